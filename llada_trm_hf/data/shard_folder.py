"""The files of a datagen run: numbered traces and pairs, each written whole, and the index of all."""

import json
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from ..storage import write_atomically
from .datagen_settings import DatagenSettings
from .hidden_pairs import METADATA_FILE, read_shard_problems, shard_name, write_shard
from .thoughts import COMPLETE, NO_END_OF_THOUGHT


@dataclass
class ShardProblem:
    """A problem of a shard on its way: its tokens, what became of it, and its states."""

    id: str
    prompt: str
    status: str = NO_END_OF_THOUGHT
    prompt_tokens: int = 0
    thought_tokens: int = 0
    states: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass
class DatagenSummary:
    """How many problems ended how (`complete` or the reason there is no pair), and the number of shards."""

    output_dir: str
    what: str
    num_shards: int
    statuses: Counter

    def __str__(self) -> str:
        total, made = self.statuses.total(), self.statuses[COMPLETE]
        reasons = ", ".join(f"{count} {status}" for status, count in self.statuses.most_common() if status != COMPLETE)
        skipped = f"; {total - made} without: {reasons}" if made < total else ""
        shards = f"{self.num_shards} shard{'s' if self.num_shards > 1 else ''}"
        return f"{made} {self.what} of {total} problems in {self.output_dir} ({shards}){skipped}"


class ShardFolder:
    """The files of a run: which shards are there, and how they are written and summed up."""

    def __init__(self, what: DatagenSettings, num_problems: int):
        self.path, self.stage = what.output_dir, what.stage
        self.size, self.num_problems = what.checkpoint_every, num_problems
        self.num_shards = -(-num_problems // what.checkpoint_every)
        self.reads_traces = what.stage == "states" and what.traces_file is None
        if self.reads_traces:
            for number in range(self.num_shards):
                self.read_traces(number)

    def problems_of(self, number: int) -> range:
        return range(number * self.size, min((number + 1) * self.size, self.num_problems))

    def has(self, number: int) -> bool:
        """Whether a shard is there and whole; says so if it is damaged."""
        wanted = [self._traces_path(number)] if self.stage != "states" else []
        wanted += [self._pairs_path(number)] if self.stage != "traces" else []
        if not all(map(os.path.exists, wanted)):
            return False
        try:
            if self.stage != "states":
                self.read_traces(number)
            if self.stage != "traces" and len(self._problems(number)) != len(self.problems_of(number)):
                raise ValueError(f"{self._pairs_path(number)} holds {len(self._problems(number))} problems.")
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
        if len(traces) != len(self.problems_of(number)):
            raise ValueError(
                f"{path} holds {len(traces)} traces instead of {len(self.problems_of(number))}: run --stage traces "
                f"again."
            )
        return traces

    def write_traces(self, number: int, traces: list[dict[str, Any]]) -> None:
        write_text(self._traces_path(number), _lines(traces))

    def write_pairs(self, number: int, problems: list[ShardProblem], width: int, dtype: torch.dtype) -> None:
        """Stacks the pairs of a shard and writes them, with a line of metadata for every problem."""
        pairs = [problem for problem in problems if problem.states is not None]
        pre, post = ([problem.states[i] for problem in pairs if problem.states] for i in (0, 1))
        row = offset = 0
        metadata = []
        for problem in problems:
            entry: dict[str, Any] = {"id": problem.id, "status": problem.status, "shard": number}
            length = None if problem.states is None else len(problem.states[0])
            entry |= {"row": None, "offset": None, "length": None}
            if length is not None:
                entry |= {"row": row, "offset": offset, "length": length}
                row, offset = row + 1, offset + length
            counts = {"num_prompt_tokens": problem.prompt_tokens, "num_thought_tokens": problem.thought_tokens}
            metadata.append(entry | counts | {"problem": problem.prompt})
        write_shard(
            self._pairs_path(number),
            torch.cat(pre) if pre else torch.empty(0, width, dtype=dtype),
            torch.stack(post) if post else torch.empty(0, width, dtype=dtype),
            metadata,
        )

    def finish(self) -> DatagenSummary:
        """Writes `metadata.jsonl` from all shards and counts."""
        if self.stage == "traces":
            entries = [trace for number in range(self.num_shards) for trace in self.read_traces(number)]
            statuses = Counter(entry["status"] for entry in entries)
            return DatagenSummary(self.path, "traces with a complete thought", self.num_shards, statuses)
        entries = [entry for number in range(self.num_shards) for entry in self._problems(number)]
        write_text(os.path.join(self.path, METADATA_FILE), _lines(entries))
        statuses = Counter(entry["status"] for entry in entries)
        return DatagenSummary(self.path, "hidden pairs", self.num_shards, statuses)

    def _problems(self, number: int) -> list[dict[str, Any]]:
        return read_shard_problems(self._pairs_path(number))

    def _pairs_path(self, number: int) -> str:
        return os.path.join(self.path, shard_name(number))

    def _traces_path(self, number: int) -> str:
        return os.path.join(self.path, f"traces-{number:05d}.jsonl")


def _lines(entries: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def write_text(path: str, text: str) -> None:
    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)

    write_atomically(path, write)
