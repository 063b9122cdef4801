"""Checkpoints of a run without the backbone that does not change in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from .recording_trainer import RecordingTrainer


@contextmanager
def without_backbone(model: Any) -> Iterator[None]:
    """In it, `model.save_pretrained` leaves the backbone out, whatever the Trainer calls it with."""
    model.save_pretrained = partial(model.save_pretrained, save_backbone=False)
    try:
        yield
    finally:
        del model.save_pretrained


class BackboneSavingTrainer(RecordingTrainer):
    """
    A [`RecordingTrainer`] of a latent-thinking model; `args.save_backbone` says whether checkpoints hold its backbone.

    Raises:
        ValueError: if they are to leave out a backbone nobody could find again, or one that trains.
    """

    def __init__(self, *, model: Any, args: Any, **kwargs: Any):
        if not args.save_backbone:
            if not model.config.backbone_name_or_path:
                raise ValueError("save_backbone=False needs config.backbone_name_or_path to say where it is.")
            if any(parameter.requires_grad for parameter in model.backbone.parameters()):
                raise ValueError("save_backbone=False would lose what the backbone learns: freeze it, or save it.")
        super().__init__(model=model, args=args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.save_backbone:  # type: ignore[attr-defined]
            super()._save(output_dir, state_dict)
            return
        with without_backbone(self.model):
            super()._save(output_dir, state_dict)
