"""Where benchmarks leave their figures."""

import json
import math
import platform
import statistics
from datetime import date
from pathlib import Path
from typing import Any

import torch

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided, for so many seeds


def mean_and_margin(values: list[float]) -> tuple[float, float]:
    """Over seeds: the mean, and half of its 95% interval, NaN where there are not seeds enough to say."""
    mean = statistics.fmean(values)
    if len(values) not in T_95:
        return mean, math.nan
    return mean, T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def circumstances(command: str) -> dict[str, Any]:
    """What a figure means nothing without: the command, the day, the machine."""
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    return {"command": command, "date": str(date.today()), "torch": torch.__version__, "machine": machine}


def result_file(name: str) -> Path:
    return Path(__file__).parent / "results" / f"{name}.json"


def write_result(name: str, result: dict[str, Any]) -> None:
    """Writes benchmarks/results/NAME.json."""
    result_file(name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
