"""The trainer of [`LatentThinkingForCausalLM`]: answers after latent thoughts."""

from typing import Any

from torch import nn

from ..data import LatentAnswerCollator
from ..models import LatentThinkingForCausalLM
from ..models.latent_thinking.thinking_chat_template import tokenizer_to_save
from .arguments import LatentAnswerTrainingArguments
from .base_trainer import BaseTrainer


class LatentAnswerTrainer(BaseTrainer):
    """
    Answer supervision: the cross-entropy of the answer, given the prompt and the latents thought from it. It trains
    whatever requires gradients, as a rule the thinker (`from_backbone` freezes the backbone).

    Besides the loss it logs `answer_accuracy`, the share of answers whose every token is the most likely one after
    those before it, and `reasoning_steps`.

    Args:
        train_dataset, eval_dataset: of `tokenize_latent_answers`.
        kwargs: as in `Trainer`. A `processing_class` is saved as `latent_thinking_tokenizer` makes it.
    """

    args: LatentAnswerTrainingArguments

    def __init__(self, model: LatentThinkingForCausalLM, args: LatentAnswerTrainingArguments, **kwargs: Any):
        if kwargs.get("processing_class") is not None:
            kwargs["processing_class"] = tokenizer_to_save(kwargs["processing_class"], model.config)
        collator = LatentAnswerCollator(model.config.get_text_config().pad_token_id or 0)
        super().__init__(model=model, args=args, data_collator=collator, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss; the share of right answers goes to the next log."""
        labels = inputs["labels"][:, 1:]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        correct = (outputs["logits"][:, :-1].argmax(-1) == labels) | (labels == -100)
        self.record("answer_accuracy", correct.all(-1).float().mean())
        self.record("reasoning_steps", outputs["reasoning_steps"].float().mean())
        return (loss, outputs) if return_outputs else loss
