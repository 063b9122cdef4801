"""
Models of this package for lm-evaluation-harness: `llada_trm` and `latent_thinking`. Importing this registers them.
Everything around the model (tokens, chat templates, batches, several processes) is the harness's own `HFLM`.
"""

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from ..generation import MaskedDiffusionGenerationConfig, MaskedDiffusionGenerationMixin
from ..models.latent_thinking.thinking_chat_template import without_latent_thought
from .likelihood import is_greedy_response, likelihood_bounds


@register_model("llada_trm")
class MaskedDiffusionLM(HFLM):
    """
    Hybrids and masked-diffusion backbones (ValueError for other models).

    `generate_until` generates as many tokens as the task's `max_gen_toks`. `loglikelihood` is a lower bound, see
    `likelihood_bounds`; `loglikelihood_rolling` that of the windows of a text, each given the token before it.

    Args:
        pretrained: folder or repository.
        num_samples, seed: of the masks the bound of a response is estimated from.
        kwargs: settings of [`MaskedDiffusionGenerationConfig`], such as `num_diffusion_steps=64,block_length=32`, and
            those of `HFLM`.
    """

    def __init__(self, pretrained: Any, num_samples: int = 128, seed: int = 0, **kwargs: Any):
        known = vars(MaskedDiffusionGenerationConfig()).keys() - {"max_length"}
        self.settings = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
        self.num_samples, self.seed = num_samples, seed
        super().__init__(pretrained, backend="causal", **kwargs)
        if not isinstance(self.model, MaskedDiffusionGenerationMixin):
            raise ValueError(f"{pretrained} is a {type(self.model).__name__}, which does not generate by diffusion.")

    @property
    def max_gen_toks(self) -> int:
        """For tasks that do not say."""
        own = self.settings.get("max_new_tokens", self.model.generation_config.max_new_tokens)
        return super().max_gen_toks if own is None else own

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        settings = {"max_new_tokens": max_length - context.shape[1]} | self.settings
        if generation_kwargs.get("do_sample"):
            settings = {"temperature": generation_kwargs.get("temperature", 1.0)} | settings
        sequences = self.model.generate(context, attention_mask=generation_kwargs["attention_mask"], **settings)
        new = sequences[:, context.shape[1] :]
        ended = (new == self.eot_token_id).cumsum(-1) > 0  # a block may go on after its end token
        return torch.cat([context, new.masked_fill(ended, self.eot_token_id)], dim=1)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        batch_size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else 1)
        answers: list[tuple[float, bool]] = []
        starts = range(0, len(requests), batch_size)
        for start in tqdm(starts, desc="Likelihood bounds", disable=disable_tqdm or self.rank > 0):
            batch = requests[start : start + batch_size]
            responses = [continuation[-self.max_length + 1 :] for _, _, continuation in batch]
            prompts = [context[-(self.max_length - len(r)) :] for (_, context, _), r in zip(batch, responses)]
            bounds = likelihood_bounds(self.model, prompts, responses, self.num_samples, self.seed, batch_size)
            answers += zip(bounds, is_greedy_response(self.model, prompts, responses, batch_size))
        for (text, _, _), answer in zip(requests, answers):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers


@register_model("latent_thinking")
class LatentThinkingLM(HFLM):
    """
    Causal language models that think in latent space (ValueError for others): a thought stands between every context
    and what is generated or scored after it. Log-likelihoods are exact. `loglikelihood_rolling` has no context, and so
    no thought.
    """

    def __init__(self, pretrained: Any, **kwargs: Any):
        super().__init__(pretrained, backend="causal", **kwargs)
        if not hasattr(self.model.config, "thought_token_ids"):
            raise ValueError(f"{pretrained} is a {type(self.model).__name__}, which has no latent thoughts.")
        self.thought = list(self.model.config.thought_token_ids)
        if isinstance(self.tokenizer.chat_template, str):
            self.tokenizer.chat_template = without_latent_thought(self.tokenizer.chat_template)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        """Without the opening marker that some templates end with: it is part of the thought."""
        text = super().apply_chat_template(*args, **kwargs)
        opening = self.tokenizer.decode(self.model.config.think_start_token_ids)
        body = text.rstrip()
        return body.removesuffix(opening) if body.endswith(opening) else text

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        return context_ids + self.thought, continuation_ids

    def tok_batch_encode(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Contexts, left-padded, each with a thought at its end."""
        if kwargs.get("left_truncate_len"):
            kwargs["left_truncate_len"] -= len(self.thought)
        input_ids, attention_mask = super().tok_batch_encode(*args, **kwargs)
        thought = torch.tensor(self.thought, device=input_ids.device).expand(len(input_ids), -1)
        return torch.cat([input_ids, thought], 1), torch.cat([attention_mask, torch.ones_like(thought)], 1)
