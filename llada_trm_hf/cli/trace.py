"""`llada-trm trace`: how the answer to a prompt came about, as a page, a picture and data."""

import importlib
import os
from typing import TYPE_CHECKING

from .command import CommandParser, check_output_dir
from .generation import add_generation_flags, check_generation, generate, generation_settings, load

if TYPE_CHECKING:  # --help does not wait for torch
    from transformers import PreTrainedTokenizerBase


def run(arguments: list[str]) -> None:
    parser = CommandParser(
        prog="llada-trm trace",
        description="Answers a prompt and writes trace.html, trace.png and trace.json: the text appearing, how sure "
        "the model was, and what the refiner did.",
    )
    parser.add_argument("--checkpoint", required=True, help="folder or repository of a hybrid or a backbone")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--answer", help="the right answer, if known: shows what became right, and what wrong")
    parser.add_argument(
        "--grid_width", type=int, help="draw the answer as a grid with so many cells in a row, as of a sudoku"
    )
    add_generation_flags(parser)
    parser.add_argument("--output_dir", default="outputs/trace", help="folder for the files")
    options = parser.parse(arguments)
    settings = {**generation_settings(options), "output_refinement_trace": True}
    check_generation(settings, [options.prompt])
    if options.answer is not None and not options.answer:
        raise ValueError("--answer is empty: leave it out if the right answer is not known.")
    folder = options.output_dir
    check_output_dir(folder)
    importlib.import_module("matplotlib")  # if it is missing, say so before the work
    import torch

    from ..evaluation.language_models import decode
    from ..hub.files import output_dir_lock, write_atomically
    from ..inspection import trace_summary

    torch.manual_seed(options.seed)
    model, tokenizer = load(options.checkpoint, options.dtype, options.device)
    page, picture, data = (os.path.join(folder, f"trace.{ending}") for ending in ("html", "png", "json"))
    output, answers = generate(model, tokenizer, [options.prompt], settings)
    trace = output.refinement_trace
    if options.answer is not None:
        trace.expect(answer_tokens(options.answer, tokenizer, answers.shape[1]))
    with output_dir_lock(folder, ".trace.lock"):  # so that the three files are of one answer
        write_atomically(page, lambda path: trace.to_html(path, tokenizer, options.grid_width))
        write_atomically(data, lambda path: trace.to_json(path, tokenizer))
        print(f"{decode(answers[0], tokenizer)}\n\n{trace_summary(trace)}\n\n{page}\n{data}")
        if trace.passes:
            write_atomically(picture, lambda path: trace.plot(path, tokenizer, options.grid_width))
            print(picture)


def answer_tokens(answer: str, tokenizer: "PreTrainedTokenizerBase", room: int) -> list[int]:
    """Tokens of the known answer, and the end token behind it if `room` tokens are enough for that."""
    tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tokens + end if len(tokens) < room else tokens
