"""The LLaDA-TRM hybrid: a masked-diffusion backbone proposes, a recursive refiner corrects where it is unsure."""

import copy
import os
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import can_return_tuple

from .active_block import DenoisingInputs
from .backbones import EncodedTokens, build_backbone, encode, load_backbone, native_model
from .block_kv_cache import BlockKVCache
from .chunk_layout import ChunkLayout
from .configuration_llada_trm import LLaDATRMConfig
from .configuration_masked_diffusion_generation import MaskedDiffusionGenerationConfig
from .debug_report import debuggable
from .generation_masked_diffusion import DenoisingOutput, MaskedDiffusionGenerationMixin
from .llada_trm_output import LLaDATRMOutput
from .logits_to_keep import columns_of, keeps_all, kept_positions, select_positions, unpack_logits
from .loss_masked_diffusion import MaskedTargets, masked_diffusion_loss, masked_targets
from .loss_refinement import confidence_loss, deep_supervision_loss
from .modeling_backbone_checkpoints import input_device
from .modeling_hybrid_checkpoints import OWN_FIELDS, HybridCheckpoints
from .refinement_trace import RefinementPass, RefinementTrace
from .refiner_output import RefinerOutput
from .refiner_registry import build_refiner
from .refiners import assemble_refiner, resolve_refiners
from .token_scores import score_tokens


class _Refinement(NamedTuple):
    """What one refinement saw and did."""

    layout: ChunkLayout
    relevant: torch.Tensor  # BoolTensor [B, L], the tokens to be decided
    chunk_confidence: torch.Tensor  # [B, N], the backbone's
    active: torch.Tensor  # BoolTensor [B, N], the chunks refined
    refined: RefinerOutput
    changed_tokens: torch.Tensor  # BoolTensor [B, L], where the best guess is another now; filled in where it is known
    chunk_accuracy: torch.Tensor | None = None  # [B, N], with labels


class LLaDATRMForMaskedDiffusion(MaskedDiffusionGenerationMixin, HybridCheckpoints, PreTrainedModel):
    """
    A masked-diffusion backbone whose last hidden states a refiner corrects, chunk by chunk, only where the backbone is
    unsure. Build one with [`from_backbone`](LLaDATRMForMaskedDiffusion.from_backbone).
    """

    config: LLaDATRMConfig
    config_class = LLaDATRMConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is already a mean over rows: the Trainer must not divide it again
    auto_classes = ("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM")
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

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
        refiner: str | os.PathLike | PreTrainedConfig | PreTrainedModel | list = "recursive_refinement_head",
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
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in OWN_FIELDS}
        if isinstance(backbone, (str, os.PathLike)):
            fields.setdefault("backbone_name_or_path", str(backbone))
            backbone = load_backbone(backbone, **kwargs)
        elif kwargs:
            raise ValueError(f"Unknown argument {', '.join(kwargs)} for a backbone that is already loaded.")
        fields.setdefault("backbone_name_or_path", backbone.config.name_or_path or None)
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

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_output_embeddings(value)

    @can_return_tuple
    @debuggable
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
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> LLaDATRMOutput:
        """
        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, labels, p_mask, logits_to_keep: see
                [`LLaDAForMaskedDiffusion.forward`].
            past_key_values: a [`BlockKVCache`], which then also holds the last hidden states. `input_ids` are the
                columns it asks for; `logits_to_keep`, `relevant_tokens` and the results are those of the whole canvas.
            relevant_tokens: BoolTensor `[B, L]`, the tokens to be decided, which a chunk's confidence is taken over.
                By default the masked and labelled tokens with labels; without, the mask tokens of a row, or all its
                tokens if it has no mask.
            max_steps: recursion steps, the refiner's own number by default.
            enable_refinement: `False` gives exactly the backbone.
            output_refinement_trace, output_hidden_states: see [`LLaDATRMOutput`].
        """
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
        encoded = encode(self.backbone, inputs, output_hidden_states, balance_experts)
        hidden_states = encoded.last_hidden_state
        if input_ids is not None:
            hidden_states = hidden_states.to(input_ids.device)  # with a device_map, layers may be anywhere
        if past_key_values is not None:
            hidden_states = past_key_values.update_hidden_states(hidden_states)
        if enable_refinement is False:
            return self._predict(hidden_states, encoded, targets, logits_to_keep)

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
            hidden_states=(*encoded.hidden_states, refined.hidden_states) if encoded.hidden_states else None,
            refinement_steps=refined.num_steps,
            chunk_confidence=result.chunk_confidence,
            refiner_confidence=refined.confidence,
            refiner_statistics=None if targets is None else refined.statistics,
            chunk_accuracy=result.chunk_accuracy,
            loss_components=components,
            refinement_trace=self._trace(input_ids, result) if output_refinement_trace else None,
        )

    def _predict(
        self,
        hidden_states: torch.Tensor,
        encoded: EncodedTokens,
        targets: MaskedTargets | None,
        logits_to_keep: int | torch.Tensor | None,
    ) -> LLaDATRMOutput:
        """What the backbone alone says."""
        loss = components = None
        if targets is not None:
            scores = score_tokens(hidden_states[targets.positions], self._logits, targets.tokens)
            loss = masked_diffusion_loss(scores.losses, targets)
            components = {"diffusion": loss.detach()}
            if encoded.router_aux_loss is not None:
                components["router_aux"] = encoded.router_aux_loss.detach()
                loss = loss + self.backbone.config.router_aux_loss_coef * encoded.router_aux_loss
        logits = self._logits_at(hidden_states, logits_to_keep)
        return LLaDATRMOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, loss_components=components
        )

    def _refine(
        self,
        hidden_states: torch.Tensor,
        layout: ChunkLayout,
        relevant: torch.Tensor,
        probability: torch.Tensor,
        arguments: dict[str, Any],
    ) -> "_Refinement":
        """
        Refines the chunks of `hidden_states` `[B, L, D]` whose `relevant` tokens (BoolTensor `[B, L]`) have a low mean
        `probability` `[B, L]` of the best guess.
        """
        confidence = layout.mean_per_chunk(probability, relevant, empty=1.0)
        active = layout.any_per_chunk(relevant)
        if self.config.refine_low_confidence_only:
            active = active & (confidence < self.config.min_confidence)
        refined = self.refiner(hidden_states, active_chunks=active, **arguments).to(hidden_states.device)
        return _Refinement(layout, relevant, confidence, active, refined, torch.zeros_like(relevant))

    def _refine_logits(
        self,
        hidden_states: torch.Tensor,
        layout: ChunkLayout,
        relevant: torch.Tensor,
        logits_to_keep: int | torch.Tensor,
        arguments: dict[str, Any],
    ) -> tuple["_Refinement", torch.Tensor]:
        """Refines `hidden_states` `[B, L, D]`; the logits `logits_to_keep` asks for, computed anew where refined."""
        kept = kept_positions(logits_to_keep, relevant)
        wanted = relevant | kept  # [B, L]
        positions = columns_of(wanted, kept, logits_to_keep)  # [B, P]
        read = logits_to_keep if keeps_all(logits_to_keep) else positions
        logits = self._logits(select_positions(hidden_states, read))  # [B, P, V]
        base = logits.detach().float()
        largest = (base.amax(-1) - base.logsumexp(-1)).exp()
        probability = largest.new_zeros(wanted.shape).scatter(1, positions, largest)
        result = self._refine(hidden_states, layout, relevant, probability, arguments)
        best = logits.argmax(-1) if arguments["output_statistics"] else None
        again = layout.to_tokens(result.active) & wanted  # [B, L]
        row, slot = again.gather(1, positions).nonzero(as_tuple=True)
        anew = self._logits(result.refined.hidden_states[row, positions[row, slot]])
        logits = logits.index_put_((row, slot), anew)  # in place, for the tensor may be large
        if best is not None:
            result.changed_tokens.scatter_(1, positions, best != logits.argmax(-1))
        return result, logits if positions is logits_to_keep else unpack_logits(logits, wanted, logits_to_keep)

    def _refine_loss(
        self,
        hidden_states: torch.Tensor,
        layout: ChunkLayout,
        relevant: torch.Tensor,
        targets: MaskedTargets,
        encoded: EncodedTokens,
        arguments: dict[str, Any],
    ) -> tuple["_Refinement", torch.Tensor, dict[str, torch.Tensor]]:
        """Refines `hidden_states` `[B, L, D]`; the weighted sum of the losses, and each of them. Keeps no logits."""
        config = self.config
        positions = relevant | targets.positions  # [B, L]; P of them
        tokens = torch.full_like(positions, -100, dtype=torch.long).masked_scatter(targets.positions, targets.tokens)
        backbone_trains = self._backbone_trains
        with torch.set_grad_enabled(backbone_trains and torch.is_grad_enabled()):
            base = score_tokens(hidden_states[positions], self._logits, tokens[positions])
        probability = base.probability.new_zeros(positions.shape).index_put((positions,), base.probability)
        arguments = {**arguments, "output_step_hidden_states": config.deep_supervision_weight > 0}
        result = self._refine(hidden_states, layout, relevant, probability, arguments)

        in_active = layout.to_tokens(result.active)  # [B, L]
        again = in_active & positions
        anew = score_tokens(result.refined.hidden_states[again], self._logits, tokens[again])
        losses = base.losses.index_put((again[positions],), anew.losses)
        best = base.best.index_put((again[positions],), anew.best)
        result.changed_tokens[positions] = base.best != best
        counted = targets.positions[positions]  # [P], which of the positions are in the loss

        loss = masked_diffusion_loss(losses[counted], targets)
        components = {"diffusion": loss, "backbone": masked_diffusion_loss(base.losses[counted], targets)}
        if backbone_trains:
            loss = loss + components["backbone"]
            if encoded.router_aux_loss is not None:
                components["router_aux"] = encoded.router_aux_loss
                loss = loss + self.backbone.config.router_aux_loss_coef * encoded.router_aux_loss
        if result.refined.step_hidden_states:
            components["deep_supervision"] = self._deep_supervision(result.refined, targets, in_active)
            loss = loss + config.deep_supervision_weight * components["deep_supervision"]
        if result.refined.orthogonality_loss is not None:
            components["orthogonality"] = result.refined.orthogonality_loss
            loss = loss + config.orthogonality_weight * components["orthogonality"]
        correct = torch.zeros_like(positions).index_put((targets.positions,), best[counted] == targets.tokens)
        share = layout.mean_per_chunk(correct, targets.positions, empty=1.0)
        result = result._replace(chunk_accuracy=share)
        components["confidence"] = confidence_loss(result.refined.confidence[result.active], share[result.active])
        # Even with a weight of 0: DDP wants a gradient, if a zero one, for every parameter.
        loss = loss + config.confidence_loss_weight * components["confidence"]
        return result, loss, {name: value.detach() for name, value in components.items()}

    def _deep_supervision(
        self, refined: RefinerOutput, targets: MaskedTargets, in_active: torch.Tensor
    ) -> torch.Tensor:
        """The loss after every recursion step, at the targets in chunks that were refined."""
        there, among = targets.positions & in_active, in_active[targets.positions]  # [B, L], [M]
        supervised = MaskedTargets(there, targets.tokens[among], targets.weights[among])
        losses = []
        for states in refined.step_hidden_states or ():
            scores = score_tokens(states[there], self._logits, supervised.tokens)
            losses.append(masked_diffusion_loss(scores.losses, supervised))
        return deep_supervision_loss(losses, self.config.deep_supervision_schedule)

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

    def _trace(self, input_ids: torch.Tensor | None, result: "_Refinement") -> RefinementTrace | None:
        if input_ids is None:
            return None
        changed = result.changed_tokens & result.relevant
        recorded = RefinementPass.of_forward(result.layout, result.chunk_confidence, result.refined, changed)
        canvas = input_ids.cpu()
        return RefinementTrace(self.config.mask_token_id, input_ids.shape[1], [canvas, canvas], [recorded])

    @property
    def _backbone_trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.backbone.parameters())

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
        )
        if trace is not None and outputs.refinement_trace is not None:
            trace.passes.extend(outputs.refinement_trace.passes)
        if config.remasking != "refiner":
            return DenoisingOutput(outputs.logits)
        # The refiner's verdict on a chunk; the backbone's where it was sure enough.
        refined = outputs.refinement_steps > 0
        per_chunk = torch.where(refined, outputs.refiner_confidence, outputs.chunk_confidence)
        batch, length = inputs.tokens.shape
        layout = ChunkLayout(batch, length, self.config.chunk_size, inputs.attention_mask, per_chunk.device)
        return DenoisingOutput(outputs.logits, layout.to_tokens(per_chunk).gather(1, inputs.positions))
