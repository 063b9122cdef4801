"""Problems from easy to hard, by the model's own pass rate."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import Dataset

from ..data.rows import fingerprint
from ..hub.files import write_atomically

PASS_RATES_FILE = "pass_rates.json"


@dataclass(frozen=True)
class PassRates:
    """
    How often a model solved each problem.

    Attributes:
        rates: the share of right samples of each problem.
        num_samples: samples per problem.
        sha256_of_problems: fingerprint of the problems.
    """

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
        Reads the pass rates of the run in `folder`, which are those of the first of `problems`.

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
        if drop_uninformative:
            order = [i for i in order if 0 < self.rates[i] < 1]
        return problems.select(order)

    def __str__(self) -> str:
        never, always = self.rates.count(0.0), self.rates.count(1.0)
        return (
            f"pass rate {100 * sum(self.rates) / len(self.rates):.1f}% over {self.num_samples} samples of "
            f"{len(self.rates)} problems: {always} always solved, {never} never"
        )
