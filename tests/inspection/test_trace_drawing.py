"""Traces: what they record, and the page and picture drawn from them."""

import html
import json
import os
import re
import shutil
import struct
import sys
from dataclasses import fields
from html.parser import HTMLParser

import pytest
import torch
from run_programs import run_program
from transformers import StoppingCriteria, StoppingCriteriaList

import llada_trm_hf.inspection
from llada_trm_hf.generation.refinement_trace import TRACE_RENDERERS, RefinementPass, RefinementTrace
from llada_trm_hf.inspection import trace_summary
from llada_trm_hf.models import LLaDAConfig, LLaDAForMaskedDiffusion, LLaDATRMForMaskedDiffusion

MASK, PROMPT_LENGTH, NEW_TOKENS, NUM_STEPS = 49, 6, 16, 8
ATTENTION_MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
# Texts that end a script element, keep it from ending, or look different in HTML and JSON.
NASTY = ["</script><b>", "<!--<script>", "&amp;\"'`${x}", "\u2028\n", "x\\u003cy"]
CHROMIUM = shutil.which("chromium")


class Tokenizer:
    def decode(self, ids):
        (token,) = ids
        return NASTY[token % len(NASTY)] + str(token)


class StopRow(StoppingCriteria):
    """Stops the rows whose prompt ends in a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, PROMPT_LENGTH - 1] == self.token


class Elements(HTMLParser):
    """The scripts of a page, the names of all its elements, and its tokens as (classes, text)."""

    def __init__(self, page):
        super().__init__()
        self.names, self.scripts, self.tokens, self.inside = [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        classes = set((dict(attrs).get("class") or "").split())
        self.inside = tag if tag == "script" or "token" in classes else ""
        if tag == "script":
            self.scripts.append("")
        elif self.inside:
            self.tokens.append((classes, ""))

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside:
            classes, text = self.tokens[-1]
            self.tokens[-1] = (classes, text + data)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LLaDAConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        mask_token_id=MASK,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=1,
        max_position_embeddings=128,
    )
    return LLaDATRMForMaskedDiffusion.from_backbone(LLaDAForMaskedDiffusion(config).eval(), chunk_size=4).eval()


def generate(model, stop_first=False, **kwargs):
    """Two rows, the first padded on the left; with `stop_first` it stops after the first of four blocks."""
    prompt = torch.arange(2, 2 + 2 * PROMPT_LENGTH).view(2, PROMPT_LENGTH)
    if stop_first:
        kwargs["stopping_criteria"] = StoppingCriteriaList([StopRow(int(prompt[0, -1]))])
        kwargs["block_length"] = 4
    return model.generate(
        prompt.masked_fill(ATTENTION_MASK == 0, 0),
        attention_mask=ATTENTION_MASK,
        max_new_tokens=NEW_TOKENS,
        num_diffusion_steps=NUM_STEPS,
        return_dict_in_generate=True,
        output_history=True,
        output_refinement_trace=True,
        **kwargs,
    )


def embedded_data(page):
    return Elements(page).scripts[0]


def rendered(path, step, row):
    """The page as a browser shows it at a step."""
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    profile = f"--user-data-dir={path.parent / 'profile'}"
    address = f"{path.as_uri()}#step={step}&row={row}"
    command = [CHROMIUM, *options.split(), "--disable-component-update", "--disable-sync", profile, "--dump-dom"]
    page = run_program([*command, address], check=True).stdout
    return page[: page.index('<ul class="legend"')]


def test_json_holds_every_canvas_and_its_refinement(model, tmp_path):
    out = generate(model)
    out.refinement_trace.to_json(tmp_path / "trace.json", Tokenizer())
    data = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    assert (data["mask_token_id"], data["prompt_length"]) == (MASK, PROMPT_LENGTH)
    assert len(data["rows"]) == 2
    for row, steps in enumerate(data["rows"]):
        assert [step["tokens"] for step in steps] == out.history[:, row].tolist()
        for step in steps:
            assert step["text"] == [None if t == MASK else Tokenizer().decode([t]) for t in step["tokens"]]
        assert all(step["refinement"]["num_steps"] for step in steps[1:])
        # Chunks of four are counted from the first token that is not padding.
        length = PROMPT_LENGTH + NEW_TOKENS
        padding = int((ATTENTION_MASK[row] == 0).sum())
        expected = [-1] * padding + [i // 4 for i in range(length - padding)]
        assert steps[1]["refinement"]["chunk_of_token"] == expected


@pytest.mark.parametrize("tokenizer", [None, Tokenizer()])
@pytest.mark.parametrize("kwargs", [{}, {"stop_first": True}, {"enable_refinement": False}, {"cfg_scale": 1.0}])
def test_page_holds_exactly_the_data(model, tmp_path, tokenizer, kwargs):
    trace = generate(model, **kwargs).refinement_trace
    trace.to_html(tmp_path / "trace.html", tokenizer)
    data = json.loads(embedded_data((tmp_path / "trace.html").read_text(encoding="utf-8")))
    whole = trace.to_dict(tokenizer)
    assert data["mask_token_id"] == MASK and len(data["rows"]) == len(whole["rows"])
    for row, steps in zip(data["rows"], whole["rows"]):
        canvas = row["tokens"]
        assert canvas == steps[0]["tokens"] and len(row["steps"]) == len(steps) - 1
        for short, step in zip(row["steps"], steps[1:]):
            for column, token in short["set"]:
                canvas[column] = token
            assert canvas == step["tokens"]
            if tokenizer is not None:
                texts = [data["texts"].get(str(token)) for token in canvas]
                assert texts == [text and text.replace("\u2028", "\\u2028") for text in step["text"]]
            assert bool(short.get("refinement")) == bool(step.get("refinement"))
            if step.get("refinement"):
                assert row["chunk_of_token"] == step["refinement"]["chunk_of_token"]
                check_refinement(short["refinement"], step["refinement"], [column for column, _ in short["set"]])


def check_refinement(short, whole, decided):
    """That the page's short record of a pass says what the whole one says."""
    assert short["num_steps"] == whole["num_steps"]
    assert short["changed"] == [i for i, changed in enumerate(whole["changed_tokens"]) if changed]
    for name in ("chunk_confidence", "refiner_confidence"):
        assert short[name] == pytest.approx(whole[name], abs=1e-4)
    assert [value == 1 for value in short["chunk_confidence"]] == [value >= 1 for value in whole["chunk_confidence"]]
    for ends, curve in zip(short["similarity"], whole["similarity"]):
        values = [value for value in curve if value is not None]
        assert ends == pytest.approx([*values[:1], *values[-1:]], abs=1e-4)
    (old, new), (p, q) = whole["guesses"], whole["guess_probability"]
    refined = [chunk >= 0 and whole["num_steps"][chunk] > 0 for chunk in whole["chunk_of_token"]]
    told = [i for i, token in enumerate(old) if token >= 0 and (refined[i] or i in decided)]
    assert [guess[0] for guess in short["guesses"]] == told
    for column, before, before_share, after, after_share in short["guesses"]:
        assert (before, after) == (old[column], new[column])
        assert (before_share / 1000, after_share / 1000) == pytest.approx((p[column], q[column]), abs=6e-4)


def test_texts_cannot_leave_the_data(model, tmp_path):
    generate(model).refinement_trace.to_html(tmp_path / "trace.html", Tokenizer())
    page = (tmp_path / "trace.html").read_text(encoding="utf-8")
    elements = Elements(page)
    assert len(elements.scripts) == 2
    assert "b" not in elements.names
    assert "<" not in embedded_data(page)


def test_page_loads_nothing(model, tmp_path):
    generate(model).refinement_trace.to_html(tmp_path / "trace.html", Tokenizer())
    page = (tmp_path / "trace.html").read_text(encoding="utf-8")
    template = page.replace(embedded_data(page), "")
    assert not re.search(r"https?://|\bsrc\s*=|<link|@import|url\(|\bfetch\(|\bimport\b|XMLHttpRequest", template)
    assert "default-src 'none'" in template


class Figures(HTMLParser):
    """The points and the title of every polyline of a page, by row, chunk and step; and the captions of the chunks."""

    def __init__(self, page):
        super().__init__()
        self.points, self.titles, self.captions = {}, {}, {}
        self.row = self.chunk = self.line = self.inside = None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs, self.inside = dict(attrs), tag
        self.row = int(attrs.get("data-row", self.row or 0))
        self.chunk = int(attrs.get("data-chunk", self.chunk or 0))
        if tag == "polyline":
            self.line = (self.row, self.chunk, int(attrs["data-step"]))
            self.points[self.line] = [tuple(map(float, point.split(","))) for point in attrs["points"].split()]

    def handle_data(self, data):
        if self.inside == "title" and self.line:
            self.titles[self.line] = data
        elif self.inside in ("figcaption", "small") and self.line:
            key = (self.row, self.chunk)
            self.captions[key] = self.captions.get(key, "") + data

    def handle_endtag(self, tag):
        self.inside = None


@pytest.mark.parametrize("kwargs", [{}, {"stop_first": True}, {"cfg_scale": 1.0}])
def test_page_draws_the_similarity_curves(make_hybrid, tmp_path, kwargs):
    trace = generate(make_hybrid(), **kwargs).refinement_trace
    trace.to_html(tmp_path / "trace.html", Tokenizer())
    figures = Figures((tmp_path / "trace.html").read_text(encoding="utf-8").split("<script")[0])
    expected = {}
    for step, done in enumerate(trace.passes, start=1):
        for index, row in enumerate(done.rows.tolist()):
            for chunk, curve in enumerate(done.similarity[index].tolist()):
                if any(value == value for value in curve):
                    expected[row, chunk, step] = [value for value in curve if value == value]
    assert len(expected) > 10 and figures.points.keys() == figures.titles.keys() == expected.keys()
    for (row, chunk, step), curve in expected.items():
        low = min(min(values) for (other, _, _), values in expected.items() if other == row)
        points = figures.points[row, chunk, step][: len(curve)]
        # From the top line, which is 1, to the bottom line, the lowest of the row; from left to right.
        assert [1 - (y - 4) / 40 * max(1 - low, 1e-6) for _, y in points] == pytest.approx(curve, abs=2e-4)
        assert [x for x, _ in points] == sorted({x for x, _ in points})
        assert figures.titles[row, chunk, step] == f"step {step}: " + " ".join(f"{value:.4f}" for value in curve)
    for (row, chunk), caption in figures.captions.items():
        here = [done.num_steps[list(done.rows).index(row), chunk] for done in trace.passes if row in done.rows]
        updates, steps = int(sum(here)), sum(number > 0 for number in here)
        counts = [f"{number} {word}{'s' * (number != 1)}" for number, word in ((updates, "update"), (steps, "step"))]
        assert caption == f"Chunk {chunk + 1} {' in '.join(counts)}"


def test_page_without_refiner_draws_none(model, tmp_path):
    generate(model, enable_refinement=False).refinement_trace.to_html(tmp_path / "trace.html")
    assert "<polyline" not in (tmp_path / "trace.html").read_text(encoding="utf-8").split("<script")[0]


@pytest.mark.parametrize("tokenizer", [None, Tokenizer()])
@pytest.mark.parametrize("kwargs", [{}, {"stop_first": True}, {"enable_refinement": False}])
def test_json_is_read_back_whole(model, tmp_path, kwargs, tokenizer):
    trace = generate(model, **kwargs).refinement_trace
    trace.to_json(tmp_path / "trace.json", tokenizer)
    again = RefinementTrace.from_json(tmp_path / "trace.json")
    assert (again.mask_token_id, again.prompt_length) == (MASK, PROMPT_LENGTH)
    assert len(again.passes) == len(trace.passes)
    for ours, theirs in zip(again.canvases, trace.canvases, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(again.passes, trace.passes):
        for part in fields(RefinementPass):
            found, expected = getattr(ours, part.name), getattr(theirs, part.name)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert "NaN" not in (tmp_path / "trace.json").read_text(encoding="utf-8")  # which is no JSON


@pytest.mark.parametrize(
    "text", ["{not json", "[1, 2]", '{"rows": 3}', '{"mask_token_id": 1, "prompt_length": 2, "rows": [[{}]]}']
)
def test_other_files_are_no_traces(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is not a refinement trace"):
        RefinementTrace.from_json(tmp_path / "x.json")


@pytest.mark.parametrize("stop_first", [False, True])
def test_summary_counts_what_the_trace_holds(make_hybrid, stop_first):
    model = make_hybrid(min_confidence=0.2)
    trace = generate(model, stop_first=stop_first).refinement_trace
    steps = [step["refinement"] for step in trace.to_dict()["rows"][0][1:] if step["refinement"]]
    refined = [(step, chunk) for step in steps for chunk, number in enumerate(step["num_steps"]) if number]
    updates, changed = (sum(sum(step[name]) for step in steps) for name in ("num_steps", "changed_tokens"))
    before, after = (
        sum(step[name][chunk] for step, chunk in refined) / len(refined)
        for name in ("chunk_confidence", "refiner_confidence")
    )
    curves = [[value for value in step["similarity"][chunk] if value is not None] for step, chunk in refined]
    last = [curve[-1] for curve in curves if curve]
    with_refined = sum(any(step["num_steps"]) for step in steps)
    assert 0 < with_refined < len(steps)
    assert trace_summary(trace).splitlines()[1:] == [
        f"{len(refined)} chunks refined, in {with_refined} of the steps: {updates} updates, "
        f"{changed} best guesses changed",
        f"mean confidence in them {before:.3f} of the backbone, {after:.3f} of the refiner",
        f"similarity at the end {sum(last) / len(last):.4f} on average, {min(last):.4f} at worst",
    ]
    assert trace_summary(generate(model, enable_refinement=False).refinement_trace) == (
        f"{NEW_TOKENS} tokens decided in {NUM_STEPS} diffusion steps\nno refiner ran"
    )


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_browser_shows_the_tokens(model, tmp_path):
    out = generate(model, stop_first=True)
    out.refinement_trace.to_html(tmp_path / "trace.html", Tokenizer())
    canvases = out.history[:, 1]
    for step in (0, 3, NUM_STEPS):
        tokens = Elements(rendered(tmp_path / "trace.html", step, row=1)).tokens
        assert len(tokens) == PROMPT_LENGTH + NEW_TOKENS
        before = canvases[max(step - 1, 0)]
        for (classes, text), token, earlier in zip(tokens, canvases[step].tolist(), before.tolist()):
            assert ("undecided" in classes) == (token == MASK)
            assert ("new" in classes) == (token != earlier)
            if token != MASK:
                assert text == Tokenizer().decode([token]).replace("\n", "↵\n").replace(
                    "\u2028", "\\u2028"
                )  # all made visible
    # The first row has left the batch, and its padding is folded up.
    page = rendered(tmp_path / "trace.html", NUM_STEPS, row=0)
    assert "finished after step 2." in page
    assert re.search("2 . padding", page)
    assert len(Elements(page).tokens) == PROMPT_LENGTH + NEW_TOKENS - 2


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_browser_shows_the_guesses_of_the_step(make_hybrid, tmp_path):
    model = make_hybrid(min_confidence=0.5)
    trace = generate(model).refinement_trace
    trace.expected = trace.canvases[-1].roll(1, dims=0)
    trace.to_html(tmp_path / "trace.html", Tokenizer())
    step = next(i for i, done in enumerate(trace.passes, start=1) if done.changed_tokens[1].any())
    page = rendered(tmp_path / "trace.html", step, row=1)
    whole = trace.to_dict()["rows"][1]
    done, tokens, before = whole[step]["refinement"], whole[step]["tokens"], whole[step - 1]["tokens"]
    expected = []
    for column, (old, new) in enumerate(zip(*done["guesses"])):
        if old < 0 or not done["num_steps"][done["chunk_of_token"][column]]:
            continue
        names = ["mask" if t == MASK else Tokenizer().decode([t]).replace("\u2028\n", "\\u2028↵") for t in (old, new)]
        right = int(trace.expected[1, column])
        outcome = ("" if old == new else "became " if right in (old, new) else "still ") + ("wrong", "right")[
            new == right
        ]
        shares = [int(1000 * done["guess_probability"][i][column] + 0.5) / 10 for i in (0, 1)]
        decided = "decided now" if tokens[column] != before[column] else "still open"
        expected.append([column - PROMPT_LENGTH + 1, [names[1]] if old == new else names, shares, outcome, decided])
    assert len(expected) > 3 and any(len(names) == 2 for _, names, *_ in expected)
    tiles = re.findall(r'<li class="tile( changed)?">(.*?)</li>', page, re.DOTALL)
    assert len(tiles) == len(expected)
    for (changed, tile), (number, names, shares, outcome, decided) in zip(tiles, expected):
        text = html.unescape(re.sub(r"<[^>]+>", "|", tile))
        assert bool(changed) == (len(names) == 2) and f"|token {number}|" in text
        assert all(f"|{name}|" in text for name in names) and f" {outcome}|" in text and f"|{decided}|" in text
        found = re.search(r"\|(\d+)% → (\d+)%\|", text)
        assert [int(share) for share in found.groups()] == pytest.approx(shares, abs=0.6)


@pytest.mark.parametrize("kwargs", [{}, {"stop_first": True}, {"cfg_scale": 1.0}])
def test_plot_is_a_picture(model, tmp_path, kwargs):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    generate(model, **kwargs).refinement_trace.plot(tmp_path / "trace.png")
    picture = (tmp_path / "trace.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", picture[16:24]) >= (1500, 800)
    assert matplotlib_image.imread(tmp_path / "trace.png").std() > 0.05  # it can be read and is not blank


def test_plot_shows_the_first_row_while_it_takes_part(model, tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    trace = generate(model, stop_first=True).refinement_trace
    trace.plot(tmp_path / "trace.png")
    # Eight steps over four blocks: the first row stops after two.
    passes = [step["refinement"] for step in trace.to_dict()["rows"][0][1:3]]
    chunk_of_token = passes[0]["chunk_of_token"]
    guesses, updates = (axes.images[0].get_array() for axes in drawn[0].axes if axes.images)
    first, last = chunk_of_token[PROMPT_LENGTH], max(chunk_of_token)  # the prompt has nothing to decide
    assert guesses.shape == (2, NEW_TOKENS) and updates.shape == (last - first + 1, 2)
    canvases = trace.to_dict()["rows"][0]
    for step, done in enumerate(passes):
        assert updates.filled(0)[:, step].tolist() == done["num_steps"][first : last + 1]
        before, after = (canvases[i]["tokens"][PROMPT_LENGTH:] for i in (step, step + 1))
        for state, old, new, changed in zip(
            guesses[step].tolist(), before, after, done["changed_tokens"][PROMPT_LENGTH:]
        ):
            assert state == (3 if changed else 0 if new == MASK else 1 if new == old else 2)


def test_plot_of_a_refiner_without_similarities_shows_all_updates(model, tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    trace = generate(model).refinement_trace
    for number, done in enumerate(trace.passes, start=1):
        done.similarity = torch.full((*done.num_steps.shape, 1), torch.nan)
        done.num_steps.fill_(number)
    trace.plot(tmp_path / "trace.png")
    _, updates = (axes.images[0] for axes in drawn[0].axes if axes.images)
    assert updates.get_clim() == (0, len(trace.passes))


def test_plot_needs_a_refiner_and_matplotlib(model, tmp_path, monkeypatch):
    trace = generate(model, enable_refinement=False).refinement_trace
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape("pip install llada-trm-hf[demo]")):
        trace.plot(tmp_path / "trace.png")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no refinement passes"):
        trace.plot(tmp_path / "trace.png")


def test_drawing_without_the_package_says_what_is_missing(model, tmp_path, monkeypatch):
    assert TRACE_RENDERERS["html"] is llada_trm_hf.inspection.write_html
    assert TRACE_RENDERERS["plot"] is llada_trm_hf.inspection.plot_trace
    trace = generate(model).refinement_trace
    monkeypatch.delitem(TRACE_RENDERERS, "html")
    with pytest.raises(RuntimeError, match="pip install llada-trm-hf"):
        trace.to_html(tmp_path / "trace.html")
    assert not os.path.exists(tmp_path / "trace.html")


def test_guidance_traces_the_conditional_pass(tiny_hybrid):
    prompt = torch.tensor([[3, 4, 5], [6, 7, 8]])
    settings = {"max_new_tokens": 6, "output_refinement_trace": True, "return_dict_in_generate": True}
    guided = tiny_hybrid.generate(prompt, cfg_scale=1.0, **settings).refinement_trace
    plain = tiny_hybrid.generate(prompt, **settings).refinement_trace
    assert all(len(recorded.num_steps) == len(recorded.rows) == 2 for recorded in guided.passes)
    # The first pass sees the same canvas with and without guidance.
    torch.testing.assert_close(guided.passes[0].chunk_confidence, plain.passes[0].chunk_confidence)
