"""The LLaDA-TRM hybrid: a masked-diffusion backbone proposes, a recursive refiner corrects where it is unsure."""

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .backbones import build_backbone, encode, load_backbone
from .chunk_layout import ChunkLayout
from .configuration_llada_trm import LLaDATRMConfig, of_the_backbone
from .configuration_masked_diffusion_generation import MaskedDiffusionGenerationConfig
from .generation_masked_diffusion import DenoisingInputs, MaskedDiffusionGenerationMixin
from .logits_to_keep import kept_positions, select_positions, unpack_logits
from .loss_masked_diffusion import MaskedTargets, masked_diffusion_loss, masked_targets
from .loss_refinement import confidence_loss, deep_supervision_loss
from .modeling_hub import HubModel
from .refinement_trace import RefinementPass, RefinementTrace
from .refiner_output import RefinerOutput
from .refiners import REFINERS, build_refiner, resolve_refiner

# Arguments of `from_pretrained` that say where files come from.
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
)
# Fields of the hybrid's own config, as opposed to arguments for the backbone.
OWN_FIELDS = LLaDATRMConfig.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()


@dataclass
class LLaDATRMOutput(ModelOutput):
    """
    Args:
        loss: scalar in float32, with labels.
        logits: `[B, L, V]`, or of the shape `logits_to_keep` asks for; refined.
        hidden_states: with `output_hidden_states=True`, the backbone's, and last the refined ones, each `[B, L, D]`.
        refinement_steps: LongTensor `[B, N]`, updates applied to each chunk.
        chunk_confidence: FloatTensor `[B, N]`, the backbone's, which decides what is refined; 1 for a chunk with
            nothing to decide.
        refiner_confidence: FloatTensor `[B, N]`, the refiner's own, of the result.
        loss_components: each part of the loss by name, before its weight, detached.
        refinement_trace: with `output_refinement_trace=True`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    refinement_steps: torch.Tensor | None = None
    chunk_confidence: torch.Tensor | None = None
    refiner_confidence: torch.Tensor | None = None
    loss_components: dict[str, torch.Tensor] | None = None
    refinement_trace: RefinementTrace | None = None


class LLaDATRMForMaskedDiffusion(MaskedDiffusionGenerationMixin, HubModel, PreTrainedModel):
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
    _no_split_modules = ["LLaDADecoderLayer", "LLaDAMoEDecoderLayer", "RecursiveRefinementHead"]

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
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike | PreTrainedModel,
        refiner: str | os.PathLike | PreTrainedConfig | PreTrainedModel = "recursive_refinement_head",
        freeze_backbone: bool = True,
        **kwargs: Any,
    ) -> "LLaDATRMForMaskedDiffusion":
        """
        Puts a refiner on a masked-diffusion model.

        Args:
            backbone: a model, or the name or folder of one.
            refiner: the `model_type` of a refiner (built to fit the backbone), its config, a refiner, or the folder or
                repository of one.
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
        model, refiner_config = resolve_refiner(refiner, backbone.config.get_text_config(), fields.get("chunk_size"))
        fields["chunk_size"] = refiner_config.chunk_size if fields.get("chunk_size") is None else fields["chunk_size"]
        config = LLaDATRMConfig(backbone_config=backbone.config, refiner_config=refiner_config, **fields)
        if model is None:
            model = build_refiner(refiner_config)
        hybrid = cls(config, backbone=backbone, refiner=model.to(backbone.device))
        if isinstance(getattr(backbone, "generation_config", None), MaskedDiffusionGenerationConfig):
            hybrid.generation_config = copy.deepcopy(backbone.generation_config)
        if freeze_backbone:
            hybrid.backbone.requires_grad_(False)
        return hybrid

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """
        Loads a checkpoint. One without backbone (`save_pretrained(dir, save_backbone=False)`) is put together with the
        backbone its config names; `dtype`, `device_map`, `quantization_config` then apply to that backbone.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        saved = LLaDATRMConfig.from_pretrained(pretrained_model_name_or_path, **hub) if config is None else config
        if saved.backbone_in_checkpoint:
            if "experts_implementation" in kwargs:
                kwargs["experts_implementation"] = of_the_backbone(kwargs["experts_implementation"])
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
            if saved.refiner_dtype and kwargs.get("dtype", "auto") == "auto":
                (loaded[0] if isinstance(loaded, tuple) else loaded).refiner.to(getattr(torch, saved.refiner_dtype))
            return loaded
        return cls._from_refiner_checkpoint(pretrained_model_name_or_path, saved, hub, kwargs)

    @classmethod
    def _from_refiner_checkpoint(
        cls, path: Any, config: LLaDATRMConfig, hub: dict[str, Any], kwargs: dict[str, Any]
    ) -> Any:
        """Loads the refiner from `path` and the backbone from where `config` says."""
        wants_info = kwargs.pop("output_loading_info", False)
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in OWN_FIELDS}
        config = LLaDATRMConfig.from_dict({**config.to_dict(), **overrides})
        kwargs = {name: value for name, value in kwargs.items() if name not in hub}
        backbone = load_backbone(config.backbone_name_or_path, **kwargs)
        found, expected = backbone.config.get_text_config(), config.get_text_config()
        for name in ("hidden_size", "vocab_size"):
            if getattr(found, name) != getattr(expected, name):
                raise ValueError(
                    f"{path} refines a backbone with {name}={getattr(expected, name)}, but "
                    f"{config.backbone_name_or_path} has {getattr(found, name)}: it is another model. Pass "
                    f"backbone_name_or_path to name the right one."
                )
        refiner, info = REFINERS[config.refiner_config.model_type].from_pretrained(
            path,
            config=config.refiner_config,
            key_mapping={r"^refiner\.": ""},
            output_loading_info=True,
            dtype=kwargs.get("dtype", "auto"),
            **hub,
        )
        config.backbone_config = backbone.config
        model = cls(config, backbone=backbone, refiner=refiner.to(backbone.device)).eval()
        model.adjust_generation_fn(None, False, None, path, **hub)
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
            save_backbone: with `False`, only the refiner's tensors and the backbone's name are written.
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
            state_dict = {name: tensor for name, tensor in state_dict.items() if name.startswith("refiner.")}
        self.config.backbone_in_checkpoint = save_backbone
        differs = self.refiner.dtype != self.backbone.dtype
        self.config.refiner_dtype = str(self.refiner.dtype).removeprefix("torch.") if differs else None
        try:
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        finally:
            self.config.backbone_in_checkpoint = True

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_output_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
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
            **kwargs,
        }
        if logits_to_keep is None and not (self.training and labels is not None):
            logits_to_keep = 0
        mask_token_id = self.config.mask_token_id
        targets = None if labels is None else masked_targets(input_ids, labels, mask_token_id, p_mask)
        if enable_refinement is False:
            return self._forward_backbone(inputs, targets, logits_to_keep, output_hidden_states)

        hidden_states, all_hidden_states, router_aux_loss = encode(self.backbone, inputs, output_hidden_states)
        batch, length, _ = hidden_states.shape
        layout = ChunkLayout(batch, length, self.config.chunk_size, attention_mask, hidden_states.device)
        relevant = self._relevant_tokens(relevant_tokens, targets, input_ids, layout)

        # Base logits at the P positions that someone asks for, one after the other.
        positions = relevant | kept_positions(logits_to_keep, relevant)
        if targets is not None:
            positions = positions | targets.positions
        base_logits = self._logits(hidden_states[positions])  # [P, V]
        confidence = self._chunk_confidence(base_logits, positions, relevant, layout)
        active = self._active_chunks(confidence, relevant, layout)
        refined = self.refiner(
            hidden_states,
            active_chunks=active,
            attention_mask=attention_mask,
            max_steps=max_steps,
            output_step_hidden_states=targets is not None and self.config.deep_supervision_weight > 0,
            output_statistics=bool(output_refinement_trace),
        )
        in_active = layout.to_tokens(active) & positions  # [B, L]
        logits = base_logits.index_put((in_active[positions],), self._logits(refined.hidden_states[in_active]))

        loss = components = None
        if targets is not None:
            loss, components = self._loss(
                targets, positions, base_logits, logits, refined, active, layout, router_aux_loss
            )
        trace = None
        if output_refinement_trace and input_ids is not None:
            changed = torch.zeros_like(relevant)
            changed[positions] = base_logits.argmax(-1) != logits.argmax(-1)
            trace = self._trace(input_ids, layout, confidence, refined, changed & relevant)
        return LLaDATRMOutput(
            loss=loss,
            logits=None if logits_to_keep is None else unpack_logits(logits, positions, logits_to_keep),
            hidden_states=None if all_hidden_states is None else (*all_hidden_states, refined.hidden_states),
            refinement_steps=refined.num_steps,
            chunk_confidence=confidence,
            refiner_confidence=refined.confidence,
            loss_components=components,
            refinement_trace=trace,
        )

    def _forward_backbone(
        self,
        inputs: dict[str, Any],
        targets: MaskedTargets | None,
        logits_to_keep: int | torch.Tensor | None,
        output_hidden_states: bool | None,
    ) -> LLaDATRMOutput:
        """The backbone alone."""
        hidden_states, all_hidden_states, router_aux_loss = encode(self.backbone, inputs, output_hidden_states)
        loss = components = logits = None
        if targets is not None:
            loss = masked_diffusion_loss(self._logits(hidden_states[targets.positions]), targets)
            components = {"diffusion": loss.detach()}
            if router_aux_loss is not None:
                components["router_aux"] = router_aux_loss.detach()
                loss = loss + self.backbone.config.router_aux_loss_coef * router_aux_loss
        if logits_to_keep is not None:
            logits = self._logits(select_positions(hidden_states, logits_to_keep))
        return LLaDATRMOutput(loss=loss, logits=logits, hidden_states=all_hidden_states, loss_components=components)

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The LM head at `hidden_states` `[..., D]`."""
        return self.backbone.get_output_embeddings()(hidden_states)

    def _relevant_tokens(
        self,
        relevant_tokens: torch.Tensor | None,
        targets: MaskedTargets | None,
        input_ids: torch.Tensor | None,
        layout: ChunkLayout,
    ) -> torch.Tensor:
        if relevant_tokens is not None:
            return relevant_tokens & layout.is_real
        if targets is not None:
            return targets.positions & layout.is_real
        if input_ids is None:
            return layout.is_real
        masks = (input_ids == self.config.mask_token_id) & layout.is_real
        return torch.where(masks.any(-1, keepdim=True), masks, layout.is_real)

    def _chunk_confidence(
        self, logits: torch.Tensor, positions: torch.Tensor, relevant: torch.Tensor, layout: ChunkLayout
    ) -> torch.Tensor:
        """Mean largest probability `[B, N]` over each chunk's relevant tokens; 1 for a chunk with none."""
        logits = logits.detach().float()
        largest = (logits.amax(-1) - logits.logsumexp(-1)).exp()  # [P]
        per_token = largest.new_zeros(positions.shape).index_put((positions,), largest)
        return layout.mean_per_chunk(per_token, relevant, empty=1.0)

    def _active_chunks(self, confidence: torch.Tensor, relevant: torch.Tensor, layout: ChunkLayout) -> torch.Tensor:
        """BoolTensor `[B, N]`: the chunks to refine."""
        active = layout.any_per_chunk(relevant)
        return active & (confidence < self.config.min_confidence) if self.config.refine_low_confidence_only else active

    def _loss(
        self,
        targets: MaskedTargets,
        positions: torch.Tensor,
        base_logits: torch.Tensor,
        logits: torch.Tensor,
        refined: RefinerOutput,
        active: torch.Tensor,
        layout: ChunkLayout,
        router_aux_loss: torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum of the losses, and each of them. `base_logits`, `logits` `[P, V]` stand at `positions`."""
        config = self.config
        counted = targets.positions[positions]  # [P], which of the positions are in the loss
        backbone_trains = any(parameter.requires_grad for parameter in self.backbone.parameters())
        with torch.set_grad_enabled(backbone_trains and torch.is_grad_enabled()):
            backbone_loss = masked_diffusion_loss(base_logits[counted], targets)
        loss = masked_diffusion_loss(logits[counted], targets)
        components = {"diffusion": loss, "backbone": backbone_loss}
        if backbone_trains:
            loss = loss + backbone_loss
            if router_aux_loss is not None:
                components["router_aux"] = router_aux_loss
                loss = loss + self.backbone.config.router_aux_loss_coef * router_aux_loss
        if refined.step_hidden_states:
            in_active = layout.to_tokens(active)[targets.positions]  # [M]
            there = targets.positions & layout.to_tokens(active)
            supervised = MaskedTargets(there, targets.tokens[in_active], targets.weights[in_active])
            components["deep_supervision"] = deep_supervision_loss(
                (self._logits(states[there]) for states in refined.step_hidden_states),
                supervised,
                config.deep_supervision_schedule,
            )
            loss = loss + config.deep_supervision_weight * components["deep_supervision"]
        if config.confidence_loss_weight > 0:
            correct = torch.zeros_like(targets.positions).index_put(
                (targets.positions,), logits[counted].argmax(-1) == targets.tokens
            )
            share = layout.mean_per_chunk(correct, targets.positions, empty=1.0)
            components["confidence"] = confidence_loss(refined.confidence[active], share[active])
            loss = loss + config.confidence_loss_weight * components["confidence"]
        return loss, {name: value.detach() for name, value in components.items()}

    def _trace(
        self,
        input_ids: torch.Tensor,
        layout: ChunkLayout,
        confidence: torch.Tensor,
        refined: RefinerOutput,
        changed_tokens: torch.Tensor,
    ) -> RefinementTrace:
        recorded = RefinementPass(
            chunk_of_token=layout.chunk_of_token.cpu(),
            chunk_confidence=confidence.cpu(),
            refiner_confidence=refined.confidence.detach().cpu(),
            num_steps=refined.num_steps.cpu(),
            similarity=refined.statistics["similarity"].cpu(),
            changed_tokens=changed_tokens.cpu(),
            rows=torch.arange(len(input_ids)),
        )
        canvas = input_ids.cpu()
        return RefinementTrace(self.config.mask_token_id, input_ids.shape[1], [canvas, canvas], [recorded])

    def _denoising_logits(
        self, inputs: DenoisingInputs, config: MaskedDiffusionGenerationConfig, trace: RefinementTrace | None
    ) -> torch.Tensor:
        outputs = self(
            input_ids=inputs.tokens,
            attention_mask=inputs.attention_mask,
            logits_to_keep=torch.arange(inputs.window.start, inputs.window.stop, device=inputs.tokens.device),
            relevant_tokens=inputs.undecided,
            enable_refinement=config.enable_refinement,
            output_refinement_trace=trace is not None,
        )
        if trace is not None and outputs.refinement_trace is not None:
            trace.passes.extend(outputs.refinement_trace.passes)
        return outputs.logits
