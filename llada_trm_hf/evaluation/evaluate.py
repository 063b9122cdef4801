"""Evaluation of a model on a reasoning dataset, problem by problem, in one process or several."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel

from ..data import GeneratorOptions, load_reasoning_dataset
from ..data.rows import check_prompts, fingerprint
from ..generation import MaskedDiffusionGenerationConfig
from ..hub.files import check_processes, output_dir_lock
from .code_execution import ExecutionLimits
from .language_models import load_model, make_responder
from .result_folder import EvaluationSummary, ProblemResult, ResultFolder
from .scoring import expected_answer, score_output, scoring_kind


@dataclass
class EvaluationSettings(GeneratorOptions):
    """
    What is evaluated on what; the problems are those of `load_reasoning_dataset`.

    Attributes:
        model: name or folder of a hybrid, a masked-diffusion backbone or a causal language model.
        output_dir: where results go; an interrupted evaluation there is resumed.
        dataset_name, split, data_files, columns, data_seed: the problems, with the generator options.
        prompt_format: how a problem becomes a prompt; `{prompt}` stands for it.
        generation: settings that override the model's own.
        batch_size: problems that go through the model together.
        seed: of sampling, which depends on the seed and the batch only.
        dtype, device: of the model; with several processes and `cuda`, each takes its own.
        allow_code_execution, limits: run programs the model writes, which datasets of code need; limits of each.

    Raises:
        ValueError: for settings that cannot work.
    """

    model: str
    output_dir: str
    dataset_name: str = "gsm8k"
    split: str = "test"
    data_files: str | None = None
    columns: dict[str, str] | None = None
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
    """The model and the problems of an evaluation, on the `device` of this process."""

    def __init__(self, settings: EvaluationSettings, device: Any):
        self.settings = settings
        names = ("dataset_name", "split", "data_files", "columns", "data_seed")
        self.problems, response = load_reasoning_dataset(
            *(getattr(settings, name) for name in names), **settings.generator_options()
        )
        source = settings.data_files or settings.dataset_name
        check_prompts(self.problems, source)
        for number, prompt in enumerate(self.problems["prompt"]):
            if not (prompt or "").strip():
                raise ValueError(f"{source}: the prompt of row {number} is empty.")
        self.kind = scoring_kind(self.problems.column_names, response)
        if self.kind == "code" and not settings.allow_code_execution:
            raise ValueError(
                f"The answers to {source} are programs, which have to run: say so with --allow_code_execution, "
                f"preferably in a container."
            )
        self.expected = [expected_answer(self.kind, problem, response) for problem in self.problems]
        model, tokenizer = load_model(settings.model, settings.dtype, device)
        self.responder = make_responder(model, tokenizer, settings.generation)
        texts = (settings.prompt_format.replace("{prompt}", problem) for problem in self.problems["prompt"])
        self.prompts = [self.responder.prompt(text) for text in texts]
        self.responder.check_length(max(map(len, self.prompts)))

    def batches(self) -> list[list[int]]:
        """
        The problems' indices, the longest prompts first, so that running out of memory happens at once. Batches depend
        neither on the number of processes nor on what is done already.
        """
        order = sorted(range(len(self.prompts)), key=lambda index: (-len(self.prompts[index]), index))
        size = self.settings.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def answer(self, number: int, batch: list[int]) -> list[ProblemResult]:
        """Answers and scores the problems of batch `number`."""
        torch.manual_seed(self.settings.seed * 1_000_003 + number)
        start = time.perf_counter()
        responses = self.responder.respond([self.prompts[index] for index in batch])
        seconds = (time.perf_counter() - start) / len(batch)
        results = []
        for index, response in zip(batch, responses):
            problem, expected = self.problems[index], self.expected[index]
            score = score_output(self.kind, problem, expected, response.text, self.settings.limits)
            results.append(
                ProblemResult(
                    index=index,
                    prompt=problem["prompt"],
                    answer=expected,
                    output=response.text,
                    **vars(score),
                    forward_passes=response.forward_passes,
                    tokens=response.num_tokens,
                    seconds=seconds,
                    refinement_steps=response.refinement_steps,
                )
            )
        return results

    def recorded_settings(self) -> dict[str, Any]:
        """What the results depend on."""
        settings, config = self.settings, self.responder.generation_config
        said = {name: value for name, value in config.to_diff_dict().items() if name != "transformers_version"}
        if isinstance(config, MaskedDiffusionGenerationConfig):
            del said["do_sample"]  # its temperature says so
        return {
            "model": settings.model,
            "checksum_of_weights": _checksum(self.responder.model),
            "dtype": str(self.responder.model.dtype),
            "dataset_name": settings.dataset_name,
            "split": settings.split,
            "num_problems": len(self.problems),
            "sha256_of_problems": fingerprint(self.problems),
            "prompt_format": settings.prompt_format,
            "scoring": self.kind,
            "batch_size": settings.batch_size,
            "seed": settings.seed,
            **({"limits": vars(settings.limits)} if self.kind == "code" else {}),
            "generation": {name: value for name, value in said.items() if value is not None},
        }


def run_evaluation(settings: EvaluationSettings) -> EvaluationSummary | None:
    """
    Evaluates the problems that `settings.output_dir` has no results of, and returns the summary; None in all processes
    but the first. Processes (`torchrun`, `accelerate launch`) share the batches; their number changes neither rows nor
    outputs. `problems.jsonl` grows by whole batches and is sorted in the end.

    Raises:
        ValueError, OSError: for settings that cannot work, or that differ from those of the evaluation in the folder.
        RuntimeError: if another run is writing to the folder, or processes do not know of each other.
    """
    processes = PartialState(cpu=settings.device == "cpu")
    check_processes(processes.num_processes, settings.output_dir)
    evaluation = Evaluation(settings, processes.device if settings.device == "cuda" else settings.device)
    recorded, folder = evaluation.recorded_settings(), ResultFolder(settings.output_dir)
    with output_dir_lock(settings.output_dir, ".evaluation.lock"):
        folder.check(recorded)
        processes.wait_for_everyone()
        if processes.is_main_process:
            folder.start(recorded)
        processes.wait_for_everyone()
        done = {result.index for result in folder.results()}
        missing = [(number, batch) for number, batch in enumerate(evaluation.batches()) if not done.issuperset(batch)]
        total, is_main = len(evaluation.prompts), processes.is_main_process
        with tqdm(total=total, initial=len(done), desc="Evaluating", disable=not is_main) as progress:
            for start in range(0, len(missing), processes.num_processes):
                turn = start + processes.process_index
                results = [r for number, batch in missing[turn : turn + 1] for r in evaluation.answer(number, batch)]
                gathered = [result for result in gather_object(results) if result.index not in done]
                if is_main:
                    folder.append(gathered)
                progress.update(len(gathered))
        summary = folder.finish(recorded) if is_main else None
        processes.wait_for_everyone()
    return summary


def _checksum(model: PreTrainedModel) -> int:
    """Changes when a weight does, whatever the order of summation: the weights' bits summed as integers."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = (parameter.detach().view(integers[parameter.element_size()]) for parameter in model.parameters())
    return sum(int(weight.sum(dtype=torch.int64)) for weight in bits)
