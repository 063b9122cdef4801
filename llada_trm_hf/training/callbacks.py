"""Metrics as CSV files in the output folder."""

import csv
import os
from pathlib import Path
from typing import Any

from torch.profiler import profile, schedule
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


SKIPPED_STEPS = 2  # before the recorded ones: one is left out, in the next the profiler itself warms up


class ProfilerCallback(TrainerCallback):
    """
    Records `num_steps` optimizer steps of the first process and writes `profile.txt` (the operations that take most
    time) and `profile.json` (for chrome://tracing or ui.perfetto.dev) to the output folder.

    The Trainer has no such callback, and accelerate's `profile()` is a context manager around the same
    `torch.profiler`: it counts no optimizer steps and writes no table.
    """

    def __init__(self, num_steps: int):
        self.num_steps = num_steps
        self._profiler: profile | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """
        Raises:
            ValueError: if the run is too short.
        """
        needed, left = SKIPPED_STEPS + self.num_steps, state.max_steps - state.global_step
        if left < needed:
            raise ValueError(
                f"profile_steps={self.num_steps} needs {needed} training steps, {SKIPPED_STEPS} of them before it "
                f"records; this run has {left}."
            )
        if state.is_world_process_zero:
            self._profiler = profile(
                schedule=schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=self.num_steps, repeat=1),
                on_trace_ready=lambda profiler: self._write(profiler, Path(args.output_dir)),
            )
            self._profiler.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self._profiler is not None:
            self._profiler.step()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, profiler: profile, folder: Path) -> None:
        os.makedirs(folder, exist_ok=True)
        events = profiler.key_averages()
        device = "device" if any(event.self_device_time_total for event in events) else "cpu"
        table = events.table(sort_by=f"self_{device}_time_total", row_limit=40, max_name_column_width=60)
        title = f"{self.num_steps} training steps, sorted by the operations' own time on the {device}"
        (folder / "profile.txt").write_text(f"{title}\n\n{table}\n", encoding="utf-8")
        profiler.export_chrome_trace(str(folder / "profile.json"))
