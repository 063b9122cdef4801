"""Makes hidden pairs: what a language model knows before it thinks, and after, for every problem of a dataset."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from datasets import Dataset
from torch import distributed
from tqdm import tqdm

from ..models import DimensionCompressor
from ..storage import output_dir_lock
from .datagen_settings import DatagenSettings, check_recorded, recorded_settings
from .hidden_pairs import CONFIG_FILE
from .problem_rows import check_prompts, load_problems, load_traces
from .shard_folder import DatagenSummary, ShardFolder, write_text
from .shard_making import ShardMaker


def run_datagen(what: DatagenSettings) -> DatagenSummary | None:
    """
    Makes what is missing in `what.output_dir`, shard by shard.

    Shard `n` holds the problems from `n * checkpoint_every`. It depends on the settings alone: with several processes
    (`torchrun`, `accelerate launch`) each makes whole shards, and a run that was killed goes on at the first one that
    is missing. On the same machine, with the same number of threads, the files come out the same byte for byte.
    (Batches are composed within a shard. Another batch size, or `states` instead of `all`, changes states by float
    rounding, which is why the settings are recorded and a change is refused.)

    Returns:
        The summary; None in all processes but the first.

    Raises:
        ValueError, OSError: for settings that cannot work, or that differ from those of the earlier run in the folder.
        RuntimeError: if another run is writing to the folder.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    rows = _load_rows(what)
    compressor = DimensionCompressor.from_pretrained(what.compressor).eval() if what.compressor else None
    config = recorded_settings(what, rows, compressor)
    with _meeting_point(world_size) as meet, output_dir_lock(what.output_dir, ".datagen.lock"):
        recorded = check_recorded(what, config) if rank == 0 else config
        folder = ShardFolder(what, len(rows))
        mine = range(rank, folder.num_shards, world_size)
        missing = [number for number in mine if not folder.has(number)]
        maker = ShardMaker(what, folder, rows, compressor) if missing else None
        if rank == 0 and recorded != config:
            text = json.dumps({**recorded, **config}, indent=2, ensure_ascii=False) + "\n"
            write_text(os.path.join(what.output_dir, CONFIG_FILE), text)
        meet()  # nobody works before the first process holds the folder and has recorded the settings
        done = sum(len(folder.problems_of(number)) for number in mine if number not in missing)
        total = sum(len(folder.problems_of(number)) for number in mine)
        with tqdm(total=total, initial=done, desc=f"Datagen ({what.stage})", disable=rank > 0) as progress:
            for number in missing:
                assert maker is not None
                maker.make(number, progress.update)
        meet()
        summary = folder.finish() if rank == 0 else None
        meet()
    return summary


def _load_rows(what: DatagenSettings) -> Dataset:
    if what.traces_file is not None:
        rows = load_traces(what.traces_file, what.split, what.num_samples, what.columns)
    else:
        rows = load_problems(what.dataset, what.split, what.num_samples, what.columns, what.num_terms)
    check_prompts(rows, what.traces_file or ", ".join(what.dataset))
    return rows


@contextmanager
def _meeting_point(world_size: int) -> Iterator[Callable[[], object]]:
    """A function in which each process waits for all others, however long they take."""
    if world_size == 1:
        yield lambda: None
        return
    distributed.init_process_group("gloo", timeout=timedelta(days=365))
    try:
        yield distributed.barrier
    finally:
        distributed.destroy_process_group()
