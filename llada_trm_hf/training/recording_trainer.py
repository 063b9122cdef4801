"""What the trainers of the package share: metrics of their own in every log, CSV files, early stopping."""

import json
import os
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from ..cards import TRAINING_SETTINGS_FILE, files_to_publish, model_card, publish, training_settings
from ..inspection.non_finite import NonFiniteWatch, non_finite_weights
from .arguments import CommonTrainingArguments
from .csv_metrics import CSVMetricsCallback
from .profiler import ProfilerCallback


class RecordingTrainer(Trainer):
    """
    The HF `Trainer` with `record`: what it was given since the last log is averaged into the next one, over steps and
    processes. Logs also go to `training_metrics.csv` and `validation_metrics.csv`. What is saved also holds
    `training_settings.json`, from which the model card is made.

    Attributes:
        data_description: `name`, `hub_name`, `split` and `eval_split` of the dataset, as far as the card shall say.
    """

    args: CommonTrainingArguments
    data_description: dict[str, str] | None = None

    def __init__(
        self, *, args: CommonTrainingArguments, callbacks: list[TrainerCallback] | None = None, **kwargs: Any
    ):
        self._records: dict[str, list[torch.Tensor]] = defaultdict(list)
        own: list[TrainerCallback] = [CSVMetricsCallback()]
        if args.early_stopping_patience is not None:
            own.append(_EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold))
        if args.profile_steps is not None:
            own.append(ProfilerCallback(args.profile_steps))
        super().__init__(args=args, callbacks=[*own, *(callbacks or [])], **kwargs)

    def record(self, name: str, value: torch.Tensor) -> None:
        """
        Keeps a scalar, on its device, for the mean that the next log reports; NaN does not count. Names that start
        with `eval_` go to the next log of an evaluation, others to the next one of training. Every process has to
        record the same names.
        """
        self._records[name].append(value.detach())

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """
        As in `Trainer`; then all processes look at the loss, for after the optimizer step NaN would be in the weights.

        Raises:
            FloatingPointError: if it is NaN or infinite on any process; names the module that came from.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.reduce(loss.isfinite().float(), "mean") < 1:
            origin = self._origin_of_non_finite(model, inputs, num_items_in_batch)
            became = f"became {loss.item()}" if not loss.isfinite() else "is NaN or infinite on another process"
            raise FloatingPointError(
                f"The loss {became} in step {self.state.global_step + 1}. {origin} Lower the learning rate or "
                f"max_grad_norm, and go on from the last checkpoint in {self.args.output_dir}."
            )
        return loss

    @torch.no_grad()
    def _origin_of_non_finite(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None
    ) -> str:
        """Runs a batch again and says where its NaN or Inf came from. Sharded models need every process here."""
        own_model = self.accelerator.unwrap_model(model)
        with NonFiniteWatch(own_model) as watch, self.compute_loss_context_manager():
            self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        if watch.finding is None:
            return "Run again, the batch of this process gives finite numbers."
        broken = len(non_finite_weights(own_model))
        weights = f" In all, {broken} of its parameters and buffers hold NaN or Inf." if broken else ""
        return f"{watch.finding}{weights}"

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        for name in [name for name in self._records if name.startswith("eval_")]:
            del self._records[name]
        return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of what was recorded since the last log."""
        if "eval_loss" in logs or "loss" in logs:
            for name in [name for name in self._records if name.startswith("eval_") == ("eval_loss" in logs)]:
                values = torch.stack(self._records.pop(name)).float()
                mean = self.accelerator.gather(values.nanmean().reshape(1)).nanmean()
                logs[name] = round(mean.item(), 6)
        super().log(logs, start_time)

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """
        Writes the package's card for the model in the output folder.

        Raises:
            ValueError: for what the `Trainer` would put into a card of its own.
        """
        _refuse_for_card(kwargs)
        if self.is_world_process_zero():
            folder = self.args.output_dir
            self.save_state()
            repo_id = self.hub_model_id or model_name or os.path.basename(os.path.abspath(folder))
            model_card(folder, repo_id, revision=self.args.hub_revision).save(os.path.join(folder, "README.md"))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        model_name: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        As in `Trainer`, except that it uploads what `llada-trm push` does: the model, its code and its card, but no
        pickles (`training_args.bin`) and logs.

        Returns:
            `CommitInfo`, or a `Future` of it unless `blocking`; None in all processes but the first.

        Raises:
            ValueError: as `create_model_card` and `publish`.
        """
        _refuse_for_card(kwargs)
        private = bool(self.args.hub_private_repo if private is None else private)
        token, revision = token or self.args.hub_token, revision or self.args.hub_revision
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.save_state()
        uploads = files_to_publish(self.args.output_dir, self.hub_model_id, revision=revision, new_card=True)
        upload = publish if blocking else partial(HfApi().run_as_future, publish)
        return upload(uploads, self.hub_model_id, private, revision, token, commit_message or "Upload model")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        with open(os.path.join(folder, TRAINING_SETTINGS_FILE), "w", encoding="utf-8") as file:
            json.dump(training_settings(self.model, self.args, self.data_description), file, indent=2)


def _refuse_for_card(fields: dict[str, Any]) -> None:
    unused = [name for name, value in fields.items() if value]
    if unused:
        raise ValueError(f"The card is made from the checkpoint: leave out {', '.join(unused)}.")


class _EarlyStopping(EarlyStoppingCallback):
    """Goes on counting where the checkpoint that a run continues had got to."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is not None:
            self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
