"""Checkpoints of a model that stands on a backbone: whole, or its own part alone with the name of the backbone."""

import os
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_parts import of_the_backbone
from .modeling_hub import HubModel

# Arguments of `from_pretrained` that say where files come from.
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
)


def own_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    """Fields of a config class of ours, as opposed to arguments for the backbone."""
    return config_class.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()


def input_device(backbone: PreTrainedModel) -> torch.device:
    """Where `backbone` takes its tokens: with a `device_map`, what is offloaded to CPU or disk runs elsewhere."""
    places = getattr(backbone, "hf_device_map", None)
    if places is None:
        return backbone.device
    return torch.device(next((place for place in places.values() if place not in ("cpu", "disk")), "cpu"))


class BackboneCheckpoints(HubModel):
    """
    Mixin for a `PreTrainedModel` made of a `backbone` and a part of its own, whose constructor takes both by name.

    Its config has `backbone_config`, `backbone_name_or_path`, `backbone_in_checkpoint` and, named after the part,
    `..._dtype`, which is set when the part is saved in another dtype than its backbone.

    Attributes:
        own_part: the name of that part.
    """

    own_part: ClassVar[str]
    config: Any
    config_class: Any
    backbone: PreTrainedModel
    state_dict: Any

    @classmethod
    def _load_backbone(cls, name_or_path: str, **kwargs: Any) -> PreTrainedModel:
        """For the class to say, as the two below: how its backbone is loaded."""
        raise NotImplementedError

    @classmethod
    def _load_own_part(cls, path: Any, config: Any, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The part, from a checkpoint where its tensors' names begin with `own_part`, and the loading info."""
        raise NotImplementedError

    def _load_generation_config(self, path: Any, **hub: Any) -> None:
        """Sets `generation_config`, of the class that the model generates with, from the checkpoint."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """
        Loads a checkpoint. One without backbone (`save_pretrained(dir, save_backbone=False)`) is put together with the
        backbone its config names; `dtype`, `device_map`, `quantization_config` then apply to that backbone.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        saved = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub) if config is None else config
        if not saved.backbone_in_checkpoint:
            return cls._from_part_checkpoint(pretrained_model_name_or_path, saved, hub, kwargs)
        if "experts_implementation" in kwargs:
            kwargs["experts_implementation"] = of_the_backbone(kwargs["experts_implementation"])
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        own_dtype = getattr(saved, f"{cls.own_part}_dtype")
        if own_dtype and kwargs.get("dtype", "auto") == "auto":
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            getattr(model, cls.own_part).to(getattr(torch, own_dtype))
        return loaded

    @classmethod
    def _from_part_checkpoint(cls, path: Any, config: Any, hub: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        """Loads the own part from `path` and the backbone from where `config` says."""
        wants_info = kwargs.pop("output_loading_info", False)
        fields = own_fields(cls.config_class)
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in fields}
        config = cls.config_class.from_dict({**config.to_dict(), **overrides})
        # Which commit of which files was found for this repository (an Auto class adds it) is not for the backbone's.
        elsewhere = {"adapter_kwargs", "code_revision", "force_download", "revision", "subfolder"}
        kwargs = {name: kwargs[name] for name in kwargs if name not in elsewhere and not name.startswith("_")}
        backbone = cls._load_backbone(config.backbone_name_or_path, **kwargs)
        found, expected = backbone.config.get_text_config(), config.get_text_config()
        for name in ("hidden_size", "vocab_size"):
            if getattr(found, name) != getattr(expected, name):
                raise ValueError(
                    f"{path} holds the {cls.own_part} of a backbone with {name}={getattr(expected, name)}, but "
                    f"{config.backbone_name_or_path} has {getattr(found, name)}: it is another model. Pass "
                    f"backbone_name_or_path to name the right one."
                )
        dtype, own_dtype = kwargs.get("dtype", "auto"), getattr(config, f"{cls.own_part}_dtype")
        part, info = cls._load_own_part(
            path,
            config,
            key_mapping={rf"^{cls.own_part}\.": ""},
            output_loading_info=True,
            dtype=own_dtype if own_dtype and (dtype == "auto" or own_dtype == "float32") else dtype,
            **hub,
        )
        config.backbone_config = backbone.config
        whole: Any = cls
        model = whole(config, backbone=backbone, **{cls.own_part: part.to(input_device(backbone))}).eval()
        model._load_generation_config(path, **hub)
        return (model, info) if wants_info else model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        save_backbone: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            save_directory: a folder.
            save_backbone: with `False`, only the tensors of the model's own part and the backbone's name are written.
            state_dict, kwargs: as in transformers.

        Raises:
            ValueError: without the backbone, if the config does not say where it came from.
        """
        if not save_backbone:
            if not self.config.backbone_name_or_path:
                raise ValueError(
                    "save_backbone=False needs to know where the backbone comes from: set "
                    "model.config.backbone_name_or_path to its folder or repository."
                )
            state_dict = self.state_dict() if state_dict is None else state_dict
            state_dict = {name: value for name, value in state_dict.items() if name.startswith(f"{self.own_part}.")}
        self.config.backbone_in_checkpoint = save_backbone
        part = getattr(self, self.own_part)
        own_dtype = str(part.dtype).removeprefix("torch.") if part.dtype != self.backbone.dtype else None
        setattr(self.config, f"{self.own_part}_dtype", own_dtype)
        try:
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        finally:
            self.config.backbone_in_checkpoint = True
