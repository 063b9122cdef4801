"""Whether outputs answer their problems, and how many of them do, with a confidence interval."""

import ast
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from .answer_extraction import extract_answer
from .answer_values import answers_match
from .code_execution import ExecutionLimits, run_tests

ScoringKind = Literal["answer", "response", "code"]


@dataclass(frozen=True)
class Score:
    """The answer found in an output, whether it is right, and for code why it is not."""

    extracted: str | None
    correct: bool
    reason: str = ""


def scoring_kind(columns: list[str], response: str) -> ScoringKind:
    """
    How the outputs for a dataset are scored: `code` where it has tests; `response`, all of it and as text, where its
    format of responses is the answer only, or joins reasoning and answer without anything between (after a thought, or
    without reasoning, the answer alone is right too); else `answer`.
    """
    if "tests" in columns:
        return "code"
    return "response" if response in ("{answer}", "{reasoning}{answer}") else "answer"


def expected_answer(kind: ScoringKind, problem: Mapping[str, Any], response: str) -> str:
    """What an output is compared with; for code, where tests decide, a solution."""
    if kind == "response":
        return response.format(reasoning=problem["reasoning"], answer=problem["answer"]).strip()
    return problem["answer"]


def score_output(
    kind: ScoringKind, problem: Mapping[str, Any], expected: str, output: str, limits: ExecutionLimits | None = None
) -> Score:
    """
    Scores the `output` of a model for `problem`, a row of `load_reasoning_dataset`, against its `expected_answer`. Of
    code, the `tests` of the problem decide, which run in processes with `limits`.
    """
    if kind == "code":
        entry_point = problem.get("entry_point") or ""
        code = extract_code(output, problem["prompt"], entry_point)
        result = run_tests(code, problem["tests"], entry_point, limits)
        return Score(code, result.passed, result.reason)
    if kind == "response":
        written = output.rpartition("</think>")[2].strip()
        return Score(written or None, written in (expected, problem["answer"]))
    found = extract_answer(output)
    return Score(found, answers_match(found, expected))


def extract_code(output: str, prompt: str = "", entry_point: str = "") -> str:
    """
    The program in an output, up to where it stops being Python: the last fenced block that defines `entry_point`, else
    the last one, else all of it. Where the prompt holds the head of the function `entry_point`, the output may be its
    body, and what stands before the function in the prompt belongs to the program in any case.
    """
    output = output.rpartition("</think>")[2]
    definition = re.compile(rf"^[ \t]*def[ \t]+{re.escape(entry_point)}\b", re.MULTILINE) if entry_point else None
    blocks = re.findall(r"```[^\n`]*\n(.*?)(?:```|\Z)", output, re.DOTALL)
    defining = [block for block in blocks if definition and definition.search(block)]
    code = (defining or blocks or [output])[-1]
    head = definition.search(prompt) if definition else None
    if head and definition:
        whole = definition.search(code) is not None
        code = f"{prompt[: head.start()] if whole else prompt}{code}"
    return _python_part(code)


def _python_part(code: str) -> str:
    """The lines of `code` up to the last that leaves it valid Python; all of them if there are none."""
    lines = code.splitlines(keepends=True)
    beginnings = ("".join(lines[:end]) for end in range(len(lines), 0, -1))
    return next(filter(_is_python, beginnings), code)


def _is_python(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of "\d" in a string
            ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95% interval of Wilson (1927) for a share of `total`, which holds near 0 and 1 too."""
    from scipy.stats import binomtest  # here, since it takes a second, which `generate` need not wait for

    interval = binomtest(correct, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


@dataclass
class Accuracy:
    """`correct` of `total` problems, its 95% interval, and the forward passes per batch."""

    correct: int
    total: int
    forward_passes: float = math.nan

    @property
    def value(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.correct, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f}% ({100 * low:.1f} to {100 * high:.1f})"


def exact_match_accuracy(
    model: PreTrainedModel, samples: Dataset, batch_size: int = 250, **generation_settings: Any
) -> Accuracy:
    """
    How many responses `model` generates token for token, reasoning included, with `generation_settings` of `generate`.
    The samples, of `tokenize_reasoning`, must have prompts of one length and responses of one length (else a
    ValueError is raised), so that neither padding nor the end of a response has to be guessed.
    """
    lengths = {(sample["prompt_length"], len(sample["input_ids"])) for sample in samples}
    if len(lengths) != 1:
        raise ValueError(f"Exact match needs samples of one length, got {len(lengths)} different ones.")
    ((prompt_length, length),) = lengths
    correct, passes = 0, []
    tokens = torch.tensor([sample["input_ids"] for sample in samples], device=model.device)  # [N, L]
    for expected in tokens.split(batch_size):
        output = model.generate(
            expected[:, :prompt_length],
            max_new_tokens=length - prompt_length,
            return_dict_in_generate=True,
            **generation_settings,
        )
        correct += int((output.sequences == expected).all(-1).sum())
        passes.append(output.num_forward_passes)
    return Accuracy(correct, len(samples), sum(passes) / len(passes))
