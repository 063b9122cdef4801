"""Generation by masked diffusion: a canvas of mask tokens is decided step by step, block by block."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import GENERATION_CONFIG_NAME, ModelOutput, cached_file

from .configuration_llada import check_token_id
from .configuration_masked_diffusion_generation import MaskedDiffusionGenerationConfig, unknown_settings
from .masked_diffusion_sampling import (
    choose_positions,
    process_logits,
    sample_tokens,
    token_confidence,
    tokens_per_step,
)
from .refinement_trace import RefinementTrace

DEFAULT_MAX_NEW_TOKENS = 128


@dataclass
class MaskedDiffusionGenerateOutput(ModelOutput):
    """
    Args:
        sequences: LongTensor `[B, L_prompt + max_new_tokens]`, prompt included.
        num_forward_passes: how often the model ran. With guidance a pass has the conditional and the unconditional
            batch.
        tokens_per_forward: FloatTensor `[B]`, the tokens a row decided over the passes it took part in.
        history: LongTensor `[passes + 1, B, L]`, the canvas before the first and after each pass.
        refinement_trace: what the refiner did in each pass.
    """

    sequences: torch.Tensor = None  # type: ignore[assignment]
    num_forward_passes: int = None  # type: ignore[assignment]
    tokens_per_forward: torch.Tensor = None  # type: ignore[assignment]
    history: torch.Tensor | None = None
    refinement_trace: RefinementTrace | None = None


@dataclass
class DenoisingInputs:
    """
    One denoising step of the rows that are still being decided.

    Attributes:
        tokens: LongTensor `[B, L]`, the canvas.
        attention_mask: LongTensor `[B, L]` or None.
        undecided: BoolTensor `[B, L]`, the masks that may be decided in this step.
        window: the columns that contain all of `undecided`.
        prompt_tokens: BoolTensor `[B, L]`, positions that were no masks at the start; hidden for guidance.
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor | None
    undecided: torch.Tensor
    window: slice
    prompt_tokens: torch.Tensor


class MaskedDiffusionGenerationMixin:
    """Adds `generate` to a model whose `forward` takes `input_ids`, `attention_mask` and `logits_to_keep`."""

    generation_config_class = MaskedDiffusionGenerationConfig

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        generation_config: MaskedDiffusionGenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Generates by masked diffusion. Masks in the prompt are filled in too, together with the first block.

        Args:
            input_ids: `[B, L_prompt]`.
            attention_mask: `[B, L_prompt]`, 0 for padding, on either side.
            generation_config: settings; the model's own by default.
            streamer: gets finished blocks (`put`) and, if it can take them, drafts after each step (`put_draft`).
            logits_processor: called with the row's canvas and `[positions, V]` logits, as in causal generation.
            stopping_criteria: called after each block with the sequences so far; rows it stops leave the batch.
            kwargs: settings of [`MaskedDiffusionGenerationConfig`] that override the config.

        Returns:
            LongTensor `[B, L_prompt + max_new_tokens]`, or a [`MaskedDiffusionGenerateOutput`].
        """
        config = self._resolve_generation_config(generation_config, kwargs)
        check_prompt(input_ids, attention_mask)
        prompt_length = input_ids.shape[1]
        num_new_tokens = self._num_new_tokens(prompt_length, config)

        sequences = torch.nn.functional.pad(input_ids, (0, num_new_tokens), value=config.mask_token_id)
        if attention_mask is not None:
            attention_mask = torch.nn.functional.pad(attention_mask, (0, num_new_tokens), value=1)
        is_masked = sequences.eq(config.mask_token_id)
        if attention_mask is not None:
            is_masked &= attention_mask.bool()
        prompt_tokens = ~is_masked
        rows = torch.arange(len(sequences), device=sequences.device)  # the rows that are not finished
        mask_token = torch.tensor(config.mask_token_id, device=sequences.device)
        recorder = _Recorder(sequences, config, streamer, prompt_length)

        for window, num_steps in self._blocks(is_masked, prompt_length, config):
            canvas, masked = sequences[rows], is_masked[rows]
            mask_of_rows = None if attention_mask is None else attention_mask[rows]
            schedule = tokens_per_step(masked[:, window].sum(-1), num_steps)
            for step in range(num_steps):
                undecided = torch.zeros_like(masked)
                undecided[:, window] = masked[:, window]
                # Two cases without synchronisation: a schedule ends when no row has a token left to commit.
                done = not (undecided.any() if config.confidence_threshold is not None else schedule[:, step].any())
                if done:
                    break
                inputs = DenoisingInputs(canvas, mask_of_rows, undecided, window, prompt_tokens[rows])
                logits = self._denoise(inputs, config, recorder.trace)
                logits = process_logits(logits, canvas, config, logits_processor)
                # The mask token means "not decided" and cannot be a decision; confidence still counts its probability.
                choices = logits.index_fill(-1, mask_token, -torch.inf)
                tokens = sample_tokens(choices, config.temperature, config.top_k, config.top_p)
                confidence = token_confidence(logits, tokens, config.remasking, config.defer_tokens)
                commit = choose_positions(
                    confidence, undecided[:, window], schedule[:, step], config.confidence_threshold
                )
                canvas[:, window] = torch.where(commit, tokens, canvas[:, window])
                masked[:, window] &= ~commit
                sequences[rows] = canvas
                recorder.step(
                    sequences, rows, commit, torch.where(undecided[:, window], tokens, canvas[:, window]), window
                )
            is_masked[rows] = masked
            recorder.block(sequences, window)
            finished = self._finished(sequences[rows], window.stop, prompt_length, config, stopping_criteria)
            if finished.any():
                sequences[rows] = pad_finished(sequences[rows], finished, window.stop, prompt_length, config)
                rows = rows[~finished]
                if not len(rows):
                    break
        return recorder.finish(sequences)

    def adjust_generation_fn(
        self,
        generation_config: MaskedDiffusionGenerationConfig | None,
        from_auto_class: bool,
        from_pipeline: str | None,
        pretrained_model_name_or_path: str | None,
        trust_remote_code: bool | None = None,
        **hub_arguments: Any,
    ) -> None:
        """What `from_pretrained` calls to load `generation_config.json`; without that file the defaults hold."""
        if generation_config is not None:
            self.generation_config = generation_config
            return
        file = cached_file(
            pretrained_model_name_or_path,
            GENERATION_CONFIG_NAME,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub_arguments,
        )
        if file is not None:
            self.generation_config = self.generation_config_class.from_pretrained(
                pretrained_model_name_or_path, **hub_arguments
            )

    def _denoise(
        self, inputs: DenoisingInputs, config: MaskedDiffusionGenerationConfig, trace: RefinementTrace | None
    ) -> torch.Tensor:
        """Logits `[B, P, V]` in float32 at the columns of `inputs.window`, guided by `cfg_scale`."""
        if config.cfg_scale == 0:
            return self._denoising_logits(inputs, config, trace).float()
        blank = inputs.tokens.masked_fill(inputs.prompt_tokens, config.mask_token_id)
        both = DenoisingInputs(
            torch.cat([inputs.tokens, blank]),
            None if inputs.attention_mask is None else inputs.attention_mask.repeat(2, 1),
            inputs.undecided.repeat(2, 1),
            inputs.window,
            inputs.prompt_tokens.repeat(2, 1),
        )
        conditional, unconditional = self._denoising_logits(both, config, trace).float().chunk(2)
        if trace is not None and trace.passes:
            trace.passes[-1] = trace.passes[-1].first(len(inputs.tokens))  # of the conditional half
        return unconditional + (config.cfg_scale + 1) * (conditional - unconditional)

    def _denoising_logits(
        self, inputs: DenoisingInputs, config: MaskedDiffusionGenerationConfig, trace: RefinementTrace | None
    ) -> torch.Tensor:
        """One forward pass: `[B, P, V]` at the columns of `inputs.window`. Models with a refiner override this."""
        columns = torch.arange(inputs.window.start, inputs.window.stop, device=inputs.tokens.device)
        return self(  # type: ignore[operator]
            input_ids=inputs.tokens, attention_mask=inputs.attention_mask, logits_to_keep=columns
        ).logits

    def _blocks(
        self, is_masked: torch.Tensor, prompt_length: int, config: MaskedDiffusionGenerationConfig
    ) -> Iterator[tuple[slice, int]]:
        """Yields each block's columns and its number of steps. The first block also covers masks in the prompt."""
        num_new_tokens = is_masked.shape[1] - prompt_length
        block_length = config.block_length or max(num_new_tokens, 1)
        ends = [min(end, num_new_tokens) for end in range(block_length, num_new_tokens + block_length, block_length)]
        ends = ends or [0]
        steps = config.num_diffusion_steps
        if steps is not None and steps < len(ends) and config.confidence_threshold is None:
            raise ValueError(
                f"num_diffusion_steps={steps} is fewer than the {len(ends)} blocks of block_length={block_length}: "
                f"give every block at least one step."
            )
        in_prompt = is_masked[:, :prompt_length].any(0)
        start = int(in_prompt.int().argmax()) if in_prompt.any() else prompt_length
        for i, end in enumerate(ends):
            window = slice(start, prompt_length + end)
            if steps is None or config.confidence_threshold is not None:
                num_steps = int(is_masked[:, window].sum(-1).max())
            else:
                num_steps = steps // len(ends) + (i < steps % len(ends))
            if num_steps:
                yield window, num_steps
            start = window.stop

    def _finished(
        self,
        sequences: torch.Tensor,
        end: int,
        prompt_length: int,
        config: MaskedDiffusionGenerationConfig,
        stopping_criteria: StoppingCriteriaList | None,
    ) -> torch.Tensor:
        """BoolTensor `[B]`, the rows that need no further blocks."""
        finished = torch.zeros(len(sequences), dtype=torch.bool, device=sequences.device)
        if config.stop_at_eos:
            eos = torch.tensor(config.eos_token_id, device=sequences.device)
            finished |= torch.isin(sequences[:, prompt_length:end], eos).any(-1)
        if stopping_criteria:
            finished |= stopping_criteria(sequences[:, :end], None)  # type: ignore[arg-type]
        return finished

    def _resolve_generation_config(
        self, generation_config: MaskedDiffusionGenerationConfig | None, kwargs: dict[str, Any]
    ) -> MaskedDiffusionGenerationConfig:
        """`kwargs` over `generation_config` over the model's own; special tokens from the model's config."""
        config = copy.deepcopy(generation_config or self.generation_config)  # type: ignore[has-type]
        unknown = [name for name in kwargs if name.startswith("_") or name not in vars(config)]
        if unknown:
            raise ValueError(unknown_settings(unknown, config))
        if "max_length" in kwargs and "max_new_tokens" not in kwargs:
            config.max_new_tokens = None
        config.update(**kwargs)
        model_config = self.config  # type: ignore[attr-defined]
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            if getattr(config, name) is None:
                setattr(config, name, getattr(model_config, name, None))
        if config.mask_token_id is None:
            raise ValueError("No mask token: pass mask_token_id, the id the model was trained with.")
        check_token_id("mask_token_id", config.mask_token_id, model_config.get_text_config().vocab_size)
        if config.stop_at_eos and config.eos_token_id is None:
            raise ValueError("stop_at_eos=True needs an eos_token_id.")
        return config

    def _num_new_tokens(self, prompt_length: int, config: MaskedDiffusionGenerationConfig) -> int:
        num_new_tokens = config.max_new_tokens
        if num_new_tokens is None and config.max_length is not None:
            num_new_tokens = config.max_length - prompt_length
            if num_new_tokens < 0:
                raise ValueError(f"The prompt has {prompt_length} tokens, more than max_length={config.max_length}.")
        elif num_new_tokens is None:
            num_new_tokens = DEFAULT_MAX_NEW_TOKENS
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[attr-defined]
        if longest is not None and prompt_length + num_new_tokens > longest:
            raise ValueError(
                f"The prompt has {prompt_length} tokens; with max_new_tokens={num_new_tokens} that is more than the "
                f"model's context of {longest}. Shorten the prompt or generate fewer tokens."
            )
        return num_new_tokens


def check_prompt(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Raises ValueError for a prompt that is not `[B, L]`, is empty, or whose mask has another shape."""
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must have shape [batch, tokens], got {tuple(input_ids.shape)}.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}."
        )
    if not input_ids.numel() or (attention_mask is not None and not attention_mask.any(-1).all()):
        raise ValueError(
            "The prompt is empty: every row needs at least one token (a mask token to start from nothing)."
        )


def pad_finished(
    sequences: torch.Tensor,
    finished: torch.Tensor,
    end: int,
    prompt_length: int,
    config: MaskedDiffusionGenerationConfig,
) -> torch.Tensor:
    """In finished rows, replaces what follows the first end-of-sequence token, and undecided blocks, by padding."""
    pad = config.pad_token_id
    if pad is None:
        pad = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    columns = torch.arange(sequences.shape[1], device=sequences.device)
    after = (columns >= end).expand_as(sequences)
    if config.stop_at_eos:
        eos = torch.isin(sequences, torch.tensor(config.eos_token_id, device=sequences.device))
        eos &= (columns >= prompt_length) & (columns < end)
        after = after | ((eos.cumsum(-1) - eos.int()) > 0)
    return sequences.masked_fill(after & finished[:, None], pad if pad is not None else config.mask_token_id)


class _Recorder:
    """Keeps what `generate` reports besides the sequences: counts, history, trace, and what the streamer gets."""

    def __init__(
        self,
        sequences: torch.Tensor,
        config: MaskedDiffusionGenerationConfig,
        streamer: BaseStreamer | None,
        prompt_length: int,
    ):
        self.config = config
        self.streamer = streamer
        self.passes = torch.zeros(len(sequences), device=sequences.device)
        self.decided = torch.zeros_like(self.passes)
        self.num_forward_passes = 0
        self.history = [sequences.clone()] if config.output_history else None
        self.trace = None
        if config.output_refinement_trace:
            self.trace = RefinementTrace(mask_token_id=config.mask_token_id, prompt_length=prompt_length)
            self.trace.canvases.append(sequences.clone().cpu())
        if streamer is not None:
            masks = sequences.eq(config.mask_token_id).any(0)
            start = int(masks.int().argmax()) if masks.any() else sequences.shape[1]
            streamer.put(sequences[:, : min(start, prompt_length)].cpu())

    def step(
        self, sequences: torch.Tensor, rows: torch.Tensor, commit: torch.Tensor, draft: torch.Tensor, window: slice
    ) -> None:
        self.num_forward_passes += 1
        self.passes[rows] += 1
        self.decided[rows] += commit.sum(-1)
        if self.history is not None:
            self.history.append(sequences.clone())
        if self.trace is not None:
            self.trace.add_canvas(sequences, rows)
        if self.streamer is not None and hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(draft.cpu())

    def block(self, sequences: torch.Tensor, window: slice) -> None:
        if self.streamer is not None:
            self.streamer.put(sequences[:, window].cpu())

    def finish(self, sequences: torch.Tensor) -> Any:
        if self.streamer is not None:
            self.streamer.end()
        if self.trace is not None:
            self.trace.canvases[-1] = sequences.clone().cpu()  # with the padding of rows that ended
        if not self.config.return_dict_in_generate:
            return sequences
        return MaskedDiffusionGenerateOutput(
            sequences=sequences,
            num_forward_passes=self.num_forward_passes,
            tokens_per_forward=self.decided / self.passes.clamp(min=1),
            history=None if self.history is None else torch.stack(self.history),
            refinement_trace=self.trace,
        )
