"""The passes of a batch with thoughts through its backbone."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from ..backbone_wrapper import lm_head_inputs, select_states
from ..rotary import check_inputs
from .configuration_latent_thinking import LatentThinkingConfig
from .latent_thinker import LatentThinker
from .thought_tokens import ThoughtLayout, find_thoughts


@dataclass
class LatentThinkingOutput(ModelOutput):
    """
    Args:
        loss: scalar, with labels: cross-entropy of each next token.
        logits: `[B, L, V]`, or at the positions `logits_to_keep` asks for.
        past_key_values: with `use_cache`.
        hidden_states, attentions: on request, as in transformers; `output_hidden_states` also takes numbers, such as
            `[0, -1]`, and gives None in the place of the others.
        reasoning_steps: LongTensor `[B, T]`, supervision steps that each of a row's thoughts took, 0 where a row has
            fewer than the `T` of another; None if no row has any.
        halt_probability: `[B, T]`, after the last step.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    reasoning_steps: torch.Tensor | None = None
    halt_probability: torch.Tensor | None = None


@dataclass
class BatchWithThoughts:
    """Rows with thoughts in them, as the backbone reads them, and what their thoughts reported."""

    layout: ThoughtLayout
    embeddings: torch.Tensor  # [B, L, D]; a thought's latents replace its placeholders once they are known
    attention_mask: torch.Tensor | None  # [B, L]
    position_ids: torch.Tensor | None  # [B, L]
    steps: torch.Tensor  # LongTensor [B, T]
    halt_probability: torch.Tensor  # [B, T]


class LatentPasses:
    """Mixin for a model with a `backbone` and a `thinker`."""

    config: LatentThinkingConfig
    backbone: PreTrainedModel
    thinker: LatentThinker
    training: bool

    def encode(
        self, input_ids: torch.Tensor | None, num_logits: int, **arguments: Any
    ) -> tuple[torch.Tensor, LatentThinkingOutput]:
        """
        The states `[B, L, D]` the LM head reads, and the output with logits at the last `num_logits` positions. The
        other arguments are those of `forward`.
        """
        for name in ("output_hidden_states", "output_attentions"):
            if arguments.get(name) is None and getattr(self.config, name):
                arguments[name] = getattr(self.config, name)
        selection = arguments.get("output_hidden_states")
        if selection is not None:
            arguments["output_hidden_states"] = bool(selection)
        states, outputs = self._encode(input_ids, num_logits, **arguments)
        if outputs.hidden_states is not None:
            outputs.hidden_states = select_states(outputs.hidden_states, selection)
        return states, outputs

    def _encode(
        self,
        input_ids: torch.Tensor | None,
        num_logits: int,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        enable_latent_thinking: bool | None = None,
        max_reasoning_steps: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, LatentThinkingOutput]:
        layout = None
        if enable_latent_thinking is not False and input_ids is not None:
            layout = self._find_thoughts(input_ids, attention_mask, past_key_values)
        if layout is None:
            inputs = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "past_key_values": past_key_values,
                "inputs_embeds": inputs_embeds,
                "use_cache": use_cache,
            }
            inputs = {name: value for name, value in inputs.items() if value is not None}
            states, outputs = _as_output(*lm_head_inputs(self.backbone, {**inputs, **kwargs}, num_logits))
            if self.training and torch.is_grad_enabled() and enable_latent_thinking is not False:
                states, outputs.logits = self._with_zero_gradients(states, outputs.logits)
            return states, outputs
        assert input_ids is not None
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        thoughts = (len(input_ids), layout.num_thoughts)
        batch = BatchWithThoughts(
            layout=layout,
            embeddings=self.backbone.get_input_embeddings()(input_ids),
            attention_mask=attention_mask,
            position_ids=position_ids,
            steps=input_ids.new_zeros(thoughts),
            halt_probability=torch.zeros(thoughts, device=input_ids.device),
        )
        if use_cache is None:
            use_cache = not self.training and getattr(self.config.get_text_config(), "use_cache", True)
        states, outputs = self._run(batch, past_key_values, use_cache, num_logits, max_reasoning_steps, kwargs)
        outputs.reasoning_steps, outputs.halt_probability = batch.steps, batch.halt_probability
        return states, outputs

    def _with_zero_gradients(self, *results: torch.Tensor | None) -> tuple[Any, ...]:
        """
        The same values; their backward pass gives the thinker's weights zeros for gradients. Where the batch of
        another process of `DistributedDataParallel` has thoughts, it waits for gradients from this one.
        """
        weights = [parameter for parameter in self.thinker.parameters() if parameter.requires_grad]
        if not weights:
            return results
        return tuple(None if result is None else _ZeroGradients.apply(result, *weights) for result in results)

    def _find_thoughts(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
    ) -> ThoughtLayout | None:
        """Where thoughts are to be thought, if anywhere."""
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past_length:
            if bool((input_ids == self.config.latent_token_id).any()):
                raise ValueError(
                    f"A thought reads its whole prompt, but {past_length} tokens of it are in past_key_values: pass "
                    f"the whole input_ids without them, and no prefill_chunk_size."
                )
            return None
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"Latent thinking needs an attention_mask [B, L], got {tuple(attention_mask.shape)}.")
        check_inputs(input_ids, attention_mask)
        layout = find_thoughts(input_ids, attention_mask, self.config)
        return layout if layout.columns else None

    def _run(
        self,
        batch: BatchWithThoughts,
        past_key_values: Cache | None,
        use_cache: bool,
        num_logits: int,
        max_steps: int | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, LatentThinkingOutput]:
        """
        On a KV cache, every position is computed once, in a pass up to each column where thoughts start and one for
        the rest. Without one (gradient checkpointing drops it, and rows that think in different columns would make
        many short passes) the part before the thoughts is computed once more with the latents in place.
        """
        checkpointing = self.training and any(
            getattr(m, "gradient_checkpointing", False) for m in self.backbone.modules()
        )
        if not checkpointing and (use_cache or past_key_values is not None or len(batch.layout.columns) == 1):
            if past_key_values is None:
                past_key_values = DynamicCache(config=self.config.get_text_config())
            states, outputs = self._run_on_cache(batch, past_key_values, num_logits, max_steps, kwargs)
            outputs.past_key_values = past_key_values if use_cache else None
            return states, outputs
        for number in range(batch.layout.num_thoughts):
            states, _ = self._pass(batch, slice(0, batch.layout.columns[-1]), None, 0, kwargs)
            rows, starts = batch.layout.numbered(number)
            self._think(batch, states, rows, starts, torch.full_like(rows, number), max_steps)
        length = batch.embeddings.shape[1]
        return _as_output(*self._pass(batch, slice(0, length), None, num_logits, kwargs))

    def _run_on_cache(
        self, batch: BatchWithThoughts, cache: Cache, num_logits: int, max_steps: int | None, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, LatentThinkingOutput]:
        length, done = batch.embeddings.shape[1], 0
        states = batch.embeddings[:, :0]
        outputs: list[Any] = []
        for end in (*batch.layout.columns, length):
            wanted = max(0, end - max(done, length - num_logits))
            new_states, output = self._pass(batch, slice(done, end), cache, wanted, kwargs)
            states, done = torch.cat([states, new_states], dim=1), end
            outputs.append(output)
            if end < length:
                rows, numbers = batch.layout.starting_at(end)
                self._think(batch, states, rows, torch.full_like(rows, end), numbers, max_steps)
        return states, LatentThinkingOutput(
            logits=torch.cat([part.logits for part in outputs], dim=1),
            hidden_states=_join([part.get("hidden_states") for part in outputs]),
            attentions=_join([part.get("attentions") for part in outputs], length),
        )

    def _pass(
        self, batch: BatchWithThoughts, columns: slice, cache: Cache | None, num_logits: int, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, Any]:
        """The backbone on `columns`: states, and output with logits at the last `num_logits` of them."""
        inputs: dict[str, Any] = {
            "inputs_embeds": batch.embeddings[:, columns],
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        if batch.attention_mask is not None:
            inputs["attention_mask"] = batch.attention_mask[:, : columns.stop]
        if batch.position_ids is not None:
            inputs["position_ids"] = batch.position_ids[:, columns]
        states, outputs = lm_head_inputs(self.backbone, {**inputs, **kwargs}, num_logits)
        return states.to(batch.embeddings.device), outputs  # which may be the first of several

    def _think(
        self,
        batch: BatchWithThoughts,
        states: torch.Tensor,
        rows: torch.Tensor,
        starts: torch.Tensor,
        numbers: torch.Tensor,
        max_steps: int | None,
    ) -> None:
        """Thinks thoughts number `numbers` `[R]` of `rows`, whose first latents stand in `starts`; fills them in."""
        width = len(self.config.think_start_token_ids)
        states = states[:, :-width]  # they end where the last of the thoughts starts; its marker is not read
        columns = torch.arange(states.shape[1], device=states.device)
        readable = (columns < starts[:, None] - width) & batch.layout.is_real[rows, : states.shape[1]]
        thought = self.thinker(states[rows], readable, max_steps=max_steps, return_dict=True)
        places = starts[:, None] + torch.arange(self.config.num_latents, device=starts.device)
        latents = thought.latents.to(batch.embeddings)
        batch.embeddings = batch.embeddings.index_put((rows[:, None], places), latents)
        batch.steps[rows, numbers] = thought.num_steps.to(rows.device)
        batch.halt_probability[rows, numbers] = thought.halt_probability.detach().to(batch.halt_probability)


class _ZeroGradients(torch.autograd.Function):
    """A tensor as it is, whose backward pass gives `weights` zeros for gradients."""

    @staticmethod
    def forward(ctx: Any, result: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*weights)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients[0], *map(torch.zeros_like, ctx.saved_tensors)


def _as_output(states: torch.Tensor, outputs: Any) -> tuple[torch.Tensor, LatentThinkingOutput]:
    names = ("logits", "past_key_values", "hidden_states", "attentions")
    return states, LatentThinkingOutput(**{name: outputs.get(name) for name in names})


def _join(parts: list[tuple[torch.Tensor | None, ...] | None], num_keys: int | None = None) -> tuple[Any, ...] | None:
    """
    Joins each layer's states `[B, l, D]` of consecutive passes; with `num_keys`, weights `[B, heads, l, keys]`. A
    layer that was not asked for is None in each.
    """
    given = [part for part in parts if part]
    if not given:
        return None
    layers = [None if layer[0] is None else layer for layer in zip(*given)]
    if num_keys is None:
        return tuple(None if layer is None else torch.cat(layer, dim=1) for layer in layers)
    pad = nn.functional.pad
    padded = ([pad(p, (0, num_keys - p.shape[-1])) for p in layer] if layer else None for layer in layers)
    return tuple(None if layer is None else torch.cat(layer, dim=2) for layer in padded)
