"""Settings of masked-diffusion generation, saved as `generation_config.json` with the model."""

from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from ..models.hub_model import nearest_name

logger = logging.get_logger(__name__)

REMASKING_STRATEGIES = ("low_confidence", "random", "entropy", "margin", "refiner")
KV_CACHES = ("none", "prefix", "dual")


class MaskedDiffusionGenerationConfig(GenerationConfig):
    r"""
    Settings of `MaskedDiffusionGenerationMixin.generate`. The defaults are those of the official LLaDA sampler
    (arXiv 2502.09992, algorithms 4 and 5).

    Args:
        max_new_tokens (`int`, *optional*): Tokens to generate after the prompt, 128 by default; 0 only fills in the
            masks of the prompt.
        max_length (`int`, *optional*): Prompt and new tokens together; used when `max_new_tokens` is not given.
        num_diffusion_steps (`int`, *optional*): Denoising steps of the whole generation, shared equally among the
            blocks (the first ones get the remainder). By default one step for every masked token.
        block_length (`int`, *optional*): Blocks are decoded one after the other, each by diffusion. By default the
            whole generation is one block.
        temperature (`float`, defaults to 0.0): 0 takes the most probable token; above, tokens are sampled.
        top_k (`int`, *optional*), top_p (`float`, *optional*): Restrict the tokens that can be sampled.
        remasking (`str`, defaults to `"low_confidence"`): Which tokens to commit first: those of highest probability
            (`"low_confidence"`), of lowest entropy (`"entropy"`), of largest distance between the best two tokens
            (`"margin"`), at random (`"random"`), or, in a hybrid, those of the chunks the refiner is surest of
            (`"refiner"`; the backbone's confidence stands for chunks that needed no refinement, and within a chunk
            the highest probability comes first).
        confidence_threshold (`float`, *optional*): Instead of a fixed number, commit every token whose confidence
            reaches the threshold, and always the best one, until the block is decided. For `"entropy"` the confidence
            is minus the entropy in nats.
        confidence_factor (`float`, *optional*): Instead of a fixed number, commit the `n` most confident tokens for
            the largest `n` with `(n + 1) * (1 - confidence of the n-th) < confidence_factor`, and always the best one
            (Fast-dLLM, arXiv 2505.22618, section 3.3).
        kv_cache (`str`, defaults to `"none"`): The first step of a block computes the whole canvas; what the others
            compute: again all of it (`"none"`), the active block and what follows it (`"prefix"`), or the active block
            only (`"dual"`). The keys and values of the rest stay those of the block's first step, which is an
            approximation. With a confidence threshold or factor, a cached block takes at least two passes, as in
            Fast-dLLM.
        remask_committed (`float`, *optional*): A committed token of the active block whose probability (with
            `remasking="refiner"`, whose chunk's confidence) falls below this is masked again. `True` means 0.5.
        remask_budget (`int`, defaults to 1): How often one position can be masked again. It bounds the number of
            steps, so that generation always ends.
        cfg_scale (`float`, defaults to 0.0): Classifier-free guidance; above 0 doubles the batch.
        suppress_tokens (`list[int]`, *optional*): Tokens that are never chosen (the official `logits_eos_inf`).
        defer_tokens (`list[int]`, *optional*): Tokens that are committed last (the official
            `confidence_eos_eot_inf`).
        stop_at_eos (`bool`, defaults to `False`): A row that holds an end-of-sequence token after a block is finished:
            what follows that token becomes padding and the row leaves the batch.
        mask_token_id, eos_token_id, pad_token_id: Special tokens, taken from the model's config by default.
        compile (`bool`, defaults to `False`): Run the transformer through `torch.compile`, with static shapes: rows
            that are finished stay in the batch.
        enable_refinement (`bool`, *optional*): For models with a refiner; `False` gives the bare backbone.
        output_history (`bool`, defaults to `False`): Return the canvas before the first and after every step.
        output_refinement_trace (`bool`, defaults to `False`): Return a `RefinementTrace`.
        return_dict_in_generate (`bool`, defaults to `False`): Return a `MaskedDiffusionGenerateOutput`.

    Raises:
        ValueError: for a value out of range or a name that does not exist.
    """

    def __init__(self, **kwargs: Any):
        # Not super().__init__(): its attributes describe autoregressive decoding.
        self.max_new_tokens: int | None = kwargs.pop("max_new_tokens", None)
        self.max_length: int | None = kwargs.pop("max_length", None)
        self.num_diffusion_steps: int | None = kwargs.pop("num_diffusion_steps", None)
        self.block_length: int | None = kwargs.pop("block_length", None)
        self.temperature: float = kwargs.pop("temperature", 0.0)
        self.top_k: int | None = kwargs.pop("top_k", None)
        self.top_p: float | None = kwargs.pop("top_p", None)
        self.remasking: str = kwargs.pop("remasking", "low_confidence")
        self.confidence_threshold: float | None = kwargs.pop("confidence_threshold", None)
        self.confidence_factor: float | None = kwargs.pop("confidence_factor", None)
        self.kv_cache: str = kwargs.pop("kv_cache", "none")
        self.remask_committed: float | bool | None = kwargs.pop("remask_committed", None)
        self.remask_budget: int = kwargs.pop("remask_budget", 1)
        self.compile: bool = kwargs.pop("compile", False)
        self.cfg_scale: float = kwargs.pop("cfg_scale", 0.0)
        self.suppress_tokens: list[int] | None = kwargs.pop("suppress_tokens", None)
        self.defer_tokens: list[int] | None = kwargs.pop("defer_tokens", None)
        self.stop_at_eos: bool = kwargs.pop("stop_at_eos", False)
        self.mask_token_id: Any = kwargs.pop("mask_token_id", None)
        self.eos_token_id: int | list[int] | None = kwargs.pop("eos_token_id", None)
        self.pad_token_id: int | None = kwargs.pop("pad_token_id", None)
        self.bos_token_id: int | None = kwargs.pop("bos_token_id", None)
        self.enable_refinement: bool | None = kwargs.pop("enable_refinement", None)
        self.output_history: bool = kwargs.pop("output_history", False)
        self.output_refinement_trace: bool = kwargs.pop("output_refinement_trace", False)
        self.return_dict_in_generate: bool = kwargs.pop("return_dict_in_generate", False)
        self._commit_hash: str | None = kwargs.pop("_commit_hash", None)
        self._from_model_config: bool = kwargs.pop("_from_model_config", False)
        self.transformers_version: str | None = kwargs.pop("transformers_version", None)
        if kwargs:
            raise ValueError(unknown_settings(kwargs, self))
        self.validate()

    @classmethod
    def from_model_config(cls, model_config: PreTrainedConfig | dict) -> "MaskedDiffusionGenerationConfig":
        """Takes the special tokens of a model's config."""
        config = model_config if isinstance(model_config, dict) else model_config.to_dict()
        names = ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id")
        return cls(**{name: config[name] for name in names if config.get(name) is not None})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        As in transformers. A published file may hold settings of autoregressive decoding: those are left out, except
        that `do_sample: false` means a temperature of 0 and `top_k: 0` no restriction, as they do there.
        """
        own = vars(cls()).keys()
        known = {name: value for name, value in config_dict.items() if name in own}
        unknown = config_dict.keys() - own - vars(GenerationConfig()).keys()
        if unknown:
            logger.warning(f"The generation config has settings that mean nothing here: {', '.join(sorted(unknown))}.")
        if config_dict.get("do_sample") is False:
            known["temperature"] = 0.0
        if known.get("top_k") == 0:
            known["top_k"] = None
        return super().from_dict(known, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """The settings that differ from the defaults."""
        defaults = type(self)().to_dict()
        return {
            name: value
            for name, value in self.to_dict().items()
            if name == "transformers_version" or value != defaults[name]
        }

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Raises ValueError for a value out of range; called whenever settings change."""
        for name in ("num_diffusion_steps", "block_length", "max_length", "top_k"):
            _check(self, name, lambda value: isinstance(value, int) and value >= 1, "an integer of at least 1")
        _check(self, "max_new_tokens", lambda value: isinstance(value, int) and value >= 0, "an integer of at least 0")
        _check(self, "temperature", lambda value: value >= 0, "0 or more")
        _check(self, "cfg_scale", lambda value: value >= 0, "0 or more")
        _check(self, "top_p", lambda value: 0 < value <= 1, "above 0 and at most 1")
        _check(self, "remasking", lambda value: value in REMASKING_STRATEGIES, f"one of {REMASKING_STRATEGIES}")
        _check(self, "kv_cache", lambda value: value in KV_CACHES, f"one of {KV_CACHES}")
        _check(self, "confidence_factor", lambda value: value > 0, "above 0")
        _check(self, "remask_budget", lambda value: isinstance(value, int) and value >= 0, "an integer of at least 0")
        if not isinstance(self.remask_committed, bool):
            _check(self, "remask_committed", lambda value: 0 <= value <= 1, "between 0 and 1")
        if self.remasking == "entropy":
            _check(self, "confidence_threshold", lambda value: value <= 0, "0 or less for an entropy, in nats")
        else:
            _check(self, "confidence_threshold", lambda value: 0 <= value <= 1, "between 0 and 1")
        if self.remasking == "random" and self.commits_by_confidence:
            raise ValueError("remasking='random' has no confidence to compare with a threshold or factor.")
        if self.remasking == "entropy" and self.confidence_factor is not None:
            raise ValueError("confidence_factor needs confidences between 0 and 1; remasking='entropy' has none.")
        if self.confidence_threshold is not None and self.confidence_factor is not None:
            raise ValueError("Give confidence_threshold or confidence_factor, not both.")

    @property
    def commits_by_confidence(self) -> bool:
        """Whether a step commits what the model is sure of, instead of a number fixed beforehand."""
        return self.confidence_threshold is not None or self.confidence_factor is not None

    @property
    def remask_threshold(self) -> float | None:
        """The confidence below which a committed token is masked again; None for never."""
        if self.remask_committed is None or self.remask_committed is False:
            return None
        return 0.5 if self.remask_committed is True else self.remask_committed


def _check(config: MaskedDiffusionGenerationConfig, name: str, is_valid: Any, expected: str) -> None:
    value = getattr(config, name)
    if value is None:
        return
    try:
        valid = not isinstance(value, bool) and is_valid(value)
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"{name} must be {expected}, got {value!r}.")


def unknown_settings(names: Any, config: MaskedDiffusionGenerationConfig) -> str:
    """An error message for names that are not generation settings, each with the nearest one that is."""
    known = [name for name in vars(config) if not name.startswith("_")]
    parts = [f"{name!r}{nearest_name(name, known)}" for name in names]
    return f"Unknown generation setting {', '.join(parts)}. Known: {', '.join(known)}."
