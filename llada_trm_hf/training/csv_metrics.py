"""Metrics as CSV files in the output folder."""

import csv
import os
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class CSVMetricsCallback(TrainerCallback):
    """
    Writes `training_metrics.csv` and `validation_metrics.csv`, one row per log. A resumed run rebuilds both from the
    log history in its checkpoint before it adds to them.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.is_world_process_zero:
            os.makedirs(args.output_dir, exist_ok=True)
            for name in ("training_metrics.csv", "validation_metrics.csv"):
                self._rewrite(os.path.join(args.output_dir, name), state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Adds the newest log to its file; a log with a new column writes the file anew."""
        if not state.is_world_process_zero or not state.log_history:
            return
        row = state.log_history[-1]
        name = _csv_name(row)
        if name is None:
            return
        os.makedirs(args.output_dir, exist_ok=True)
        path = os.path.join(args.output_dir, name)
        columns: list[str] = []
        if os.path.exists(path):
            with open(path, newline="", encoding="utf-8") as file:
                columns = next(csv.reader(file), [])
        if not columns or any(column not in columns for column in row):
            self._rewrite(path, state)
            return
        with open(path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns).writerow(row)

    def _rewrite(self, path: str, state: TrainerState) -> None:
        """Writes all rows of the log history that belong in the file; removes the file if there are none."""
        rows = [row for row in state.log_history if _csv_name(row) == os.path.basename(path)]
        if not rows:
            if os.path.exists(path):
                os.remove(path)
            return
        columns = list(dict.fromkeys(["step", "epoch", *(column for row in rows for column in row)]))
        with open(path + ".tmp", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(path + ".tmp", path)


def _csv_name(row: dict[str, Any]) -> str | None:
    if "loss" in row:
        return "training_metrics.csv"
    return "validation_metrics.csv" if "eval_loss" in row else None
