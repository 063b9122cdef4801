"""
What the models with a backbone share: its config in theirs, how it is loaded, the hidden states its LM head reads, and
checkpoints with and without it.
"""

import os
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from .hub_model import BACKBONES, HubModel, model_type_of

# Arguments of `from_pretrained` that say where files come from.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def config_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    """The fields of a config class of this package, as opposed to arguments for the backbone."""
    return config_class.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()


def input_device(backbone: PreTrainedModel) -> torch.device:
    """Where `backbone` takes its tokens: with a `device_map`, what is offloaded to CPU or disk runs elsewhere."""
    places = getattr(backbone, "hf_device_map", None)
    if places is None:
        return backbone.device
    return torch.device(next((place for place in places.values() if place not in ("cpu", "disk")), "cpu"))


def for_the_backbone_only(experts_implementation: str | dict | None) -> dict[str, Any]:
    """For a config with a `backbone_config`: transformers refuses a choice of experts for sub-models without any."""
    if isinstance(experts_implementation, dict):
        return experts_implementation
    return {"backbone_config": experts_implementation}


def config_from_dict(
    config: PreTrainedConfig | dict[str, Any], known: dict[str, type[PreTrainedModel]]
) -> PreTrainedConfig:
    """A config object from `config`, whose `model_type` is looked up in `known` and then in transformers' registry."""
    if isinstance(config, PreTrainedConfig):
        return config
    model_type = config.get("model_type")
    if model_type in known:
        return known[model_type].config_class.from_dict(config)
    if model_type is None:
        raise ValueError(f"A config needs a model_type, one of {', '.join(known)} or another; got {config}.")
    return AutoConfig.for_model(**config)


def lasting_name(name_or_path: str) -> str:
    """A folder's name in full, so that it is found from anywhere; that of a repository as it is."""
    return os.path.abspath(name_or_path) if os.path.isdir(name_or_path) else name_or_path


def backbone_place(name_or_path: str, checkpoint: Any) -> str:
    """
    Where the backbone is that a checkpoint without one names: a repository, a folder, or one relative to the
    checkpoint. Raises FileNotFoundError for a folder that is not there.
    """
    beside = os.path.join(checkpoint, name_or_path)
    if not os.path.isdir(name_or_path) and os.path.isdir(beside):
        return os.path.normpath(beside)
    is_path = os.path.isabs(name_or_path) or name_or_path.startswith(".") or name_or_path.count("/") > 1
    if is_path and not os.path.isdir(name_or_path):
        raise FileNotFoundError(
            f"{checkpoint} holds no backbone, and the folder of the one it names is not there: {name_or_path}. Put it "
            f"there, or change backbone_name_or_path in the config.json of {checkpoint}."
        )
    return name_or_path


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A backbone with random weights."""
    if config.model_type in BACKBONES:
        return BACKBONES[config.model_type](config)
    auto_class = AutoModelForMaskedLM if type(config) in AutoModelForMaskedLM._model_mapping else AutoModelForCausalLM
    return auto_class.from_config(config)


def load_backbone(name_or_path: Any, **kwargs: Any) -> PreTrainedModel:
    """
    A masked-diffusion model from a folder or repository: one of the native families in the official or in this
    package's layout, or any model `AutoModelForMaskedLM` or `AutoModelForCausalLM` knows.
    """
    if os.path.isabs(name_or_path) and not os.path.isdir(name_or_path):
        raise FileNotFoundError(f"There is no folder {name_or_path}.")
    place = {name: kwargs[name] for name in ("cache_dir", "local_files_only", "token") if name in kwargs}
    model_type = model_type_of(PreTrainedConfig.get_config_dict(name_or_path, **place)[0]) or ""
    if model_type == "llada_trm":
        raise ValueError(f"{name_or_path} is a hybrid already, not a backbone: load it with from_pretrained.")
    if model_type in BACKBONES:
        return BACKBONES[model_type].from_pretrained(name_or_path, **kwargs)
    try:
        return AutoModelForMaskedLM.from_pretrained(name_or_path, **kwargs)
    except ValueError:
        return AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)


# --- Hidden states ---


class EncodedTokens(NamedTuple):
    """
    The output of a backbone without its logits.

    Attributes:
        last_hidden_state: `[B, L, D]`, what the LM head reads.
        hidden_states: on request, those of every layer.
        router_aux_loss: the balancing loss of a backbone with experts, in training.
    """

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None
    router_aux_loss: torch.Tensor | None = None


def native_model(backbone: PreTrainedModel) -> PreTrainedModel | None:
    """The model of one of the native families in `backbone`, which may be wrapped by PEFT; None for any other."""
    model = backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone
    return model if hasattr(model, "_block_kv_cache") else None  # (not by class: remote code may load it twice)


def encode(
    backbone: PreTrainedModel,
    inputs: dict[str, Any],
    output_hidden_states: bool | None = None,
    balance_experts: bool = False,
) -> EncodedTokens:
    """The hidden states that `backbone`'s LM head reads, on request those of every layer, and its balancing loss."""
    inputs = {name: value for name, value in inputs.items() if value is not None}
    native: Any = native_model(backbone)
    if native is not None:
        if not balance_experts or not hasattr(native, "balancing_loss"):
            outputs = native.model(**inputs, output_hidden_states=output_hidden_states)
            return EncodedTokens(outputs.last_hidden_state, outputs.hidden_states)
        outputs = native.model(**inputs, output_hidden_states=output_hidden_states, output_router_logits=True)
        aux_loss = native.balancing_loss(outputs.router_logits, inputs.get("attention_mask"))
        return EncodedTokens(outputs.last_hidden_state, outputs.hidden_states, aux_loss)
    inputs.pop("is_padded", None)
    states, outputs = lm_head_inputs(backbone, {**inputs, "output_hidden_states": output_hidden_states}, num_logits=0)
    return EncodedTokens(states, outputs.hidden_states if output_hidden_states else None)


def lm_head_inputs(model: PreTrainedModel, inputs: dict[str, Any], num_logits: int) -> tuple[torch.Tensor, Any]:
    """
    Runs `model` and captures the hidden states its LM head reads.

    Args:
        model: any language model with an output embedding; whatever it does to its logits after the head stays.
        inputs: arguments of its forward.
        num_logits: how many of the last positions the head is evaluated at; 0 for none.

    Returns:
        The states `[B, L, D]`, and the model's outputs with logits `[B, num_logits, V]`.
    """
    captured: list[torch.Tensor] = []

    def capture(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        captured.append(args[0])
        return (args[0][:, args[0].shape[1] - num_logits :],)

    hook = model.get_output_embeddings().register_forward_pre_hook(capture)
    try:
        outputs = model(**inputs)
    finally:
        hook.remove()
    return captured[-1], outputs


# --- Checkpoints ---


class BackboneWrapper(HubModel):
    """
    Mixin for a `PreTrainedModel` made of a `backbone` and a recursive module, whose constructor takes both by name.
    Checkpoints hold both, or the recursive module alone with the name of the backbone.

    Its config has `backbone_config`, `backbone_name_or_path`, `backbone_in_checkpoint` and `refiner_dtype` or
    `thinker_dtype`, which is set when the recursive module is saved in another dtype than its backbone.

    Attributes:
        recursive_module: its name, `"refiner"` or `"thinker"`.
    """

    recursive_module: ClassVar[str]
    config: Any
    config_class: Any
    backbone: PreTrainedModel
    state_dict: Any

    # What a class adds: how its backbone is loaded; its recursive module, from a checkpoint where the module's name is
    # the prefix of its tensors, with the loading info; and its `generation_config` from a checkpoint.
    _load_backbone: Callable[..., PreTrainedModel]
    _load_recursive_module: Callable[..., tuple[PreTrainedModel, dict[str, Any]]]
    _load_generation_config: Callable[..., None]

    @classmethod
    def _backbone_and_fields(
        cls, backbone: str | os.PathLike | PreTrainedModel, arguments: dict[str, Any]
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The backbone, loaded if it is a name or folder, and the fields of the config among `arguments`."""
        own = config_fields(cls.config_class)
        fields = {name: value for name, value in arguments.items() if name in own}
        others = {name: value for name, value in arguments.items() if name not in own}
        if isinstance(backbone, (str, os.PathLike)):
            fields.setdefault("backbone_name_or_path", lasting_name(str(backbone)))
            backbone = cls._load_backbone(str(backbone), **others)
        elif others:
            raise ValueError(f"Unknown argument {', '.join(others)} for a backbone that is already loaded.")
        fields.setdefault("backbone_name_or_path", lasting_name(backbone.config.name_or_path or "") or None)
        return backbone, fields

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_output_embeddings(value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """
        Loads a checkpoint. One without backbone (`save_pretrained(dir, save_backbone=False)`) is put together with the
        backbone its config names; `dtype`, `device_map`, `quantization_config` then apply to that backbone.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        saved = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub) if config is None else config
        if not saved.backbone_in_checkpoint:
            return cls._from_recursive_checkpoint(pretrained_model_name_or_path, saved, hub, kwargs)
        if "experts_implementation" in kwargs:
            kwargs["experts_implementation"] = for_the_backbone_only(kwargs["experts_implementation"])
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        recursive_dtype = getattr(saved, f"{cls.recursive_module}_dtype")
        if recursive_dtype and kwargs.get("dtype", "auto") == "auto":
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            getattr(model, cls.recursive_module).to(getattr(torch, recursive_dtype))
        return loaded

    @classmethod
    def _from_recursive_checkpoint(cls, path: Any, config: Any, hub: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        """Loads the recursive module from `path` and the backbone from where `config` says."""
        wants_info = kwargs.pop("output_loading_info", False)
        fields = config_fields(cls.config_class)
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in fields}
        config = cls.config_class.from_dict({**config.to_dict(), **overrides})
        # Which commit of which files was found for this repository (an Auto class adds it) is not for the backbone's.
        elsewhere = {"adapter_kwargs", "code_revision", "force_download", "revision", "subfolder"}
        kwargs = {name: kwargs[name] for name in kwargs if name not in elsewhere and not name.startswith("_")}
        config.backbone_name_or_path = backbone_place(config.backbone_name_or_path, path)
        backbone = cls._load_backbone(config.backbone_name_or_path, **kwargs)
        found, expected = backbone.config.get_text_config(), config.get_text_config()
        for name in ("hidden_size", "vocab_size"):
            if getattr(found, name) != getattr(expected, name):
                raise ValueError(
                    f"{path} holds the {cls.recursive_module} of a backbone with {name}={getattr(expected, name)}, "
                    f"but {config.backbone_name_or_path} has {getattr(found, name)}: it is another model. Pass "
                    f"backbone_name_or_path to name the right one."
                )
        dtype, recursive_dtype = kwargs.get("dtype", "auto"), getattr(config, f"{cls.recursive_module}_dtype")
        part, info = cls._load_recursive_module(
            path,
            config,
            key_mapping={rf"^{cls.recursive_module}\.": ""},
            output_loading_info=True,
            dtype=recursive_dtype if recursive_dtype and (dtype == "auto" or recursive_dtype == "float32") else dtype,
            **hub,
        )
        config.backbone_config = backbone.config
        whole: Any = cls
        model = whole(config, backbone=backbone, **{cls.recursive_module: part.to(input_device(backbone))}).eval()
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
            save_backbone: with `False`, only the recursive module's tensors and the backbone's name are written.
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
            self.config.backbone_name_or_path = lasting_name(self.config.backbone_name_or_path)
            state_dict = self.state_dict() if state_dict is None else state_dict
            state_dict = {
                name: value for name, value in state_dict.items() if name.startswith(f"{self.recursive_module}.")
            }
        self.config.backbone_in_checkpoint = save_backbone
        part = getattr(self, self.recursive_module)
        recursive_dtype = str(part.dtype).removeprefix("torch.") if part.dtype != self.backbone.dtype else None
        setattr(self.config, f"{self.recursive_module}_dtype", recursive_dtype)
        try:
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        finally:
            self.config.backbone_in_checkpoint = True
