"""What all trainers share: metrics in every log and as CSV files, early stopping, the NaN check, the Hub."""

import os
import shutil
from collections import defaultdict
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from safetensors import SafetensorError
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    HubStrategy,
    SaveStrategy,
    get_last_checkpoint,
    rotate_checkpoints,
)
from transformers.utils import PushInProgress, logging

from ..hub.checkpoint_files import files_to_publish
from ..hub.files import give_usual_mode, move_folder, write_atomically, writing
from ..hub.push import publish
from ..hub.readme_file import save_card
from ..hub.training_record import TRAINING_SETTINGS_FILE, write_training_settings
from ..inspection import NonFiniteWatch
from ..inspection.non_finite import non_finite_weights
from .arguments import CommonTrainingArguments
from .callbacks import CSVMetricsCallback, ProfilerCallback
from .resuming import (
    UNFINISHED,
    check_files,
    check_settings,
    check_trainer_state,
    checkpoints_in,
    optimizer_settings,
    quantized_backbone_kept,
    raise_if_weights_are_damaged,
    remove_leftovers,
    restore_optimizer_settings,
    run_settings,
    trainer_state_problem,
)

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
    recipe_settings: dict[str, Any] | None = None  # those that must not change when the run is resumed

    def __init__(
        self,
        *,
        model: Any,
        args: CommonTrainingArguments,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        self._save_backbone = getattr(args, "save_backbone", True)
        self._saves_checkpoint = False
        self._run_settings: dict[str, Any] | None = None
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

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As in `Trainer`; `True` goes on from the last complete checkpoint. Raises ValueError, naming it, for a missing
        or damaged file, and for settings or data that are not those of the run, unless `args.resume_with_changes`.
        """
        self._run_settings = None
        if self.is_world_process_zero():
            remove_leftovers(self.args.output_dir)
        if resume_from_checkpoint is True:
            complete, _ = checkpoints_in(self.args.output_dir)
            resume_from_checkpoint = complete[-1] if complete else True  # `Trainer` says that there is none
        if isinstance(resume_from_checkpoint, str):
            self._check_checkpoint(resume_from_checkpoint)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        # A run that was killed after its last save may not have deleted older checkpoints.
        last = get_last_checkpoint(self.args.output_dir) if os.path.isdir(self.args.output_dir) else None
        if self.args.should_save and last is not None and trainer_state_problem(last) is None:
            self._delete_older_checkpoints(self.args.output_dir)
        return output

    def _delete_older_checkpoints(self, folder: str) -> None:
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        rotate_checkpoints(folder, save_total_limit=limit, best_model_checkpoint=best)

    def _check_checkpoint(self, checkpoint: str) -> None:
        """Raises ValueError for a checkpoint from which the run cannot go on as it was."""
        check_trainer_state(checkpoint)
        may_differ = self.args.resume_with_changes
        if may_differ and self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed restores the old settings: start a new run instead of resume_with_changes.")
        check_settings(checkpoint, self._settings_of_run(), may_differ)
        if not self.is_deepspeed_enabled and self.args.local_process_index == 0:  # which keeps its own
            check_files(checkpoint, *([] if self.is_fsdp_enabled else [OPTIMIZER_NAME]), SCHEDULER_NAME)
        if not may_differ:  # other processes have other random numbers
            several = self.args.world_size > 1
            check_files(checkpoint, f"rng_state_{self.args.process_index}.pth" if several else "rng_state.pth")

    def _settings_of_run(self) -> dict[str, Any]:
        """Of the data and settings with which training began."""
        if self._run_settings is None:
            data = self.train_dataset
            self._run_settings = run_settings(self.args, data, self.data_description, self.recipe_settings)
        return self._run_settings

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, but no step more if the checkpoint that is resumed was the last one."""
        callbacks = self.callback_handler.callbacks
        stopped = any(isinstance(callback, _EarlyStopping) and callback.has_stopped for callback in callbacks)
        if stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

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
        if self.is_world_process_zero():
            write_atomically(os.path.join(self.args.output_dir, TRAINER_STATE_NAME), self.state.save_to_json)
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
            write_atomically(os.path.join(self.args.output_dir, TRAINER_STATE_NAME), self.state.save_to_json)
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
        if self._saves_checkpoint:  # not before it is whole
            return
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

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._saves_checkpoint else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in `Trainer`, but what is named `checkpoint-N` is complete: it gets its name when all is written."""
        folder = self._get_output_dir(trial)
        unfinished, name = os.path.join(folder, UNFINISHED), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        writes = self.args.local_process_index == 0  # on machines that share no disk, each has its own part
        if writes:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saves_checkpoint = True
        try:
            with writing(os.path.join(folder, name)):
                super()._save_checkpoint(model, trial)
                self._name_best_checkpoint(folder, os.path.join(unfinished, name))
            self._saves_checkpoint = False
            self.accelerator.wait_for_everyone()
            if writes:
                with suppress(FileNotFoundError):  # moved by another machine with the same disk
                    move_folder(os.path.join(unfinished, name), os.path.join(folder, name))
        finally:
            self._saves_checkpoint = False
            if writes:
                shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(folder, name))
        if self.args.should_save:
            self._delete_older_checkpoints(folder)

    def _name_best_checkpoint(self, folder: str, unfinished: str) -> None:
        """The best checkpoint by the name it will have, also in the state within the checkpoint."""
        if not self.state.best_global_step or self.args.save_strategy == SaveStrategy.NO:
            return
        best = os.path.join(folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if os.path.basename(best) == os.path.basename(unfinished) or os.path.isdir(best):
            self.state.best_model_checkpoint = best
        if self.args.should_save:
            self.state.save_to_json(os.path.join(unfinished, TRAINER_STATE_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in `Trainer`, but `args.resume_with_changes` keeps the new settings of the optimizer."""
        settings = optimizer_settings(self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.args.resume_with_changes:
            restore_optimizer_settings(self.optimizer, self.lr_scheduler, settings)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with nullcontext() if self._saves_checkpoint else writing(output_dir or self.args.output_dir):
            self._save_model_and_settings(output_dir, state_dict)

    def _save_model_and_settings(self, output_dir: str | None, state_dict: dict | None) -> None:
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
            write_training_settings(folder, self.model, self.args, self.data_description, self._settings_of_run())
            for path in Path(folder).glob("*.safetensors"):  # PEFT writes them as safetensors does
                give_usual_mode(str(path), os.path.join(folder, TRAINING_SETTINGS_FILE))
            self._save_card(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with quantized_backbone_kept(self.model):
            try:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            except SafetensorError:
                raise_if_weights_are_damaged(resume_from_checkpoint)
                raise

    def _load_best_model(self) -> None:
        with quantized_backbone_kept(self.model):
            super()._load_best_model()


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

    @property
    def has_stopped(self) -> bool:
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is not None:
            self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
