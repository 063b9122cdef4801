"""`llada-trm generate`: text from prompts."""

import json
import os
from typing import Any

import torch
from tqdm import tqdm
from transformers import TextDiffusionStreamer

from ..evaluation.language_models import decode
from ..hub.files import write_text
from .command import CommandParser, check_output_file
from .generation import add_generation_flags, check_generation, generate, generation_settings, load


def run(arguments: list[str]) -> None:
    parser = CommandParser(prog="llada-trm generate", description="Generates text by masked diffusion.")
    parser.add_argument("--checkpoint", required=True, help="folder or repository of a hybrid or a backbone")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="one prompt")
    source.add_argument("--prompts_file", help="a .json list, a .jsonl with a prompt a line, or a .txt")
    add_generation_flags(parser)
    parser.add_argument("--output_file", help="where to write a JSON line for each prompt; printed otherwise")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts at a time")
    parser.add_argument("--show_intermediates", action="store_true", help="show the text appearing step by step")
    parser.add_argument("--trace_file", help="write a refinement trace: .html or .json")
    options = parser.parse_args(arguments)
    texts = [options.prompt] if options.prompt is not None else read_prompts(options.prompts_file)
    settings = generation_settings(options) | {"output_refinement_trace": options.trace_file is not None}
    check_generation(settings, texts)
    if options.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {options.batch_size}.")
    check_output_file(options.output_file)
    check_output_file(options.trace_file, ".html", ".json")
    if len(texts) > 1 and (options.show_intermediates or options.trace_file):
        raise ValueError("--show_intermediates and --trace_file take one prompt.")

    torch.manual_seed(options.seed)
    model, tokenizer = load(options.checkpoint, options.dtype, options.device)
    streamer = TextDiffusionStreamer(tokenizer, skip_prompt=True) if options.show_intermediates else None
    results = []
    for start in tqdm(range(0, len(texts), options.batch_size), desc="Generating", disable=len(texts) == 1):
        prompts = texts[start : start + options.batch_size]
        output, answers = generate(model, tokenizer, prompts, settings, streamer)
        for prompt, tokens in zip(prompts, answers):
            answer, passes = decode(tokens, tokenizer), output.num_forward_passes
            results.append({"prompt": prompt, "answer": answer, "forward_passes": passes})
        if options.trace_file:
            trace = output.refinement_trace
            (trace.to_html if options.trace_file.endswith(".html") else trace.to_json)(options.trace_file, tokenizer)
    write_results(results, options.output_file)


def read_prompts(path: str) -> list[str]:
    """From a `.json` list of texts (or objects with a `prompt`), a `.jsonl` with one a line, or lines of text."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no prompts file {path}.")
    with open(path, encoding="utf-8") as file:
        text = file.read()
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


def write_results(results: list[dict[str, Any]], path: str | None) -> None:
    """Prints the answers, or writes a JSON line for each to the file."""
    if path is None:
        for result in results:
            print(result["answer"] if len(results) == 1 else f"{result['prompt']}\n{result['answer']}\n")
        return
    write_text(path, "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results))
    print(f"Wrote {len(results)} answers to {path}")
