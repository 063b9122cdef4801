"""What all trainers share: metrics in every log and as CSV files, early stopping, the NaN check, the Hub."""

import os
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from ..hub import model_card
from ..hub.push import files_to_publish, publish
from ..hub.training_record import write_training_settings
from ..inspection import NonFiniteWatch
from ..inspection.non_finite import non_finite_weights
from .arguments import CommonTrainingArguments
from .callbacks import CSVMetricsCallback, ProfilerCallback


class BaseTrainer(Trainer):
    """
    The HF `Trainer` with `record`: what was recorded since the last log is averaged into the next one, over steps and
    processes. Logs also go to CSV files. Saved models come with `training_settings.json`, from which the model card is
    made, and with `args.save_backbone=False` without their backbone. A loss that is NaN or infinite stops training
    before it reaches the weights.

    Raises:
        ValueError: if checkpoints would leave out a backbone that nobody could find again, or one that trains.
    """

    args: CommonTrainingArguments
    hub_model_id: Any  # None until there is a repository
    data_description: dict[str, str] | None = None  # for the card: `name`, `hub_name`, `split` and `eval_split`

    def __init__(
        self,
        *,
        model: Any,
        args: CommonTrainingArguments,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        self._save_backbone = getattr(args, "save_backbone", True)
        if not self._save_backbone:
            _check_backbone_can_be_left_out(model)
        self._records: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._micro_batches: list[tuple[torch.Tensor, dict[str, Any]]] = []  # loss and inputs, until they are checked
        default_callbacks: list[TrainerCallback] = [CSVMetricsCallback()]
        if args.early_stopping_patience is not None:
            default_callbacks.append(_EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold))
        if args.profile_steps is not None:
            default_callbacks.append(ProfilerCallback(args.profile_steps))
        super().__init__(model=model, args=args, callbacks=[*default_callbacks, *(callbacks or [])], **kwargs)

    def record(self, name: str, value: torch.Tensor) -> None:
        """
        Keeps a scalar, on its device, for the mean in the next log: of an evaluation (as `eval_{name}`) if the model
        is in evaluation mode, else of training. NaN does not count. Every process must record the same names.
        """
        self._records[name if self.model.training else f"eval_{name}"].append(value.detach())

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """
        As in `Trainer`, but raises FloatingPointError, naming the module where it began, if a loss is NaN or infinite
        on any process. Checked once per optimizer step, before the weights change, since it waits for the device.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro_batches.append((loss, inputs))
        if self.accelerator.sync_gradients:
            micro_batches, self._micro_batches = self._micro_batches, []
            finite = torch.stack([loss for loss, _ in micro_batches]).isfinite()
            if self.accelerator.reduce(finite.all().float(), "mean") < 1:
                broken = [batch for batch, is_finite in zip(micro_batches, finite.tolist()) if not is_finite]
                wrong, inputs = (broken or micro_batches)[0]
                origin = self._origin_of_non_finite(model, inputs, num_items_in_batch)
                became = f"became {wrong.item()}" if broken else "is NaN or infinite on another process"
                raise FloatingPointError(
                    f"The loss {became} in step {self.state.global_step + 1}. {origin} {self._advice_on_non_finite()}"
                )
        return loss

    def _advice_on_non_finite(self) -> str:
        folder = self.args.output_dir
        return f"Lower the learning rate or max_grad_norm, and resume from the last checkpoint in {folder}."

    @torch.no_grad()
    def _origin_of_non_finite(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> str:
        """Runs a batch again, on every process since models may be sharded, and says where NaN or Inf came from."""
        unwrapped = self.accelerator.unwrap_model(model)
        with NonFiniteWatch(unwrapped) as watch, self.compute_loss_context_manager():
            inputs = self._prepare_inputs(inputs)
            _, outputs = self.compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)
        samples = self._non_finite_samples(inputs, outputs)
        if watch.finding is None:
            return samples or "Run again, the batch of this process gives finite numbers."
        broken = len(non_finite_weights(unwrapped))
        weights = f" In all, {broken} of its parameters and buffers hold NaN or Inf." if broken else ""
        return f"{samples} {watch.finding}{weights}".lstrip()

    def _non_finite_samples(self, inputs: dict[str, Any], outputs: Any) -> str:
        """A sentence that names the samples with NaN or Inf, of trainers that can tell them apart."""
        return ""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        for name in [name for name in self._records if name.startswith("eval_")]:
            del self._records[name]
        return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the values recorded since the last log."""
        if "eval_loss" in logs or "loss" in logs:
            for name in [name for name in self._records if name.startswith("eval_") == ("eval_loss" in logs)]:
                values = torch.stack(self._records.pop(name)).float()
                mean = self.accelerator.gather(values.nanmean().reshape(1)).nanmean()
                logs[name] = round(mean.item(), 6)
        super().log(logs, start_time)

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Writes the package's card to the output folder; ValueError for arguments that only `Trainer`'s card has."""
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
        As in `Trainer`, but uploads what `llada-trm push` does: the model, its code and its card, no pickles and logs.
        Returns a `CommitInfo`, or a `Future` of it unless `blocking`; None in all processes but the first.
        """
        _refuse_for_card(kwargs)
        private = bool(self.args.hub_private_repo if private is None else private)
        token, revision = token or self.args.hub_token, revision or self.args.hub_revision
        if self.hub_model_id is None and self.is_world_process_zero():
            # `init_hf_repo` takes no `private` before transformers 5.23.
            name = self.args.hub_model_id or os.path.basename(os.path.abspath(self.args.output_dir))
            self.hub_model_id = HfApi(token=token).create_repo(name, private=private, exist_ok=True).repo_id
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.save_state()
        uploads = files_to_publish(self.args.output_dir, self.hub_model_id, revision=revision, new_card=True)
        upload = publish if blocking else partial(HfApi().run_as_future, publish)
        return upload(uploads, self.hub_model_id, private, revision, token, commit_message or "Upload model")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self._save_backbone:
            super()._save(output_dir, state_dict)
        else:
            # The Trainer cannot pass this argument on.
            self.model.save_pretrained = partial(self.model.save_pretrained, save_backbone=False)
            try:
                super()._save(output_dir, state_dict)
            finally:
                del self.model.save_pretrained
        if self.args.should_save:
            write_training_settings(output_dir or self.args.output_dir, self.model, self.args, self.data_description)


def _check_backbone_can_be_left_out(model: Any) -> None:
    if not getattr(model.config, "backbone_name_or_path", None):
        raise ValueError(
            "save_backbone=False needs a hybrid or a latent-thinking model, and its config.backbone_name_or_path to "
            "say where the backbone is."
        )
    if any(parameter.requires_grad for parameter in model.backbone.parameters()):
        raise ValueError("save_backbone=False would lose what the backbone learns: freeze it, or save it.")


def _refuse_for_card(fields: dict[str, Any]) -> None:
    unused = [name for name, value in fields.items() if value]
    if unused:
        raise ValueError(f"The card is made from the checkpoint: leave out {', '.join(unused)}.")


class _EarlyStopping(EarlyStoppingCallback):
    """Goes on counting where the resumed checkpoint stopped."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is not None:
            self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
