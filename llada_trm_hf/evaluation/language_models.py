"""Models that answer prompts behind one interface: masked-diffusion, causal, and latent-thinking ones."""

import copy
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data import latent_thinking_prompt, prompt_tokens
from ..generation import MaskedDiffusionGenerationMixin
from ..generation.configuration_masked_diffusion import DEFAULT_MAX_NEW_TOKENS
from ..hub.loaded_weights import check_index
from ..hub.model_folders import LANGUAGE_MODEL, check_model, load_tokenizer
from ..models import LatentThinkingForCausalLM, LLaDATRMForMaskedDiffusion
from ..models.backbone_wrapper import load_backbone

CAUSAL_SETTINGS = ("max_new_tokens", "max_length", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class Response:
    """
    Attributes:
        text: the answer, up to its first end-of-sequence token.
        num_tokens: of the text, with that token.
        forward_passes: number of function evaluations (NFE) for this prompt; for a causal model one for each token.
        refinement_steps: chunk updates of a refiner per prompt, averaged over the batch; None without refiner.
    """

    text: str
    num_tokens: int
    forward_passes: int
    refinement_steps: float | None = None


def load_model(name: str, dtype: str = "auto", device: Any = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A hybrid, a masked-diffusion backbone or a causal language model, with its tokenizer, ready to generate; ValueError
    or OSError for anything else.
    """
    check_model(name, "checkpoint", LANGUAGE_MODEL)
    tokenizer = load_tokenizer(name, padding_side="left")
    return load_weights(name, dtype).to(device).eval(), tokenizer


def load_weights(name: str, dtype: str = "auto") -> PreTrainedModel:
    """The model of `load_model`, on the CPU and without its tokenizer."""
    check_index(name)
    model_type = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    is_hybrid = model_type == LLaDATRMForMaskedDiffusion.config_class.model_type
    loader = LLaDATRMForMaskedDiffusion.from_pretrained if is_hybrid else load_backbone
    return loader(name, dtype=dtype)


def decode(tokens: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an answer, up to its first end-of-sequence token."""
    return tokenizer.decode(_up_to_end(tokens, [tokenizer.eos_token_id]), skip_special_tokens=True)


class Responder(ABC):
    """A model, its tokenizer and the settings it generates with."""

    generation_config: GenerationConfig  # max_new_tokens is None if max_length limits prompt and answer together

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer

    def prompt(self, problem: str) -> list[int]:
        """The tokens a model answers."""
        return prompt_tokens(problem, self.tokenizer)

    def respond(self, prompts: list[list[int]]) -> list[Response]:
        """Answers a batch of prompts."""
        batch = self.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        return self._generate(batch.to(self.model.device))

    @abstractmethod
    def _generate(self, batch: Any) -> list[Response]: ...

    def check_length(self, longest_prompt: int) -> None:
        """Raises ValueError if a prompt of so many tokens does not fit the model's context."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        new_tokens = self.generation_config.max_new_tokens
        if limit is not None and longest_prompt + (new_tokens or 0) > limit:
            raise ValueError(
                f"The longest prompt has {longest_prompt} tokens; with max_new_tokens={new_tokens} that is more than "
                f"the model's context of {limit}. Generate fewer tokens, or choose other problems."
            )


class DiffusionResponder(Responder):
    """A masked-diffusion model. `settings`, of [`MaskedDiffusionGenerationConfig`], override the model's own."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]):
        super().__init__(model, tokenizer)
        if settings.get("enable_refinement") is False and not hasattr(model, "refiner"):
            raise ValueError(f"--no_refinement is for hybrids; {type(model).__name__} has no refiner.")
        if "enable_thinking" in settings:
            raise ValueError(f"--no_thinking is for causal language models, {type(model).__name__} is none.")
        config = copy.deepcopy(model.generation_config)
        if "max_length" in settings and "max_new_tokens" not in settings:
            config.max_new_tokens = None
        config.update(**settings)
        if config.max_new_tokens is None and config.max_length is None:
            config.max_new_tokens = DEFAULT_MAX_NEW_TOKENS
        self.generation_config = config

    def _generate(self, batch: Any) -> list[Response]:
        refiner = getattr(self.model, "refiner", None)
        updates: list[torch.Tensor] = []  # on the device: one synchronisation for all
        count = nullcontext()
        if refiner is not None:
            count = refiner.register_forward_hook(lambda *call: updates.append(call[-1].num_steps.sum()))
        with count:
            output = self.model.generate(
                **batch,
                generation_config=self.generation_config,
                tokenizer=self.tokenizer,
                num_return_sequences=1,
                return_dict_in_generate=True,
            )
        answers = output.sequences[:, batch["input_ids"].shape[1] :]
        mean_updates = None if refiner is None else float(sum(updates)) / len(answers)
        end = [self.tokenizer.eos_token_id]
        return [
            Response(decode(tokens, self.tokenizer), len(_up_to_end(tokens, end)), passes, mean_updates)
            for tokens, passes in zip(answers, output.num_forward_passes_per_row.tolist())
        ]


class CausalResponder(Responder):
    """
    A causal language model, greedy unless `settings` has a temperature. Of its own `generation_config` only the end
    tokens count, so that models are compared under the same settings. A latent thought stands before the answer of a
    [`LatentThinkingForCausalLM`], unless `settings` has `enable_thinking=False`, which chat templates obey as well.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]):
        super().__init__(model, tokenizer)
        name, settings = type(model).__name__, dict(settings)
        self.enable_thinking: bool | None = settings.pop("enable_thinking", None)
        self.can_think = isinstance(model, LatentThinkingForCausalLM)
        if useless := settings.keys() - CAUSAL_SETTINGS:
            raise ValueError(f"{name} is a causal language model: {', '.join(sorted(useless))} means nothing to it.")
        if not model.can_generate():
            raise ValueError(f"{name} cannot generate text.")
        max_length = settings.pop("max_length", None)
        new_tokens = settings.pop("max_new_tokens", None if max_length else DEFAULT_MAX_NEW_TOKENS)
        is_greedy = not settings.get("temperature")
        if is_greedy and settings.keys() - {"temperature"}:
            raise ValueError("top_k and top_p need a temperature above 0: without one, nothing is sampled.")
        eos = model.generation_config.eos_token_id
        self.end_tokens = sorted({*([eos] if isinstance(eos, int) else eos or ()), tokenizer.eos_token_id} - {None})
        self.generation_config = GenerationConfig(
            max_new_tokens=new_tokens,
            max_length=max_length,
            do_sample=not is_greedy,
            eos_token_id=self.end_tokens or None,
            pad_token_id=tokenizer.pad_token_id,
            **({} if is_greedy else {"top_k": 0, **settings}),
        )
        # `generate` fills what is not set from the model's own config, such as a repetition penalty.
        model.generation_config = GenerationConfig()

    def prompt(self, problem: str) -> list[int]:
        if self.can_think and self.enable_thinking is not False:
            tokens = latent_thinking_prompt(problem, self.tokenizer, self.model.config)
            assert isinstance(tokens, list)
            return tokens
        return prompt_tokens(problem, self.tokenizer, self.enable_thinking)

    def _generate(self, batch: Any) -> list[Response]:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if self.can_think:
            inputs["enable_latent_thinking"] = self.enable_thinking
        sequences = self.model.generate(**inputs, generation_config=self.generation_config)
        answers = [_up_to_end(tokens, self.end_tokens) for tokens in sequences[:, inputs["input_ids"].shape[1] :]]
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
        return [Response(text, len(tokens), len(tokens)) for text, tokens in zip(texts, answers)]


def make_responder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> DiffusionResponder | CausalResponder:
    """The responder for `model`; ValueError for settings it has no use for."""
    responder = DiffusionResponder if isinstance(model, MaskedDiffusionGenerationMixin) else CausalResponder
    return responder(model, tokenizer, settings)


def _up_to_end(tokens: torch.Tensor, end_tokens: list[int | None]) -> torch.Tensor:
    """`tokens` `[L]` up to the first end token, and with it."""
    ends = torch.isin(tokens, torch.tensor([token for token in end_tokens if token is not None], device=tokens.device))
    return tokens[: int(ends.int().argmax()) + 1] if ends.any() else tokens
