"""Rows as they are published: of local files and of the Hub, a slice of them, all at once or as a stream."""

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterable
from typing import Any, TypeAlias

import pyarrow
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from ..models.hub_model import nearest_name

Rows: TypeAlias = Dataset | IterableDataset

# What a file may be called as a split: one name for all its rows.
_SPLITS_OF_FILES = ("train", "test", "validation", "valid", "dev", "eval", "all")
_FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_MALFORMED = (DatasetGenerationError, pyarrow.ArrowInvalid, json.JSONDecodeError, UnicodeDecodeError)
_CHECKED_SIZE = 2**28  # of a JSON file: a few seconds
# A name, and a slice by numbers or by percents.
_SPLIT = re.compile(r"([\w.-]+)(\[(?:-?\d+)?:(?:-?\d+)?\]|\[(?:-?\d+%)?:(?:-?\d+%)?\])?")


def parse_split(split: str) -> tuple[str, str]:
    """Name and slice of a split: `train`, `train[:1000]`, `test[10%:20%]`; ValueError for any other text."""
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise ValueError(f"A split is a name such as train, train[:1000] or test[10%:20%]; got {split!r}.")
    return match[1], match[2] or ""


def row_range(split: str, source: str) -> tuple[int, int | None]:
    """The first row of a slice and the one after its last; ValueError if they depend on the length of `source`."""
    name, piece = parse_split(split)
    if "-" in piece or "%" in piece:
        raise ValueError(f"{source} is sliced by numbers from its start, as in {name}[:1000]; got {split}.")
    start, _, stop = piece.strip("[]").partition(":")
    return int(start or 0), int(stop) if stop else None


def slices_overlap(first: str, second: str) -> bool:
    """
    Whether two slices as `parse_split` returns them share rows of one split. One by numbers and one by percents, or
    from the end, cannot be compared without the number of rows: False, unless they are the same.
    """
    if first == second or not first or not second:
        return True
    if "-" in first + second or ("%" in first) != ("%" in second):
        return False
    starts, stops = zip(*(piece.strip("[]").replace("%", "").split(":") for piece in (first, second)))
    return max(int(start or 0) for start in starts) < min(float(stop or math.inf) for stop in stops)


def is_data_file(name: str) -> bool:
    """Whether a name is that of a local file, by its ending."""
    return _file_format(name) is not None


def column_names(rows: Rows) -> list[str]:
    """The columns of the rows; a stream may not know them before its first row."""
    return rows.column_names or list(next(iter(rows)))


def text_features(columns: Iterable[str]) -> Features:
    """Columns of text."""
    return Features({column: Value("string") for column in columns})


def fingerprint(rows: Dataset) -> str:
    """A hash of everything in the rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


def check_prompts(rows: Any, source: str) -> None:
    """Raises ValueError for a prompt that is not a text."""
    for number, prompt in enumerate(rows["prompt"]):
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"{source}: the prompt of row {number} is a {type(prompt).__name__}, not a text.")


def check_columns_exist(columns: dict[str, str], found: list[str], source: str) -> None:
    """Raises ValueError if `columns`, such as `{"prompt": "question"}`, names one that is not among those found."""
    unknown = [f"{name}={column}" for name, column in columns.items() if column not in found]
    if unknown:
        raise ValueError(f"{source} has no such column: {', '.join(unknown)}. It has {', '.join(found)}.")


def read_rows(
    path: str | list[str], split: str = "train", streaming: bool = False, other_splits: Collection[str] = ()
) -> Rows:
    """
    The rows of a data file, or of several in one format; FileNotFoundError or ValueError for one without rows, and for
    a split that is neither an ordinary name nor one of `other_splits`.
    """
    paths = [path] if isinstance(path, str) else path
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"There is no file {path}.")
        file_format = _file_format(path)
        if file_format is None:
            raise ValueError(f"{path}: a dataset file is one of {', '.join(_FILE_FORMATS)}.")
        if not os.path.getsize(path):
            raise ValueError(f"{path} is empty.")
        if file_format == "json" and not path.endswith(".gz") and os.path.getsize(path) < _CHECKED_SIZE:
            _check_json(path)
    # A file is one split, whatever it is called: `test[:100]` of test.jsonl is its first 100 rows.
    split_name, piece = parse_split(split)
    if split_name not in (*_SPLITS_OF_FILES, *other_splits):
        hint = nearest_name(split_name, _SPLITS_OF_FILES)
        raise ValueError(
            f"{path} has no split {split_name!r}{hint}: a file is one split, such as train or train[:100]."
        )
    file_split = "train" + piece
    # A field of a csv file that is empty, or says "NA" or "nan", is that text, not a missing number.
    options = {"keep_default_na": False} if file_format == "csv" else {}
    try:
        rows = _load(file_split, streaming, path=file_format, data_files=paths, **options)
        first = next(iter(rows), None)
    except _MALFORMED as error:
        raise ValueError(f"{path} is not valid {file_format}: {error.__cause__ or error}") from error
    if first is None:
        raise ValueError(f"{path} [{split}] is empty.")
    return rows


def read_hub(
    name: str, config: str | None, split: str, streaming: bool = False, data_files: dict[str, str] | None = None
) -> Rows:
    """
    A split of a dataset of the Hub, or a slice of one; ValueError if it cannot be fetched. `data_files` are the jsonl
    files of the splits, for a repository with a loading script, which `datasets` no longer runs.
    """
    split_name, _ = parse_split(split)
    arguments: dict[str, Any] = {"path": name, "name": config}
    if data_files:
        arguments = {"path": "json", "data_files": {split_name: data_files[split_name]}}
    try:
        return _load(split, streaming, **arguments)
    except HfHubHTTPError:  # the Hub answered, and says what is wrong
        raise
    except (ConnectionError, HTTPError, DatasetNotFoundError) as error:  # httpx's HTTPError, or httpx2's
        problem = f"{name} cannot be fetched from the Hub ({type(error).__name__})"
        raise ValueError(f"{problem}. Offline, name a local copy with data_files.") from error


def _load(split: str, streaming: bool, **arguments: Any) -> Rows:
    if not streaming:
        return load_dataset(split=split, **arguments)
    start, stop = row_range(split, "A stream")
    rows = load_dataset(split=parse_split(split)[0], streaming=True, **arguments)
    rows = rows.skip(start) if start else rows
    return rows if stop is None else rows.take(max(stop - start, 0))


def _check_json(path: str) -> None:
    """Raises ValueError for a file that is neither JSON Lines nor JSON: on some, pyarrow's threads crash."""
    with open(path, "rb") as file:
        try:
            for line in file:
                if line.strip():
                    json.loads(line)
        except ValueError as error:  # perhaps it is one value on several lines
            file.seek(0)
            try:
                json.load(file)
            except ValueError:
                raise ValueError(f"{path} is not valid json: {error}") from error


def _file_format(path: str) -> str | None:
    return _FILE_FORMATS.get(os.path.splitext(path.removesuffix(".gz"))[1])
