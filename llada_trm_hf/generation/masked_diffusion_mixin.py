"""Generation by masked diffusion: a canvas of mask tokens is decided step by step, block by block."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from transformers import GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import GENERATION_CONFIG_NAME, ModelOutput, cached_file

from ..models.hub_model import check_token_id
from .block_kv_cache import BlockKVCache
from .block_sampler import ActiveBlock, DenoisingInputs, MaskedCanvas
from .commit_rules import process_logits
from .configuration_masked_diffusion import MaskedDiffusionGenerationConfig, unknown_settings

DEFAULT_MAX_NEW_TOKENS = 128


@dataclass
class MaskedDiffusionGenerateOutput(ModelOutput):
    """
    Args:
        sequences: LongTensor `[B, L_prompt + max_new_tokens]`, prompt included.
        num_forward_passes: the number of function evaluations (NFE). With guidance a pass has the conditional and the
            unconditional batch; with a cache a pass may cover one block only.
        num_forward_passes_per_row: LongTensor `[B]`, the passes a row took part in.
        tokens_per_forward: FloatTensor `[B]`, the tokens transferred in a row over these.
        history: LongTensor `[passes + 1, B, L]`, the canvas before the first and after each pass.
        refinement_trace: a `RefinementTrace`, what the refiner did in each pass.
    """

    sequences: torch.Tensor = None  # type: ignore[assignment]
    num_forward_passes: int = None  # type: ignore[assignment]
    num_forward_passes_per_row: torch.Tensor = None  # type: ignore[assignment]
    tokens_per_forward: torch.Tensor = None  # type: ignore[assignment]
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
    trace_class: ClassVar[Any] = None

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        generation_config: MaskedDiffusionGenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        custom_generate: str | Callable | None = None,
        trust_remote_code: bool | None = None,
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
            custom_generate: a function, or a folder or repository with `custom_generate/generate.py`, to run instead,
                with the same arguments. Code from a repository needs `trust_remote_code=True`.
            kwargs: settings of [`MaskedDiffusionGenerationConfig`] that override the config.

        Returns:
            LongTensor `[B, L_prompt + max_new_tokens]`, or a [`MaskedDiffusionGenerateOutput`].
        """
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
                **kwargs,
            )
        config = self._resolve_generation_config(generation_config, kwargs)
        check_prompt(input_ids, attention_mask)
        if isinstance(stopping_criteria, list):
            stopping_criteria = StoppingCriteriaList(stopping_criteria)
        if isinstance(logits_processor, list):
            logits_processor = LogitsProcessorList(logits_processor)
        num_new_tokens = self._num_new_tokens(input_ids.shape[1], config)
        canvas = MaskedCanvas(input_ids, attention_mask, num_new_tokens, config)
        recorder = GenerationRecorder(canvas, streamer, self._new_trace(canvas))
        with compiled_forward(self._transformer, config) if config.compile else contextlib.nullcontext():
            for window, num_steps in canvas.blocks():
                cache = None if config.kv_cache == "none" else self._block_kv_cache()
                block = ActiveBlock(canvas, window, num_steps, cache)
                for inputs in block.steps():
                    output = self._denoise(inputs, config, recorder.trace)
                    logits = process_logits(output.logits, inputs.tokens, config, logits_processor)
                    tokens = block.update(inputs, logits, output.refiner_confidence)
                    recorder.step(block, inputs, tokens)
                if config.stop_at_eos or stopping_criteria:
                    canvas.finish(self._finished(canvas, window.stop, stopping_criteria), window.stop)
                recorder.block(window)
                if (config.stop_at_eos or stopping_criteria) and canvas.is_finished.all():
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

    def _finished(
        self, canvas: MaskedCanvas, end: int, stopping_criteria: StoppingCriteriaList | None
    ) -> torch.Tensor:
        """BoolTensor `[b]`, the rows that need no further blocks."""
        sequences = canvas.tokens[canvas.rows, :end]
        finished = torch.zeros(len(sequences), dtype=torch.bool, device=sequences.device)
        if canvas.config.stop_at_eos:
            eos = torch.tensor(canvas.config.eos_token_id, device=sequences.device)
            finished |= torch.isin(sequences[:, canvas.prompt_length :], eos).any(-1)
        if stopping_criteria:
            finished |= stopping_criteria(sequences, None)  # type: ignore[arg-type]
        return finished

    def _resolve_generation_config(
        self, generation_config: MaskedDiffusionGenerationConfig | None, kwargs: dict[str, Any]
    ) -> MaskedDiffusionGenerationConfig:
        """`kwargs` over `generation_config` over the model's own; special tokens from the model's config."""
        config = copy.deepcopy(generation_config or self.generation_config)  # type: ignore[has-type]
        if not hasattr(config, "mask_token_id"):
            raise ValueError(
                f"generation_config is a {type(config).__name__}; masked diffusion needs a "
                f"MaskedDiffusionGenerationConfig."
            )
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
        eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        named: dict[str, Any] = {"mask_token_id": [config.mask_token_id]}
        named |= {"suppress_tokens": config.suppress_tokens, "defer_tokens": config.defer_tokens}
        named |= {"eos_token_id": eos if config.stop_at_eos else None}
        for name, token_ids in named.items():
            for token_id in token_ids or ():
                check_token_id(name, token_id, model_config.get_text_config().vocab_size)
        if config.stop_at_eos and config.eos_token_id is None:
            raise ValueError("stop_at_eos=True needs an eos_token_id.")
        if config.remasking == "refiner" and (not hasattr(self, "refiner") or config.enable_refinement is False):
            raise ValueError("remasking='refiner' needs a hybrid with its refinement enabled: this has no refiner.")
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


class GenerationRecorder:
    """Keeps counts, history and trace of a generation, and feeds the streamer."""

    def __init__(self, canvas: MaskedCanvas, streamer: BaseStreamer | None, trace: Any):
        self.canvas, self.config, self.streamer = canvas, canvas.config, streamer
        self.passes = torch.zeros(len(canvas.tokens), device=canvas.tokens.device)
        self.num_forward_passes = 0
        self.history = [canvas.tokens.clone()] if self.config.output_history else None
        self.trace = trace
        if streamer is not None:
            masks = canvas.is_masked.any(0)
            start = int(masks.int().argmax()) if masks.any() else canvas.tokens.shape[1]
            streamer.put(canvas.tokens[:, : min(start, canvas.prompt_length)].cpu())

    def step(self, block: ActiveBlock, inputs: DenoisingInputs, tokens: torch.Tensor) -> None:
        """After a step of `block`, whose best guesses at `inputs.positions` `[b, P]` were `tokens` `[b, P]`."""
        self.num_forward_passes += 1
        self.passes[block.rows] += block.active
        if self.history is not None:
            self.history.append(self.canvas.tokens.clone())
        if self.trace is not None:
            self.trace.add_canvas(self.canvas.tokens, block.rows)
        if self.streamer is not None and hasattr(self.streamer, "put_draft"):
            draft = self.canvas.tokens[block.rows].scatter(1, inputs.positions, tokens)
            self.streamer.put_draft(draft[:, block.window].cpu())

    def block(self, window: slice) -> None:
        """After a block is decided."""
        if self.streamer is not None:
            self.streamer.put(self.canvas.tokens[:, window].clone().cpu())

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
            history=None if self.history is None else torch.stack(self.history),
            refinement_trace=self.trace,
        )


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
