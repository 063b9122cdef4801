"""What every model of the package shares when it is saved: the code travels with the weights."""

import os
from typing import ClassVar

from transformers.dynamic_module_utils import custom_object_save


class ExportableModel:
    """
    Mixin for `PreTrainedModel` classes. `save_pretrained` also writes the Python files of the model and the
    `auto_map` of `config.json`, so that `AutoModel*.from_pretrained(folder, trust_remote_code=True)` works where this
    package is not installed.

    Attributes:
        auto_classes: the Auto classes the model answers to.
    """

    auto_classes: ClassVar[tuple[str, ...]] = ()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_original_format: bool = False,
        **kwargs,
    ) -> None:
        """
        As in transformers, except that tensors keep this package's names unless `save_original_format=True` asks for
        those of the official checkpoints. (The HF Trainer resumes by names in memory.)
        """
        if is_main_process and self.auto_classes:
            os.makedirs(save_directory, exist_ok=True)
            export_code(self, save_directory)
        super().save_pretrained(  # type: ignore[misc]
            save_directory, is_main_process=is_main_process, save_original_format=save_original_format, **kwargs
        )


def export_code(model: ExportableModel, folder: str | os.PathLike) -> None:
    """Copies the Python files `model` and its config are made of into `folder`, and fills `model.config.auto_map`."""
    config, cls = model.config, type(model)  # type: ignore[attr-defined]
    custom_object_save(model, folder)
    custom_object_save(config, folder)
    auto_map = {"AutoConfig": f"{type(config).__module__.split('.')[-1]}.{type(config).__name__}"}
    auto_map.update({name: f"{cls.__module__.split('.')[-1]}.{cls.__name__}" for name in cls.auto_classes})
    config.auto_map = auto_map
