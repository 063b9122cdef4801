"""The trainer of [`DimensionCompressor`], on the last-layer hidden states of a frozen language model."""

import inspect
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel

from ..data import TextCollator
from ..models import DimensionCompressor, PCAFit
from ..models.backbone_wrapper import encode
from .arguments import CompressorTrainingArguments
from .base_trainer import BaseTrainer
from .reconstruction_metrics import compare_next_tokens, head_width, reconstruction_metrics


class CompressorTrainer(BaseTrainer):
    """
    Trains a [`DimensionCompressor`] on a frozen language model's last-layer hidden states of text. Every real token
    counts the same, however a batch is divided. Checkpoints hold the compressor and name the language model.

    On held-out text it reports `reconstruction_metrics`, and how the LM head reads the reconstruction:
    `eval_top_token_agreement`, the share of tokens with the same most likely successor, and `eval_kl_divergence`.
    `eval_loss` is the mean squared error. (The states stay in memory: tokens x hidden size x 4 bytes, and again.)

    Args:
        language_model: any causal language model; frozen here. Its hidden size is the compressor's.
        train_dataset, eval_dataset: samples with `input_ids`, of `tokenize_texts` or `tokenize_reasoning`.
        kwargs: as in `Trainer`.

    Raises:
        ValueError: if the sizes differ.
    """

    args: CompressorTrainingArguments

    def __init__(
        self,
        model: DimensionCompressor,
        args: CompressorTrainingArguments,
        language_model: PreTrainedModel,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ):
        width = head_width(language_model.get_output_embeddings())
        if width != model.config.hidden_size:
            size = model.config.hidden_size
            raise ValueError(f"The language model's states are {width} wide, the compressor takes hidden_size={size}.")
        if train_dataset is not None and not hasattr(train_dataset, "__len__"):
            # Each process reads its own share: lengths differ, so one cannot cut batches for the others.
            args.accelerator_config.dispatch_batches = False
        model.config.backbone_name_or_path = language_model.config.name_or_path or None
        super().__init__(
            model=model,
            args=args,
            data_collator=TextCollator(),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=self._held_out_metrics,
            **kwargs,
        )
        self.language_model = language_model.requires_grad_(False).eval()
        if getattr(language_model, "hf_device_map", None) is None:  # else it is placed already
            language_model.to(self.args.device)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of all micro-batches

    def fit_pca(self, num_batches: int | None = None) -> PCAFit:
        """Sets the compressor to the optimum for the training data, or for its first batches. See its `fit_pca`."""
        return self.model.fit_pca(self.hidden_states(num_batches))

    def hidden_states(self, num_batches: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Hidden states and mask of this process's share of the training data, each sample once."""
        loader = DataLoader(self.train_dataset, batch_size=self.args.train_batch_size, collate_fn=self.data_collator)
        for batch in islice(loader, self.args.process_index, num_batches, self.args.world_size):
            batch = self._prepare_inputs(batch)
            yield last_layer_states(self.language_model, **batch), batch["attention_mask"]

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of an optimizer step, and the real tokens in them on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = sum((batch["attention_mask"].sum() for batch in batches), torch.zeros((), dtype=torch.long))
        return batches, self.accelerator.gather(tokens.to(device).reshape(1)).sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The share of this micro-batch in the mean squared error over all real tokens of the step."""
        mask = inputs["attention_mask"]
        outputs = model(last_layer_states(self.language_model, inputs["input_ids"], mask), attention_mask=mask)
        loss = outputs.loss
        if num_items_in_batch is not None:
            # Processes average their gradients; this undoes it, since the shares have to add up.
            loss = loss * mask.sum() * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Reconstruction, agreement and divergence of each token; the states themselves and the mask."""
        inputs = self._prepare_inputs(inputs)
        mask = inputs["attention_mask"]
        states = last_layer_states(self.language_model, inputs["input_ids"], mask)
        reconstructed = self.model(states, attention_mask=mask).reconstructed.float()
        real, head = mask.bool(), self.language_model.get_output_embeddings()
        same, divergence = compare_next_tokens(head, states[real], reconstructed[real])
        per_token = [torch.zeros_like(mask, dtype=torch.float32).masked_scatter(real, v) for v in (same, divergence)]
        return None, (reconstructed, *per_token), (states.float(), mask)

    def _held_out_metrics(self, outputs: EvalPrediction) -> dict[str, float]:
        # One entry per batch, as CompressorTrainingArguments ask for. A row of another process is padded with -100.
        real = [mask == 1 for _, mask in outputs.label_ids]

        def rows(batches: Iterable[np.ndarray]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate([batch[kept] for batch, kept in zip(batches, real)]))

        reconstructed, same, divergence = (rows(batches) for batches in zip(*outputs.predictions))
        metrics = reconstruction_metrics(reconstructed, rows(states for states, _ in outputs.label_ids))
        metrics |= {"top_token_agreement": same.mean().item(), "kl_divergence": divergence.mean().item()}
        return {"loss": metrics["mse"], **metrics}


@torch.no_grad()
def last_layer_states(
    language_model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """The hidden states `[B, L, D]` that the LM head reads; the head is not run, other layers' states are not kept."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "use_cache" in inspect.signature(language_model.forward).parameters:
        inputs["use_cache"] = False
    return encode(language_model, inputs).last_hidden_state.to(input_ids.device)
