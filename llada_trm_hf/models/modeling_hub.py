"""What every model of the package shares when it is saved and loaded: its code travels with the weights, and a
checkpoint that lacks weights is refused."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar

from .source_code import module_name, source_files


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
            self.export_code(save_directory)
        super().save_pretrained(  # type: ignore[misc]
            save_directory, is_main_process=is_main_process, save_original_format=save_original_format, **kwargs
        )

    def export_code(self, folder: str | os.PathLike) -> None:
        """Writes the Python files of the model and its config into `folder`, and fills `config.auto_map`."""
        config, model_class = self.config, type(self)  # type: ignore[attr-defined]
        if not self.auto_classes:
            return
        if not write_code(folder, type(config), model_class):
            return
        # The config through the model's file, where that has it. Of a folder, transformers tells versions of the code
        # apart by what an entry file imports: behind one of its own, a config would keep the model class it was first
        # loaded with, whatever the model's file says later.
        entry = module_name(model_class)
        if not hasattr(sys.modules[model_class.__module__], type(config).__name__):
            entry = module_name(type(config))
        config.auto_map = {"AutoConfig": f"{entry}.{type(config).__name__}"}
        config.auto_map.update(
            {name: f"{module_name(model_class)}.{model_class.__name__}" for name in self.auto_classes}
        )


def write_code(folder: str | os.PathLike, *classes: Any) -> bool:
    """
    Writes the Python files that `classes` (or functions) are made of into `folder`; False if one of a notebook has
    none.
    """
    os.makedirs(folder, exist_ok=True)
    for cls in classes:
        if module_name(cls) is None:
            warnings.warn(
                f"{cls.__name__} stands in no file, so its code is not saved with the model: whoever loads it needs "
                f"the class.",
                stacklevel=2,
            )
            return False
        for name, text in source_files(cls).items():
            Path(folder, name).write_text(text, encoding="utf-8")
    return True
