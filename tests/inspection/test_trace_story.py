"""What a trace tells of the refiner's changes: recomputed from logits, and read back from the page and the picture."""

import json
import re
import warnings
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch

from llada_trm_hf.generation.refinement_trace import RefinementTrace
from llada_trm_hf.inspection import trace_summary
from llada_trm_hf.inspection.trace_story import answer_score, guess_changes, headline, visible_text
from llada_trm_hf.models.llada_trm import modeling_llada_trm
from llada_trm_hf.models.llada_trm.loss_llada_trm import BestGuesses

PROMPT_LENGTH, NEW_TOKENS, NUM_STEPS = 6, 8, 4
ATTENTION_MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
END, PAD = 3, 7
# What must not reach a page or a terminal as it is, or would be read as markup.
HOSTILE = [
    "<img src=x>",
    "&amp;",
    "\"'",
    "a\nb",
    "\x1b[31m",
    "\u202eevil",
    "\ud800",
    "",
    " ",
    "$\\x{$",
    "{{trace}}",
    "|",
]


class Tokenizer:
    eos_token_id, pad_token_id = END, PAD

    def decode(self, ids):
        (token,) = ids
        return {END: "<end & over>", PAD: "[filler]"}.get(token, HOSTILE[token % len(HOSTILE)])


class Table(HTMLParser):
    """The cells of every line of the tables of a page, by row of the batch."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.lines, self.stories, self.inside = {}, None, {}, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get("class") == "changes":
            self.lines = self.rows.setdefault(int(attrs["data-row"]), [])
        elif attrs.get("class") == "story":
            self.inside = ("story", int(attrs["data-row"]))
        elif tag == "tr":
            self.lines.append([])
        elif tag in ("td", "th"):
            self.lines[-1].append("")
            self.inside = ("cell", None)
        assert tag != "img"

    def handle_endtag(self, tag):
        if tag in ("td", "th", "p"):
            self.inside = None

    def handle_data(self, data):
        if self.inside and self.inside[0] == "cell":
            self.lines[-1][-1] += data
        elif self.inside:
            self.stories[self.inside[1]] = self.stories.get(self.inside[1], "") + data


@pytest.fixture
def model(make_hybrid):
    return make_hybrid(min_confidence=0.9)


def generate(model, **kwargs):
    torch.manual_seed(0)
    prompt = torch.arange(10, 10 + 2 * PROMPT_LENGTH).view(2, PROMPT_LENGTH).masked_fill(ATTENTION_MASK == 0, 0)
    settings = {"max_new_tokens": NEW_TOKENS, "num_diffusion_steps": NUM_STEPS, "output_refinement_trace": True}
    settings |= {"return_dict_in_generate": True, **kwargs}
    return model.generate(prompt, attention_mask=ATTENTION_MASK, **settings)


def written(trace, path, tokenizer=None):
    trace.to_html(path, tokenizer)
    return path.read_text(encoding="utf-8")


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="trace">(.*?)</script>', page, re.DOTALL)[1])


# --- What is recorded ---


@torch.no_grad()
def test_guesses_are_those_of_both_logits(model):
    trace = generate(model).refinement_trace
    attention = torch.nn.functional.pad(ATTENTION_MASK, (0, NEW_TOKENS), value=1)
    compared = changed = 0
    for canvas, done in zip(trace.canvases, trace.passes, strict=False):
        masked = canvas == trace.mask_token_id
        for which, enabled in ((0, False), (1, True)):
            logits = model(
                canvas, attention_mask=attention, relevant_tokens=masked, enable_refinement=enabled
            ).logits.float()
            best = logits.softmax(-1).topk(2, dim=-1)
            clear = masked & (best.values[..., 0] - best.values[..., 1] > 1e-3)  # on any CPU
            assert torch.equal(done.guesses[:, which][clear], best.indices[..., 0][clear])
            torch.testing.assert_close(
                done.guess_probability[:, which][masked], best.values[..., 0][masked], rtol=1e-3, atol=1e-4
            )
            assert (done.guesses[:, which][~masked] == -1).all()
            assert done.guess_probability[:, which][~masked].isnan().all()
            compared += int(clear.sum())
        assert torch.equal(done.changed_tokens, done.guesses[:, 0] != done.guesses[:, 1])
        changed += int(done.changed_tokens.sum())
    assert compared > 30 and changed > 5


def test_a_forward_with_labels_records_them_too(model):
    tokens = torch.randint(1, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    masked = tokens.clone()
    masked[:, 4:10] = model.config.mask_token_id
    labels = tokens.masked_fill(masked == tokens, -100)
    arguments = {"input_ids": masked, "output_refinement_trace": True}
    with torch.no_grad():
        (trained,) = model(**arguments, labels=labels).refinement_trace.passes
        (plain,) = model(**arguments).refinement_trace.passes
    assert (trained.guesses >= 0).sum() == 2 * 2 * 6
    torch.testing.assert_close(
        trained.guess_probability, plain.guess_probability, equal_nan=True, rtol=1e-3, atol=1e-4
    )


def test_without_a_trace_nothing_is_gathered(model, monkeypatch):
    evaluated = []
    own = modeling_llada_trm.best_probability
    monkeypatch.setattr(BestGuesses, "of_tokens", lambda *_: pytest.fail("nobody asked for the guesses"))
    monkeypatch.setattr(
        modeling_llada_trm, "best_probability", lambda logits: evaluated.append(len(logits)) or own(logits)
    )
    assert generate(model, output_refinement_trace=False).refinement_trace is None
    assert len(evaluated) == NUM_STEPS  # of the backbone, which decides what is refined, and no more


def test_a_trace_of_an_earlier_version_is_read_and_drawn(model, tmp_path):
    trace = generate(model).refinement_trace
    trace.to_json(tmp_path / "new.json")
    content = json.loads((tmp_path / "new.json").read_text())
    for steps in content["rows"]:
        for step in steps:
            for name in ("guesses", "guess_probability"):
                (step.get("refinement") or {}).pop(name, None)
    (tmp_path / "old.json").write_text(json.dumps(content))
    old = RefinementTrace.from_json(tmp_path / "old.json")
    assert all(done.guesses is None and done.guess_probability is None for done in old.passes)
    assert guess_changes(old) == [] and trace_summary(old) == trace_summary(trace)
    page = written(old, tmp_path / "old.html")
    assert Table(page).rows == {} and "guesses" not in data_of(page)["rows"][0]["steps"][0]["refinement"]
    assert data_of(page)["rows"][0]["steps"][0]["refinement"]["changed"]
    pytest.importorskip("matplotlib")
    old.plot(tmp_path / "old.png")
    assert (tmp_path / "old.png").stat().st_size > 10_000


# --- What is told ---


def expected_changes(trace, row):
    """Changed guesses, from the JSON of the trace: step, column, both guesses and probabilities, the token decided."""
    steps = trace.to_dict()["rows"][row]
    for number, (before, after) in enumerate(pairwise(steps), start=1):
        (old, new), (p, q) = after["refinement"]["guesses"], after["refinement"]["guess_probability"]
        for column, (a, b) in enumerate(zip(old, new)):
            if a != b:
                decided = after["tokens"][column] if after["tokens"][column] != before["tokens"][column] else None
                yield number, column, a, p[column], b, q[column], decided


def name_of(trace, token):
    return "mask" if token == trace.mask_token_id else str(token)


def outcome(right, old, new):
    return "✓ became right" if new == right else "✗ became wrong" if old == right else "✗ still wrong"


@pytest.mark.parametrize("is_known", [False, True])
def test_page_lists_every_change(model, tmp_path, is_known):
    trace = generate(model).refinement_trace
    if is_known:  # every outcome occurs: the first token is as the refiner said last, the second as the backbone did
        trace.expected = torch.full_like(trace.canvases[0], -1)
        for row in (0, 1):
            changes = list(expected_changes(trace, row))
            for i, change in enumerate(changes):
                trace.expected[row, change[1]] = (change[4], change[2], 0)[i % 3]
    table = Table(written(trace, tmp_path / "trace.html"))
    for row in (0, 1):
        changes = list(expected_changes(trace, row))
        head, *lines = table.rows[row]
        assert len(changes) == len(lines) > 3
        for (step, column, old, p, new, q, decided), cells in zip(changes, lines):
            known = int(trace.expected[row, column]) if is_known else None
            assert cells == [
                str(step),
                str(column - PROMPT_LENGTH + 1),
                f"{name_of(trace, old)} {100 * p:.0f}%",
                f"{name_of(trace, new)} {100 * q:.0f}%",
                *([str(known), outcome(known, old, new)] if is_known else []),
                "left open" if decided is None else f"decided: {decided}",
            ]
        assert ("Known answer" in head) == is_known
        assert f"{len(changes)} best guesses changed" in table.stories[row] == headline(trace, row)
        if is_known:
            results = [outcome(int(trace.expected[row, c]), old, new) for _, c, old, _, new, *_ in changes]
            for name in ("became right", "became wrong", "still wrong"):
                count = sum(result.endswith(name) for result in results)
                assert (f"{count} {name}" in table.stories[row]) == (count > 0)


def test_known_answer_is_scored(model, tmp_path):
    out = generate(model)
    trace, answer = out.refinement_trace, out.sequences[0, PROMPT_LENGTH:].tolist()
    assert answer_score(trace) is None and "known answer" not in trace_summary(trace)
    trace.expect([*answer[:5], (answer[5] + 1) % 40])  # what follows may be anything
    assert answer_score(trace) == (5, 6)
    assert "5 of 6 as in the known answer" in trace_summary(trace).splitlines()
    assert headline(trace).endswith("The answer is wrong: 5 of 6 tokens as in the known answer.")
    trace.expect(answer)
    assert headline(trace).endswith("The answer is right: 8 of 8 tokens as in the known answer.")
    trace.to_json(tmp_path / "trace.json")
    again = RefinementTrace.from_json(tmp_path / "trace.json")
    assert torch.equal(again.expected, trace.expected) and answer_score(again) == (8, 8)
    assert data_of(written(trace, tmp_path / "x.html"))["rows"][0]["expected"] == [-1] * PROMPT_LENGTH + answer


@pytest.mark.parametrize("answer", [[], [1] * (NEW_TOKENS + 1)])
def test_an_answer_that_cannot_be_compared_is_refused(model, answer):
    trace = generate(model).refinement_trace
    with pytest.raises(ValueError, match=rf"has {len(answer)} tokens and {NEW_TOKENS} were generated"):
        trace.expect(answer)
    assert trace.expected is None


def test_a_damaged_known_answer_is_no_trace(model, tmp_path):
    trace = generate(model).refinement_trace
    trace.expect([1, 2])
    content = trace.to_dict() | {"expected": [[1, 2]]}
    (tmp_path / "trace.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not a refinement trace"):
        RefinementTrace.from_json(tmp_path / "trace.json")


# --- The page ---


def test_no_text_is_read_as_markup_or_hides(model, tmp_path):
    trace = generate(model).refinement_trace
    for done in trace.passes:  # every text there is, and the end token, in the table
        column = int(done.guesses[0, 0].argmax())
        done.guesses[0, :, column] = torch.tensor([10, 11])
    wanted = [*range(12, 24), END, PAD]
    for i, token in enumerate(wanted):
        done = trace.passes[i % NUM_STEPS]
        open_columns = (done.guesses[1, 0] >= 0).nonzero().flatten().tolist()
        column = open_columns[(i // NUM_STEPS) % len(open_columns)]
        done.guesses[1, :, column] = torch.tensor([token, 25])
    page = written(trace, tmp_path / "trace.html", Tokenizer())
    static = page.split('<script type="application/json"')[0]
    assert "<img" not in page and "&lt;img src=x&gt;" in static
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    texts = data_of(page)["texts"]
    assert texts[str(12 + 4)] == "\\u001b[31m" and texts[str(12 + 5)] == "\\u202eevil" and texts[str(12 + 3)] == "a\nb"
    cells = {cell.rpartition(" ")[0] for lines in Table(page).rows.values() for line in lines for cell in line[2:4]}
    assert {"<img src=x>", "&amp;", "a↵b", "\\u001b[31m", "\\u202eevil", "\\ud800", "␣", "{{trace}}"} & cells
    assert cells <= {visible_text(t) for t in HOSTILE} | {"␣", "∎", "mask", ""} | {f"⟨{i}⟩" for i in range(50)}


def test_end_tokens_are_explained(model, tmp_path):
    trace = generate(model).refinement_trace
    trace.canvases[-1][:, -2:] = torch.tensor([END, PAD])
    page = written(trace, tmp_path / "trace.html", Tokenizer())
    assert sorted(data_of(page)["end"]) == [END, PAD]
    legend = page[page.index('<li class="with-end">') :].split("</li>")[0]
    assert "<code>&lt;end &amp; over&gt;</code>, <code>[filler]</code>" in legend
    assert data_of(written(trace, tmp_path / "ids.html"))["end"] == []  # ids alone do not say what ends


def test_long_generations_stay_small(model, tmp_path):
    sizes = []
    for steps in (8, 32):
        trace = generate(model, max_new_tokens=32, num_diffusion_steps=steps).refinement_trace
        sizes.append(len(json.dumps(trace.to_dict(Tokenizer()))))
        page = data_of(written(trace, tmp_path / "trace.html", Tokenizer()))
        decided = [entry for step in page["rows"][0]["steps"] for entry in step["set"]]
        assert len(decided) == 32  # each token once, not in every step
        assert len(json.dumps(page)) < sizes[-1] / 3


# --- The picture ---


@pytest.fixture
def figure(model, tmp_path, monkeypatch):
    """Draws a trace; returns the matplotlib figure."""
    figure_module = pytest.importorskip("matplotlib.figure")

    def draw(trace, tokenizer=None):
        drawn, own = [], figure_module.Figure.savefig

        def save(figure, *args, **kwargs):
            drawn.append(figure)
            own(figure, *args, **kwargs)

        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("error")  # of glyphs that the font lacks, for one
            patch.setattr(figure_module.Figure, "savefig", save)
            trace.plot(tmp_path / "trace.png", tokenizer)
        return drawn[0]

    return draw


def texts_at(axes):
    """The texts of a panel by their cell, from top to bottom."""
    cells = {}
    for text in sorted(axes.texts, key=lambda text: text.get_position()[1]):
        x, y = text.get_position()
        cells.setdefault((round(x), round(y)), []).append(text.get_text())
    return cells


def test_picture_writes_both_guesses(model, figure):
    trace = generate(model).refinement_trace
    answer = trace.canvases[-1][0, PROMPT_LENGTH:].tolist()
    trace.expect([(answer[0] + 1) % 40, *answer[1:]])
    drawn = figure(trace)
    cells = texts_at(drawn.axes[0])
    changes = list(expected_changes(trace, 0))
    assert len(changes) > 3
    for step, column, old, p, new, q, _ in changes:
        names = [name_of(trace, token) for token in (old, new)]
        share = f"{100 * p:.0f}→{100 * q:.0f}%"
        assert cells[column - PROMPT_LENGTH + 1, step] == [f"{names[0]} →", names[1], share]
    marks = [cells[column, NUM_STEPS + 1] for column in range(1, NEW_TOKENS + 1)]
    assert marks == [[f"✗ {(answer[0] + 1) % 40}"], *([f"✓ {token}"] for token in answer[1:])]
    assert drawn.get_suptitle() == headline(trace)


def test_picture_writes_updates_and_confidence(model, figure):
    trace = generate(model).refinement_trace
    _, updates, confidence, _ = figure(trace).axes[:4]
    steps = [step["refinement"] for step in trace.to_dict()["rows"][0][1:]]
    cells = texts_at(updates)
    first = (PROMPT_LENGTH - 2) // 4  # of the chunks that hold new tokens; two columns are padding
    for number, step in enumerate(steps, start=1):
        for line, count in enumerate(step["num_steps"][first : max(step["chunk_of_token"]) + 1], start=1):
            assert cells[number, line] == [f"{count} update{'s' * (count != 1)}"]
    for which, line in enumerate(confidence.lines[:2]):
        means = []
        for step in steps:
            values = [value for value in step["guess_probability"][which] if value is not None]
            means.append(100 * sum(values) / len(values))
        assert list(line.get_ydata()) == pytest.approx(means, rel=1e-4)
        assert {f"{mean:.0f}%" for mean in means} <= {text.get_text() for text in confidence.texts}


def test_picture_survives_any_text_and_any_length(model, figure):
    trace = generate(model).refinement_trace
    mathematics = next(token for token in range(12, 40) if "$" in Tokenizer().decode([token]))  # LaTeX that is none
    trace.expect([mathematics] * NEW_TOKENS)
    assert any("$" in text.get_text() for text in figure(trace, Tokenizer()).axes[0].texts)
    long = generate(model, max_new_tokens=60, num_diffusion_steps=30).refinement_trace
    long.expect([PAD] * 60)
    axes = figure(long, Tokenizer()).axes[0]
    assert not list(axes.texts)  # no room for letters: colours only
    assert axes.images[0].get_array().shape == (30, 60) and axes.images[1].get_array().shape == (1, 60)
