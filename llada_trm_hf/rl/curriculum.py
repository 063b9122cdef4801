"""Problems from easy to hard, by how often the model itself solves them."""

import json
import os
from dataclasses import asdict, dataclass

from datasets import Dataset

from ..data.rows import fingerprint
from ..storage import write_atomically

PASS_RATES_FILE = "pass_rates.json"


@dataclass(frozen=True)
class PassRates:
    """
    How often a model solved each problem.

    Attributes:
        rates: share of right samples, for each problem.
        num_samples: of a problem.
        sha256_of_problems: of those that were measured.
    """

    rates: list[float]
    num_samples: int
    sha256_of_problems: str

    def save(self, folder: str) -> None:
        """Writes `pass_rates.json`."""

        def write(path: str) -> None:
            with open(path, "w", encoding="utf-8") as file:
                json.dump(asdict(self), file)

        os.makedirs(folder, exist_ok=True)
        write_atomically(os.path.join(folder, PASS_RATES_FILE), write)

    @classmethod
    def load(cls, folder: str, problems: Dataset) -> "PassRates":
        """
        Those of the run in `folder`, for the first of `problems`.

        Raises:
            ValueError: if they were measured on other problems, or not at all.
        """
        path = os.path.join(folder, PASS_RATES_FILE)
        if not os.path.isfile(path):
            raise ValueError(f"There is no {path}: the run had no curriculum. Go on without one.")
        with open(path, encoding="utf-8") as file:
            found = cls(**json.load(file))
        count = len(found.rates)
        if count > len(problems) or fingerprint(problems.select(range(count))) != found.sha256_of_problems:
            raise ValueError(f"{path} is about other problems: go on with those of the run, and its seed.")
        return found

    def easy_to_hard(self, problems: Dataset, drop_uninformative: bool) -> Dataset:
        """The problems that were measured, those with the highest rate first and equal ones in the order they have."""
        order = sorted(range(len(self.rates)), key=lambda i: -self.rates[i])
        if drop_uninformative:
            order = [i for i in order if 0 < self.rates[i] < 1]
        return problems.select(order)

    def __str__(self) -> str:
        never, always = self.rates.count(0.0), self.rates.count(1.0)
        return (
            f"pass rate {100 * sum(self.rates) / len(self.rates):.1f}% over {self.num_samples} samples of "
            f"{len(self.rates)} problems: {always} always solved, {never} never"
        )
