"""`llada-trm evaluate`, `llada-trm compare` and `llada-trm lm-eval`."""

import json
import sys

from .command import (
    CommandParser,
    add_problem_options,
    check_output_dir,
    check_output_file,
    finish_distributed,
    options_for,
    prepare,
)
from .generation import add_generation_flags, generation_settings


def run_evaluate(arguments: list[str]) -> None:
    """What a model gets right. Also what `torchrun` and `accelerate launch` run."""
    parser = CommandParser(
        prog="llada-trm evaluate",
        description="Accuracy of a hybrid, a masked-diffusion model or a causal language model on a dataset, with a "
        "95% interval and a line for every problem. Started again, an interrupted evaluation goes on.",
    )
    parser.add_argument("--model", "--checkpoint", required=True, help="folder or repository")
    add_problem_options(parser, split="test")
    parser.add_argument("--data_seed", type=int, default=0, help="of generated problems")
    parser.add_argument("--prompt_format", default="{prompt}", help="e.g. '{prompt} Think step by step.'")
    parser.add_argument("--no_thinking", action="store_true", help="tell a causal model's chat template so")
    parser.add_argument("--output_dir", default="outputs/evaluation", help="for problems.jsonl and summary.json")
    parser.add_argument("--allow_code_execution", action="store_true", help="run programs the model writes")
    parser.add_argument("--code_seconds", type=float, default=10.0, help="time limit of such a program")
    parser.add_argument("--code_memory", type=int, default=1024, help="memory limit of such a program, in MB")
    add_generation_flags(parser)
    parser.add_argument("--batch_size", type=int, default=8, help="problems at a time")
    options = parser.parse(arguments)
    from ..data.reasoning import column_mapping
    from ..evaluation.code_execution import ExecutionLimits
    from ..evaluation.evaluate import EvaluationSettings, run_evaluation

    check_output_dir(options.output_dir)
    generation = generation_settings(options)  # and checks the options
    settings = options_for(EvaluationSettings, options)
    settings["columns"] = column_mapping(options.columns)
    settings["generation"] = generation
    if options.no_thinking:
        settings["generation"]["enable_thinking"] = False
    settings["limits"] = ExecutionLimits(options.code_seconds, options.code_memory)
    summary = run_evaluation(EvaluationSettings(**settings))
    if summary is not None:  # it is None in all processes but the first
        print(f"{summary}\nEvery problem, and the summary, are in {options.output_dir}")
    finish_distributed()


def run_compare(arguments: list[str]) -> None:
    """Evaluations of the same problems side by side."""
    parser = CommandParser(
        prog="llada-trm compare",
        description="Compares evaluations with the first one, problem by problem: the difference in accuracy with its "
        "95% interval, and McNemar's exact test.",
    )
    parser.add_argument("results", nargs="+", metavar="RESULT", help="a folder that llada-trm evaluate wrote")
    parser.add_argument("--common_only", action="store_true", help="of different problems, compare those all have")
    parser.add_argument("--plot", help="draw accuracies and differences to this .png file")
    parser.add_argument("--output_file", help="write all numbers to this .json file")
    options = parser.parse(arguments)
    check_output_file(options.plot, ".png")
    check_output_file(options.output_file, ".json")
    from ..evaluation.comparison import compare_results
    from ..hub.files import write_atomically, write_text

    comparison = compare_results(options.results, options.common_only)
    print(comparison.table())
    if options.plot:
        write_atomically(options.plot, comparison.plot)
    if options.output_file:
        write_text(options.output_file, json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False))


def run_lm_eval(arguments: list[str]) -> None:
    """The command of lm-evaluation-harness, with the models of this package registered."""
    prepare()
    from lm_eval.__main__ import cli_evaluate

    from ..evaluation import harness  # noqa: F401  (registers the models)

    sys.argv = ["llada-trm lm-eval", *arguments]
    cli_evaluate()
