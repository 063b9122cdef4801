"""The files of an evaluation: its settings, a line for each problem, and the summary."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hub.files import write_atomically, writing
from ..hub.training_record import read_json
from .scoring import Accuracy

SETTINGS_FILE, PROBLEMS_FILE, SUMMARY_FILE = "settings.json", "problems.jsonl", "summary.json"


@dataclass(frozen=True)
class ProblemResult:
    """
    One line of `problems.jsonl`.

    Attributes:
        index: the problem's number in the split.
        prompt, answer: the problem and its right answer.
        output: what the model wrote.
        extracted: the answer in it, for code the program; None if there is none.
        correct, reason: whether it is right, and for code why it is not.
        forward_passes: number of function evaluations (NFE) of the model.
        tokens: of the output, with its end-of-sequence token.
        seconds, refinement_steps: of generation, and chunk updates of a hybrid: those of its batch, divided among the
            problems in it.
    """

    index: int
    prompt: str
    answer: str
    output: str
    extracted: str | None
    correct: bool
    reason: str
    forward_passes: int
    tokens: int
    seconds: float
    refinement_steps: float | None

    @property
    def line(self) -> str:
        return json.dumps(vars(self), ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class EvaluationSummary:
    """The figures of an evaluation: means per problem, but `tokens_per_second`, which is that of one process."""

    accuracy: Accuracy
    forward_passes: float
    tokens: float
    tokens_per_second: float
    refinement_steps: float | None

    @classmethod
    def of(cls, results: list[ProblemResult]) -> "EvaluationSummary":
        total = len(results)
        tokens, seconds = sum(result.tokens for result in results), sum(result.seconds for result in results)
        updates = [result.refinement_steps for result in results if result.refinement_steps is not None]
        return cls(
            Accuracy(sum(result.correct for result in results), total),
            forward_passes=sum(result.forward_passes for result in results) / total,
            tokens=tokens / total,
            tokens_per_second=tokens / seconds if seconds else 0.0,
            refinement_steps=sum(updates) / total if updates else None,
        )

    def __str__(self) -> str:
        updates = f", {self.refinement_steps:.1f} refinement steps" if self.refinement_steps is not None else ""
        return (
            f"{self.accuracy.correct} of {self.accuracy.total} right: {self.accuracy}\n"
            f"per problem {self.forward_passes:.1f} forward passes{updates}, {self.tokens:.1f} tokens; "
            f"{self.tokens_per_second:.1f} tokens per second and process"
        )

    def to_dict(self) -> dict[str, Any]:
        numbers = {name: value for name, value in vars(self).items() if name != "accuracy"}
        counts = {"correct": self.accuracy.correct, "total": self.accuracy.total}
        return {"accuracy": self.accuracy.value, "interval_95": list(self.accuracy.interval), **counts, **numbers}


class ResultFolder:
    """The folder of an evaluation. Lines are appended as problems are answered, and sorted when all are."""

    def __init__(self, path: str):
        self.path = path
        self.problems_file = os.path.join(path, PROBLEMS_FILE)

    def check(self, settings: dict[str, Any]) -> None:
        """Raises ValueError if the folder holds an evaluation with other settings, naming the first that differs."""
        recorded = read_json(os.path.join(self.path, SETTINGS_FILE))
        if not recorded:
            if os.path.exists(self.problems_file):
                raise ValueError(f"{self.path} holds {PROBLEMS_FILE} but no {SETTINGS_FILE}: choose another folder.")
            return
        for name in {**recorded, **settings}:
            old, new = recorded.get(name), settings.get(name)
            if old != new:
                raise ValueError(
                    f"{self.path} was made with {name}={old!r}, now it is {new!r}. Give the old value to resume, "
                    f"or choose another --output_dir."
                )

    def start(self, settings: dict[str, Any]) -> None:
        """Records the settings, and removes what an interrupted run left of a line."""
        self._write_json(SETTINGS_FILE, settings)
        if os.path.exists(self.problems_file):
            self._write_results(self.results())

    def results(self) -> list[ProblemResult]:
        """The recorded results, without a last line that was cut short; ValueError for any other damaged line."""
        if not os.path.exists(self.problems_file):
            return []
        # What follows the last line break was not finished.
        lines = Path(self.problems_file).read_text(encoding="utf-8").split("\n")[:-1]
        results = []
        for number, line in enumerate(lines, start=1):
            try:
                results.append(ProblemResult(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self.problems_file}, line {number}, is damaged: {error}") from error
        return results

    def append(self, results: list[ProblemResult]) -> None:
        with writing(self.problems_file), open(self.problems_file, "a", encoding="utf-8") as file:
            file.writelines(result.line for result in results)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, settings: dict[str, Any]) -> EvaluationSummary:
        """Sorts the lines and writes the summary."""
        results = sorted(self.results(), key=lambda result: result.index)
        self._write_results(results)
        summary = EvaluationSummary.of(results)
        self._write_json(SUMMARY_FILE, {**summary.to_dict(), "settings": settings})
        return summary

    def _write_results(self, results: list[ProblemResult]) -> None:
        self._write(PROBLEMS_FILE, "".join(result.line for result in results))

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        self._write(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        path = os.path.join(self.path, name)
        write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
