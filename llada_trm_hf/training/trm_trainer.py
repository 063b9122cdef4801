"""The trainer of [`SequenceTRM`]: an optimizer step for every supervision step."""

import copy
import os
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence, Sized
from itertools import cycle, islice
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cosine_similarity
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import EvalPrediction, TrainerCallback

from ..hidden_pairs import HiddenPairsCollator
from ..models import DimensionCompressor, SequenceTRM, SequenceTRMOutput
from .arguments import TRMTrainingArguments
from .ema_trainer import EMATrainer
from .reconstruction_metrics import head_width, reconstruction_metrics, top_tokens


class TRMTrainer(EMATrainer):
    """
    Trains a [`SequenceTRM`] on pairs of a context and the language model's state after thinking.

    Each batch comes `n_supervision_steps` times in a row. Every supervision step is a step of the trainer, with an
    optimizer step on its loss (TRM, arXiv 2510.04871, figure 3): `max_steps`, the schedule, logs and checkpoints all
    count supervision steps. The state (y, z) passes, detached, from one step to the next. All samples of a batch take
    all its steps, even where the halting head would stop: so every step's halting probability is learned, and
    processes stay in step. Checkpoints hold what a run needs to resume in the middle of a batch.

    Held-out metrics are those of `reason`, which halts sample by sample: `reconstruction_metrics` (`eval_loss` is the
    mean squared error), `eval_solved_share` (how often the final prediction was close enough), `eval_halting_accuracy`
    (how often the halting head knew), `eval_mean_steps`, and with an LM head `eval_top_token_agreement`.

    Args:
        model: the SequenceTRM; `args` change its config.
        train_dataset, eval_dataset: pairs, such as [`HiddenPairsDataset`].
        data_collator: [`HiddenPairsCollator`], or another with batches of `context` [B, L, D'], `mask` [B, L],
            `target` [B, D'] and `ids`.
        lm_head: from the language model's hidden states to logits.
        compressor: the one that compressed the pairs, if any; `lm_head` needs it.
        kwargs: as in `Trainer`.

    Raises:
        ValueError: for an LM head of another width, or sharded training (the model is small: processes hold it whole).
    """

    args: TRMTrainingArguments

    def __init__(
        self,
        model: SequenceTRM,
        args: TRMTrainingArguments,
        *,
        data_collator: Any = None,
        lm_head: nn.Linear | None = None,
        compressor: DimensionCompressor | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        changes = args.config_fields()
        type(model.config).from_dict(model.config.to_dict() | changes)  # raises ValueError if they cannot work
        model.config.update(changes)
        if lm_head is not None:
            _check_width(lm_head, model, compressor)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or HiddenPairsCollator(),
            compute_metrics=self._held_out_metrics,
            callbacks=[_SupervisionSteps(self), *(callbacks or [])],
            **kwargs,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("TRMTrainer does not shard the model: use plain distributed data parallelism.")
        self.lm_head = None if lm_head is None else lm_head.requires_grad_(False)
        # A copy: the pairs may use the other one, on the CPU and in data loader workers.
        self.compressor = None if compressor is None else copy.deepcopy(compressor).to(self.args.device)
        # (y, z) after the last step, of each micro-batch; sum and number of the cosine similarities of this epoch.
        self._carry: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
        self._cosines = torch.zeros(2, dtype=torch.float64, device=self.args.device)

    @property
    def num_steps_per_batch(self) -> int:
        """Optimizer steps for each batch."""
        return self.model.config.n_supervision_steps if self.args.per_step_updates else 1

    def get_train_dataloader(self) -> DataLoader:
        """Batches of `train_dataset`, each as often as it has supervision steps."""
        if self.train_dataset is None or not hasattr(self.train_dataset, "__len__"):
            raise ValueError("TRMTrainer needs a train_dataset with a length.")
        sampler = SupervisionSampler(
            self._get_train_sampler(self.train_dataset),
            self._train_batch_size,
            num_parts=self.args.world_size * self.args.gradient_accumulation_steps,
            num_repeats=self.num_steps_per_batch,
            drop_last=self.args.dataloader_drop_last,
        )
        loader = DataLoader(
            RecentBatches(self.train_dataset, self.args.gradient_accumulation_steps),
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As in [`BaseTrainer`], from the state (y, z) that the previous supervision step left."""
        if len(self._carry) == self.args.gradient_accumulation_steps:
            y, z = self._carry.popleft()
            if self.state.global_step % self.num_steps_per_batch != 0:  # the first step of a batch starts anew
                inputs = {**inputs, "y": y, "z": z}
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a supervision step; without per-step updates the mean over all of them."""
        batch = {name: inputs[name] for name in ("context", "mask", "target", "y", "z") if name in inputs}
        losses: list[torch.Tensor] = []
        for _ in range(1 if self.args.per_step_updates else self.model.config.n_supervision_steps):
            outputs = model(**batch)
            self._record_step(outputs)
            batch |= {"y": outputs.y, "z": outputs.z}
            losses.append(outputs["loss"])
        if self.args.per_step_updates:
            self._carry.append((batch["y"], batch["z"]))
        loss = torch.stack(losses).mean()
        return (loss, outputs) if return_outputs else loss

    def _record_step(self, outputs: Any) -> None:
        cosines = outputs.cosine_similarity
        self._cosines += torch.stack([cosines.double().sum(), self._cosines.new_full((), len(cosines))])
        for name, value in outputs.loss_components.items():
            self.record(f"{name}_loss", value)
        self.record("cosine_similarity", cosines.mean())
        self.record("halt_probability", outputs.halt_probability.mean())
        if self.model.config.halt_loss == "bce":
            self.record("halt_threshold", cosines.new_full((), self.model.config.cosine_threshold))

    def _non_finite_samples(self, inputs: dict[str, Any], outputs: SequenceTRMOutput) -> str:
        errors = (outputs.prediction - inputs["target"]).square().mean(-1) + outputs.halt_logits  # [B]
        broken = [str(inputs["ids"][row]) for row in (~errors.isfinite()).nonzero().flatten().tolist()]
        if not broken:
            return ""
        advice = " Look at their hidden states." if len(broken) < len(errors) else ""
        return f"It is not finite for {len(broken)} of {len(errors)} samples: {', '.join(broken[:8])}.{advice}"

    def _end_epoch(self) -> None:
        total, number = self.accelerator.reduce(self._cosines).tolist()
        config = self.model.config
        if self.args.adaptive_halt_threshold and config.halt_loss == "bce":
            config.cosine_threshold = max(config.cosine_threshold, 0.95 * total / number)
        self._cosines.zero_()

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, tuple[torch.Tensor, ...], torch.Tensor]:
        """Prediction, halting probability and steps, the top tokens of prediction and target; the target."""
        inputs = self._prepare_inputs(inputs)
        with self.accelerator.autocast():
            thought = self.model.reason(inputs["context"], inputs["mask"])
        tokens = []
        if self.lm_head is not None:
            for states in (thought.prediction, inputs["target"]):
                states = states if self.compressor is None else self.compressor.decompress(states)
                tokens.append(top_tokens(self.lm_head, states))
        return None, (thought.prediction, thought.halt_probability, thought.num_steps, *tokens), inputs["target"]

    def _held_out_metrics(self, outputs: EvalPrediction) -> dict[str, float]:
        prediction, probability, num_steps, *tokens = map(torch.from_numpy, outputs.predictions)
        target = torch.from_numpy(outputs.label_ids)
        solved = cosine_similarity(prediction, target, dim=-1) > self.model.config.cosine_threshold
        metrics = reconstruction_metrics(prediction, target)
        metrics |= {
            "loss": metrics["mse"],
            "halting_accuracy": ((probability > 0.5) == solved).float().mean().item(),
            "solved_share": solved.float().mean().item(),
            "mean_steps": num_steps.float().mean().item(),
        }
        if tokens:
            metrics["top_token_agreement"] = (tokens[0] == tokens[1]).float().mean().item()
        return metrics

    def _save_rng_state(self, output_dir: str) -> None:
        """Also the state of the supervision steps: the Trainer calls this on every process for every checkpoint."""
        super()._save_rng_state(output_dir)
        state = {
            "layout": self._layout(),
            "cosines": self._cosines,
            "cosine_threshold": torch.tensor(self.model.config.cosine_threshold, dtype=torch.float64),
        }
        for i, (y, z) in enumerate(self._carry):
            state |= {f"y.{i}": y, f"z.{i}": z}
        save_file({name: value.contiguous() for name, value in state.items()}, self._state_file(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = self._state_file(resume_from_checkpoint)
        if not os.path.isfile(path):
            raise ValueError(f"{path} is missing: go on with as many processes as the checkpoint was made with.")
        state = {name: value.to(self.args.device) for name, value in load_file(path).items()}
        made, found = state["layout"].tolist(), self._layout().tolist()
        if made != found:
            raise ValueError(
                f"{resume_from_checkpoint} was made with {made[0]} processes, gradient_accumulation_steps={made[1]} "
                f"and {made[2]} optimizer steps per batch, now {found[0]}, {found[1]} and {found[2]}: go on as before."
            )
        self._cosines = state["cosines"]
        self.model.config.cosine_threshold = state["cosine_threshold"].item()
        number = sum(name.startswith("y.") for name in state)
        self._carry = deque((state[f"y.{i}"], state[f"z.{i}"]) for i in range(number))

    def _layout(self) -> torch.Tensor:
        """What must stay the same for a run to resume in the middle of a batch."""
        return torch.tensor([self.args.world_size, self.args.gradient_accumulation_steps, self.num_steps_per_batch])

    def _state_file(self, folder: str) -> str:
        return os.path.join(folder, f"supervision_state_{self.args.process_index}.safetensors")


class _SupervisionSteps(TrainerCallback):
    def __init__(self, trainer: TRMTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:  # forget the batch with which an earlier run ended
            self.trainer._carry.clear()
            self.trainer._cosines.zero_()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.epoch == int(state.epoch):  # not in on_epoch_end: a checkpoint is written in between
            self.trainer._end_epoch()


def _check_width(lm_head: nn.Linear, model: SequenceTRM, compressor: DimensionCompressor | None) -> None:
    size = model.config.hidden_size
    if compressor is not None and compressor.config.compressed_size != size:
        compressed = compressor.config.compressed_size
        raise ValueError(f"The compressor has compressed_size={compressed}, the model hidden_size={size}.")
    width = size if compressor is None else compressor.config.hidden_size
    found = head_width(lm_head)
    if found != width:
        raise ValueError(f"The LM head reads states {found} wide, the pairs hold {width}: they are of another model.")


class RecentBatches(Dataset):
    """
    A dataset that caches the last `num_batches` batches of another, in each data loader worker, so that a repeated
    batch is read once.
    """

    def __init__(self, dataset: Any, num_batches: int):
        self.dataset, self.num_batches = dataset, num_batches
        self._recent: OrderedDict[tuple[int, ...], list[Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        key = tuple(indices)
        if key not in self._recent:
            self._recent[key] = [self.dataset[index] for index in indices]
            if len(self._recent) > self.num_batches:
                self._recent.popitem(last=False)
        return self._recent[key]


class SupervisionSampler(Sampler[list[int]]):
    """
    Batches of indices, repeated for each supervision step. The batches of all processes in one optimizer step form a
    group of `num_parts` micro-batches (processes times accumulation steps), which comes `num_repeats` times in a row.
    accelerate shards batch by batch, so every process gets the same micro-batches in every repetition. To a smaller
    last group, up to `num_parts - 1` samples from the beginning of the epoch are added, until it divides.

    Args:
        sampler: of indices; accelerate replaces this attribute by a seeded one.
        batch_size: of a micro-batch.
        drop_last: leave out a smaller last group.
    """

    # Batches differ in size: without a batch_size, accelerate takes them as they are.
    batch_size = None

    def __init__(self, sampler: Sampler[int], batch_size: int, num_parts: int, num_repeats: int, drop_last: bool):
        self.sampler = sampler
        self.group_size = batch_size * num_parts
        self.num_parts, self.num_repeats, self.drop_last = num_parts, num_repeats, drop_last

    def __iter__(self) -> Iterator[list[int]]:
        indices = list(self.sampler)
        for start in range(0, len(indices), self.group_size):
            group = indices[start : start + self.group_size]
            if len(group) < self.group_size and self.drop_last:
                return
            group += islice(cycle(indices), -len(group) % self.num_parts)
            size = len(group) // self.num_parts
            micro_batches = [group[first : first + size] for first in range(0, len(group), size)]
            for _ in range(self.num_repeats):
                yield from micro_batches

    def __len__(self) -> int:
        assert isinstance(self.sampler, Sized)
        whole, rest = divmod(len(self.sampler), self.group_size)
        return (whole + (rest > 0 and not self.drop_last)) * self.num_parts * self.num_repeats
