"""Callbacks that write to the output folder: metrics as CSV files, and a profile."""

import csv
import io
import os
from pathlib import Path
from typing import Any

from torch.profiler import profile, schedule
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..hub.files import write_text

TRAINING_METRICS_FILE = "training_metrics.csv"
VALIDATION_METRICS_FILE = "validation_metrics.csv"
SKIPPED_STEPS = 2  # before those in the profile: one is left out, in the next the profiler itself warms up


class CSVMetricsCallback(TrainerCallback):
    """
    Writes `training_metrics.csv` and `validation_metrics.csv`, one row per log. A resumed run rebuilds both from the
    log history in its checkpoint before it adds to them.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.is_world_process_zero:
            for name in (TRAINING_METRICS_FILE, VALIDATION_METRICS_FILE):
                _write_history(os.path.join(args.output_dir, name), state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Adds the newest log to its file; a log with a new column writes the file anew."""
        if not state.is_world_process_zero or not state.log_history:
            return
        row = state.log_history[-1]
        name = _file_of(row)
        if name is None:
            return
        path = os.path.join(args.output_dir, name)
        columns: list[str] = []
        if os.path.exists(path):
            with open(path, newline="", encoding="utf-8") as file:
                columns = next(csv.reader(file), [])
        if not row.keys() <= set(columns):
            _write_history(path, state)
            return
        with open(path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns).writerow(row)


class ProfilerCallback(TrainerCallback):
    """
    Records `num_steps` optimizer steps of the first process and writes `profile.txt` (the operations that take most
    time) and `profile.json` (for chrome://tracing or ui.perfetto.dev) to the output folder.
    """

    def __init__(self, num_steps: int):
        self.num_steps = num_steps
        self._profiler: profile | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Starts the profiler, or raises ValueError if the run is too short."""
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
        folder.mkdir(parents=True, exist_ok=True)
        events = profiler.key_averages()
        device = "device" if any(event.self_device_time_total for event in events) else "cpu"
        table = events.table(sort_by=f"self_{device}_time_total", row_limit=40, max_name_column_width=60)
        title = f"{self.num_steps} training steps, sorted by the operations' own time on the {device}"
        (folder / "profile.txt").write_text(f"{title}\n\n{table}\n", encoding="utf-8")
        profiler.export_chrome_trace(str(folder / "profile.json"))


def _file_of(row: dict[str, Any]) -> str | None:
    if "loss" in row:
        return TRAINING_METRICS_FILE
    return VALIDATION_METRICS_FILE if "eval_loss" in row else None


def _write_history(path: str, state: TrainerState) -> None:
    """Writes all rows of the log history that belong in the file; removes the file if there are none."""
    rows = [row for row in state.log_history if _file_of(row) == os.path.basename(path)]
    if not rows:
        Path(path).unlink(missing_ok=True)
        return
    columns = dict.fromkeys(["step", "epoch", *(column for row in rows for column in row)])
    os.makedirs(os.path.dirname(path), exist_ok=True)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())
