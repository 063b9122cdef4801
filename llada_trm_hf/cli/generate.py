"""`llada-trm generate`: text from prompts."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from .command import CommandParser, check_output_file
from .generation import add_generation_flags, check_generation, generate, generation_settings, load


def run(arguments: list[str]) -> None:
    options = _parser().parse(arguments)
    texts = [options.prompt] if options.prompt is not None else read_prompts(options.prompts_file)
    settings = generation_settings(options) | {"output_refinement_trace": options.trace_file is not None}
    check_generation(settings, texts)
    if options.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {options.batch_size}.")
    check_output_file(options.output_file)
    check_output_file(options.trace_file, ".html", ".json")
    if len(texts) > 1 and (options.show_intermediates or options.trace_file):
        raise ValueError("--show_intermediates and --trace_file take one prompt.")
    import torch
    from tqdm import tqdm
    from transformers import TextDiffusionStreamer

    from ..evaluation.language_models import decode
    from ..hub.files import write_atomically

    torch.manual_seed(options.seed)
    model, tokenizer = load(options.checkpoint, options.dtype, options.device)
    check_prompt_lengths(texts, model, tokenizer, settings)
    streamer = TextDiffusionStreamer(tokenizer, skip_prompt=True) if options.show_intermediates else None
    with answers_to(options.output_file, len(texts)) as write:
        for start in tqdm(range(0, len(texts), options.batch_size), desc="Generating", disable=len(texts) == 1):
            prompts = texts[start : start + options.batch_size]
            output, answers = generate(model, tokenizer, prompts, settings, streamer)
            passes = output.num_forward_passes
            decoded = [decode(tokens, tokenizer) for tokens in answers]
            write([{"prompt": p, "answer": a, "forward_passes": passes} for p, a in zip(prompts, decoded)])
            if options.trace_file:
                save = output.refinement_trace.to_html
                if options.trace_file.endswith(".json"):
                    save = output.refinement_trace.to_json
                write_atomically(options.trace_file, partial(save, tokenizer=tokenizer))


def _parser() -> CommandParser:
    parser = CommandParser(prog="llada-trm generate", description="Generates text by masked diffusion.")
    parser.add_argument("--checkpoint", required=True, help="folder or repository of a hybrid or a backbone")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="one prompt")
    source.add_argument("--prompts_file", help="a .json list, a .jsonl with a prompt a line, or a .txt")
    add_generation_flags(parser)
    parser.add_argument("--output_file", help="a JSON line for each prompt, as soon as it is answered; else printed")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts at a time")
    parser.add_argument("--show_intermediates", action="store_true", help="show the text appearing step by step")
    parser.add_argument("--trace_file", help="write a refinement trace: .html or .json")
    return parser


def check_prompt_lengths(texts: list[str], model: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
    """Raises ValueError for a prompt too long for the model's context, before any is answered."""
    from ..data import prompt_tokens

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    new_tokens = settings.get("max_new_tokens", model.generation_config.max_new_tokens) or 0
    if limit is None or "max_length" in settings:
        return
    for number, text in enumerate(texts, start=1):
        length = len(prompt_tokens(text, tokenizer))
        if length + new_tokens > limit:
            which = "The prompt" if len(texts) == 1 else f"Prompt {number}"
            found = f"{which} has {length} tokens; with max_new_tokens={new_tokens}"
            raise ValueError(f"{found} that is more than the model's context of {limit}.")


def read_prompts(path: str) -> list[str]:
    """From a `.json` list of texts (or objects with a `prompt`), a `.jsonl` with one a line, or lines of text."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no prompts file {path}.")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}.") from error
    entries: Any = [line for line in text.splitlines() if line.strip()]
    try:
        if path.endswith(".json"):
            entries = json.loads(text)
        elif path.endswith(".jsonl"):
            entries = [json.loads(line) for line in entries]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list of prompts, got a {type(entries).__name__}.")
    prompts: list[Any] = [entry.get("prompt") if isinstance(entry, dict) else entry for entry in entries]
    for number, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str):
            raise ValueError(f"{path}: entry {number} is neither a text nor an object with a 'prompt'.")
    if not prompts:
        raise ValueError(f"{path} holds no prompts.")
    return prompts


@contextmanager
def answers_to(path: str | None, number: int) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """
    A function that takes the next of `number` answers and prints them, or adds a JSON line for each to the file at
    once: what a killed run had answered stays.
    """
    if path is None:
        yield lambda results: print(
            *(r["answer"] if number == 1 else f"{r['prompt']}\n{r['answer']}\n" for r in results), sep="\n", flush=True
        )
        return
    with ExitStack() as stack:
        file = None

        def write(results: list[dict[str, Any]]) -> None:
            nonlocal file
            if file is None:  # not before there is an answer: until then an older file stays
                file = stack.enter_context(open(path, "w", encoding="utf-8"))
            file.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
            file.flush()

        yield write
    print(f"Wrote {number} answers to {path}")
