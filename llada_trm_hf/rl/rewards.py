"""Rewards: whether an answer is right, and how often it is, for an order of problems from easy to hard."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.rows import fingerprint
from ..evaluation.code_execution import ExecutionLimits, sandbox_protections
from ..evaluation.scoring import ScoringKind, score_output
from ..hub.files import write_atomically

PASS_RATES_FILE = "pass_rates.json"
# Each program runs in its own process, for a tenth of a second or longer.
_PROGRAMS_AT_A_TIME = 8


def correctness_reward(
    kind: ScoringKind = "answer", limits: ExecutionLimits | None = None
) -> Callable[..., list[float]]:
    """
    A reward function for TRL's trainers: 1 for a right completion, 0 for a wrong one.

    Args:
        kind: `answer` compares the completion's answer with the column `answer`, as `extract_answer` and
            `answers_match` do; `response` compares all of it, as text; `code` runs its program with the column
            `tests`, as `run_tests`, with these `limits`.
    """

    def correctness(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        names = [name for name in ("tests", "entry_point") if name in columns]
        problems = [
            {"prompt": prompt, "answer": right, **dict(zip(names, values))}
            for prompt, right, *values in zip(prompts, answer, *(columns[name] for name in names))
        ]

        def score(problem: dict[str, str], expected: str, completion: str) -> float:
            return float(score_output(kind, problem, expected, completion, limits).correct)

        if kind != "code":
            return list(map(score, problems, answer, completions))
        sandbox_protections()  # tried once, before the threads would
        with ThreadPoolExecutor(_PROGRAMS_AT_A_TIME) as pool:
            return list(pool.map(score, problems, answer, completions))

    return correctness


@dataclass(frozen=True)
class PassRates:
    """The share of right ones among `num_samples` answers of a model to each problem, and which problems these are."""

    rates: list[float]
    num_samples: int
    sha256_of_problems: str

    def save(self, folder: str) -> None:
        """Writes `pass_rates.json`."""
        os.makedirs(folder, exist_ok=True)
        content = json.dumps(asdict(self))
        write_atomically(os.path.join(folder, PASS_RATES_FILE), lambda path: Path(path).write_text(content))

    @classmethod
    def load(cls, folder: str, problems: Dataset) -> "PassRates":
        """
        The pass rates of the first of `problems` that the run in `folder` measured.

        Raises:
            ValueError: if there are none, or they belong to other problems.
        """
        path = os.path.join(folder, PASS_RATES_FILE)
        if not os.path.isfile(path):
            raise ValueError(f"There is no {path}: the run had no curriculum. Resume without one.")
        saved = cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        count = len(saved.rates)
        if count > len(problems) or fingerprint(problems.select(range(count))) != saved.sha256_of_problems:
            raise ValueError(f"{path} is about other problems: resume with those of the run, and its seed.")
        return saved

    def easy_to_hard(self, problems: Dataset, drop_uninformative: bool) -> Dataset:
        """The measured problems by falling rate; those with equal rates keep their order."""
        order = sorted(range(len(self.rates)), key=lambda i: -self.rates[i])
        return problems.select([i for i in order if not drop_uninformative or 0 < self.rates[i] < 1])

    def __str__(self) -> str:
        never, always = self.rates.count(0.0), self.rates.count(1.0)
        return (
            f"pass rate {100 * sum(self.rates) / len(self.rates):.1f}% over {self.num_samples} samples of "
            f"{len(self.rates)} problems: {always} always solved, {never} never"
        )
