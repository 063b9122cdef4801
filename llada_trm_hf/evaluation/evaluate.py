"""Evaluation of a model on a reasoning dataset, problem by problem, in one process or several."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from ..data import load_reasoning_dataset
from ..data.rows import check_prompts, fingerprint
from ..storage import output_dir_lock
from .code_execution import ExecutionLimits
from .language_models import Responder, load_model, make_responder
from .result_folder import EvaluationSummary, ProblemResult, ResultFolder
from .scoring import ScoringKind, expected_answer, score_output, scoring_kind


@dataclass
class EvaluationSettings:
    """
    What is evaluated, and how.

    Attributes:
        model: name or folder of a hybrid, a masked-diffusion backbone or a causal language model.
        output_dir: where results go; an interrupted evaluation there goes on.
        dataset_name, split, data_files, columns, num_terms, data_seed: the problems, see `load_reasoning_dataset`.
        prompt_format: how a problem becomes a prompt; `{prompt}` stands for it.
        generation: settings that override the model's own.
        batch_size: problems that go through the model together.
        seed: of sampling; what a batch draws depends on it and the batch only.
        dtype, device: of the model; with several processes and `cuda`, each takes its own.
        allow_code_execution: run programs the model writes, which datasets of code need.
        limits: of the process each runs in.

    Raises:
        ValueError: for settings that cannot work.
    """

    model: str
    output_dir: str
    dataset_name: str = "gsm8k"
    split: str = "test"
    data_files: str | None = None
    columns: dict[str, str] | None = None
    num_terms: int = 8
    data_seed: int = 0
    prompt_format: str = "{prompt}"
    generation: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    seed: int = 0
    dtype: str = "auto"
    device: str = "cpu"
    allow_code_execution: bool = False
    limits: ExecutionLimits = field(default_factory=ExecutionLimits)

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")
        if "{prompt}" not in self.prompt_format:
            raise ValueError(f"prompt_format has to hold {{prompt}}, the problem's place; got {self.prompt_format!r}.")


class Evaluation:
    """
    Model and problems of an evaluation.

    Args:
        what: the settings.
        device: the process's own.
    """

    def __init__(self, what: EvaluationSettings, device: Any):
        self.what = what
        self.problems, self.kind, self.expected = _load_problems(what)
        model, tokenizer = load_model(what.model, what.dtype, device)
        self.responder: Responder = make_responder(model, tokenizer, what.generation)
        texts = (what.prompt_format.replace("{prompt}", problem) for problem in self.problems["prompt"])
        self.prompts = [self.responder.prompt(text) for text in texts]
        self.responder.check_length(max(map(len, self.prompts)))

    def batches(self) -> list[list[int]]:
        """
        The problems, those of similar length together and the longest first: what does not fit in memory fails at
        once. A batch is the same whatever the number of processes, and whatever is done already.
        """
        order = sorted(range(len(self.prompts)), key=lambda index: (-len(self.prompts[index]), index))
        return [order[start : start + self.what.batch_size] for start in range(0, len(order), self.what.batch_size)]

    def answer(self, number: int, batch: list[int]) -> list[ProblemResult]:
        """Answers and scores the problems of batch `number`."""
        torch.manual_seed(self.what.seed * 1_000_003 + number)
        start = time.perf_counter()
        responses = self.responder.respond([self.prompts[index] for index in batch])
        seconds = (time.perf_counter() - start) / len(batch)
        results = []
        for index, response in zip(batch, responses):
            problem, expected = self.problems[index], self.expected[index]
            score = score_output(self.kind, problem, expected, response.text, self.what.limits)
            results.append(
                ProblemResult(
                    index=index,
                    prompt=problem["prompt"],
                    answer=expected,
                    output=response.text,
                    extracted=score.extracted,
                    correct=score.correct,
                    reason=score.reason,
                    forward_passes=response.forward_passes,
                    tokens=response.num_tokens,
                    seconds=seconds,
                    refinement_steps=response.refinement_steps,
                )
            )
        return results

    def recorded_settings(self) -> dict[str, Any]:
        """What the results depend on."""
        what, config = self.what, self.responder.generation_config
        return {
            "model": what.model,
            "checksum_of_weights": _checksum(self.responder.model),
            "dtype": str(self.responder.model.dtype),
            "dataset_name": what.dataset_name,
            "split": what.split,
            "num_problems": len(self.problems),
            "sha256_of_problems": fingerprint(self.problems),
            "prompt_format": what.prompt_format,
            "scoring": self.kind,
            "batch_size": what.batch_size,
            "seed": what.seed,
            **({"limits": vars(what.limits)} if self.kind == "code" else {}),
            "generation": {k: v for k, v in config.to_diff_dict().items() if k != "transformers_version"},
        }


def run_evaluation(what: EvaluationSettings) -> EvaluationSummary | None:
    """
    Evaluates what `what.output_dir` lacks. Processes (`torchrun`, `accelerate launch`) share the batches; their
    number changes neither rows nor outputs. `problems.jsonl` grows by whole batches and is sorted in the end.

    Returns:
        The summary; None in all processes but the first.

    Raises:
        ValueError, OSError: for settings that cannot work, or that differ from those of the evaluation in the folder.
        RuntimeError: if another run is writing to the folder.
    """
    processes = PartialState(cpu=what.device == "cpu")
    evaluation = Evaluation(what, processes.device if what.device == "cuda" else what.device)
    settings, folder = evaluation.recorded_settings(), ResultFolder(what.output_dir)
    with output_dir_lock(what.output_dir, ".evaluation.lock"):
        folder.check(settings)
        processes.wait_for_everyone()
        if processes.is_main_process:
            folder.start(settings)
        processes.wait_for_everyone()
        done = {result.index for result in folder.results()}
        batches = list(enumerate(evaluation.batches()))
        missing = [(number, batch) for number, batch in batches if not done.issuperset(batch)]
        with tqdm(
            total=len(evaluation.prompts), initial=len(done), desc="Evaluating", disable=not processes.is_main_process
        ) as progress:
            for start in range(0, len(missing), processes.num_processes):
                turn = start + processes.process_index
                results = [r for number, batch in missing[turn : turn + 1] for r in evaluation.answer(number, batch)]
                gathered = [result for result in gather_object(results) if result.index not in done]
                if processes.is_main_process:
                    folder.append(gathered)
                progress.update(len(gathered))
        summary = folder.finish(settings) if processes.is_main_process else None
        processes.wait_for_everyone()
    return summary


def _load_problems(what: EvaluationSettings) -> tuple[Dataset, ScoringKind, list[str]]:
    """The problems, how they are scored, and the right answers."""
    problems, response = load_reasoning_dataset(
        what.dataset_name, what.split, what.data_files, what.columns, what.num_terms, what.data_seed
    )
    assert isinstance(problems, Dataset)
    source = what.data_files or what.dataset_name
    check_prompts(problems, source)
    kind = scoring_kind(problems.column_names, response)
    if kind == "code" and not what.allow_code_execution:
        raise ValueError(
            f"The answers to {source} are programs, which have to run: say so with --allow_code_execution, preferably "
            f"in a container."
        )
    return problems, kind, [expected_answer(kind, problem, response) for problem in problems]


def _checksum(model: PreTrainedModel) -> int:
    """Changes when a weight does, whatever the order of summation: the weights' bits summed as integers."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return sum(
        int(parameter.detach().view(integers[parameter.element_size()]).sum(dtype=torch.int64))
        for parameter in model.parameters()
    )
