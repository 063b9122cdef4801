"""
The chat template of a latent thinker: that of its language model, with a latent thought at the end of a prompt. It is
saved with the tokenizer and needs transformers alone. (This file stays here: a checkpoint holds the template.)
"""

import copy
import json
import os
import tempfile
import warnings
from pathlib import Path
from string import Template

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from .configuration_latent_thinking import LatentThinkingConfig

# The language model's own template is a block of the new one. Written where it stands, its {% generation %} tags go on
# marking the assistant's tokens; called, it gives its text, of which an open or empty thought is cut off.
_FIRST_LINE = "{#- Ends the prompt with a latent thought, unless enable_thinking is false. -#}"
_BLOCK, _END_OF_BLOCK = "{%+ block language_model +%}", "{%+ endblock language_model %}"
_THOUGHT = Template(
    """
{%- if add_generation_prompt and (enable_thinking is undefined or enable_thinking) %}
    {%- set enable_thinking, always_empty = true, $always_empty %}
    {%- set think_start, think_latents, think_end = $start, $latents, $end %}
    {%- set prompt = self.language_model() %}
    {%- set body = prompt.rstrip() %}
    {%- set opened = body.removesuffix(think_end).rstrip() %}
    {%- set is_empty_thought = body.endswith(think_end) and opened.endswith(think_start) %}
    {%- if body.endswith(think_start) %}
        {%- set prompt = body.removesuffix(think_start) %}
    {%- elif is_empty_thought and always_empty %}
        {%- set prompt = opened.removesuffix(think_start) %}
    {%- endif %}
    {{- prompt }}
    {%- if not (is_empty_thought and not always_empty) %}
        {{- think_start + think_latents + think_end }}
    {%- endif %}
{%- else -%}"""
)
_LAST_LINE = """
{%- endif -%}
"""


def thought_texts(tokenizer: PreTrainedTokenizerBase, config: LatentThinkingConfig) -> tuple[str, str, str]:
    """The opening marker, the latents and the closing marker of a thought."""
    start, end = (tokenizer.decode(ids) for ids in (config.think_start_token_ids, config.think_end_token_ids))
    return start, tokenizer.convert_ids_to_tokens(config.latent_token_id) * config.num_latents, end


def latent_thinking_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: LatentThinkingConfig
) -> PreTrainedTokenizerBase:
    """
    A copy of `tokenizer` whose chat template ends prompts (`add_generation_prompt=True`) with a latent thought, as
    `latent_thinking_prompt` writes it. Saved with the model, it makes `pipeline("text-generation")` think about
    messages with transformers alone. `apply_chat_template(..., enable_thinking=False)` is the template it had. Without
    a chat template there are no messages: the tokenizer is returned as it is.

    An opening marker that the template ends with is part of the thought. So is an empty thought, unless the template
    writes it for some conversations only: then this one asked for it (SmolLM3's `/no_think`).

    Raises:
        ValueError: if the tokens of a prompt with a thought differ from those the model reads, because the tokenizer
            merges a marker of several tokens with what stands before it.
    """
    if not tokenizer.chat_template:
        return tokenizer
    tokenizer, given = copy.deepcopy(tokenizer), tokenizer.chat_template
    thought = thought_texts(tokenizer, config)
    templates = given if isinstance(given, dict) else {"default": given}
    templates = {name: _with_latent_thought(tokenizer, text, thought) for name, text in templates.items()}
    for template in templates.values():
        _check_tokens(tokenizer, template, config)
    tokenizer.chat_template = templates if isinstance(given, dict) else templates["default"]
    return tokenizer


def _with_latent_thought(tokenizer: PreTrainedTokenizerBase, template: str, thought: tuple[str, str, str]) -> str:
    # Jinja drops a template's last line break, but none in the middle.
    template = without_latent_thought(template).removesuffix("\n").removesuffix("\r")
    start, _, end = thought
    body = _prompt(tokenizer, template).rstrip()
    always_empty = body.endswith(end) and body.removesuffix(end).rstrip().endswith(start)
    literals = {name: json.dumps(text, ensure_ascii=False) for name, text in zip(("start", "latents", "end"), thought)}
    head = _FIRST_LINE + _THOUGHT.substitute(literals, always_empty=str(always_empty).lower())
    return head + _BLOCK + template + _END_OF_BLOCK + _LAST_LINE


def _prompt(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """An ordinary one, with thinking enabled."""
    options = {"chat_template": template, "add_generation_prompt": True, "enable_thinking": True}
    return tokenizer.apply_chat_template([{"role": "user", "content": "1 + 1?"}], tokenize=False, **options)


def _check_tokens(tokenizer: PreTrainedTokenizerBase, template: str, config: LatentThinkingConfig) -> None:
    """Raises ValueError unless a prompt, tokenized as a whole, ends with the tokens of a thought."""
    text, thought = _prompt(tokenizer, template), "".join(thought_texts(tokenizer, config))
    # (A template writes the special tokens itself.)
    context, found = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text.removesuffix(thought), text))
    expected = context + config.thought_token_ids
    if found != expected:
        tail = -len(config.thought_token_ids) - 1
        ends = [tokenizer.convert_ids_to_tokens(ids[tail:]) for ids in (found, expected)]
        raise ValueError(
            f"With the thought {thought!r} after it, a prompt of this chat template ends with the tokens {ends[0]} "
            f"instead of {ends[1]}: the tokenizer merges them. Add the markers as tokens of their own, or end the "
            f"template's generation prompt with a line break or a special token."
        )


def tokenizer_to_save(tokenizer: PreTrainedTokenizerBase, config: LatentThinkingConfig) -> PreTrainedTokenizerBase:
    """`latent_thinking_tokenizer`; where there is none, `tokenizer` itself, with a warning that says why."""
    try:
        return latent_thinking_tokenizer(tokenizer, config)
    except ValueError as error:
        warnings.warn(f"The chat template stays without a latent thought. {error}", stacklevel=2)
        return tokenizer


def latent_thinking_template_files(folder: str | os.PathLike) -> dict[str, bytes]:
    """
    The files with the chat templates of `latent_thinking_tokenizer` for the model and the tokenizer in `folder`, by
    their path in it; none without a tokenizer, a chat template or a whole model, or with `tokenizer_to_save`'s
    warning.
    """
    config_dict = PreTrainedConfig.get_config_dict(folder)[0]
    is_model = "AutoModelForCausalLM" in config_dict.get("auto_map", {"AutoModelForCausalLM": ""})
    is_thinker = config_dict.get("model_type") == LatentThinkingConfig.model_type and is_model
    if not is_thinker or not Path(folder, "tokenizer_config.json").is_file():
        return {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = tokenizer_to_save(tokenizer, LatentThinkingConfig.from_pretrained(folder))
    if ours is tokenizer:
        return {}
    with tempfile.TemporaryDirectory() as new_folder:
        ours.save_pretrained(new_folder)
        paths = Path(new_folder).rglob("*.jinja")
        return {path.relative_to(new_folder).as_posix(): path.read_bytes() for path in paths}


def without_latent_thought(template: str) -> str:
    """The language model's own chat template, of one of `latent_thinking_tokenizer`; another is returned as it is."""
    if not template.startswith(_FIRST_LINE):
        return template
    return template.partition(_BLOCK)[2].rpartition(_END_OF_BLOCK)[0]
