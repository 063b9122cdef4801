"""Evaluations of the same problems side by side: their differences, and whether those could be chance."""

import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from .result_folder import PROBLEMS_FILE, EvaluationSummary, ProblemResult, ResultFolder
from .scoring import wilson_interval


@dataclass(frozen=True)
class PairedDifference:
    """Two models on the same problems: how many of these both, one or neither of them got right."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def total(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def value(self) -> float:
        """Accuracy of the second less that of the first."""
        return (self.only_second - self.only_first) / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """
        The 95% interval for paired proportions of Newcombe (1998, Statistics in Medicine 17, 2635, method 10), which
        scipy and statsmodels do not have.
        """
        first, second = self.both + self.only_first, self.both + self.only_second
        p, q, n = second / self.total, first / self.total, self.total
        (low_p, high_p), (low_q, high_q) = wilson_interval(second, n), wilson_interval(first, n)
        # The phi coefficient, with Newcombe's correction for continuity where it is positive.
        product: float = self.both * self.neither - self.only_first * self.only_second
        if product > 0:
            product = max(product - n / 2, 0)
        margins = first * (n - first) * second * (n - second)
        correlation = product / math.sqrt(margins) if margins else 0.0

        def width(a: float, b: float) -> float:
            return math.sqrt(max(a * a - 2 * correlation * a * b + b * b, 0.0))

        return self.value - width(p - low_p, high_q - q), self.value + width(high_p - p, q - low_q)

    @property
    def p_value(self) -> float:
        """McNemar's exact test: both models equally often right where only one is. Two-sided."""
        from scipy.stats import binomtest

        discordant = self.only_first + self.only_second
        return float(binomtest(self.only_first, discordant).pvalue) if discordant else 1.0

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


@dataclass(frozen=True)
class ComparedResult:
    """One of several evaluations: its name, its summary on the common problems, and its difference to the first."""

    name: str
    summary: EvaluationSummary
    difference: PairedDifference | None


@dataclass(frozen=True)
class Comparison:
    """
    Evaluations, the first of which the others are compared with: the number of problems they share, and that of each.
    """

    results: list[ComparedResult]
    num_common: int
    num_each: list[int]

    def table(self) -> str:
        """For people: a line for each result."""
        lines = [["", "accuracy (95%)", "difference (95%)", "only first : only this", "p", "passes", "tokens/s"]]
        for result in self.results:
            summary, paired = result.summary, result.difference
            compared = ["", "", ""]
            if paired is not None:
                compared = [str(paired), f"{paired.only_first} : {paired.only_second}", f"{paired.p_value:.2g}"]
            numbers = [f"{summary.forward_passes:.1f}", f"{summary.tokens_per_second:.1f}"]
            lines.append([result.name, str(summary.accuracy), *compared, *numbers])
        widths = [max(map(len, column)) for column in zip(*lines)]
        rows = ["  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) for cells in lines]
        note = f"{self.num_common} problems"
        if set(self.num_each) != {self.num_common}:
            note += f" common to all, of {', '.join(map(str, self.num_each))}"
        return "\n".join([*rows, f"\n{note}; p: McNemar's exact test against {self.results[0].name}"])

    def to_dict(self) -> dict[str, Any]:
        rows = []
        for result in self.results:
            row: dict[str, Any] = {"name": result.name, **result.summary.to_dict()}
            if (paired := result.difference) is not None:
                row |= {"difference": paired.value, "difference_interval_95": list(paired.interval)}
                row |= {"p_value": paired.p_value, **vars(paired)}
            rows.append(row)
        return {"problems": self.num_common, "problems_of_each": self.num_each, "results": rows}

    def plot(self, path: str) -> None:
        """Draws accuracies and differences, with their intervals and numbers, to an image file."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 2.2 + 0.8 * len(self.results)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for row, result in enumerate(self.results):
            _draw_estimate(left, row, result.summary.accuracy, "%")
            _draw_estimate(right, row, result.difference, "")
        names = [_shortened(result.name) for result in self.results]
        left.set_yticks(range(len(names)), names)
        for label in left.get_yticklabels():
            label.set_parse_math(False)
        left.set_ylim(len(names) - 0.4, -0.7)
        left.set(title="Accuracy", xlabel="problems answered right (%)")
        right.axvline(0, color="grey", linewidth=1)
        right.text(0, 0, "reference", ha="center", va="center", color="grey", backgroundcolor="white")
        right.set_xlabel("percentage points (to the right of 0: better)")
        right.set_title(f"Difference from {names[0]}", parse_math=False)
        for axes in (left, right):
            axes.grid(axis="x", alpha=0.3)
            axes.margins(x=0.25)
        figure.suptitle(f"{self.num_common} problems; points with their 95% intervals", fontweight="bold")
        figure.savefig(path, dpi=150)


def _draw_estimate(axes: Any, row: int, share: Any, unit: str) -> None:
    """A point with its interval in a row, and the numbers above it; nothing for None."""
    if share is None:
        return
    low, value, high = (100 * number for number in (share.interval[0], share.value, share.interval[1]))
    axes.errorbar(value, row, xerr=[[value - low], [high - value]], fmt="o", capsize=4, color="C0", markersize=7)
    sign = "" if unit else "+"
    numbers = f"{value:{sign}.1f}{unit}  ({low:{sign}.1f} to {high:{sign}.1f})"
    axes.annotate(numbers, (value, row), (0, 9), textcoords="offset points", ha="center", va="bottom")


def _shortened(name: str, longest: int = 36) -> str:
    """A name that leaves room for the drawing; paths differ at their ends."""
    return name if len(name) <= longest else f"…{name[-longest + 1 :]}"


def compare_results(paths: list[str], common_only: bool = False) -> Comparison:
    """
    Compares evaluations (their folders, or `problems.jsonl` in these) with the first of them, problem by problem; with
    `common_only`, where the problems differ, on those that all have.

    Raises:
        FileNotFoundError, ValueError: for fewer than two, a path without results, or different problems.
    """
    if len(paths) < 2:
        raise ValueError("A comparison needs at least two results.")
    results = [_read(path) for path in paths]
    names = _names(paths)
    common = set(results[0]).intersection(*results[1:])
    if not common:
        raise ValueError("The results have no problem in common.")
    num_each = [len(result) for result in results]
    if set(num_each) != {len(common)} and not common_only:
        counts = ", ".join(f"{name} {number}" for name, number in zip(names, num_each))
        raise ValueError(
            f"The results are not of the same problems: {counts}, {len(common)} in common. Compare those with "
            f"--common_only."
        )
    keys = sorted(common)
    first, *others = [[result[key] for key in keys] for result in results]
    compared = [ComparedResult(names[0], EvaluationSummary.of(first), None)]
    for name, other in zip(names[1:], others):
        pairs = Counter((a.correct, b.correct) for a, b in zip(first, other))
        difference = PairedDifference(pairs[True, True], pairs[True, False], pairs[False, True], pairs[False, False])
        compared.append(ComparedResult(name, EvaluationSummary.of(other), difference))
    return Comparison(compared, len(common), num_each)


def _read(path: str) -> dict[tuple[str, str, int], ProblemResult]:
    """The results by prompt, answer, and how many of the same stood before."""
    folder = os.path.dirname(path) if os.path.basename(path) == PROBLEMS_FILE else path
    if not os.path.isfile(os.path.join(folder, PROBLEMS_FILE)):
        raise FileNotFoundError(f"There is no {PROBLEMS_FILE} in {folder or '.'}: llada-trm evaluate writes one.")
    results = ResultFolder(folder).results()
    if not results:
        raise ValueError(f"{path} holds no results.")
    seen: Counter[tuple[str, str]] = Counter()
    keyed = {}
    for result in sorted(results, key=lambda result: result.index):
        problem = (result.prompt, result.answer)
        keyed[(*problem, seen[problem])] = result
        seen[problem] += 1
    return keyed


def _names(paths: list[str]) -> list[str]:
    """The folders' own names where these are different, else the whole paths."""
    folders = [path.removesuffix(PROBLEMS_FILE).rstrip("/") or "." for path in paths]
    names = [os.path.basename(folder) for folder in folders]
    return names if len(set(names)) == len(names) else folders
