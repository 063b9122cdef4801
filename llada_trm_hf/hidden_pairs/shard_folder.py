"""The files of a datagen run: numbered traces and pairs, each written whole, and their index."""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.thoughts import COMPLETE, NO_END_OF_THOUGHT
from ..hub.files import write_atomically
from .dataset import METADATA_FILE, read_shard_problems, shard_name, write_shard
from .settings import DatagenSettings


@dataclass
class ShardProblem:
    """A problem while its shard is made: what became of it, its number of tokens, its states."""

    id: str
    prompt: str
    status: str = NO_END_OF_THOUGHT
    prompt_tokens: int = 0
    thought_tokens: int = 0
    states: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass
class DatagenSummary:
    """What a run made (hidden pairs or traces), and how many problems are `complete` or not for which reason."""

    output_dir: str
    kind: str
    num_shards: int
    statuses: Counter

    def __str__(self) -> str:
        total, made = self.statuses.total(), self.statuses[COMPLETE]
        reasons = ", ".join(f"{count} {status}" for status, count in self.statuses.most_common() if status != COMPLETE)
        skipped = f"; {total - made} without: {reasons}" if made < total else ""
        shards = f"{self.num_shards} shard{'s' if self.num_shards > 1 else ''}"
        return f"{made} {self.kind} of {total} problems in {self.output_dir} ({shards}){skipped}"


class ShardFolder:
    """The files of a run: which shards are there, and how they are written and summed up."""

    def __init__(self, settings: DatagenSettings, num_problems: int):
        self.path, self.stage = settings.output_dir, settings.stage
        self.size, self.num_problems = settings.checkpoint_every, num_problems
        self.num_shards = -(-num_problems // self.size)
        self.reads_traces = self.stage == "states" and settings.traces_file is None
        if self.reads_traces:
            for number in range(self.num_shards):
                self.read_traces(number)

    def problems_of(self, number: int) -> range:
        return range(number * self.size, min((number + 1) * self.size, self.num_problems))

    def has(self, number: int) -> bool:
        """Whether a shard is there and whole; prints a line if it is damaged."""
        traces, pairs = self._traces_path(number), self._pairs_path(number)
        wanted = {"traces": [traces], "states": [pairs], "all": [traces, pairs]}[self.stage]
        if not all(map(os.path.exists, wanted)):
            return False
        try:
            if traces in wanted:
                self.read_traces(number)
            if pairs in wanted and len(read_shard_problems(pairs)) != len(self.problems_of(number)):
                raise ValueError(f"{pairs} holds {len(read_shard_problems(pairs))} problems.")
        except ValueError as error:
            print(f"Making shard {number} again: {error}")
            return False
        return True

    def read_traces(self, number: int) -> list[dict[str, Any]]:
        """Raises ValueError if the traces of a shard are missing or damaged."""
        path = self._traces_path(number)
        try:
            with open(path, encoding="utf-8") as file:
                traces = [json.loads(line) for line in file]
        except FileNotFoundError:
            raise ValueError(f"There is no {path}: run --stage traces first, or name a --traces_file.") from None
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): run --stage traces again.") from error
        expected = len(self.problems_of(number))
        if len(traces) != expected:
            raise ValueError(f"{path} holds {len(traces)} traces instead of {expected}: run --stage traces again.")
        return traces

    def write_traces(self, number: int, traces: list[dict[str, Any]]) -> None:
        write_text(self._traces_path(number), _lines(traces))

    def write_pairs(self, number: int, problems: list[ShardProblem], width: int, dtype: torch.dtype) -> None:
        """Writes the pairs of a shard, and a line of metadata for every problem."""
        pairs = [problem.states for problem in problems if problem.states is not None]
        row = offset = 0
        metadata = []
        for problem in problems:
            place: dict[str, Any] = {"row": None, "offset": None, "length": None}
            if problem.states is not None:
                place = {"row": row, "offset": offset, "length": len(problem.states[0])}
                row, offset = row + 1, offset + place["length"]
            tokens = {"num_prompt_tokens": problem.prompt_tokens, "num_thought_tokens": problem.thought_tokens}
            entry = {"id": problem.id, "status": problem.status, "shard": number, **place, **tokens}
            metadata.append({**entry, "problem": problem.prompt})
        none = torch.empty(0, width, dtype=dtype)
        hidden_pre = torch.cat([pre for pre, _ in pairs]) if pairs else none
        hidden_post = torch.stack([post for _, post in pairs]) if pairs else none
        write_shard(self._pairs_path(number), hidden_pre, hidden_post, metadata)

    def finish(self) -> DatagenSummary:
        """Writes `metadata.jsonl` from all shards and counts."""
        shards = range(self.num_shards)
        if self.stage == "traces":
            kind, entries = "traces with a complete thought", [e for n in shards for e in self.read_traces(n)]
        else:
            kind, entries = "hidden pairs", [e for n in shards for e in read_shard_problems(self._pairs_path(n))]
            write_text(os.path.join(self.path, METADATA_FILE), _lines(entries))
        return DatagenSummary(self.path, kind, self.num_shards, Counter(entry["status"] for entry in entries))

    def _pairs_path(self, number: int) -> str:
        return os.path.join(self.path, shard_name(number))

    def _traces_path(self, number: int) -> str:
        return os.path.join(self.path, f"traces-{number:05d}.jsonl")


def _lines(entries: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def write_text(path: str, text: str) -> None:
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
