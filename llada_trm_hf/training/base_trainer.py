"""What all trainers share: metrics in every log and as CSV files, early stopping, the NaN check, the Hub."""

import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from ..hub.checkpoint_files import files_to_publish
from ..hub.push import publish
from ..hub.readme_file import save_card
from ..hub.training_record import write_training_settings
from ..inspection import NonFiniteWatch
from ..inspection.non_finite import non_finite_weights
from .arguments import CommonTrainingArguments
from .callbacks import CSVMetricsCallback, ProfilerCallback

logger = logging.get_logger(__name__)


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

    def save_state(self) -> None:
        """As in `Trainer`; the results also go into the card."""
        super().save_state()
        self._save_card(self.args.output_dir)

    def create_model_card(
        self,
        model_name: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Writes the package's card to the output folder, unless a person wrote or changed the README.md there;
        ValueError for arguments that only `Trainer`'s card has.
        """
        _refuse_for_card(kwargs)
        if self.is_world_process_zero():
            super().save_state()
            self._save_card(self.args.output_dir, model_name, license, tags)

    def _save_card(
        self,
        folder: str,
        model_name: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        if self.is_world_process_zero():
            repo_id = self.hub_model_id or model_name
            save_card(folder, repo_id, self.args.hub_revision, license, self._card_tags(tags))

    def _card_tags(self, tags: str | list[str] | None) -> list[str]:
        more = [tags] if isinstance(tags, str) else tags or []
        return [*(getattr(self.model, "model_tags", None) or []), *more]

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        model_name: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        As in `Trainer`, but uploads what `llada-trm push` does: the model, its code and its card, no pickles and logs.
        Returns a `CommitInfo`, or a `Future` of it unless `blocking`; None in all processes but the first.
        """
        _refuse_for_card(kwargs)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        private = self.args.hub_private_repo if private is None else private
        token, revision = token or self.args.hub_token, revision or self.args.hub_revision
        if self.hub_model_id is None and self.is_world_process_zero():
            # `init_hf_repo` takes no `private` before transformers 5.23.
            name = self.args.hub_model_id or os.path.basename(os.path.abspath(self.args.output_dir))
            self.hub_model_id = HfApi(token=token).create_repo(name, private=private, exist_ok=True).repo_id
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.save_state()
        files = files_to_publish(
            self.args.output_dir, self.hub_model_id, revision=revision, license=license, tags=self._card_tags(tags)
        )
        self._finish_current_push()
        upload = publish if blocking else partial(HfApi().run_as_future, publish)
        return upload(files, self.hub_model_id, private, revision, token, commit_message, license=license)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        As in `Trainer`, but uploads what `push_to_hub` does, from the checkpoint, in the background. With a
        `hub_strategy` of `checkpoint` or `all_checkpoints`, what it takes to resume goes into a folder beside it.
        """
        strategy = HubStrategy(self.args.hub_strategy)
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        push = getattr(self, "push_in_progress", None)
        running = push is not None and not push.is_done()
        # A checkpoint must not be deleted while it is uploaded, nor two commits be made at once.
        if running and not self.args.hub_always_push and self.args.save_total_limit is None:
            return
        self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        job = HfApi().run_as_future(self._publish_checkpoint, checkpoint_folder, strategy, self.state.global_step)
        job.add_done_callback(_report_failure)
        self.push_in_progress = PushInProgress([job])

    def _publish_checkpoint(self, folder: str, strategy: HubStrategy, step: int) -> CommitInfo:
        args, revision = self.args, self.args.hub_revision
        files = files_to_publish(folder, self.hub_model_id, revision=revision, tags=self._card_tags(None))
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else os.path.basename(folder)
            for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                if path.name != TRAINING_ARGS_NAME:  # a pickle that resuming does not read
                    files[f"{name}/{path.relative_to(folder).as_posix()}"] = str(path)
        message = f"Training in progress, step {step}"
        return publish(files, self.hub_model_id, args.hub_private_repo, revision, args.hub_token, message)

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
            folder = output_dir or self.args.output_dir
            write_training_settings(folder, self.model, self.args, self.data_description)
            self._save_card(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with _quantized_backbone_kept(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with _quantized_backbone_kept(self.model):
            super()._load_best_model()


@contextmanager
def _quantized_backbone_kept(model: Any) -> Iterator[None]:
    """
    Within it, `model.load_state_dict` leaves what does not train of a quantised backbone as it is: quantised weights
    are saved in a form that it cannot load. ValueError if they are others than those of the checkpoint.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or not hasattr(model, "backbone"):
        yield
        return
    load_state_dict = model.load_state_dict

    def load(state_dict: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
        kept = {n: tensor for n, tensor in state_dict.items() if n.startswith("backbone.") and n not in trainable}
        present, _ = quantizer.get_state_dict_and_metadata(model)
        for name, tensor in kept.items():
            # (Scales in floating point may be stored in another format on another device.)
            if tensor.is_floating_point():
                continue
            if name not in present or not torch.equal(present[name].cpu(), tensor.cpu()):
                raise ValueError(f"{name} is not as in the checkpoint: resume on the backbone it was quantised from.")
        others = {name: tensor for name, tensor in state_dict.items() if name not in kept}
        result = load_state_dict(others, *args, **kwargs)
        result.missing_keys[:] = [name for name in result.missing_keys if not name.startswith("backbone.")]
        return result

    model.load_state_dict = load
    try:
        yield
    finally:
        del model.load_state_dict


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


def _report_failure(upload: Future) -> None:
    """Training goes on without the Hub, but not without a word."""
    if not upload.cancelled() and upload.exception() is not None:
        logger.warning(f"A checkpoint could not be uploaded: {upload.exception()}")


class _EarlyStopping(EarlyStoppingCallback):
    """Goes on counting where the resumed checkpoint stopped."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is not None:
            self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
