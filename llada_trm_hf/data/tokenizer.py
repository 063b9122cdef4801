"""Tokens of a prompt, and a byte-level tokenizer that needs no download: any text, one token a byte."""

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL_TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",  # as in LLaDA: padding is the end of the text, and is learned
    "mask_token": "<|mdm_mask|>",
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """
    256 byte tokens and the special tokens of LLaDA (start, end = padding, mask); 259 in all. For models trained from
    scratch, such as the demo's.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)


def prompt_tokens(prompt: str, tokenizer: PreTrainedTokenizerBase, enable_thinking: bool | None = None) -> list[int]:
    """
    The tokens a prompt is generated from: a user's message if the tokenizer has a chat template, else the text.

    Args:
        enable_thinking: for chat templates that know the word (SmolLM3's, Qwen3's); None leaves it to the template.

    Raises:
        ValueError: to say whether to think without a chat template.
    """
    if not tokenizer.chat_template:
        if enable_thinking is not None:
            raise ValueError("Only a chat template knows how a model is told (not) to think; the tokenizer has none.")
        return tokenizer(prompt)["input_ids"]
    message = [{"role": "user", "content": prompt}]
    thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    batch = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True, **thinking)
    return batch["input_ids"]
