"""The order of the data when every batch takes several optimizer steps."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence, Sized
from itertools import cycle, islice
from typing import Any

from torch.utils.data import Dataset, Sampler


class RecentBatches(Dataset):
    """
    A dataset that caches the last `num_batches` batches of another, so a repeated batch is read once. (Each data
    loader worker has its own cache.)
    """

    def __init__(self, dataset: Any, num_batches: int):
        self.dataset, self.num_batches = dataset, num_batches
        self._recent: OrderedDict[tuple[int, ...], list[Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        key = tuple(indices)
        if key not in self._recent:
            self._recent[key] = [self.dataset[index] for index in indices]
            if len(self._recent) > self.num_batches:
                self._recent.popitem(last=False)
        return self._recent[key]


class SupervisionSampler(Sampler[list[int]]):
    """
    Batches of indices, repeated for each supervision step, so that a step of the trainer is a supervision step.

    The batches of all processes in one optimizer step form a group of `num_parts` micro-batches (processes times
    accumulation steps), which comes `num_repeats` times in a row. accelerate shards batch by batch, so every process
    gets the same micro-batches in every repetition. The last group of an epoch may be smaller; up to `num_parts - 1`
    samples from the beginning of the epoch are added until it divides into equal parts.

    Args:
        sampler: of indices; accelerate replaces this attribute by a seeded one.
        batch_size: of a micro-batch.
        num_parts: micro-batches in a group.
        num_repeats: supervision steps.
        drop_last: leave out a smaller last group.
    """

    # Batches differ in size: without a batch_size, accelerate takes them as they are.
    batch_size = None

    def __init__(self, sampler: Sampler[int], batch_size: int, num_parts: int, num_repeats: int, drop_last: bool):
        self.sampler = sampler
        self.group_size = batch_size * num_parts
        self.num_parts, self.num_repeats, self.drop_last = num_parts, num_repeats, drop_last

    def __iter__(self) -> Iterator[list[int]]:
        indices = list(self.sampler)
        for start in range(0, len(indices), self.group_size):
            group = indices[start : start + self.group_size]
            if len(group) < self.group_size and self.drop_last:
                return
            group += islice(cycle(indices), -len(group) % self.num_parts)
            size = len(group) // self.num_parts
            micro_batches = [group[first : first + size] for first in range(0, len(group), size)]
            for _ in range(self.num_repeats):
                yield from micro_batches

    def __len__(self) -> int:
        assert isinstance(self.sampler, Sized)
        whole, rest = divmod(len(self.sampler), self.group_size)
        return (whole + (rest > 0 and not self.drop_last)) * self.num_parts * self.num_repeats
