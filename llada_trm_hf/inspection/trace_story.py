"""What a refinement trace tells of one row of the batch: what the refiner changed, and what became of the answer."""

import re
import unicodedata
from collections import Counter
from typing import Any, NamedTuple

import torch

from ..generation import RefinementTrace

_END = re.compile(r"<\|?(endoftext|end_of_text|eot_id|eot|im_end|eos|/s|pad)\|?>")


class GuessChange(NamedTuple):
    """A best guess of the backbone that the refiner replaced, in a diffusion step (from 1) and a column."""

    step: int
    position: int
    backbone: int
    backbone_probability: float
    refined: int
    refined_probability: float
    committed: int | None  # the token decided in this step, if one was
    outcome: str  # "became right", "became wrong" or "still wrong"; empty where the right token is not known


class AnswerScore(NamedTuple):
    """Of the tokens that were to be decided and whose right value is known: how many are right, of how many."""

    right: int
    known: int


def guess_changes(trace: RefinementTrace, row: int = 0) -> list[GuessChange]:
    """Every best guess that the refiner changed, step by step; empty for a trace without guesses."""
    changes = []
    known = None if trace.expected is None else trace.expected[row].tolist()
    for step, (done, index) in passes_of_row(trace, row):
        if done.guesses is None or done.guess_probability is None:
            continue
        tokens, probability = done.guesses[index], done.guess_probability[index]  # [2, L]
        before, after = trace.canvases[step - 1][row].tolist(), trace.canvases[step][row].tolist()
        positions = (tokens[0] != tokens[1]).nonzero().flatten()
        columns = zip(positions.tolist(), *tokens[:, positions].tolist(), *probability[:, positions].tolist())
        for position, old, new, old_probability, new_probability in columns:
            committed = after[position] if after[position] != before[position] else None
            outcome = "" if known is None else _outcome(known[position], old, new)
            changes.append(GuessChange(step, position, old, old_probability, new, new_probability, committed, outcome))
    return changes


def answer_score(trace: RefinementTrace, row: int = 0) -> AnswerScore | None:
    """How much of a row's answer is right; None where that is not known."""
    if trace.expected is None:
        return None
    known = (trace.expected[row] >= 0) & (trace.canvases[0][row] == trace.mask_token_id)
    right = trace.expected[row] == trace.canvases[-1][row]
    return AnswerScore(int((known & right).sum()), int(known.sum())) if known.any() else None


def headline(trace: RefinementTrace, row: int = 0) -> str:
    """One sentence or two for a reader in a hurry."""
    passes = [done for _, done in passes_of_row(trace, row)]
    sentences = []
    if passes:
        updates = torch.stack([done.num_steps[index] for done, index in passes])  # [S, N]
        stepped_in, changed = int(updates.any(1).sum()), sum(int(done.changed_tokens[i].sum()) for done, i in passes)
        text = f"The refiner stepped in at {stepped_in} of {plural(len(passes), 'diffusion step')}"
        if stepped_in:
            text += (
                f": {plural(int(updates.sum()), 'update')}, {plural(changed, 'best guess', 'best guesses')} changed"
            )
        outcomes = Counter(change.outcome for change in guess_changes(trace, row))
        outcomes.pop("", None)
        if outcomes:
            text += " (" + ", ".join(f"{outcomes[name]} {name}" for name in sorted(outcomes)) + ")"
        sentences.append(text + ".")
    if (score := answer_score(trace, row)) is not None:
        counted = f"{score.right} of {plural(score.known, 'token')} as in the known answer"
        sentences.append(f"The answer is {'right' if score.right == score.known else 'wrong'}: {counted}.")
    return " ".join(sentences)


def trace_summary(trace: RefinementTrace) -> str:
    """What happened to the first row of the batch, as lines of text."""
    canvases = torch.stack([canvas[0] for canvas in trace.canvases])  # [steps + 1, L]
    decided = ((canvases[0] == trace.mask_token_id) & (canvases[-1] != trace.mask_token_id)).sum()
    lines = [f"{int(decided)} tokens decided in {len(canvases) - 1} diffusion steps"]
    if (score := answer_score(trace)) is not None:
        lines.append(f"{score.right} of {score.known} as in the known answer")
    if not trace.passes:
        return "\n".join([*lines, "no refiner ran"])
    num_steps, similarity = first_row(trace, "num_steps", "similarity")
    before, after = first_row(trace, "chunk_confidence", "refiner_confidence")
    refined = num_steps > 0  # [S, N]
    changed = sum(int(done.changed_tokens[index].sum()) for _, (done, index) in passes_of_row(trace, 0))
    lines.append(
        f"{int(refined.sum())} chunks refined, in {int(refined.any(1).sum())} of the steps: {int(num_steps.sum())} "
        f"updates, {changed} best guesses changed"
    )
    if refined.any():
        means = [confidence[refined].mean().item() for confidence in (before, after)]
        lines.append(f"mean confidence in them {means[0]:.3f} of the backbone, {means[1]:.3f} of the refiner")
    last = [curve[curve.isfinite()][-1].item() for curve in similarity.flatten(0, 1) if curve.isfinite().any()]
    if last:
        lines.append(f"similarity at the end {sum(last) / len(last):.4f} on average, {min(last):.4f} at worst")
    return "\n".join(lines)


def first_row(trace: RefinementTrace, *names: str) -> list[torch.Tensor]:
    """Fields of the passes of row 0, `[S, N]` or `[S, N, K]`; a padded row has fewer chunks than the batch."""
    # Rows only ever leave the batch, in order: as long as row 0 is in it, it comes first.
    passes = [done for done in trace.passes if 0 in done.rows]
    num_chunks = int(passes[0].chunk_of_token[0].max()) + 1
    return [torch.stack([getattr(done, name)[0, :num_chunks].float() for done in passes]) for name in names]


def first_masked(trace: RefinementTrace, row: int) -> int:
    """The first column that was to be decided: tokens are counted from it. 0 where none was."""
    return int((trace.canvases[0][row] == trace.mask_token_id).int().argmax())


def passes_of_row(trace: RefinementTrace, row: int) -> list[tuple[int, tuple[Any, int]]]:
    """The passes that a row took part in: the diffusion step, the pass, and the row's index there."""
    return [
        (step, (done, index))
        for step, done in enumerate(trace.passes, start=1)
        for index in (done.rows == row).nonzero().flatten().tolist()
    ]


def visible_text(text: str, keep: str = "") -> str:
    """
    A token's text with what a reader could not see, or what could rearrange the text around it (controls, direction
    marks, other line ends, halves of characters), written out; the characters in `keep` stay.
    """
    return "".join(character if character in keep else _visible(character) for character in text)


def _visible(character: str) -> str:
    if character in "\n\t":
        return "↵" if character == "\n" else "⇥"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"\\u{ord(character):04x}"
    return character


class TokenTexts:
    """
    Texts of tokens for a reader. Without a tokenizer, anything with `decode([id])`, they are the ids.

    Attributes:
        end: for each token that ends a text or fills up the room behind it, its name.
    """

    def __init__(self, trace: RefinementTrace, tokenizer: Any = None):
        self.mask_token_id, self.tokenizer = trace.mask_token_id, tokenizer
        seen = {token for canvas in trace.canvases for token in canvas.unique().tolist()}
        for done in trace.passes:
            seen |= set() if done.guesses is None else set(done.guesses.unique().tolist())
        if trace.expected is not None:
            seen |= set(trace.expected.unique().tolist())
        self.texts = {}
        if tokenizer is not None:
            self.texts = {token: tokenizer.decode([token]) for token in sorted(seen - {-1, self.mask_token_id})}
        special = {getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "pad")}
        self.end = {t: text for t, text in self.texts.items() if t in special or _END.fullmatch(text.strip())}

    def __call__(self, token: int) -> str:
        """One line, never empty."""
        if token == self.mask_token_id:
            return "mask"
        if token in self.end:
            return "∎"
        text = visible_text(self.texts.get(token, str(token)))
        return (text if text.strip() else text.replace(" ", "␣")) or f"⟨{token}⟩"


def plural(number: int, one: str, many: str = "") -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def _outcome(right: int, old: int, new: int) -> str:
    if right < 0:
        return ""
    return "became right" if new == right else "became wrong" if old == right else "still wrong"
