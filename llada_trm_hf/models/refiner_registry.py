"""Which refiners there are, by `model_type`, and how those of one's own travel with a checkpoint."""

import os
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .modeling_hub import HubModel, write_code
from .source_code import module_name, source_files

REFINER_CONFIGS: dict[str, type[PreTrainedConfig]] = {}
REFINERS: dict[str, type[PreTrainedModel]] = {}
# The classes of those that users brought along: their code is saved with the models that hold them.
REGISTERED: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {}


def register_refiner(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> None:
    """
    Makes a refiner of your own known by its `model_type`: in `from_backbone`, in [`LLaDATRMConfig`], and for
    `AutoConfig` and `AutoModel`. Its code is saved with the checkpoints that hold it; for that it stands in a file
    (not in a notebook) that imports torch, transformers, names of this package (`from llada_trm_hf import ...`) and
    siblings (`from .sibling import ...`).

    Args:
        config_class: with a `model_type` of its own, a `hidden_size` and a `chunk_size`.
        model_class: a model with the interface of [`PreTrainedRefiner`], which it may derive from, and
            `config_class` as its `config_class`.

    Raises:
        ValueError: for a `model_type` that is missing or taken, classes that do not belong together, or a file with
            the name of one of the package's.
    """
    model_type, name = config_class.model_type, config_class.__name__
    if not model_type:
        raise ValueError(f"{name} needs a model_type of its own.")
    # By name: running a notebook's cell again, or loading two checkpoints with the class, makes another class of it.
    for known in (CONFIG_MAPPING, REFINER_CONFIGS):
        if model_type in known and known[model_type].__name__ != name:
            raise ValueError(
                f"{name}.model_type={model_type!r} is taken by {known[model_type].__name__}: choose another."
            )
    if model_class.config_class is not config_class:
        raise ValueError(f"{model_class.__name__}.config_class must be {name}, got {model_class.config_class}.")
    if module_name(model_class) is not None:
        source_files(model_class)  # what cannot be saved later is refused now
    if not __name__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
        # Not as remote code: the Auto classes would take it for the code of every other checkpoint too.
        AutoConfig.register(model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)
    REGISTERED[model_type] = (config_class, model_class)
    REFINER_CONFIGS[model_type], REFINERS[model_type] = config_class, model_class


def is_refiner(model_type: str | None) -> bool:
    """Whether `model_type` is that of a refiner, one that came with the code of a checkpoint included."""
    if model_type not in REFINER_CONFIGS:
        # Not before it is needed: a file of one's own may import any other.
        from .own_refiners import OWN_REFINERS

        for classes in OWN_REFINERS:
            register_refiner(*classes)
    return model_type in REFINER_CONFIGS


def refiner_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the refiner that `config` describes."""
    is_refiner(config.model_type)
    model_class = REFINERS[config.model_type]
    if not model_class._supports_sdpa:
        config._attn_implementation = "eager"  # the backbone's would be refused, even by one without attention
    return model_class


def build_refiner(config: PreTrainedConfig) -> PreTrainedModel:
    """A refiner with fresh weights."""
    return refiner_class(config)(config)


class HoldsRefiners(HubModel):
    """Mixin for a model with refiners in it: saves the code of registered ones too, named in `own_refiners.py`."""

    def export_code(self, folder: str | os.PathLike) -> None:
        """As in `HubModel`, and what defines the registered refiners."""
        super().export_code(folder)
        classes = {type(module) for module in self.modules()}  # type: ignore[attr-defined]
        lines = ['"""Refiners of one\'s own that this checkpoint holds."""\n', "OWN_REFINERS = []\n"]
        for config_class, model_class in REGISTERED.values():
            if model_class in classes and write_code(folder, config_class, model_class):
                for cls in (config_class, model_class):
                    lines.append(f"from .{module_name(cls)} import {cls.__name__}")
                lines.append(f"OWN_REFINERS.append(({config_class.__name__}, {model_class.__name__}))")
        if len(lines) > 2:
            Path(folder, "own_refiners.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
