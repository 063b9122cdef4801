"""The trainer of masked-diffusion models, with or without refiner, and the calibration of refiners."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..data import MaskedDiffusionCollator
from .arguments import MaskedDiffusionTrainingArguments
from .ema_trainer import EMATrainer
from .muon import muon_with_adamw

NOT_REFINED = -100.0  # in place of an accuracy; the Trainer also pads with -100 where a batch has fewer chunks


class MaskedDiffusionTrainer(EMATrainer):
    """
    The HF `Trainer` with the forward process of masked diffusion: new masks every epoch in training, always the same
    ones in evaluation. Masks depend only on the seed, the epoch and a sample's number: a resumed run, another batch
    size or more processes see the same ones.

    Besides the loss it logs every component of it, the share of chunks refined, the refinement steps, the confidences
    and the refiner's own statistics (slot norms, gates, ...). Evaluation also reports
    `eval_expected_calibration_error`, in 10 bins over all refined chunks: of the refiner's confidence in a chunk
    against the share of the chunk's masked tokens it gets right.

    Args:
        model: a masked-diffusion model or hybrid.
        train_dataset, eval_dataset: of `tokenize_reasoning`.
        kwargs: as in `Trainer`.

    Raises:
        ValueError: without a padding token, for Muon with FSDP or DeepSpeed, and as in [`EMATrainer`].
    """

    args: MaskedDiffusionTrainingArguments
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: PreTrainedModel,
        args: MaskedDiffusionTrainingArguments,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        tokenizer = model.config.get_text_config() if processing_class is None else processing_class
        if tokenizer.pad_token_id is None:
            raise ValueError("There is no padding token: set tokenizer.pad_token, for LLaDA the end of the sequence.")
        collator = MaskedDiffusionCollator(
            mask_token_id=model.config.mask_token_id,
            pad_token_id=tokenizer.pad_token_id,
            mask_epsilon=args.mask_epsilon,
            learn_padding=args.learn_padding,
            random_length_probability=args.random_length_probability,
            seed=args.seed,
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            processing_class=processing_class,
            compute_metrics=chunk_calibration,
            callbacks=[_NewMasksEveryEpoch(collator), *(callbacks or [])],
            **kwargs,
        )
        if args.use_muon and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("Muon updates whole matrices, FSDP and DeepSpeed shard them: leave out one of them.")
        self.model_accepts_loss_kwargs = False  # the loss is a mean over rows; accumulation averages it

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.args.use_muon and self.optimizer is None:
            adamw, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decayed = self.get_decay_parameter_names(self.model)
            self.optimizer = muon_with_adamw(self.model, self.args, decayed, adamw, settings)
        return super().create_optimizer(model)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        collator: Any = self.data_collator  # type: ignore[has-type]
        self.data_collator = replace(collator, fixed=True, random_length_probability=0.0)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss; its components go to the next log."""
        if not model.training:
            # Evaluation needs no logits.
            inputs = {**inputs, "logits_to_keep": torch.zeros(0, dtype=torch.long, device=inputs["labels"].device)}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        self._record_outputs(outputs)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The loss; with a refiner, also the confidence and the accuracy (or NOT_REFINED) of each chunk, `[B, N]`."""
        with self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        if prediction_loss_only or outputs.get("chunk_accuracy") is None:
            return loss, None, None
        refined = outputs["refinement_steps"] > 0
        return loss, outputs["refiner_confidence"], outputs["chunk_accuracy"].where(refined, NOT_REFINED)

    def _record_outputs(self, outputs: Any) -> None:
        for name, value in (outputs.get("loss_components") or {}).items():
            self.record(f"{name}_loss", value)
        if outputs.get("refinement_steps") is not None:
            refined = outputs["refinement_steps"] > 0
            num_refined = refined.sum().clamp(min=1)
            undecided = outputs["chunk_confidence"] < 1
            self.record("refined_share", refined.sum() / undecided.sum().clamp(min=1))
            self.record("refinement_steps", (outputs["refinement_steps"] * refined).sum() / num_refined)
            for name in ("chunk_confidence", "refiner_confidence"):
                self.record(name, (outputs[name] * refined).sum() / num_refined)
        for name, value in (outputs.get("refiner_statistics") or {}).items():
            self.record(name, value.nanmean())  # NaN where a chunk or a step was not run


def expected_calibration_error(confidence: torch.Tensor, accuracy: torch.Tensor, num_bins: int = 10) -> float:
    """
    The expected calibration error (Guo et al., arXiv 1706.04599, equation 3): the distance between mean confidence and
    mean accuracy in each of `num_bins` bins of equal width, weighted by the share of predictions in the bin.

    Args:
        confidence, accuracy: `[M]` in [0, 1], of each prediction; at least one.
        num_bins: the bins are `[0, 1/n), [1/n, 2/n), ..., [(n - 1)/n, 1]`.
    """
    if not len(confidence):
        raise ValueError("A calibration error needs at least one prediction.")
    gap = (confidence - accuracy).double()
    bins = (confidence * num_bins).long().clamp(max=num_bins - 1)
    # A bin's weight times the distance of its means is the distance of its sums over the number of predictions.
    return (gap.new_zeros(num_bins).index_add(0, bins, gap).abs().sum() / len(gap)).item()


def chunk_calibration(outputs: EvalPrediction) -> dict[str, float]:
    """The calibration error of the refined chunks, if any, from what `prediction_step` returns, `[R, N]`."""
    confidence, accuracy = torch.from_numpy(outputs.predictions), torch.from_numpy(outputs.label_ids)
    refined = accuracy != NOT_REFINED
    if not refined.any():
        return {}
    return {"expected_calibration_error": expected_calibration_error(confidence[refined], accuracy[refined])}


class _NewMasksEveryEpoch(TrainerCallback):
    def __init__(self, collator: MaskedDiffusionCollator):
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.set_epoch(int((state.epoch or 0) + 1e-6))
