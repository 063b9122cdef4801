"""A record of what the refiner did, as plain tensors. Drawing it is the business of `llada_trm_hf.inspection`."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch

# What can draw a trace: filled in by `llada_trm_hf.inspection`, so that this file needs nothing but torch.
TRACE_RENDERERS: dict[str, Callable[..., None]] = {}


@dataclass
class RefinementPass:
    """
    One forward pass over `b` rows, `N` chunks and `K` recursion steps.

    Attributes:
        chunk_of_token: LongTensor `[b, L]`, -1 for padding.
        chunk_confidence: FloatTensor `[b, N]`, the backbone's mean probability of its best guess; 1 where the chunk
            holds nothing to decide.
        refiner_confidence: FloatTensor `[b, N]`, the refiner's own after refining.
        num_steps: LongTensor `[b, N]`, updates applied; 0 for a chunk that was left alone.
        similarity: FloatTensor `[b, N, K]`, cosine similarity of a chunk's code with the one a step before; NaN where
            that step was not run.
        changed_tokens: BoolTensor `[b, L]`, where refinement changed the model's best guess.
        rows: LongTensor `[b]`, which rows of the batch these are.
        guesses: LongTensor `[b, 2, L]`, the best guesses of the backbone, and those after refining, for the tokens to
            be decided; -1 elsewhere. None in a trace of an earlier version.
        guess_probability: FloatTensor `[b, 2, L]`, their probabilities; NaN elsewhere.
    """

    chunk_of_token: torch.Tensor
    chunk_confidence: torch.Tensor
    refiner_confidence: torch.Tensor
    num_steps: torch.Tensor
    similarity: torch.Tensor
    changed_tokens: torch.Tensor
    rows: torch.Tensor
    guesses: torch.Tensor | None = None
    guess_probability: torch.Tensor | None = None

    @classmethod
    def of_rows(cls, rows: dict[int, dict[str, Any]]) -> "RefinementPass":
        """The pass whose row number `n` is `rows[n]`, as `of_row` gives it."""

        def stacked(name: str, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor([_with_nan(row[name]) for row in rows.values()], dtype=dtype)

        has_guesses = all("guesses" in row for row in rows.values())
        return cls(
            chunk_of_token=stacked("chunk_of_token", torch.long),
            chunk_confidence=stacked("chunk_confidence", torch.float32),
            refiner_confidence=stacked("refiner_confidence", torch.float32),
            num_steps=stacked("num_steps", torch.long),
            similarity=stacked("similarity", torch.float32),
            changed_tokens=stacked("changed_tokens", torch.bool),
            rows=torch.tensor(list(rows)),
            guesses=stacked("guesses", torch.long) if has_guesses else None,
            guess_probability=stacked("guess_probability", torch.float32) if has_guesses else None,
        )

    def first(self, number: int) -> "RefinementPass":
        """The same for the first `number` rows."""
        return RefinementPass(**{name: values[:number] for name, values in self._tensors().items()})

    def of_row(self, index: int) -> dict[str, Any]:
        """Row `index` as plain lists, with None for NaN: JSON has no NaN."""
        lists = {name: values[index].tolist() for name, values in self._tensors().items() if name != "rows"}
        return {name: _without_nan(values) for name, values in lists.items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The fields that are there."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class RefinementTrace:
    """
    What happened during one `generate` (or one `forward`).

    Attributes:
        mask_token_id: the token that stands for "not decided yet".
        prompt_length: columns of the prompt.
        canvases: LongTensors `[B, L]`, the canvas before the first and after each diffusion step.
        passes: what the refiner did in each step; empty for a model without refiner.
        expected: LongTensor `[B, L]`, the right token in each place, if it is known; -1 where it is not. Set it, or
            call `expect`, and the page and the picture say what became right and what wrong.
    """

    mask_token_id: int
    prompt_length: int
    canvases: list[torch.Tensor] = field(default_factory=list)
    passes: list[RefinementPass] = field(default_factory=list)
    expected: torch.Tensor | None = None

    def expect(self, answer: list[int]) -> None:
        """
        Sets what every row's new tokens should be, as `expected`.

        Args:
            answer: token ids, with the end token if the answer is to end there. What follows it may be anything.

        Raises:
            ValueError: if it is empty, or longer than what was generated.
        """
        num_rows, length = self.canvases[0].shape
        if not 0 < len(answer) <= length - self.prompt_length:
            raise ValueError(
                f"The known answer has {len(answer)} tokens and {length - self.prompt_length} were generated: an "
                f"answer needs a token, and as many new ones (max_new_tokens) as it has itself."
            )
        self.expected = torch.full((num_rows, length), -1)
        self.expected[:, self.prompt_length : self.prompt_length + len(answer)] = torch.tensor(answer)

    def add_canvas(self, sequences: torch.Tensor, rows: torch.Tensor) -> None:
        """Adds the canvas `[B, L]` after a step that ran for `rows` `[b]`."""
        self.canvases.append(sequences.clone().cpu())
        if self.passes:
            self.passes[-1].rows = rows.cpu()

    def to_dict(self, tokenizer: Any = None) -> dict[str, Any]:
        """
        The trace as plain lists, one entry per row of the batch.

        Args:
            tokenizer: with it, each canvas also gets the text of its tokens.
        """
        rows = []
        for row in range(self.canvases[0].shape[0]):
            steps: list[dict[str, Any]] = []
            for i, canvas in enumerate(self.canvases):
                step: dict[str, Any] = {"tokens": canvas[row].tolist()}
                if tokenizer is not None:
                    step["text"] = [self._text(token, tokenizer) for token in step["tokens"]]
                done = self.passes[i - 1] if 0 < i <= len(self.passes) else None
                if done is not None:
                    where = (done.rows == row).nonzero().flatten().tolist()
                    step["refinement"] = done.of_row(where[0]) if where else None
                steps.append(step)
            rows.append(steps)
        known = {} if self.expected is None else {"expected": self.expected.tolist()}
        return {"mask_token_id": self.mask_token_id, "prompt_length": self.prompt_length, **known, "rows": rows}

    def to_json(self, path: str | os.PathLike, tokenizer: Any = None) -> None:
        """Writes `to_dict` as JSON."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_dict(tokenizer), file, ensure_ascii=False)

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> "RefinementTrace":
        """
        Reads what `to_json` wrote; texts are not needed.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a trace.
        """
        with open(path, encoding="utf-8") as file:
            try:
                content = json.load(file)
                trace = cls(content["mask_token_id"], content["prompt_length"])
                for steps in zip(*content["rows"]):
                    trace.canvases.append(torch.tensor([step["tokens"] for step in steps]))
                    done = {row: step["refinement"] for row, step in enumerate(steps) if step.get("refinement")}
                    if done:
                        trace.passes.append(RefinementPass.of_rows(done))
                if content.get("expected") is not None:
                    trace.expected = torch.tensor(content["expected"]).view_as(trace.canvases[0])
            except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
                raise ValueError(f"{path} is not a refinement trace: {error!r}.") from error
        return trace

    def to_html(self, path: str | os.PathLike, tokenizer: Any = None, grid_width: int | None = None) -> None:
        """
        Writes one self-contained page: the text appearing, what the refiner changed, confidence as colour.

        Args:
            tokenizer: anything with `decode([id])`; without it, the page shows token ids.
            grid_width: draws the response as a square grid with so many cells in a row, a token each, and the cells
                that the prompt gives, where it is such a grid and one token more (`=`), as given.

        Raises:
            ValueError: if there are fewer new tokens than cells.
        """
        self._render("html", path, tokenizer, grid_width)

    def plot(self, path: str | os.PathLike, tokenizer: Any = None, grid_width: int | None = None) -> None:
        """
        Writes a PNG of the first row: guesses changed, updates of each chunk, confidence over time, similarity. Takes
        what `to_html` takes.
        """
        self._render("plot", path, tokenizer, grid_width)

    def _text(self, token: int, tokenizer: Any) -> str | None:
        return None if token == self.mask_token_id else tokenizer.decode([token])

    def _render(self, kind: str, *args: Any) -> None:
        if kind not in TRACE_RENDERERS:
            raise RuntimeError("Drawing a trace needs the package: pip install llada-trm-hf, import llada_trm_hf.")
        TRACE_RENDERERS[kind](self, *args)


def _without_nan(values: Any) -> Any:
    """Nested lists with None in place of NaN."""
    if isinstance(values, list):
        return [_without_nan(value) for value in values]
    return values if values == values else None


def _with_nan(values: Any) -> Any:
    """Nested lists with NaN in place of None."""
    if isinstance(values, list):
        return [_with_nan(value) for value in values]
    return float("nan") if values is None else values
