"""Whether an output answers a problem."""

import ast
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..data import checking_program
from .answer_extraction import extract_answer
from .answer_values import answers_match
from .code_execution import ExecutionLimits, run_program

ScoringKind = Literal["answer", "response", "code"]


@dataclass(frozen=True)
class Score:
    """The answer found in an output, whether it is right, and for code why it is not."""

    extracted: str | None
    correct: bool
    reason: str = ""


def scoring_kind(columns: list[str], response: str) -> ScoringKind:
    """
    How the outputs for a dataset are scored: `code` where it has tests; `response`, all of it, where `response`, the
    format of its responses, joins reasoning and answer without anything between (a model that wrote its reasoning as a
    thought, or none, is to write the answer alone); else `answer`.
    """
    if "tests" in columns:
        return "code"
    return "response" if "{reasoning}{answer}" in response else "answer"


def expected_answer(kind: ScoringKind, problem: Mapping[str, Any], response: str) -> str:
    """What an output is compared with; for code, where tests decide, a solution."""
    if kind == "response":
        return response.format(reasoning=problem["reasoning"], answer=problem["answer"]).strip()
    return problem["answer"]


def score_output(
    kind: ScoringKind, problem: Mapping[str, Any], expected: str, output: str, limits: ExecutionLimits | None = None
) -> Score:
    """
    Scores one output.

    Args:
        kind: of `scoring_kind`.
        problem: a row of `load_reasoning_dataset`; for code its `tests` run, with the program in `output`.
        expected: of `expected_answer`.
        output: of the model.
        limits: of the process that runs code.
    """
    if kind == "code":
        code = extract_code(output, problem["prompt"], problem.get("entry_point") or "")
        result = run_program(checking_program(code, problem["tests"]), limits)
        return Score(code, result.passed, result.reason)
    if kind == "response":
        written = output.rpartition("</think>")[2].strip()
        return Score(written or None, written in (expected, problem["answer"]))
    found = extract_answer(output)
    return Score(found, answers_match(found, expected))


def extract_code(output: str, prompt: str = "", entry_point: str = "") -> str:
    """
    The program in an output: the last fenced block that defines `entry_point`, else the last one, else all of it up to
    where it stops being Python. If the prompt is the head of the function `entry_point`, the output may be its body,
    and what stands before the function in the prompt belongs to the program in any case.
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
    whole = (end for end in range(len(lines), 0, -1) if _is_python("".join(lines[:end])))
    return "".join(lines[: next(whole, len(lines))])


def _is_python(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of "\d" in a string
            ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True
