"""A response that is a grid, on the page and in the picture: which cells it has, and which were given."""

import json
import re

import pytest
import torch
from PIL import Image

from llada_trm_hf.data import byte_tokenizer, mazes, sudoku_puzzles
from llada_trm_hf.generation.refinement_trace import RefinementTrace
from llada_trm_hf.inspection.trace_grid import TraceGrid
from llada_trm_hf.inspection.trace_story import TokenTexts, guess_changes

TOKENIZER = byte_tokenizer()


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def solved_in_two_steps(prompts, answers):
    """A trace of prompts of one length, padded on the left, whose answers appear from both ends."""
    longest = max(map(len, prompts))
    mask, pad = TOKENIZER.mask_token_id, TOKENIZER.pad_token_id
    trace = RefinementTrace(mask, longest)
    prompt = torch.tensor([[pad] * (longest - len(p)) + ids(p) for p in prompts])
    answer = torch.tensor([ids(a) for a in answers])
    half = answer.shape[1] // 2
    for start, stop in ((0, 0), (0, half), (0, answer.shape[1])):
        canvas = torch.full_like(answer, mask)
        canvas[:, start:stop] = answer[:, start:stop]
        trace.canvases.append(torch.cat([prompt, canvas], dim=1))
    return trace


def page_of(trace, path, **kwargs):
    trace.to_html(path, TOKENIZER, **kwargs)
    page = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="trace">(.*?)</script>', page, re.DOTALL)[1])


@pytest.mark.parametrize("size, boxes", [(4, [2, 2]), (6, [2, 3]), (9, [3, 3]), (7, None)])
def test_the_page_knows_cells_boxes_and_what_was_given(tmp_path, size, boxes):
    made = list(mazes(2, 7, "test") if size == 7 else sudoku_puzzles(2, size, split="test"))
    trace = solved_in_two_steps([p["prompt"] for p in made], [p["answer"] for p in made])
    data = page_of(trace, tmp_path / "trace.html", grid_width=size)
    assert data["grid"] == {"width": size, "first": size * size + 1, "boxes": boxes}
    for row, problem in zip(data["rows"], made, strict=True):
        shown = "".join("." if token < 0 else data["texts"][str(token)] for token in row["given"])
        assert shown + "=" == problem["prompt"]
    without = page_of(trace, tmp_path / "trace.html")
    assert without["grid"] is None and "given" not in without["rows"][0]


def given_cells(prompt, answer, path):
    trace = solved_in_two_steps([prompt], [answer])
    data = page_of(trace, path, grid_width=4)
    texts = ("." if token < 0 else data["texts"][str(token)] for token in data["rows"][0]["given"])
    return "".join(texts), data["grid"]["boxes"]


def test_zeros_are_empty_and_other_prompts_give_nothing(tmp_path):
    (problem,) = sudoku_puzzles(1, 4)
    path, answer, puzzle = tmp_path / "trace.html", problem["answer"], problem["prompt"][:-1]
    for prompt in (puzzle, puzzle.replace(".", "0"), f"Solve: {puzzle}"):
        assert given_cells(f"{prompt}=", answer, path) == (puzzle, [2, 2])
    for prompt in ("=", "1234=", f"{puzzle[1:]}="):  # fewer cells than the grid has
        assert given_cells(prompt, answer, path) == ("." * 16, None)
    assert given_cells(f"{'5' * 16}=", answer, path) == ("5" * 16, None)  # no digit of such a sudoku
    # Without a tokenizer nobody knows what a cell says.
    trace = solved_in_two_steps([problem["prompt"]], [answer])
    assert TraceGrid(trace, 4, TokenTexts(trace)).given(0) == [-1] * 16
    assert TraceGrid(trace, 4, TokenTexts(trace)).boxes() is None


@pytest.mark.parametrize("width", [0, 1, -3, 5, 9])
def test_a_width_that_does_not_fit(tmp_path, width):
    (problem,) = sudoku_puzzles(1, 4)
    trace = solved_in_two_steps([problem["prompt"]], [problem["answer"]])
    with pytest.raises(ValueError, match=rf"grid_width={width} does not fit.* 16 tokens .*room for a width of 4"):
        trace.to_html(tmp_path / "trace.html", TOKENIZER, grid_width=width)
    assert not (tmp_path / "trace.html").exists()


def test_cells_have_places():
    (problem,) = sudoku_puzzles(1, 4)
    trace = solved_in_two_steps([problem["prompt"]], [problem["answer"] + "="])
    grid = TraceGrid(trace, 4, TokenTexts(trace, TOKENIZER))
    assert [grid.place(17 + cell) for cell in (0, 7, 15)] == ["row 1, column 1", "row 2, column 4", "row 4, column 4"]
    assert grid.place(17 + 16) == "behind the grid"


def test_the_picture_and_the_table_of_changes(make_hybrid, tmp_path):
    """Of a hybrid whose refiner changes guesses: the table names cells, and the picture is another one."""
    torch.manual_seed(0)
    model = make_hybrid(min_confidence=0.99)
    prompt = torch.randint(10, 45, (1, 17))
    out = model.generate(
        prompt, max_new_tokens=18, num_diffusion_steps=3, output_refinement_trace=True, return_dict_in_generate=True
    )
    trace = out.refinement_trace
    trace.expect([*range(10, 26)])
    changes = guess_changes(trace)
    assert changes
    trace.to_html(tmp_path / "trace.html", TOKENIZER, grid_width=4)
    table = re.search(r"<table>.*?</table>", (tmp_path / "trace.html").read_text(encoding="utf-8"), re.DOTALL)[0]
    places = re.findall(r"<td>(row \d, column \d|behind the grid)</td>", table)
    cells = [divmod(change.position - 17, 4) for change in changes]
    assert places == [f"row {r + 1}, column {c + 1}" if r < 4 else "behind the grid" for r, c in cells]
    trace.plot(tmp_path / "grid.png", TOKENIZER, grid_width=4)
    trace.plot(tmp_path / "text.png", TOKENIZER)
    sizes = [Image.open(tmp_path / name).size for name in ("grid.png", "text.png")]
    assert sizes[0] != sizes[1]
