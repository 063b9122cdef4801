"""
What the models with a backbone share: its config in theirs, how it is loaded, the hidden states its LM head reads, and
checkpoints with and without it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig, HfQuantizer
from transformers.utils import logging

from .hub_model import BACKBONES, HUB_HOOKS, HubModel, adapter_and_base, backbone_place, lasting_name, model_type_of
from .rotary import check_inputs

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
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type in known:
        return known[model_type].config_class.from_dict(config)
    if model_type is None:
        raise ValueError(f"A config needs a model_type, one of {', '.join(known)} or another; got {config}.")
    return AutoConfig.for_model(**config)


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A backbone with random weights."""
    if config.model_type in BACKBONES:
        return BACKBONES[config.model_type](config)
    auto_class = AutoModelForMaskedLM if type(config) in AutoModelForMaskedLM._model_mapping else AutoModelForCausalLM
    return auto_class.from_config(config)


def config_dict_of(name_or_path: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The config file of a folder or repository, with those of `arguments` that say where files come from."""
    place = {name: arguments[name] for name in ("cache_dir", "local_files_only", "token") if name in arguments}
    return PreTrainedConfig.get_config_dict(name_or_path, **place)[0]


def load_backbone(name_or_path: Any, **kwargs: Any) -> PreTrainedModel:
    """
    A masked-diffusion model from a folder or repository: one of the native families in the official or in this
    package's layout, or any model `AutoModelForMaskedLM` or `AutoModelForCausalLM` knows. With a `config`, the one it
    is of, whatever the folder's own.
    """
    if os.path.isabs(name_or_path) and not os.path.isdir(name_or_path):
        raise FileNotFoundError(f"There is no folder {name_or_path}.")
    if "config" in kwargs:
        model_type = kwargs["config"].model_type
    else:
        model_type = model_type_of(config_dict_of(name_or_path, kwargs)) or ""
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
        hidden_states: on request, those of every layer; else empty.
        attentions: on request, the attention weights of every layer.
        router_aux_loss: the balancing loss of a backbone with experts, in training.
    """

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...]
    attentions: tuple[torch.Tensor, ...] | None
    router_aux_loss: torch.Tensor | None = None


def native_model(backbone: PreTrainedModel) -> PreTrainedModel | None:
    """The model of one of the native families in `backbone`, which may be wrapped by PEFT; None for any other."""
    model = backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone
    return model if hasattr(model, "_block_kv_cache") else None  # (not by class: remote code may load it twice)


def encode(
    backbone: PreTrainedModel,
    inputs: dict[str, Any],
    output_hidden_states: bool = False,
    output_attentions: bool | None = None,
    balance_experts: bool = False,
) -> EncodedTokens:
    """
    The hidden states that `backbone`'s LM head reads, on request those of every layer and its attention weights, and
    its balancing loss.
    """
    inputs = {name: value for name, value in inputs.items() if value is not None}
    inputs |= {"output_hidden_states": output_hidden_states, "return_dict": True}
    if output_attentions:
        inputs["output_attentions"] = True
    native: Any = native_model(backbone)
    if native is not None:
        if not balance_experts or not hasattr(native, "balancing_loss"):
            outputs = native.model(**inputs)
            return EncodedTokens(outputs.last_hidden_state, outputs.hidden_states or (), outputs.attentions)
        outputs = native.model(**inputs, output_router_logits=True)
        aux_loss = native.balancing_loss(outputs.router_logits, inputs.get("attention_mask"))
        return EncodedTokens(outputs.last_hidden_state, outputs.hidden_states or (), outputs.attentions, aux_loss)
    inputs.pop("is_padded", None)
    check_inputs(inputs.get("input_ids"), inputs.get("attention_mask"))
    states, outputs = lm_head_inputs(backbone, inputs, num_logits=0)
    hidden_states = outputs.hidden_states if output_hidden_states else ()
    return EncodedTokens(states, hidden_states, outputs.attentions if output_attentions else None)


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


def select_states(
    hidden_states: tuple[torch.Tensor | None, ...], output_hidden_states: bool | int | list[int] | None
) -> tuple[torch.Tensor | None, ...] | None:
    """
    The `hidden_states` that `output_hidden_states` asks for: all of them, none, or by their numbers, also from the
    end, with None in the place of the others. (The versions of transformers differ in what a number means.)
    """
    if not output_hidden_states:
        return None
    if isinstance(output_hidden_states, bool):
        return hidden_states
    numbers = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    size = len(hidden_states)
    wanted = {n % size for n in numbers if -size <= n < size}
    return tuple(states if n in wanted else None for n, states in enumerate(hidden_states))


# --- Checkpoints ---


@contextmanager
def only_errors_logged() -> Iterator[None]:
    """Within it, transformers logs no warnings."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


class BackboneQuantizer(HfQuantizer):
    """
    The quantizer of a model's backbone, as that of the whole model, whose other parts are as they are. It knows the
    backbone's tensors by their own names, since that is how the backbone is loaded again.
    """

    def __init__(self, quantizer: HfQuantizer):
        super().__init__(quantizer.quantization_config, pre_quantized=quantizer.pre_quantized)
        self.quantizer = quantizer

    def is_serializable(self) -> bool:
        return self.quantizer.is_serializable()

    @property
    def is_trainable(self) -> bool:
        return self.quantizer.is_trainable

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        state_dict, metadata = self.quantizer.get_state_dict_and_metadata(model.backbone)
        if state_dict is None:  # it has nothing to change
            state_dict = model.backbone.state_dict()
        others = {name: value for name, value in model.state_dict().items() if not name.startswith("backbone.")}
        return {**{f"backbone.{name}": value for name, value in state_dict.items()}, **others}, metadata

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        self.quantizer.dequantize(model.backbone, dtype)
        return model


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
    _hf_peft_config_loaded: bool

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
        if hasattr(backbone, "recursive_module"):
            kind = type(backbone).__name__
            remedy = "load it with from_pretrained, or pass its `.backbone`"
            raise ValueError(f"A {kind} has a backbone already and cannot be one: {remedy}.")
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

    # Of a quantised backbone, what PEFT, accelerate and `save_pretrained` ask the whole model for. Not `is_quantized`:
    # the Trainer then refuses to train anything but adapters.

    @property
    def hf_quantizer(self) -> BackboneQuantizer | None:
        quantizer = getattr(self.backbone, "hf_quantizer", None)
        # (Saved without its backbone, the model has nothing quantised.)
        return BackboneQuantizer(quantizer) if quantizer is not None and self.config.backbone_in_checkpoint else None

    @property
    def quantization_method(self) -> Any:
        return getattr(self.backbone, "quantization_method", None)

    @property
    def is_loaded_in_4bit(self) -> bool:
        return getattr(self.backbone, "is_loaded_in_4bit", False)

    @property
    def is_loaded_in_8bit(self) -> bool:
        return getattr(self.backbone, "is_loaded_in_8bit", False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """
        Loads a checkpoint. One without backbone (`save_pretrained(dir, save_backbone=False)`) is put together with the
        backbone its config names; `dtype` and `device_map` then apply to that backbone. It is quantised as it was when
        the checkpoint was saved, or as `quantization_config` says (`None`: not); the recursive module never is. A
        folder of PEFT adapters is loaded with the checkpoint it names.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        adapter_arguments = dict(kwargs.get("adapter_kwargs") or {})
        # An Auto class has found the adapters' checkpoint already, and says where the adapters are.
        adapter, base = adapter_arguments.pop("_adapter_model_path", None), pretrained_model_name_or_path
        of_base = hub
        if adapter is None:
            adapter, base = adapter_and_base(base, **hub)
            if base != pretrained_model_name_or_path:  # a revision is the adapters'
                of_base = {name: hub[name] for name in ("cache_dir", "local_files_only", "token") if name in hub}
        saved = cls.config_class.from_pretrained(base, **of_base) if config is None else config
        quantized = kwargs.get("quantization_config") or _quantization_of(saved.backbone_config)
        if quantized or not saved.backbone_in_checkpoint:
            loaded = cls._from_parts(base, saved, of_base, kwargs)
            if adapter is not None:
                model = loaded[0] if isinstance(loaded, tuple) else loaded
                name = kwargs.get("adapter_name")
                model.load_adapter(str(adapter), name, adapter_kwargs={**hub, **adapter_arguments})
            return loaded
        if "experts_implementation" in kwargs:
            kwargs["experts_implementation"] = for_the_backbone_only(kwargs["experts_implementation"])
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        recursive_dtype = getattr(saved, f"{cls.recursive_module}_dtype")
        if recursive_dtype and kwargs.get("dtype", "auto") == "auto":
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            getattr(model, cls.recursive_module).to(getattr(torch, recursive_dtype))
        return loaded

    @classmethod
    def _from_parts(cls, path: Any, config: Any, hub: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        """Loads the recursive module from `path`, and the backbone from there too or from where `config` says."""
        wants_info = kwargs.pop("output_loading_info", False)
        fields = config_fields(cls.config_class)
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in fields}
        config = cls.config_class.from_dict({**config.to_dict(), **overrides})
        # Which commit of which files was found for this repository (an Auto class adds it) is not for the backbone's.
        elsewhere = {"adapter_kwargs", "adapter_name", "code_revision", "force_download", "revision", "subfolder"}
        kwargs = {name: kwargs[name] for name in kwargs if name not in elsewhere and not name.startswith("_")}
        if config.backbone_in_checkpoint:
            of_backbone = {"config": config.backbone_config, "key_mapping": {r"^backbone\.": ""}, **hub}
            with only_errors_logged():  # of either part, the other's tensors are unexpected
                backbone = cls._load_backbone(path, **{**kwargs, **of_backbone})
        else:
            config.backbone_name_or_path = backbone_place(config.backbone_name_or_path, path)
            backbone = cls._load_named_backbone(config, kwargs)
        found, expected = backbone.config.get_text_config(), config.get_text_config()
        for name in ("hidden_size", "vocab_size"):
            if getattr(found, name) != getattr(expected, name):
                raise ValueError(
                    f"{path} holds the {cls.recursive_module} of a backbone with {name}={getattr(expected, name)}, "
                    f"but {config.backbone_name_or_path} has {getattr(found, name)}: it is another model. Pass "
                    f"backbone_name_or_path to name the right one."
                )
        if "check_backbone" in HUB_HOOKS and not config.backbone_in_checkpoint:
            HUB_HOOKS["check_backbone"](config, backbone, path)
        dtype, recursive_dtype = kwargs.get("dtype", "auto"), getattr(config, f"{cls.recursive_module}_dtype")
        if recursive_dtype and (dtype == "auto" or recursive_dtype == "float32"):
            dtype = recursive_dtype
        if hasattr(config.backbone_config, "quantization_config"):
            del config.backbone_config.quantization_config  # a recursive module with this config is not quantised
        with only_errors_logged():
            part, info = cls._load_recursive_module(
                path,
                config,
                key_mapping={rf"^{cls.recursive_module}\.": ""},
                output_loading_info=True,
                dtype=dtype,
                **hub,
            )
        config.backbone_config, config.backbone_in_checkpoint = backbone.config, True  # in memory there is one
        config.name_or_path = str(path)  # which adapters name as their base
        whole: Any = cls
        model = whole(config, backbone=backbone, **{cls.recursive_module: part.to(input_device(backbone))}).eval()
        model._load_generation_config(path, **hub)
        return (model, info) if wants_info else model

    @classmethod
    def _load_named_backbone(cls, config: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
        """The backbone that `config` names: quantised as its own checkpoint is, or as `kwargs` say, or as it was."""
        quantization = _quantization_of(config.backbone_config)
        if quantization is not None and "quantization_config" not in kwargs:
            own = config_dict_of(config.backbone_name_or_path, kwargs)
            if not own.get("quantization_config"):
                kwargs = {**kwargs, "quantization_config": AutoQuantizationConfig.from_dict(quantization)}
        return cls._load_backbone(config.backbone_name_or_path, **kwargs)

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
        fingerprint = None
        if not save_backbone and not self._hf_peft_config_loaded:  # else only adapters are saved
            if not self.config.backbone_name_or_path:
                raise ValueError(
                    "save_backbone=False needs to know where the backbone comes from: set "
                    "model.config.backbone_name_or_path to its folder or repository."
                )
            self.config.backbone_name_or_path = lasting_name(self.config.backbone_name_or_path)
            state_dict = self.state_dict() if state_dict is None else state_dict
            fingerprint = HUB_HOOKS.get("backbone_fingerprint", lambda weights: None)(state_dict)
            state_dict = {
                name: value for name, value in state_dict.items() if name.startswith(f"{self.recursive_module}.")
            }
        self.config.backbone_in_checkpoint, self.config.backbone_fingerprint = save_backbone, fingerprint
        part = getattr(self, self.recursive_module)
        recursive_dtype = str(part.dtype).removeprefix("torch.") if part.dtype != self.backbone.dtype else None
        setattr(self.config, f"{self.recursive_module}_dtype", recursive_dtype)
        try:
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        finally:
            self.config.backbone_in_checkpoint = True


def _quantization_of(backbone_config: PreTrainedConfig) -> dict[str, Any] | None:
    """How a backbone with this config is quantised, as in a config file."""
    quantization: Any = getattr(backbone_config, "quantization_config", None)
    return quantization.to_dict() if hasattr(quantization, "to_dict") else quantization
