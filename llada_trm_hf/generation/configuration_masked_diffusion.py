"""Settings of masked-diffusion generation, saved as `generation_config.json` with the model."""

import copy
import math
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from ..models.hub_model import nearest_name

logger = logging.get_logger(__name__)

REMASKING_STRATEGIES = ("low_confidence", "random", "entropy", "margin", "refiner")
KV_CACHES = ("none", "prefix", "dual")
DEFAULT_MAX_NEW_TOKENS = 128
_OUTPUTS = ("output_scores", "output_logits", "output_history", "output_refinement_trace")
_TOO_LARGE = 2**63  # for an integer of torch's

# Settings and arguments of transformers' `generate` that masked diffusion cannot honour, and what to do instead.
_BEAMS = "diffusion has no beams; num_return_sequences with do_sample=True gives several answers"
_LEFT_TO_RIGHT = "it needs tokens written from left to right; use suppress_tokens or a logits_processor"
_DRAFTS = "only models that write from left to right take drafts; num_diffusion_steps and kv_cache save time here"
_WARPERS = "what can be sampled is restricted by top_k and top_p"
_CACHES = "what is kept between steps is chosen by kv_cache"
_STATES = "call the model itself on the sequences for its inner states"
_PROMPTS = "a prompt is input_ids and attention_mask"
_GUIDANCE = "cfg_scale (guidance_scale - 1) guides by the prompt masked"
_CANNOT = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping"), _BEAMS),
    **dict.fromkeys(
        ("no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "begin_suppress_tokens"), _LEFT_TO_RIGHT
    ),
    **dict.fromkeys(("prefix_allowed_tokens_fn", "exponential_decay_length_penalty"), _LEFT_TO_RIGHT),
    **dict.fromkeys(("assistant_model", "assistant_tokenizer", "prompt_lookup_num_tokens", "use_mtp"), _DRAFTS),
    **dict.fromkeys(("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"), _WARPERS),
    **dict.fromkeys(("cache_implementation", "cache_config", "max_cache_len", "past_key_values"), _CACHES),
    **dict.fromkeys(("output_attentions", "output_hidden_states"), _STATES),
    **dict.fromkeys(("inputs_embeds", "position_ids", "token_type_ids"), _PROMPTS),
    **dict.fromkeys(("guidance_scale", "negative_prompt_ids", "negative_prompt_attention_mask"), _GUIDANCE),
    **dict.fromkeys(("min_length", "min_new_tokens"), "suppress_tokens keeps the end token away"),
    "repetition_penalty": "logits_processor=[RepetitionPenaltyLogitsProcessor(...)] applies one to the whole canvas",
    "synced_gpus": "the number of passes differs between processes, so they cannot wait for each other's",
}
_FIELDS = frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_"))
# Besides None, False, 0 and what is empty, these ask for nothing.
_NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "length_penalty", "guidance_scale", "typical_p"), 1),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), 1),
    # Read only by a model that drafts for another.
    **{"num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.4},
    **dict.fromkeys(("assistant_lookbehind", "target_lookbehind"), 10),
    "disable_compile": True,  # only `compile=True` compiles
}


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
        do_sample (`bool`): The same in other words: `False` is a temperature of 0; `True` samples at `temperature`, or
            at 1 where that is 0. It has no state of its own, so what is set last counts.
        top_k (`int`, *optional*), top_p (`float`, *optional*): Restrict the tokens that can be sampled; 0 and 1 do
            not.
        num_return_sequences (`int`, defaults to 1): Sequences for each prompt, in rows that follow each other. More
            than one must be sampled.
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
        use_cache (`bool`): `False` is `kv_cache="none"`. `True`, which pipelines pass, turns no cache on: the result
            would be another one.
        remask_committed (`float`, *optional*): A committed token of the active block whose probability (with
            `remasking="refiner"`, whose chunk's confidence) falls below this is masked again. `True` means 0.5.
        remask_budget (`int`, defaults to 1): How often one position can be masked again. It bounds the number of
            steps, so that generation always ends.
        cfg_scale (`float`, defaults to 0.0): Classifier-free guidance; above 0 doubles the batch.
        suppress_tokens (`list[int]`, *optional*): Tokens that are never chosen (the official `logits_eos_inf`).
        defer_tokens (`list[int]`, *optional*): Tokens that are committed last (the official
            `confidence_eos_eot_inf`).
        stop_at_eos (`bool`, defaults to `False`): A row that holds an end-of-sequence token after a block is finished:
            what follows that token becomes padding and the row leaves the batch. `eos_token_id` among the arguments of
            `generate` turns it on.
        stop_strings (`str` or `list[str]`, *optional*): A row is finished by a token that completes one of these, too;
            `generate` then needs the `tokenizer`. A block is decoded whole before it is looked at.
        max_time (`float`, *optional*): No block is begun after so many seconds; what is not decided becomes padding.
        mask_token_id, eos_token_id, pad_token_id: Special tokens, taken from the model's config by default.
        compile (`bool`, defaults to `False`): Run the transformer through `torch.compile`, with static shapes: rows
            that are finished stay in the batch.
        enable_refinement (`bool`, *optional*): For models with a refiner; `False` gives the bare backbone.
        output_scores, output_logits (`bool`, defaults to `False`): Return the scores each new token was chosen by, or
            the model's logits at that step.
        output_history (`bool`, defaults to `False`): Return the canvas before the first and after every step.
        output_refinement_trace (`bool`, defaults to `False`): Return a `RefinementTrace`.
        return_dict_in_generate (`bool`, defaults to `False`): Return a `MaskedDiffusionGenerateOutput`.

    Other settings of [`GenerationConfig`] are accepted at a value that asks for nothing (`num_beams=1`) and read as
    None.

    Raises:
        ValueError: for a value out of range, a name that does not exist, or what diffusion cannot honour.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    num_diffusion_steps: int | None = None
    block_length: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    num_return_sequences: int = 1
    remasking: str = "low_confidence"
    confidence_threshold: float | None = None
    confidence_factor: float | None = None
    kv_cache: str = "none"
    remask_committed: float | bool | None = None
    remask_budget: int = 1
    compile: bool = False
    cfg_scale: float = 0.0
    suppress_tokens: list[int] | None = None
    defer_tokens: list[int] | None = None
    stop_at_eos: bool = False
    stop_strings: str | list[str] | None = None
    max_time: float | None = None
    mask_token_id: Any = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    enable_refinement: bool | None = None
    output_scores: bool = False
    output_logits: bool = False
    output_history: bool = False
    output_refinement_trace: bool = False
    return_dict_in_generate: bool = False
    transformers_version: str | None = None

    def __init__(self, **kwargs: Any):
        # Not super().__init__(): its attributes describe autoregressive decoding.
        for name in _own_names():
            setattr(self, name, getattr(type(self), name))
        self._commit_hash: str | None = kwargs.pop("_commit_hash", None)
        self._from_model_config: bool = kwargs.pop("_from_model_config", False)
        if unknown := self.update(**kwargs):
            raise ValueError(unknown_settings(unknown))

    def __getattr__(self, name: str) -> None:
        """A setting of transformers that means nothing here: None, as in a new `GenerationConfig`."""
        if name not in _FIELDS:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")

    @property
    def do_sample(self) -> bool:
        """Whether tokens are sampled."""
        return self.temperature > 0

    @do_sample.setter
    def do_sample(self, value: bool | None) -> None:
        self.update(do_sample=value)

    @property
    def use_cache(self) -> bool:
        """Whether a step takes keys and values from the steps before."""
        return self.kv_cache != "none"

    @use_cache.setter
    def use_cache(self, value: bool | None) -> None:
        self.update(use_cache=value)

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        """
        Changes settings, as in transformers: with `defaults_only` those that are None. Returns what is no setting;
        there are no custom entries, for nothing would read them.

        Raises:
            ValueError: for a value out of range, or what diffusion cannot honour.
        """
        unknown = {name: value for name, value in kwargs.items() if not _is_setting(name)}
        settings = {name: value for name, value in kwargs.items() if name not in unknown}
        if defaults_only:
            settings = {name: value for name, value in settings.items() if getattr(self, name, None) is None}
        for name, value in self._in_own_terms(settings).items():
            setattr(self, name, value)
        self.validate()
        if settings.get("remask_budget") not in (None, type(self).remask_budget) and self.remask_threshold is None:
            raise ValueError(
                f"remask_budget={self.remask_budget} has no effect without remask_committed: nothing is masked again."
            )
        return unknown

    def override(self, settings: dict[str, Any]) -> None:
        """
        Takes the arguments of a call. A `max_length` without `max_new_tokens` replaces the config's, and rows end at
        an `eos_token_id` that is given. ValueError for a name that is no setting, and for both lengths.
        """
        if unknown := [name for name in settings if not _is_setting(name)]:
            raise ValueError(unknown_settings(unknown))
        if settings.get("max_length") is not None:
            if settings.get("max_new_tokens") is not None:
                raise ValueError("max_length and max_new_tokens both limit the new tokens: give one of them.")
            self.max_new_tokens = None
        if settings.get("eos_token_id") is not None:
            settings = {"stop_at_eos": True} | settings
        self.update(**settings)

    def _in_own_terms(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What settings given together mean for this config's own; ValueError for what cannot be honoured."""
        # None leaves a setting as it is if that is never None itself.
        never_none = {name for name in settings if getattr(type(self), name, None) is not None}
        settings = {name: value for name, value in settings.items() if value is not None or name not in never_none}
        do_sample, use_cache = settings.pop("do_sample", None), settings.pop("use_cache", None)
        for name, value in (("do_sample", do_sample), ("use_cache", use_cache)):
            if value not in (None, True, False):
                raise ValueError(f"{name} must be True or False, got {value!r}.")
        if do_sample:
            if settings.setdefault("temperature", self.temperature or 1.0) == 0:
                raise ValueError("do_sample=True contradicts temperature=0: leave out one of them.")
        elif do_sample is not None:
            settings["temperature"] = 0.0
        if use_cache is not None and not use_cache and settings.setdefault("kv_cache", "none") != "none":
            raise ValueError(f"use_cache=False contradicts kv_cache={settings['kv_cache']!r}: leave out one of them.")
        if type(settings.get("top_k")) is int and settings["top_k"] == 0:
            settings["top_k"] = None
        own = {name: value for name, value in settings.items() if name in _own_names()}
        if refused := refusals({name: value for name, value in settings.items() if name not in own}):
            raise ValueError(" ".join(refused))
        return own

    def _get_default_generation_params(self) -> dict[str, Any]:  # type: ignore[override]
        """
        What `Seq2SeqTrainer` fills in. It compares lengths with `max_length`, which must be a number, but nothing may
        change for the next generation.
        """
        return {} if self.max_length else {"max_length": 1, "max_new_tokens": DEFAULT_MAX_NEW_TOKENS}

    @classmethod
    def from_model_config(cls, model_config: PreTrainedConfig | dict) -> "MaskedDiffusionGenerationConfig":
        """Takes the special tokens of a model's config."""
        config = model_config if isinstance(model_config, dict) else model_config.to_dict()
        names = ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id")
        return cls(**{name: config[name] for name in names if config.get(name) is not None})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        As in transformers. A published file may hold settings of autoregressive decoding: those that ask for something
        are left out with a warning.
        """
        if not isinstance(config_dict, dict):
            raise ValueError(f"A generation config must hold a JSON object, got a {type(config_dict).__name__}.")
        known = {name: config_dict[name] for name in config_dict if name in _own_names() or name == "do_sample"}
        if known.get("do_sample") and known.get("temperature") == 0:
            del known["do_sample"]
        for name, value in known.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"The generation config has {name}={value}, which is no finite number.")
        if known.get("remask_committed") in (None, False):
            known.pop("remask_budget", None)
        foreign = {name: value for name, value in config_dict.items() if name not in known and name[0] != "_"}
        unknown = [name for name in foreign if not _is_setting(name)]
        if unknown:
            logger.warning(f"The generation config has settings that mean nothing here: {', '.join(sorted(unknown))}.")
        if refused := refusals({name: foreign[name] for name in foreign if name not in (*unknown, "use_cache")}):
            logger.warning(f"Left out of the generation config: {' '.join(refused)}")
        return super().from_dict(known, **kwargs)

    @classmethod
    def from_transformers(cls, config: GenerationConfig, base: GenerationConfig | None = None) -> Any:
        """
        A config of this class from what a plain `GenerationConfig` sets, over `base`. What is of this class already
        stands alone and is copied. TypeError for anything else.
        """
        if not isinstance(config, GenerationConfig):
            raise TypeError(f"generation_config must be a GenerationConfig, got {type(config).__name__}.")
        if hasattr(type(config), "commits_by_confidence"):  # not isinstance: remote code may load the class twice
            return copy.deepcopy(config)
        own = cls() if base is None else cls.from_transformers(base)
        settings = {name: value for name, value in vars(config).items() if value is not None and name[0] != "_"}
        own.override(settings)
        return own

    def to_dict(self) -> dict[str, Any]:
        """Every setting, and `do_sample`, which other programs look for."""
        settings = super().to_dict()
        return {name: settings[name] for name in _own_names()} | {"do_sample": self.do_sample}

    def to_diff_dict(self) -> dict[str, Any]:
        """
        The settings that differ from the defaults, and always `do_sample` and `max_new_tokens`: a pipeline fills in
        its own (to sample, 256 tokens) where a model says nothing.
        """
        defaults, always = type(self)().to_dict(), ("transformers_version", "do_sample", "max_new_tokens")
        return {name: value for name, value in self.to_dict().items() if name in always or value != defaults[name]}

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Raises ValueError for a value out of range; called whenever settings change."""
        assigned = {name: value for name, value in vars(self).items() if name[0] != "_" and name not in _own_names()}
        if unknown := [name for name in assigned if not _is_setting(name)]:
            raise ValueError(unknown_settings(unknown))
        if refused := refusals(assigned):
            raise ValueError(" ".join(refused))
        for name in ("num_diffusion_steps", "block_length", "max_length", "top_k", "num_return_sequences"):
            _check(self, name, lambda value: isinstance(value, int) and value >= 1, "an integer of at least 1")
        _check(self, "max_new_tokens", lambda value: isinstance(value, int) and value >= 0, "an integer of at least 0")
        for name in ("mask_token_id", "pad_token_id", "bos_token_id"):
            _check(self, name, lambda value: isinstance(value, int), "an integer")
        _check(self, "eos_token_id", lambda value: isinstance(value, int) or _are_tokens(value), "a token or several")
        for name in ("suppress_tokens", "defer_tokens"):
            _check(self, name, _are_tokens, "a list of integers")
        for name in ("compile", "stop_at_eos", "enable_refinement", "return_dict_in_generate", *_OUTPUTS):
            if (value := getattr(self, name)) not in (None, True, False):
                raise ValueError(f"{name} must be True or False, got {value!r}.")
        _check(self, "temperature", lambda value: 0 <= value < _TOO_LARGE, "0 or more, and finite")
        _check(self, "cfg_scale", lambda value: 0 <= value < _TOO_LARGE, "0 or more, and finite")
        _check(self, "max_time", lambda value: 0 < value < _TOO_LARGE, "above 0 and finite, in seconds")
        _check(self, "stop_strings", _are_strings, "a string or a list of strings that are not empty")
        _check(self, "top_p", lambda value: 0 < value <= 1, "above 0 and at most 1")
        _check(self, "remasking", lambda value: value in REMASKING_STRATEGIES, f"one of {REMASKING_STRATEGIES}")
        _check(self, "kv_cache", lambda value: value in KV_CACHES, f"one of {KV_CACHES}")
        _check(self, "confidence_factor", lambda value: 0 < value < _TOO_LARGE, "above 0 and finite")
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


def _are_strings(value: Any) -> bool:
    strings = [value] if isinstance(value, str) else value
    return isinstance(strings, list) and bool(strings) and all(isinstance(s, str) and s for s in strings)


def _are_tokens(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(token) is int for token in value)


def _own_names() -> dict[str, Any]:
    """The settings of [`MaskedDiffusionGenerationConfig`]."""
    return MaskedDiffusionGenerationConfig.__annotations__


def _is_setting(name: str) -> bool:
    """Whether this package or transformers knows it."""
    return name in _own_names() or name in _FIELDS or name in _CANNOT


def refusals(settings: dict[str, Any]) -> list[str]:
    """For each of transformers' settings that asks for what diffusion cannot do, a sentence that says so."""
    sentences = []
    for name, value in settings.items():
        # 0 is a token like any other.
        is_plain = value is None or isinstance(value, (bool, int, float, str, list, tuple, dict, set))
        asks_nothing = is_plain and (not value or value == _NEUTRAL.get(name))
        if not asks_nothing or (name.endswith("token_id") and value is not None):
            shown = repr(value) if is_plain else type(value).__name__
            reason = _CANNOT.get(name, "masked diffusion has nothing like it")
            sentences.append(f"{name}={shown} cannot be honoured: {reason}.")
    return sentences


def unknown_settings(names: Any) -> str:
    """An error message for names that are not generation settings, each with the nearest one that is."""
    known = [*_own_names(), "do_sample", "use_cache"]
    parts = [f"{name!r}{nearest_name(name, known)}" for name in names]
    return f"Unknown generation setting {', '.join(parts)}. Known: {', '.join(known)}."
