"""What every model of the package shares when it is saved and loaded: its code travels with the weights, and a
checkpoint that lacks weights is refused."""

import os
from typing import Any, ClassVar

from transformers.dynamic_module_utils import custom_object_save


class HubModel:
    """
    Mixin for `PreTrainedModel` classes.

    `save_pretrained` also writes the Python files of the model and the `auto_map` of `config.json`, so that
    `AutoModel*.from_pretrained(folder, trust_remote_code=True)` works where this package is not installed.

    Attributes:
        auto_classes: the Auto classes the model answers to.
    """

    auto_classes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """
        As in transformers, except that tensors missing from the checkpoint are an error instead of being initialised
        at random, and so are tensors of another shape.

        Raises:
            ValueError: naming the tensors.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        may_differ = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        if info["mismatched_keys"] and not may_differ:
            shapes = [
                f"{n} {tuple(found)} instead of {tuple(expected)}" for n, found, expected in info["mismatched_keys"]
            ]
            raise ValueError(
                f"{pretrained_model_name_or_path} holds tensors of another shape than {cls.__name__} with its config: "
                f"{', '.join(sorted(shapes)[:8])}{', ...' if len(shapes) > 8 else ''}."
            )
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} of the tensors of {cls.__name__}: "
                f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}. Load the class it was saved from, or "
                f"a complete checkpoint."
            )
        return (model, info) if wants_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_original_format: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        As in transformers, except that tensors keep this package's names unless `save_original_format=True` asks for
        those of the official checkpoints. (The HF Trainer resumes by the names in memory.)
        """
        if is_main_process:
            os.makedirs(save_directory, exist_ok=True)
            export_code(self, save_directory)
        super().save_pretrained(  # type: ignore[misc]
            save_directory, is_main_process=is_main_process, save_original_format=save_original_format, **kwargs
        )


def export_code(model: Any, folder: str | os.PathLike) -> None:
    """Copies the Python files `model` and its config are made of into `folder`, and fills `model.config.auto_map`."""
    config, model_class = model.config, type(model)
    if not model_class.auto_classes:
        return
    for part in (config, model):
        custom_object_save(part, folder)
    config.auto_map = {"AutoConfig": _reference(type(config))}
    config.auto_map.update({name: _reference(model_class) for name in model_class.auto_classes})


def _reference(cls: type) -> str:
    return f"{cls.__module__.split('.')[-1]}.{cls.__name__}"
