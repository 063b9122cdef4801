"""Where the time of a training step goes, with `torch.profiler`."""

import os
from pathlib import Path
from typing import Any

from torch.profiler import profile, schedule
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
