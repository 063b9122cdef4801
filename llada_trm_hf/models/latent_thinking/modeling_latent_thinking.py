"""A causal language model that thinks in latent space: between `<think>` and `</think>` stand the results of a
recursive model that reasoned over the prompt's hidden states, instead of text."""

import copy
import os
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple, logging

from ..backbone_wrapper import BackboneWrapper, input_device
from .configuration_latent_thinking import LatentThinkingConfig
from .dimension_compressor import DimensionCompressor, DimensionCompressorConfig
from .latent_passes import LatentPasses, LatentThinkingOutput
from .latent_thinker import LatentThinker
from .sequence_trm import SequenceTRM, SequenceTRMConfig
from .thought_tokens import thought_token_ids

logger = logging.get_logger(__name__)


class LatentThinkingGenerationMixin(GenerationMixin):
    """
    transformers' generation for a model with a `backbone`: thoughts are thought in the first forward pass, over the
    prompt; from then on it is the backbone that generates.
    """

    config: LatentThinkingConfig
    backbone: PreTrainedModel

    def generate(  # type: ignore[override]
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        As in transformers, except that the latent token is never generated. Takes the arguments of `forward` as well:
        `enable_latent_thinking`, `max_reasoning_steps`. Warns once of prompts without any thought.
        """
        if kwargs.get("enable_latent_thinking") is not False:
            never = _NeverThisToken(self.config.latent_token_id)
            logits_processor = LogitsProcessorList([*(logits_processor or ()), never])
        tokens = kwargs.get("input_ids") if inputs is None else inputs
        is_open = kwargs.get("enable_latent_thinking") is None
        if is_open and isinstance(tokens, torch.Tensor) and not bool((tokens == self.config.latent_token_id).any()):
            logger.warning_once(
                "The prompt has no thought in it, so the backbone answers alone. Messages get one from the chat "
                "template saved with the model, texts from latent_thinking_prompt of llada-trm-hf; "
                "enable_latent_thinking=False says that none is wanted."
            )
        return super().generate(inputs, generation_config, logits_processor, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError, and so does `generate_batch`, which calls it: there is none for latent thinking."""
        raise ValueError(
            "Continuous batching feeds a model parts of prompts, many in one row, but a latent thought reads its "
            "whole prompt: pad the prompts on the left and call generate, or backbone.generate_batch for answers "
            "without thoughts."
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        enable_latent_thinking: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What the backbone prepares, with thoughts in the prompt only."""
        if enable_latent_thinking is not False and self.config.noise_std and not kwargs.get("use_cache", True):
            raise ValueError("With noise_std, every forward pass thinks anew: generate with use_cache=True.")
        num_new = input_ids.shape[1] if next_sequence_length is None else next_sequence_length
        if enable_latent_thinking is not False and num_new < input_ids.shape[1]:  # the others are in the cache
            new_thought = input_ids[:, -num_new:] == self.config.latent_token_id
            if is_first_iteration and past_key_values is not None and bool(new_thought.any()):
                # A cache does not hold the states that a new thought reads: everything is computed again.
                past_key_values.reset()
                next_sequence_length = None
            else:
                enable_latent_thinking = False
        prepared = self.backbone.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if enable_latent_thinking is not False:
            prepared["attention_mask"] = attention_mask  # as it was: a static cache gets one ready for the backbone
        return {**prepared, "enable_latent_thinking": enable_latent_thinking}


class _NeverThisToken(LogitsProcessor):
    """(A custom `SuppressTokensLogitsProcessor` would replace that of the user's `suppress_tokens`.)"""

    def __init__(self, token_id: int):
        self.token_id = token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[..., self.token_id] = -torch.inf
        return scores


class LatentThinkingModel(nn.Module):
    """The model without its logits: what `base_model` is of other causal language models, and what TRL calls."""

    _tp_plan = _pp_plan = None

    def __init__(self, causal_lm: "LatentThinkingForCausalLM"):
        super().__init__()
        self._causal_lm = (causal_lm,)  # not as a sub-module: it owns the weights

    @can_return_tuple
    def forward(self, input_ids: torch.Tensor | None = None, **inputs: Any) -> BaseModelOutputWithPast:
        """`last_hidden_state` `[B, L, D]` and the cache. The arguments are those of the causal language model."""
        states, outputs = self._causal_lm[0].encode(input_ids, num_logits=0, **inputs)
        return BaseModelOutputWithPast(
            last_hidden_state=states,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )


class LatentThinkingForCausalLM(LatentThinkingGenerationMixin, LatentPasses, BackboneWrapper, PreTrainedModel):
    """
    A causal language model (`backbone`) with a [`LatentThinker`] (`thinker`). Build one with
    [`from_backbone`](LatentThinkingForCausalLM.from_backbone).

    A thought is part of `input_ids`: the opening marker, `num_latents` times the latent token, the closing marker.
    What stands before the marker runs through the backbone; its last-layer states are compressed, the SequenceTRM
    reasons over them, and the latents it arrives at are the input embeddings in the latent tokens' places. The rest
    goes on from the same KV cache. Rows without a thought, in the same batch or not, are what the backbone makes of
    them; a row may have several thoughts, each of which reads everything before it.
    """

    config: LatentThinkingConfig
    config_class = LatentThinkingConfig
    recursive_module = "thinker"
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    auto_classes = ("AutoModelForCausalLM",)

    def __init__(
        self,
        config: LatentThinkingConfig,
        backbone: PreTrainedModel | None = None,
        thinker: LatentThinker | None = None,
    ):
        super().__init__(config)
        self.backbone = AutoModelForCausalLM.from_config(config.backbone_config) if backbone is None else backbone
        self.thinker = LatentThinker(config) if thinker is None else thinker
        self.thinker.config = config  # one that was loaded by itself has a copy, which changes would not reach
        self._no_split_modules = [*(self.backbone._no_split_modules or ()), "LatentThinker"]
        if config.thinker_dtype == "float32":
            self._keep_in_fp32_modules_strict = {"thinker"}
        self.post_init()

    # --- Building, saving ---

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike | PreTrainedModel,
        compressor: str | os.PathLike | DimensionCompressorConfig | DimensionCompressor | None = None,
        trm: str | os.PathLike | SequenceTRMConfig | SequenceTRM | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        freeze_backbone: bool = True,
        **kwargs: Any,
    ) -> "LatentThinkingForCausalLM":
        """
        Makes a causal language model think in latent space.

        Args:
            backbone: a causal language model, or the name or folder of one.
            compressor, trm: a model, the folder or repository of one, or a config for a new one; see
                [`LatentThinkingConfig`] for the defaults.
            tokenizer: says which tokens make a thought (`thought_token_ids`); by default the backbone's. Not needed
                with `think_start_token_ids`, `think_end_token_ids` and `latent_token_id`.
            freeze_backbone: whether only the thinker trains.
            kwargs: fields of [`LatentThinkingConfig`] such as `num_latents`; the rest goes to the backbone's
                `from_pretrained` (`dtype`, `device_map`, `quantization_config`, ...).

        Raises:
            ValueError: for parts that do not fit together, a backbone that cannot be continued from a KV cache, or an
                argument without use.
        """
        backbone, fields = cls._backbone_and_fields(backbone, kwargs)
        _check_backbone(backbone)
        if not {"think_start_token_ids", "think_end_token_ids", "latent_token_id"} <= fields.keys():
            if tokenizer is None:
                tokenizer = _tokenizer_of(fields["backbone_name_or_path"])
            fields = {**thought_token_ids(tokenizer), **fields}
        parts = {
            "compressor": _resolve(DimensionCompressor, compressor),
            "trm": _resolve(SequenceTRM, trm),
        }
        for name, part in parts.items():
            fields[f"{name}_config"] = part.config if isinstance(part, PreTrainedModel) else part
        config = LatentThinkingConfig(backbone_config=backbone.config, **fields)
        modules: Any = {name: part for name, part in parts.items() if isinstance(part, PreTrainedModel)}
        thinker = LatentThinker(config, **modules)
        thinker.project_decompressed(
            backbone.get_input_embeddings().weight.detach().float().square().mean().sqrt().item()
        )
        model = cls(config, backbone=backbone, thinker=thinker.to(input_device(backbone)))
        model.generation_config = copy.deepcopy(backbone.generation_config)
        model.backbone.requires_grad_(not freeze_backbone)
        return model

    @classmethod
    def _load_backbone(cls, name_or_path: str, **kwargs: Any) -> PreTrainedModel:
        if os.path.isabs(name_or_path) and not os.path.isdir(name_or_path):
            raise FileNotFoundError(f"There is no folder {name_or_path}.")
        return AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)

    @classmethod
    def _load_recursive_module(cls, path: Any, config: Any, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        return LatentThinker.from_pretrained(path, config=config, **kwargs)

    def _load_generation_config(self, path: Any, **hub: Any) -> None:
        self.generation_config = GenerationConfig.from_pretrained(path, **hub)

    @property
    def base_model(self) -> LatentThinkingModel:
        return LatentThinkingModel(self)

    # --- Forward ---

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        enable_latent_thinking: bool | None = None,
        max_reasoning_steps: int | None = None,
        **kwargs: Any,
    ) -> LatentThinkingOutput:
        """
        Args:
            input_ids: `[B, L]`, thoughts included. What stands in `past_key_values` is not read again: a new thought
                needs its whole prompt here.
            attention_mask: `[B, L]`, 0 for padding, on any side.
            position_ids: `[B, L]`; counted from a row's first real token by default, where there are thoughts.
            past_key_values, use_cache: as in transformers.
            inputs_embeds: instead of `input_ids`; has no thoughts.
            labels: `[B, L]`, the next token's is learned, -100 for none, such as for a thought's own tokens. With
                `logits_to_keep`, only those at the positions it keeps.
            logits_to_keep: logits at the last so many positions, 0 for all, or positions LongTensor `[P]`.
            enable_latent_thinking: `False` gives the bare backbone, to which a latent token is a token like any other.
            max_reasoning_steps: at inference, instead of the config's.
            kwargs: for the loss (`num_items_in_batch`) and the backbone.

        Raises:
            ValueError: for malformed thoughts, or a new thought whose prompt is partly in `past_key_values`.
        """
        for_loss = {n: kwargs.pop(n) for n in ("num_items_in_batch", "shift_labels") if n in kwargs}
        tokens = inputs_embeds if input_ids is None else input_ids
        if tokens is None:
            raise ValueError("Pass input_ids or inputs_embeds.")
        num_logits = tokens.shape[1]
        if isinstance(logits_to_keep, int) and logits_to_keep:
            num_logits = min(num_logits, logits_to_keep)
        _, outputs = self.encode(
            input_ids,
            num_logits,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            enable_latent_thinking=enable_latent_thinking,
            max_reasoning_steps=max_reasoning_steps,
            **kwargs,
        )
        logits = outputs.logits
        assert logits is not None
        if isinstance(logits_to_keep, torch.Tensor):
            logits = logits[:, logits_to_keep]  # they could stand anywhere, so there are all
        loss = None
        if labels is not None or "shift_labels" in for_loss:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **for_loss)
        return LatentThinkingOutput(  # anew: what is set later comes last in a tuple
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reasoning_steps=outputs.reasoning_steps,
            halt_probability=outputs.halt_probability,
        )


def _check_backbone(backbone: PreTrainedModel) -> None:
    model_type = backbone.config.model_type
    if model_type.startswith("llada") or backbone._is_stateful:
        raise ValueError(
            f"A {model_type} model cannot be continued from a KV cache: the backbone has to be a causal transformer."
        )


def _tokenizer_of(name: str | None) -> PreTrainedTokenizerBase:
    if name is None:
        raise ValueError(
            "Pass the backbone's tokenizer, or think_start_token_ids, think_end_token_ids and latent_token_id: the "
            "backbone does not say where it came from."
        )
    return AutoTokenizer.from_pretrained(name)


def _resolve(model_class: Any, part: Any) -> PreTrainedModel | PreTrainedConfig | None:
    return model_class.from_pretrained(part) if isinstance(part, (str, os.PathLike)) else part
