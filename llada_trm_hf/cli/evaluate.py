"""`llada-trm evaluate`: what a model gets right. Also what `torchrun` and `accelerate launch` run."""

from ..data.reasoning import column_mapping
from ..evaluation.code_execution import ExecutionLimits
from ..evaluation.evaluate import EvaluationSettings, run_evaluation
from .generation_flags import add_generation_flags, generation_settings
from .parser import CommandParser
from .processes import part


def run(arguments: list[str]) -> None:
    options = _parser().parse_args(arguments)
    if options.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {options.batch_size}.")
    summary = run_evaluation(
        EvaluationSettings(
            model=options.model,
            output_dir=options.output_dir,
            dataset_name=options.dataset_name,
            split=options.split,
            data_files=options.data_files,
            columns=column_mapping(options.columns),
            num_terms=options.num_terms,
            data_seed=options.data_seed,
            prompt_format=options.prompt_format,
            generation=generation_settings(options) | ({"enable_thinking": False} if options.no_thinking else {}),
            batch_size=options.batch_size,
            seed=options.seed,
            dtype=options.dtype,
            device=options.device,
            allow_code_execution=options.allow_code_execution,
            limits=ExecutionLimits(options.code_seconds, options.code_memory),
        )
    )
    if summary is not None:  # the first process of several speaks for all
        print(f"{summary}\nEvery problem, and the summary, are in {options.output_dir}")
    part()


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="llada-trm evaluate",
        description="Accuracy of a hybrid, a masked-diffusion model or a causal language model on a dataset, with a "
        "95% interval and a line for every problem. Started again, an interrupted evaluation goes on.",
    )
    parser.add_argument("--model", "--checkpoint", required=True, help="folder or repository")
    parser.add_argument(
        "--dataset_name", default="gsm8k", help="gsm8k, math, humaneval, arithmetic, ..., or a file of problems"
    )
    parser.add_argument("--split", default="test", help="split or slice, e.g. test[:200]")
    parser.add_argument("--data_files", help="a local file to read instead of the Hub's, in the dataset's format")
    parser.add_argument("--columns", nargs="+", default=[], help="columns of a local file, e.g. prompt=question")
    parser.add_argument("--num_terms", type=int, default=8, help="difficulty of generated arithmetic")
    parser.add_argument("--data_seed", type=int, default=0, help="of generated arithmetic")
    parser.add_argument("--prompt_format", default="{prompt}", help="e.g. '{prompt} Think step by step.'")
    parser.add_argument(
        "--no_thinking", action="store_true", help="tell the chat template of a causal language model not to think"
    )
    parser.add_argument("--output_dir", default="outputs/evaluation", help="for problems.jsonl and summary.json")
    parser.add_argument("--allow_code_execution", action="store_true", help="run programs the model writes")
    parser.add_argument("--code_seconds", type=float, default=10.0, help="time limit of such a program")
    parser.add_argument("--code_memory", type=int, default=1024, help="memory limit of such a program, in MB")
    add_generation_flags(parser)
    parser.add_argument("--batch_size", type=int, default=8, help="problems at a time")
    return parser
