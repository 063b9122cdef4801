"""An exponential moving average (EMA) of the weights."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerCallback

from .arguments import EMATrainingArguments
from .base_trainer import BaseTrainer

EMA_FILE = "ema_state.safetensors"


class EMATrainer(BaseTrainer):
    """
    With `args.use_ema`, keeps an average of the weights that train. Evaluation, the choice of the best model and saved
    models use the average; training goes on from the weights themselves, and checkpoints hold both. After training
    the model holds the average.

    Attributes:
        ema: torch's `AveragedModel`, in float32 or better, of the parameters that required gradients when the trainer
            was made; None without `use_ema`.

    Raises:
        ValueError: for sharded training: the average is one of whole weights.
    """

    args: EMATrainingArguments

    def __init__(self, *, args: EMATrainingArguments, callbacks: list[TrainerCallback] | None = None, **kwargs: Any):
        super().__init__(args=args, callbacks=[_UpdateEMA(self), *(callbacks or [])], **kwargs)
        if args.use_ema and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("use_ema averages whole weights, FSDP and DeepSpeed shard them: leave out one of them.")
        self._trainable = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self._weights = nn.ParameterList(self._trainable.values())
        self.ema: AveragedModel | None = None
        if args.use_ema:
            weights = (w.detach().to(torch.promote_types(w.dtype, torch.float32)) for w in self._trainable.values())
            self.ema = AveragedModel(
                nn.ParameterList(weights),
                avg_fn=lambda average, weight, _: average.lerp(weight.to(average.dtype), 1 - args.ema_decay),
            )
            self.update_ema()  # the first time, AveragedModel copies the weights

    def update_ema(self) -> None:
        """To be called after every optimizer step."""
        if self.ema is not None:
            self.ema.update_parameters(self._weights)

    def averages(self) -> dict[str, torch.Tensor]:
        """The averages by the names of their parameters; empty without EMA."""
        return {} if self.ema is None else dict(zip(self._trainable, (a.detach() for a in self.ema.parameters())))

    @torch.no_grad()
    def set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Copies these weights, such as `averages()`, into the model."""
        for name, weight in weights.items():
            self._trainable[name].copy_(weight)

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Inside, the model has the averages."""
        weights = {name: self._trainable[name].detach().clone() for name in self.averages()}
        self.set_weights(self.averages())
        try:
            yield
        finally:
            self.set_weights(weights)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._averaged_weights():
            return super().evaluation_loop(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with self._averaged_weights():
            super()._save(output_dir, state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        """Also the weights and their average: the Trainer calls this on every process for every checkpoint."""
        super()._save_rng_state(output_dir)
        if self.ema is not None and self.args.should_save:
            state = {f"weights.{name}": weight.detach() for name, weight in self._trainable.items()}
            state |= {f"average.{name}": average for name, average in self.averages().items()}
            save_file(state, os.path.join(output_dir, EMA_FILE))

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = os.path.join(resume_from_checkpoint, EMA_FILE)
        has_average = os.path.isfile(path)
        if has_average != (self.ema is not None):
            made = "with" if has_average else "without"
            raise ValueError(f"The checkpoint {resume_from_checkpoint} was made {made} use_ema: resume it likewise.")
        if not has_average:
            return
        state, averages = load_file(path), self.averages()
        if state.keys() != {f"{kind}.{name}" for name in averages for kind in ("weights", "average")}:
            raise ValueError("The checkpoint was made with other weights trainable: resume with the same ones.")
        for name, average in averages.items():
            self._trainable[name].copy_(state[f"weights.{name}"])
            average.copy_(state[f"average.{name}"])

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.ema is not None:
            self.ema.n_averaged.zero_()  # what was loaded is the average already: start again from it
            self.update_ema()


class _UpdateEMA(TrainerCallback):
    def __init__(self, trainer: EMATrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.update_ema()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.set_weights(self.trainer.averages())
