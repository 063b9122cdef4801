"""`llada-trm generate`: text from prompts."""

import json
import os
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextDiffusionStreamer,
)

from ..data import prompt_tokens
from ..models import MaskedDiffusionGenerationConfig
from ..models.backbones import load_backbone
from ..models.modeling_llada_trm import LLaDATRMForMaskedDiffusion
from .parser import CommandParser


def run(arguments: list[str]) -> None:
    parser = CommandParser(prog="llada-trm generate", description="Generates text by masked diffusion.")
    parser.add_argument("--checkpoint", required=True, help="folder or repository of a hybrid or a backbone")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="one prompt")
    prompts.add_argument("--prompts_file", help="a .json list, a .jsonl with a prompt a line, or a .txt")
    parser.add_argument("--output_file", help="where to write a JSON line for each prompt; printed otherwise")
    parser.add_argument("--max_length", type=int, help="tokens of prompt and answer together")
    parser.add_argument("--max_new_tokens", type=int, help="tokens of the answer")
    parser.add_argument("--num_diffusion_steps", type=int, help="denoising steps, shared equally among blocks")
    parser.add_argument("--block_length", type=int, help="tokens decoded together")
    parser.add_argument("--temperature", type=float, help="0 takes the most probable token")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--cfg_scale", type=float, help="classifier-free guidance")
    parser.add_argument("--remasking", help="low_confidence, random, entropy, margin or refiner")
    parser.add_argument("--confidence_threshold", type=float, help="commit every token that reaches it")
    parser.add_argument("--confidence_factor", type=float, help="commit more, the surer the model is of all of them")
    parser.add_argument("--kv_cache", help="none, prefix or dual: what a step does not compute again")
    parser.add_argument("--remask_committed", type=float, help="mask committed tokens again below this probability")
    parser.add_argument("--remask_budget", type=int, help="how often a token can be masked again")
    parser.add_argument("--stop_at_eos", action="store_true", default=None, help="end an answer at its end token")
    parser.add_argument("--compile", action="store_true", default=None, help="run through torch.compile")
    parser.add_argument("--no_refinement", action="store_true", help="the bare backbone")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts at a time")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto")
    parser.add_argument("--show_intermediates", action="store_true", help="show the text appearing step by step")
    parser.add_argument("--trace_file", help="write a refinement trace: .html or .json")
    options = parser.parse_args(arguments)
    texts = [options.prompt] if options.prompt is not None else read_prompts(options.prompts_file)
    check_options(options, texts)

    torch.manual_seed(options.seed)
    model, tokenizer = load(options.checkpoint, options.dtype, options.device)
    settings = generation_settings(options)
    results = []
    for start in tqdm(range(0, len(texts), options.batch_size), desc="Generating", disable=len(texts) == 1):
        batch = texts[start : start + options.batch_size]
        results += answer(model, tokenizer, batch, settings, options.show_intermediates, options.trace_file)
    write_results(results, options.output_file)


def read_prompts(path: str) -> list[str]:
    """
    Prompts from a `.json` list of texts (or objects with a `prompt`), a `.jsonl` with one of these a line, or a `.txt`
    with a prompt a line.

    Raises:
        FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no prompts file {path}.")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        if path.endswith(".json"):
            entries: Any = json.loads(text)
        elif path.endswith(".jsonl"):
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            entries = [line for line in text.splitlines() if line.strip()]
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


def check_options(options: Any, texts: list[str]) -> None:
    """Raises ValueError for what can be seen to be wrong before the model is loaded."""
    MaskedDiffusionGenerationConfig(**generation_settings(options))
    empty = [number for number, text in enumerate(texts, start=1) if not text.strip()]
    if empty:
        raise ValueError(f"Prompt {empty[0]} is empty.")
    if options.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {options.batch_size}.")
    for path in (options.output_file, options.trace_file):
        if path and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise FileNotFoundError(f"There is no folder {os.path.dirname(os.path.abspath(path))} to write {path} in.")
    if options.trace_file and not options.trace_file.endswith((".html", ".json")):
        raise ValueError(f"trace_file must end in .html or .json, got {options.trace_file}.")
    if len(texts) > 1 and (options.show_intermediates or options.trace_file):
        raise ValueError("--show_intermediates and --trace_file take one prompt.")


def load(checkpoint: str, dtype: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A hybrid or a backbone with its tokenizer, ready to generate."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    is_hybrid = model_type_of(checkpoint) == LLaDATRMForMaskedDiffusion.config_class.model_type
    loader = LLaDATRMForMaskedDiffusion.from_pretrained if is_hybrid else load_backbone
    return loader(checkpoint, dtype=dtype).to(device).eval(), tokenizer


def model_type_of(checkpoint: str) -> str | None:
    """What the `config.json` of a folder or repository says it is."""
    return PreTrainedConfig.get_config_dict(checkpoint)[0].get("model_type")


def generation_settings(options: Any) -> dict[str, Any]:
    """The settings given on the command line; the model's own hold for the rest."""
    known = vars(MaskedDiffusionGenerationConfig())
    settings = {name: value for name, value in vars(options).items() if name in known and value is not None}
    if options.no_refinement:
        settings["enable_refinement"] = False
    return settings


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    settings: dict[str, Any],
    show_intermediates: bool = False,
    trace_file: str | None = None,
) -> list[dict[str, Any]]:
    """Answers a batch of prompts: a dictionary with prompt, answer and forward passes for each."""
    batch = tokenizer.pad({"input_ids": [prompt_tokens(prompt, tokenizer) for prompt in prompts]}, return_tensors="pt")
    batch = batch.to(model.device)
    output = model.generate(
        **batch,
        **settings,
        streamer=TextDiffusionStreamer(tokenizer, skip_prompt=True) if show_intermediates else None,
        output_refinement_trace=trace_file is not None,
        return_dict_in_generate=True,
    )
    if trace_file is not None:
        trace = output.refinement_trace
        (trace.to_html if trace_file.endswith(".html") else trace.to_json)(trace_file, tokenizer)
    answers = output.sequences[:, batch["input_ids"].shape[1] :]
    return [
        {"prompt": prompt, "answer": decode(tokens, tokenizer), "forward_passes": output.num_forward_passes}
        for prompt, tokens in zip(prompts, answers)
    ]


def decode(tokens: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an answer, up to its first end-of-sequence token."""
    ends = (tokens == tokenizer.eos_token_id).nonzero()
    return tokenizer.decode(tokens[: int(ends[0])] if len(ends) else tokens, skip_special_tokens=True)


def write_results(results: list[dict[str, Any]], path: str | None) -> None:
    """Prints the answers, or writes a JSON line for each; the file appears when it is complete."""
    if path is None:
        for result in results:
            print(result["answer"] if len(results) == 1 else f"{result['prompt']}\n{result['answer']}\n")
        return
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    os.replace(path + ".tmp", path)
    print(f"Wrote {len(results)} answers to {path}")
