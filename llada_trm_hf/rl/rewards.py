"""Rewards: whether an answer is right."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from ..evaluation.code_execution import ExecutionLimits
from ..evaluation.scoring import score_output

# Each program runs in its own process, for a tenth of a second or longer.
_PROGRAMS_AT_A_TIME = 8


def correctness_reward(
    kind: Literal["answer", "code"] = "answer", limits: ExecutionLimits | None = None
) -> Callable[..., list[float]]:
    """
    A reward function for TRL's trainers: 1 for a right completion, 0 for a wrong one.

    Args:
        kind: `answer` compares the completion's answer with the column `answer`, as `extract_answer` and
            `answers_match` do; `code` runs its program with the column `tests` in a limited process.
        limits: of that process.
    """

    def correctness(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        names = [name for name in ("tests", "entry_point") if name in columns]
        problems = [
            {"prompt": prompt, **dict(zip(names, values))}
            for prompt, *values in zip(prompts, *(columns[name] for name in names))
        ]

        def score(problem: dict[str, str], expected: str, completion: str) -> float:
            return float(score_output(kind, problem, expected, completion, limits).correct)

        if kind == "answer":
            return list(map(score, problems, answer, completions))
        with ThreadPoolExecutor(_PROGRAMS_AT_A_TIME) as pool:
            return list(pool.map(score, problems, answer, completions))

    return correctness
