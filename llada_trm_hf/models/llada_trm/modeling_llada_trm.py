"""The LLaDA-TRM hybrid: a masked-diffusion backbone proposes, a recursive refiner corrects where it is unsure."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from ...generation.block_kv_cache import BlockKVCache, refuse_prefix_cache
from ...generation.block_sampler import DenoisingInputs
from ...generation.configuration_masked_diffusion import MaskedDiffusionGenerationConfig
from ...generation.masked_diffusion_mixin import DenoisingOutput, MaskedDiffusionGenerationMixin
from ...generation.refinement_trace import RefinementPass, RefinementTrace
from ..backbone_wrapper import (
    BackboneWrapper,
    EncodedTokens,
    build_backbone,
    encode,
    input_device,
    load_backbone,
    native_model,
    select_states,
)
from ..modeling_masked_diffusion import (
    MaskedTargets,
    check_loss_arguments,
    masked_diffusion_loss,
    masked_targets,
    score_tokens,
    select_positions,
)
from ..refiners.modeling_refiner import ChunkLayout, refine
from ..refiners.refiner_integration import assemble_refiner, build_refiner, refiner_class, resolve_refiners
from .configuration_llada_trm import LLaDATRMConfig
from .loss_llada_trm import (
    BestGuesses,
    Refinement,
    RefinementObjective,
    best_probability,
    columns_of,
    keeps_all,
    kept_positions,
    unpack_logits,
    weighted_loss,
)

# What reports on a forward pass: filled in by `llada_trm_hf.inspection`, so that this file needs nothing from it.
FORWARD_REPORTERS: dict[str, Callable[..., Any]] = {}


def reported(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Lets the reporter for debug mode, if there is one, run `forward`."""

    @wraps(forward)
    def reporting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or "debug" not in FORWARD_REPORTERS:
            return forward(self, *args, **kwargs)
        return FORWARD_REPORTERS["debug"](forward, self, *args, **kwargs)

    return reporting


@dataclass
class LLaDATRMOutput(ModelOutput):
    """
    Args:
        loss: scalar in float32, with labels.
        logits: `[B, L, V]`, or of the shape `logits_to_keep` asks for; refined.
        hidden_states: with `output_hidden_states=True`, the backbone's, and last the refined ones, each `[B, L, D]`;
            with numbers such as `[0, -1]`, None in the place of the others.
        attentions: with `output_attentions=True`, the backbone's, for each layer `[B, heads, L, L]`. They need
            `attn_implementation="eager"`.
        refinement_steps: LongTensor `[B, N]`, updates applied to each chunk.
        chunk_confidence: FloatTensor `[B, N]`, the backbone's, which decides what is refined; 1 for a chunk with
            nothing to decide.
        refiner_confidence: FloatTensor `[B, N]`, the refiner's own, of the result.
        refiner_statistics: with labels, what the refiner reports of itself; see the refiner.
        chunk_accuracy: FloatTensor `[B, N]`, with labels, the share of a chunk's masked tokens the result gets right;
            1 for a chunk without.
        loss_components: each part of the loss by name, before its weight, detached.
        refinement_trace: with `output_refinement_trace=True`.
        chunk_of_token: LongTensor `[B, L]`, the chunk each token belongs to, -1 for padding.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    refinement_steps: torch.Tensor | None = None
    chunk_confidence: torch.Tensor | None = None
    refiner_confidence: torch.Tensor | None = None
    refiner_statistics: dict[str, torch.Tensor] | None = None
    chunk_accuracy: torch.Tensor | None = None
    loss_components: dict[str, torch.Tensor] | None = None
    refinement_trace: RefinementTrace | None = None
    chunk_of_token: torch.Tensor | None = None


class LLaDATRMForMaskedDiffusion(
    RefinementObjective, MaskedDiffusionGenerationMixin, BackboneWrapper, PreTrainedModel
):
    """
    A masked-diffusion backbone whose last hidden states a refiner corrects, chunk by chunk, only where the backbone is
    unsure. Build one with [`from_backbone`](LLaDATRMForMaskedDiffusion.from_backbone).
    """

    config: LLaDATRMConfig
    config_class = LLaDATRMConfig
    recursive_module = "refiner"
    trace_class = RefinementTrace
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is already a mean over rows: the Trainer must not divide it again
    auto_classes = ("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM")

    def __init__(
        self,
        config: LLaDATRMConfig,
        backbone: PreTrainedModel | None = None,
        refiner: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config) if backbone is None else backbone
        self.refiner = build_refiner(config.refiner_config) if refiner is None else refiner
        if config.refiner_dtype == "float32":
            self._keep_in_fp32_modules_strict = {"refiner"}
        self._no_split_modules = {type(self.refiner).__name__}  # and the backbone's, which post_init adds
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike | PreTrainedModel,
        refiner: str | os.PathLike | PreTrainedConfig | PreTrainedModel | list = "trm_refiner",
        freeze_backbone: bool = True,
        **kwargs: Any,
    ) -> "LLaDATRMForMaskedDiffusion":
        """
        Puts a refiner on a masked-diffusion model.

        Args:
            backbone: a model, or the name or folder of one.
            refiner: the `model_type` of a refiner (built to fit the backbone), its config, a refiner, or the folder or
                repository of one; or a list of them, with `integration="cascade"` or `"mix"`.
            freeze_backbone: whether only the refiner trains.
            kwargs: fields of [`LLaDATRMConfig`]; the rest goes to the backbone's `from_pretrained`
                (`dtype`, `device_map`, `quantization_config`, ...).

        Raises:
            ValueError: if the refiner does not fit the backbone, or an argument has no use.
        """
        backbone, fields = cls._backbone_and_fields(backbone, kwargs)
        chunk_size = fields.get("chunk_size")
        models, configs = resolve_refiners(refiner, backbone.config.get_text_config(), chunk_size)
        fields["chunk_size"] = configs[0].chunk_size if chunk_size is None else chunk_size
        config = LLaDATRMConfig(backbone_config=backbone.config, refiner_config=configs, **fields)
        model = assemble_refiner(config.refiner_config, models)
        hybrid = cls(config, backbone=backbone, refiner=model.to(input_device(backbone)))
        if isinstance(getattr(backbone, "generation_config", None), MaskedDiffusionGenerationConfig):
            hybrid.generation_config = copy.deepcopy(backbone.generation_config)
        if freeze_backbone:
            hybrid.backbone.requires_grad_(False)
        return hybrid

    @classmethod
    def _load_backbone(cls, name_or_path: str, **kwargs: Any) -> PreTrainedModel:
        return load_backbone(name_or_path, **kwargs)

    @classmethod
    def _load_recursive_module(
        cls, path: Any, config: LLaDATRMConfig, **kwargs: Any
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        return refiner_class(config.refiner_config).from_pretrained(path, config=config.refiner_config, **kwargs)

    def _load_generation_config(self, path: Any, **hub: Any) -> None:
        self.adjust_generation_fn(None, False, None, path, **hub)

    @can_return_tuple
    @reported
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: BlockKVCache | None = None,
        labels: torch.Tensor | None = None,
        p_mask: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        relevant_tokens: torch.Tensor | None = None,
        max_steps: int | None = None,
        enable_refinement: bool | None = None,
        output_refinement_trace: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> LLaDATRMOutput:
        """
        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, labels, p_mask, logits_to_keep: see
                [`MaskedDiffusionLM.forward`].
            past_key_values: a [`BlockKVCache`], which then also holds the last hidden states. `input_ids` are the
                columns it asks for; `logits_to_keep`, `relevant_tokens` and the results are those of the whole canvas.
            relevant_tokens: BoolTensor `[B, L]`, the tokens to be decided, which a chunk's confidence is taken over.
                By default the masked and labelled tokens with labels; without, the mask tokens of a row, or all its
                tokens if it has no mask.
            max_steps: recursion steps, the refiner's own number by default.
            enable_refinement: `False` gives exactly the backbone.
            output_refinement_trace, output_hidden_states, output_attentions: see [`LLaDATRMOutput`]; the config's by
                default.
        """
        check_loss_arguments(self, labels, p_mask, past_key_values)
        refuse_prefix_cache(past_key_values)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "past_key_values": past_key_values,
            **kwargs,
        }
        if logits_to_keep is None and not (self.training and labels is not None):
            logits_to_keep = 0
        targets = None if labels is None else masked_targets(input_ids, labels, self.config.mask_token_id, p_mask)
        balance_experts = self.training and targets is not None and self._backbone_trains
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        encoded = encode(self.backbone, inputs, bool(output_hidden_states), output_attentions, balance_experts)
        hidden_states = encoded.last_hidden_state
        if input_ids is not None:
            hidden_states = hidden_states.to(input_ids.device)  # with a device_map, layers may be anywhere
        if past_key_values is not None:
            hidden_states = past_key_values.update_hidden_states(hidden_states)
        if enable_refinement is False:
            outputs = self._predict(hidden_states, encoded, targets, logits_to_keep)
            outputs.hidden_states = select_states(encoded.hidden_states, output_hidden_states)
            return outputs

        batch, length, _ = hidden_states.shape
        layout = ChunkLayout(batch, length, self.config.chunk_size, attention_mask, hidden_states.device)
        relevant = self._relevant_tokens(relevant_tokens, targets, input_ids, layout)
        arguments = {
            "attention_mask": attention_mask,
            "max_steps": max_steps,
            "output_statistics": bool(output_refinement_trace) or targets is not None,
        }
        loss = components = logits = None
        if targets is None:
            assert logits_to_keep is not None
            result, logits = self._refine_logits(hidden_states, layout, relevant, logits_to_keep, arguments)
        else:
            result, loss, components = self._refine_loss(hidden_states, layout, relevant, targets, encoded, arguments)
            logits = self._logits_at(result.refined.hidden_states, logits_to_keep)
        refined = result.refined
        return LLaDATRMOutput(
            loss=loss,
            logits=logits,
            hidden_states=select_states((*encoded.hidden_states, refined.hidden_states), output_hidden_states),
            attentions=encoded.attentions,
            refinement_steps=refined.num_steps,
            chunk_confidence=result.chunk_confidence,
            refiner_confidence=refined.confidence,
            refiner_statistics=None if targets is None else refined.statistics,
            chunk_accuracy=result.chunk_accuracy,
            loss_components=components,
            refinement_trace=self._trace(input_ids, result) if output_refinement_trace else None,
            chunk_of_token=layout.chunk_of_token,
        )

    def _predict(
        self,
        hidden_states: torch.Tensor,
        encoded: EncodedTokens,
        targets: MaskedTargets | None,
        logits_to_keep: int | torch.Tensor | None,
    ) -> LLaDATRMOutput:
        """The output of the backbone alone."""
        loss = components = None
        if targets is not None:
            scores = score_tokens(hidden_states[targets.positions], self._logits, targets.tokens)
            components = {"diffusion": masked_diffusion_loss(scores.losses, targets)}
            if encoded.router_aux_loss is not None:
                components["router_aux"] = encoded.router_aux_loss
            loss, components = weighted_loss(components, self.config)
        logits = self._logits_at(hidden_states, logits_to_keep)
        return LLaDATRMOutput(loss=loss, logits=logits, attentions=encoded.attentions, loss_components=components)

    def _refine(
        self,
        hidden_states: torch.Tensor,
        layout: ChunkLayout,
        relevant: torch.Tensor,
        probability: torch.Tensor,
        arguments: dict[str, Any],
    ) -> Refinement:
        """Refines the chunks whose `relevant` tokens `[B, L]` have a low mean `probability` `[B, L]` of the best."""
        confidence = layout.mean_per_chunk(probability, relevant, empty=1.0)
        active = layout.any_per_chunk(relevant)
        if self.config.refine_low_confidence_only:
            active = active & (confidence < self.config.min_confidence)
        refined = refine(self.refiner, hidden_states, layout, active_chunks=active, **arguments)
        refined = refined.to(hidden_states.device)
        return Refinement(layout, relevant, confidence, active, refined)

    def _refine_logits(
        self,
        hidden_states: torch.Tensor,
        layout: ChunkLayout,
        relevant: torch.Tensor,
        logits_to_keep: int | torch.Tensor,
        arguments: dict[str, Any],
    ) -> tuple[Refinement, torch.Tensor]:
        """Refines `hidden_states` `[B, L, D]`; the logits `logits_to_keep` asks for, computed anew where refined."""
        if torch.compiler.is_compiling():
            return self._refine_all_logits(hidden_states, layout, relevant, logits_to_keep, arguments)
        kept = kept_positions(logits_to_keep, relevant)
        wanted = relevant | kept  # [B, L]
        positions = columns_of(wanted, kept, logits_to_keep)  # [B, P]
        read = logits_to_keep if keeps_all(logits_to_keep) else positions
        logits = self._logits(select_positions(hidden_states, read))  # [B, P, V]
        largest = best_probability(logits)
        probability = largest.new_zeros(wanted.shape).scatter(1, positions, largest)
        result = self._refine(hidden_states, layout, relevant, probability, arguments)
        best = logits.argmax(-1) if arguments["output_statistics"] else None
        again = layout.to_tokens(result.active) & wanted  # [B, L]
        row, slot = again.gather(1, positions).nonzero(as_tuple=True)
        anew = self._logits(result.refined.hidden_states[row, positions[row, slot]])
        logits = logits.index_put_((row, slot), anew)  # in place, for the tensor may be large
        if best is not None:
            refined = (
                best.index_put((row, slot), anew.argmax(-1)),
                largest.index_put((row, slot), best_probability(anew)),
            )
            where = (torch.arange(len(best), device=best.device)[:, None], positions)
            guesses = BestGuesses(where, (best, refined[0]), (largest, refined[1]))
            result = result._replace(guesses=guesses)
        return result, logits if positions is logits_to_keep else unpack_logits(logits, wanted, logits_to_keep)

    def _refine_all_logits(
        self,
        hidden_states: torch.Tensor,
        layout: ChunkLayout,
        relevant: torch.Tensor,
        logits_to_keep: int | torch.Tensor,
        arguments: dict[str, Any],
    ) -> tuple[Refinement, torch.Tensor]:
        """The same for a compiled or exported graph, whose shapes cannot depend on values: twice at every position."""
        base = self._logits(hidden_states)  # [B, L, V]
        probability = best_probability(base)
        result = self._refine(hidden_states, layout, relevant, probability, arguments)
        anew = layout.to_tokens(result.active) & (relevant | kept_positions(logits_to_keep, relevant))  # [B, L]
        logits = torch.where(anew[..., None], self._logits(result.refined.hidden_states), base)
        if arguments["output_statistics"]:
            tokens, probabilities = (base.argmax(-1), logits.argmax(-1)), (probability, best_probability(logits))
            result = result._replace(guesses=BestGuesses((...,), tokens, probabilities))
        return result, select_positions(logits, logits_to_keep)

    def _logits_at(
        self, hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor | None
    ) -> torch.Tensor | None:
        return None if logits_to_keep is None else self._logits(select_positions(hidden_states, logits_to_keep))

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The LM head at `hidden_states` `[..., D]`."""
        return self.backbone.get_output_embeddings()(hidden_states).to(hidden_states.device)

    def _relevant_tokens(
        self,
        relevant_tokens: torch.Tensor | None,
        targets: MaskedTargets | None,
        input_ids: torch.Tensor | None,
        layout: ChunkLayout,
    ) -> torch.Tensor:
        if relevant_tokens is not None:
            return relevant_tokens & layout.is_real
        if input_ids is not None and input_ids.shape != layout.is_real.shape:
            raise ValueError("With a cache, relevant_tokens has to say which tokens of the canvas are to be decided.")
        if targets is not None:
            return targets.positions & layout.is_real
        if input_ids is None:
            return layout.is_real
        masks = (input_ids == self.config.mask_token_id) & layout.is_real
        return masks | (layout.is_real & ~masks.any(-1, keepdim=True))

    def _trace(self, input_ids: torch.Tensor | None, result: Refinement) -> RefinementTrace | None:
        if input_ids is None:
            return None
        assert result.guesses is not None
        guesses, probability = result.guesses.of_tokens(result.relevant)
        refined = result.refined
        similarity = (refined.statistics or {}).get("similarity")
        if similarity is None:  # a refiner that reports none
            similarity = torch.full_like(refined.confidence.detach(), torch.nan)[..., None]
        recorded = RefinementPass(
            chunk_of_token=result.layout.chunk_of_token.cpu(),
            chunk_confidence=result.chunk_confidence.cpu(),
            refiner_confidence=refined.confidence.detach().cpu(),
            num_steps=refined.num_steps.cpu(),
            similarity=similarity.cpu(),
            changed_tokens=(guesses[:, 0] != guesses[:, 1]).cpu(),
            rows=torch.arange(len(guesses)),
            guesses=guesses.cpu(),
            guess_probability=probability.cpu(),
        )
        canvas = input_ids.cpu()
        return RefinementTrace(self.config.mask_token_id, input_ids.shape[1], [canvas, canvas], [recorded])

    @property
    def _transformer(self) -> Any:
        return (native_model(self.backbone) or self.backbone).base_model

    def _block_kv_cache(self) -> BlockKVCache:
        native = native_model(self.backbone)
        if native is None:
            raise ValueError(
                f"kv_cache needs a native LLaDA or LLaDA-MoE backbone; {type(self.backbone).__name__} computes the "
                f"whole canvas in every step: use kv_cache='none'."
            )
        return native._block_kv_cache()

    def _denoising_output(
        self, inputs: DenoisingInputs, config: MaskedDiffusionGenerationConfig, trace: RefinementTrace | None
    ) -> DenoisingOutput:
        outputs = self(
            **inputs.model_inputs(),
            logits_to_keep=inputs.positions,
            relevant_tokens=inputs.undecided,
            enable_refinement=config.enable_refinement,
            output_refinement_trace=trace is not None,
            return_dict=True,
        )
        if trace is not None and outputs.refinement_trace is not None:
            trace.passes.extend(outputs.refinement_trace.passes)
        if config.remasking != "refiner":
            return DenoisingOutput(outputs.logits)
        # The refiner's confidence in a chunk; the backbone's where that was high enough.
        refined = outputs.refinement_steps > 0
        per_chunk = torch.where(refined, outputs.refiner_confidence, outputs.chunk_confidence)
        per_token = per_chunk.gather(1, outputs.chunk_of_token.clamp(min=0))
        return DenoisingOutput(outputs.logits, per_token.gather(1, inputs.positions))
