"""Generation by masked diffusion: a canvas of mask tokens is decided step by step, block by block."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import GENERATION_CONFIG_NAME, ModelOutput, cached_file

from ..models.rotary import NOT_A_MASK, check_inputs, check_token_id
from .block_kv_cache import BlockKVCache
from .block_sampler import ActiveBlock, Decisions, DenoisingInputs, MaskedCanvas, StoppingRules
from .commit_rules import process_logits
from .configuration_masked_diffusion import DEFAULT_MAX_NEW_TOKENS, MaskedDiffusionGenerationConfig


@dataclass
class MaskedDiffusionGenerateOutput(ModelOutput):
    """
    Args:
        sequences: LongTensor `[B, L_prompt + max_new_tokens]`, prompt included.
        num_forward_passes: the number of function evaluations (NFE). With guidance a pass has the conditional and the
            unconditional batch; with a cache a pass may cover one block only.
        num_forward_passes_per_row: LongTensor `[B]`, the passes a row took part in.
        tokens_per_forward: FloatTensor `[B]`, the tokens transferred in a row over these.
        scores: with `output_scores=True`, for each new token a FloatTensor `[B, V]`: what it was chosen by in the step
            that committed it, after processors, temperature, `top_k` and `top_p`. Sampled tokens follow its softmax.
            Zeros where no token was decided because the row had ended. (Masks in the prompt have none.)
        logits: with `output_logits=True`, the same of the model's own logits.
        history: LongTensor `[passes + 1, B, L]`, the canvas before the first and after each pass.
        refinement_trace: a `RefinementTrace`, what the refiner did in each pass.
    """

    sequences: torch.Tensor = None  # type: ignore[assignment]
    num_forward_passes: int = None  # type: ignore[assignment]
    num_forward_passes_per_row: torch.Tensor = None  # type: ignore[assignment]
    tokens_per_forward: torch.Tensor = None  # type: ignore[assignment]
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    history: torch.Tensor | None = None
    refinement_trace: Any = None


class DenoisingOutput(NamedTuple):
    """Logits `[B, P, V]` at the positions asked for, and the refiner's confidence `[B, P]` there, if asked for."""

    logits: torch.Tensor
    refiner_confidence: torch.Tensor | None = None


class MaskedDiffusionGenerationMixin:
    """
    Adds `generate` to a model whose `forward` takes `input_ids`, `attention_mask` and `logits_to_keep`.

    Attributes:
        trace_class: records a generation with `output_refinement_trace=True`. A hybrid has one; within this package
            every model has (`generation/__init__.py`), but it does not travel with a bare backbone.
    """

    generation_config_class = MaskedDiffusionGenerationConfig
    output_modalities = ("text",)  # read by pipelines
    trace_class: ClassVar[Any] = None

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        custom_generate: str | Callable | None = None,
        trust_remote_code: bool | None = None,
        *,
        inputs: torch.Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Generates by masked diffusion. Masks in the prompt are filled in too, together with the first block.

        Args:
            input_ids, inputs: the prompt `[B, L_prompt]`, under either name; `bos_token_id` by default.
            attention_mask: `[B, L_prompt]`, 0 for padding, on either side.
            generation_config: settings; the model's own by default. Of a plain `GenerationConfig`, what it sets
                overrides the model's own.
            streamer: gets finished blocks (`put`) and, if it can take them, drafts after each step (`put_draft`).
            logits_processor: called with the row's canvas and `[positions, V]` logits, as in causal generation.
            stopping_criteria: called after each block with the sequences so far; rows it stops leave the batch.
            custom_generate: a function, or a folder or repository with `custom_generate/generate.py`, to run instead,
                with the same arguments. Code from a repository needs `trust_remote_code=True`.
            tokenizer: for `stop_strings`.
            labels: not used; `Seq2SeqTrainer` passes a whole batch.
            kwargs: settings of [`MaskedDiffusionGenerationConfig`] that override the config. Those of `generate` in
                transformers are accepted at values that ask for nothing.

        Returns:
            LongTensor `[B * num_return_sequences, L_prompt + max_new_tokens]`, or a [`MaskedDiffusionGenerateOutput`].

        Raises:
            ValueError: for a prompt, a setting or a name that cannot be, or what diffusion cannot honour.
        """
        if inputs is not None and input_ids is not None:
            raise ValueError("inputs and input_ids are two names of the prompt: pass one.")
        input_ids = inputs if input_ids is None else input_ids
        if custom_generate is not None:
            load: Any = GenerationMixin.load_custom_generate
            is_name = isinstance(custom_generate, str)
            function: Any = load(self, custom_generate, trust_remote_code) if is_name else custom_generate
            return function(
                model=self,
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=generation_config,
                streamer=streamer,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                **({} if tokenizer is None else {"tokenizer": tokenizer}),
                **kwargs,
            )
        config = self._resolve_generation_config(generation_config, kwargs)
        canvas = self._new_canvas(input_ids, attention_mask, config)
        rules = StoppingRules(canvas, stopping_criteria, tokenizer)
        recorder = GenerationRecorder(canvas, streamer, self._new_trace(canvas))
        if isinstance(logits_processor, list):
            logits_processor = LogitsProcessorList(logits_processor)
        with compiled_forward(self._transformer, config) if config.compile else contextlib.nullcontext():
            for window, num_steps in canvas.blocks():
                cache = None if config.kv_cache == "none" else self._block_kv_cache()
                block = ActiveBlock(canvas, window, num_steps, cache)
                for step in block.steps():
                    output = self._denoise(step, config, recorder.trace)
                    raw = output.logits.clone() if config.output_logits else None  # processors may write into it
                    logits = process_logits(output.logits, step.tokens, config, logits_processor)
                    decisions = block.update(step, logits, output.refiner_confidence)
                    recorder.step(block, step, decisions, raw)
                if rules:
                    rules.apply(window)
                recorder.block(window)
                if rules and canvas.is_finished.all():
                    break
        return recorder.finish()

    def _new_trace(self, canvas: MaskedCanvas) -> Any:
        """A trace that begins with the canvas, if one is asked for."""
        if not canvas.config.output_refinement_trace:
            return None
        if self.trace_class is None:
            raise ValueError("output_refinement_trace=True needs a model with a refiner: use output_history=True.")
        return self.trace_class(canvas.config.mask_token_id, canvas.prompt_length, [canvas.tokens.clone().cpu()])

    @property
    def _transformer(self) -> Any:
        """The part that `compile=True` compiles."""
        return self.base_model  # type: ignore[attr-defined]

    def _block_kv_cache(self) -> BlockKVCache:
        """An empty cache for `_transformer`."""
        return BlockKVCache(self.config.get_text_config().num_hidden_layers)  # type: ignore[attr-defined]

    @property
    def prepare_inputs_for_generation(self) -> Callable[..., Any]:
        """
        What PEFT looks for in a model of `task_type="CAUSAL_LM"`. Nothing here calls it, for a step has the whole
        canvas as its input. PEFT's prompt learning puts its own in this place for the time of a generation, and would
        be ignored: ValueError.
        """
        return _no_next_token

    @prepare_inputs_for_generation.setter
    def prepare_inputs_for_generation(self, function: Callable[..., Any]) -> None:
        if function is not _no_next_token:
            raise ValueError(
                "Prompt learning (prompt tuning, prefix tuning, P-tuning) adds to what a model reads that generates "
                "token by token, and masked diffusion computes its whole canvas in every step: use LoRA, IA3 or "
                "another adapter inside the layers."
            )

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
            self.generation_config = self.generation_config_class.from_transformers(
                generation_config,
                self.generation_config,  # type: ignore[has-type]
            )
            return
        # Fields of the model's config (`output_hidden_states=True`) come along; they are no settings of generation.
        config: Any = self.config  # type: ignore[attr-defined]
        hub_arguments = {n: v for n, v in hub_arguments.items() if n.startswith("_") or not hasattr(config, n)}
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
        self, inputs: DenoisingInputs, config: MaskedDiffusionGenerationConfig, trace: Any
    ) -> DenoisingOutput:
        """One step, guided by `cfg_scale`; logits in float32."""
        if config.cfg_scale == 0:
            output = self._denoising_output(inputs, config, trace)
            return DenoisingOutput(output.logits.float(), output.refiner_confidence)
        blank = inputs.tokens.masked_fill(inputs.prompt_tokens, config.mask_token_id)
        both = DenoisingInputs(
            torch.cat([inputs.tokens, blank]),
            None if inputs.attention_mask is None else inputs.attention_mask.repeat(2, 1),
            inputs.undecided.repeat(2, 1),
            inputs.positions.repeat(2, 1),
            inputs.prompt_tokens.repeat(2, 1),
            inputs.cache,
        )
        logits, confidence = self._denoising_output(both, config, trace)
        conditional, unconditional = logits.float().chunk(2)
        if trace is not None and trace.passes:
            trace.passes[-1] = trace.passes[-1].first(len(inputs.tokens))  # of the conditional half
        return DenoisingOutput(
            unconditional + (config.cfg_scale + 1) * (conditional - unconditional),
            None if confidence is None else confidence[: len(inputs.tokens)],
        )

    def _denoising_output(
        self, inputs: DenoisingInputs, config: MaskedDiffusionGenerationConfig, trace: Any
    ) -> DenoisingOutput:
        """One forward pass. Models with a refiner override this."""
        positions = inputs.positions
        if inputs.cache is not None and inputs.cache.columns is not None:
            positions = positions - inputs.cache.columns[0]
        outputs = self(**inputs.model_inputs(), logits_to_keep=positions, return_dict=True)  # type: ignore[operator]
        return DenoisingOutput(outputs.logits)

    def _resolve_generation_config(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> MaskedDiffusionGenerationConfig:
        """`kwargs` over `generation_config` over the model's own; special tokens from the model's config."""
        own: GenerationConfig = self.generation_config  # type: ignore[has-type]
        config = self.generation_config_class.from_transformers(generation_config or own, own)
        config.override(kwargs)
        model_config = self.config  # type: ignore[attr-defined]
        for name in ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id"):
            if getattr(config, name) is None:
                setattr(config, name, getattr(model_config, name, None))
        if config.mask_token_id is None:
            raise ValueError("No mask token: pass mask_token_id, the id the model was trained with.")
        eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        named: dict[str, Any] = {"mask_token_id": [config.mask_token_id]}
        named |= {"suppress_tokens": config.suppress_tokens, "defer_tokens": config.defer_tokens}
        named |= {"eos_token_id": eos if config.stop_at_eos else None}
        vocab_size = model_config.get_text_config().vocab_size
        for name, token_ids in named.items():
            for token_id in token_ids or ():
                check_token_id(name, token_id, vocab_size)
        if len({config.mask_token_id, *(config.suppress_tokens or ())}) == vocab_size:
            raise ValueError("suppress_tokens leaves no token to choose: it holds the whole vocabulary.")
        if config.stop_at_eos and config.eos_token_id is None:
            raise ValueError("stop_at_eos=True needs an eos_token_id.")
        if config.remasking == "refiner" and (not hasattr(self, "refiner") or config.enable_refinement is False):
            raise ValueError("remasking='refiner' needs a hybrid with its refinement enabled: this has no refiner.")
        if config.num_return_sequences > 1 and not config.do_sample and config.remasking != "random":
            raise ValueError(
                f"num_return_sequences={config.num_return_sequences} would give the same sequence again and again: "
                f"pass do_sample=True or a temperature above 0."
            )
        for name in ("output_scores", "output_logits"):
            if getattr(config, name) and not config.return_dict_in_generate:
                raise ValueError(f"{name}=True needs return_dict_in_generate=True.")
        return config

    def _new_canvas(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        config: MaskedDiffusionGenerationConfig,
    ) -> MaskedCanvas:
        """The prompts, each as often as sequences are wanted, with masks behind them."""
        if input_ids is None and config.bos_token_id is not None:
            input_ids = torch.tensor([[config.bos_token_id]], device=self.device)  # type: ignore[attr-defined]
        vocab_size = self.config.get_text_config().vocab_size  # type: ignore[attr-defined]
        check_prompt(input_ids, attention_mask, vocab_size)
        assert input_ids is not None
        num_new_tokens = self._num_new_tokens(input_ids.shape[1], config)
        if config.num_return_sequences > 1:
            input_ids = input_ids.repeat_interleave(config.num_return_sequences, dim=0)
            if attention_mask is not None:
                attention_mask = attention_mask.repeat_interleave(config.num_return_sequences, dim=0)
        return MaskedCanvas(input_ids, attention_mask, num_new_tokens, config)

    def _num_new_tokens(self, prompt_length: int, config: MaskedDiffusionGenerationConfig) -> int:
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[attr-defined]
        num_new_tokens = config.max_new_tokens
        if num_new_tokens is None and config.max_length is not None:
            num_new_tokens = config.max_length - prompt_length
            if num_new_tokens < 0:
                raise ValueError(f"The prompt has {prompt_length} tokens, more than max_length={config.max_length}.")
        elif num_new_tokens is None:
            room = DEFAULT_MAX_NEW_TOKENS if longest is None else max(longest - prompt_length, 1)
            num_new_tokens = min(DEFAULT_MAX_NEW_TOKENS, room)
        if longest is not None and prompt_length + num_new_tokens > longest:
            raise ValueError(
                f"The prompt has {prompt_length} tokens; with max_new_tokens={num_new_tokens} that is more than the "
                f"model's context of {longest}. Shorten the prompt or generate fewer tokens."
            )
        return num_new_tokens


class GenerationRecorder:
    """Keeps counts, history and trace of a generation, and feeds the streamer."""

    def __init__(self, canvas: MaskedCanvas, streamer: BaseStreamer | None, trace: Any):
        self.canvas, self.config, self.streamer = canvas, canvas.config, streamer
        self.passes = torch.zeros(len(canvas.tokens), device=canvas.tokens.device)
        self.num_forward_passes = 0
        self.history = [canvas.tokens.clone()] if self.config.output_history else None
        self.trace = trace
        # For `output_scores` and `output_logits`, `[B, new tokens + 1, V]`. The last column takes what stays open.
        self.kept: dict[str, torch.Tensor] = {}
        if streamer is not None:
            masks = canvas.is_masked.any(0)
            start = int(masks.int().argmax()) if masks.any() else canvas.tokens.shape[1]
            streamer.put(canvas.tokens[:, : min(start, canvas.prompt_length)].cpu())

    def step(
        self, block: ActiveBlock, inputs: DenoisingInputs, decisions: Decisions, logits: torch.Tensor | None
    ) -> None:
        """After a step of `block`: what it decided at `inputs.positions` `[b, P]`, by `logits` `[b, P, V]`."""
        self.num_forward_passes += 1
        self.passes[block.rows] += block.active
        columns = inputs.positions - self.canvas.prompt_length
        for name, values in (("scores", decisions.scores), ("logits", logits)):
            if values is not None:
                size = (len(self.canvas.tokens), self.canvas.tokens.shape[1] - self.canvas.prompt_length + 1)
                kept = self.kept.setdefault(name, values.new_zeros(*size, values.shape[-1]))
                kept[block.rows[:, None], torch.where(decisions.committed, columns, -1).clamp(min=-1)] = values
        if self.history is not None:
            self.history.append(self.canvas.tokens.clone())
        if self.trace is not None:
            self.trace.add_canvas(self.canvas.tokens, block.rows)
        if self.streamer is not None and hasattr(self.streamer, "put_draft"):
            draft = self.canvas.tokens[block.rows].scatter(1, inputs.positions, decisions.tokens)
            self.streamer.put_draft(draft[:, block.window].cpu())

    def block(self, window: slice) -> None:
        """After a block is decided."""
        if self.streamer is None:
            return
        tokens = self.canvas.tokens[:, window].clone().cpu()
        if len(tokens) == 1:  # one-dimensional, as new tokens are in transformers, and without closing padding
            tokens = tokens[0, : int(self.canvas.ends[0]) - window.start]
        self.streamer.put(tokens)

    def finish(self) -> Any:
        """What `generate` returns."""
        canvas = self.canvas
        if self.streamer is not None:
            self.streamer.end()
        # The last canvas with the padding of rows that ended.
        if self.trace is not None:
            self.trace.canvases[-1] = canvas.tokens.clone().cpu()
        if self.history is not None:
            self.history[-1] = canvas.tokens.clone()
        if not self.config.return_dict_in_generate:
            return canvas.tokens
        return MaskedDiffusionGenerateOutput(
            sequences=canvas.tokens,
            num_forward_passes=self.num_forward_passes,
            num_forward_passes_per_row=self.passes.long(),
            tokens_per_forward=canvas.num_decided / self.passes.clamp(min=1),
            scores=self._per_token("scores"),
            logits=self._per_token("logits"),
            history=None if self.history is None else torch.stack(self.history),
            refinement_trace=self.trace,
        )

    def _per_token(self, name: str) -> tuple[torch.Tensor, ...] | None:
        """For each new token `[B, V]`; None if not asked for, or if there is no new token."""
        return self.kept[name][:, :-1].unbind(1) or None if name in self.kept else None


def _no_next_token(*args: Any, **kwargs: Any) -> dict[str, Any]:
    raise ValueError("A masked-diffusion model has no next token to prepare for: call its own generate.")


def check_prompt(input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, vocab_size: int) -> None:
    """
    Raises ValueError for a prompt that is not `[B, L]`, is empty, holds what is no token, or whose mask has another
    shape or holds anything but 0 and 1; TypeError for tokens that are not whole numbers.
    """
    if input_ids is None:
        raise ValueError("The prompt is empty and there is no bos_token_id to begin with: pass input_ids.")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must have shape [batch, tokens], got {tuple(input_ids.shape)}.")
    if isinstance(attention_mask, GenerationConfig):
        raise TypeError("The second argument is the attention mask: pass generation_config by name.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}."
        )
    check_inputs(input_ids, None)
    empty = "The prompt is empty: every row needs at least one token (a mask token to start from nothing)."
    if not input_ids.numel():
        raise ValueError(empty)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    tokens_exist = ((input_ids >= 0) & (input_ids < vocab_size)).all()
    # Read together, since the device is waited for.
    found = torch.stack([tokens_exist, ((mask == 0) | (mask == 1)).all(), mask.bool().any(-1).all()]).tolist()
    if not found[0]:
        raise ValueError(f"input_ids hold what is no token: they must be between 0 and {vocab_size - 1}.")
    if not found[1]:
        raise ValueError(NOT_A_MASK)
    if not found[2]:
        raise ValueError(empty)


@contextlib.contextmanager
def compiled_forward(module: Any, config: MaskedDiffusionGenerationConfig) -> Iterator[None]:
    """Within it, `module.forward` runs through `torch.compile`. Only with a prefix cache blocks differ in width."""
    own = module.__dict__.get("forward")  # what hooks may have put in place of the class's
    module.forward = torch.compile(module.forward, dynamic=config.kv_cache == "prefix")
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
