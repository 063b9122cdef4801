"""Reasoning datasets with one schema: prompt, reasoning, answer; for code also tests and the entry point."""

from typing import Any

from datasets import Dataset

from ..models.hub_model import nearest_name
from .generated_problems import GeneratorOptions, generate_problems
from .reasoning_sources import CODE_COLUMNS, LOCAL_CODE, LOCAL_FILE, SCHEMA, SOURCES, ReasoningSource
from .rows import (
    Rows,
    check_columns_exist,
    column_names,
    is_data_file,
    parse_split,
    read_hub,
    read_rows,
    text_features,
)


def load_reasoning_dataset(
    name: str,
    split: str = "train",
    data_files: str | None = None,
    columns: dict[str, str] | None = None,
    seed: int = 0,
    streaming: bool = False,
    **generator_options: Any,
) -> tuple[Rows, str]:
    """
    Loads problems as texts: `prompt`, `reasoning`, `answer`, and where answers are programs `tests` and `entry_point`
    (see `code_tests`). Rows with neither answer nor tests are left out and, but for streams, counted.

    Args:
        name: a generated dataset (`"arithmetic"`, `"prefix_sum"`, `"sudoku"`, `"maze"`), one of the Hub (`"gsm8k"`,
            `"natural_reasoning"`, `"math"`, `"aime"`, `"humaneval"`, `"mbpp"`, `"apps"`), or a local json, jsonl, csv
            or parquet file, gzipped or not, with the schema's columns or those of one of these datasets.
        split: a split, or a slice of one such as `"train[:1000]"` or `"test[10%:20%]"`. A local file is one split. For
            generated data the slice says which problems are made, 50,000 for `"train"`, 1,000 for `"test"`.
        data_files: a local file to read instead of the Hub's, in the format of the dataset `name`.
        columns: for a local file, which of its columns are which, e.g. `{"prompt": "question"}`.
        seed: of generated data.
        streaming: read rows as they are needed, as an `IterableDataset`; it is sliced by numbers only.
        generator_options: of generated data, see [`GeneratorOptions`]; other data take no notice of them.

    Returns:
        The dataset, and the format string that joins reasoning and answer to a response.

    Raises:
        TypeError: for an option that no generated dataset has.
        ValueError: for an unknown name or split, generator options that do not fit, missing columns, an empty dataset,
            or a malformed row, with its number in the slice, from 0; in a stream, when the row is read.
        FileNotFoundError: for a file that does not exist.
    """
    options = GeneratorOptions(**generator_options).generator_options()
    path = data_files or (name if is_data_file(name) else None)
    if path is not None:
        rows = read_rows(path, split, streaming, SOURCES[name].splits if name in SOURCES else ())
        source = SOURCES.get(name) or _recognise(column_names(rows), columns)
    elif name in SOURCES:
        source = SOURCES[name]
        if parse_split(split)[0] not in source.splits:
            raise ValueError(f"{name} has no split {parse_split(split)[0]!r}, it has {', '.join(source.splits)}.")
        if source.hub_name is None:
            rows = generate_problems(name, split, seed, options, streaming)
        else:
            rows = read_hub(source.hub_name, source.hub_config, split, streaming, source.hub_files)
    else:
        raise ValueError(
            f"Unknown dataset {name!r}{nearest_name(name, SOURCES)}. Known: {', '.join(SOURCES)}, or a .json, "
            f".jsonl, .csv or .parquet file."
        )
    return _convert(rows, source, columns or {}, path or name, split), source.response


def column_mapping(columns: list[str] | None) -> dict[str, str] | None:
    """`["prompt=question"]`, as on a command line, as a dictionary; None for no columns, ValueError for no pair."""
    pairs = [pair.partition("=") for pair in columns or []]
    if any(not column for _, _, column in pairs):
        raise ValueError(f"columns are pairs such as prompt=question; got {' '.join(columns or [])}.")
    return {name: column for name, _, column in pairs} or None


def _recognise(found: list[str], columns: dict[str, str] | None) -> ReasoningSource:
    """The format of a local file: this package's schema, after renaming, or that of a known dataset."""
    names = {*found, *(columns or {})}
    if columns or names >= set(LOCAL_FILE.columns):
        return LOCAL_CODE if names >= set(LOCAL_CODE.columns) else LOCAL_FILE
    return next((source for source in SOURCES.values() if names >= set(source.columns)), LOCAL_FILE)


def _convert(rows: Rows, source: ReasoningSource, columns: dict[str, str], where: str, split: str) -> Rows:
    """The rows in the schema; `columns` says what the file calls the columns of `source`."""
    found = column_names(rows)
    known = dict.fromkeys((*source.columns, *SCHEMA, *CODE_COLUMNS))
    misnamed = [name for name in columns if name not in known]
    if misnamed:
        raise ValueError(f"columns name {', '.join(known)}; got {', '.join(misnamed)}.")
    check_columns_exist(columns, found, where)
    missing = [column for column in source.columns if column not in found and column not in columns]
    if missing:
        lacking = f"{where} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
        example = f"Say which is which with columns, e.g. {missing[0]}={found[0]}"
        raise ValueError(f"{lacking}; it has {', '.join(found)}. {example}.")
    renamed = {name: column for name in known if (column := columns.get(name, name)) in found}

    def convert(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[str]]:
        problems = []
        for i, number in enumerate(numbers):
            try:
                problem = source.convert({name: batch[column][i] for name, column in renamed.items()})
            except ValueError as error:
                raise ValueError(f"{where} [{split}], row {number}: {error}") from error
            if problem["answer"].strip() or problem.get("tests", "").strip():
                problems.append(problem)
        return {column: [problem[column] for problem in problems] for column in source.result_columns}

    rows = rows.select_columns(sorted(set(renamed.values())))
    converted = rows.map(
        convert,
        with_indices=True,
        batched=True,
        batch_size=100,  # some problems of APPS come with megabytes of tests
        remove_columns=column_names(rows),
        features=text_features(source.result_columns),
    )
    if isinstance(converted, Dataset) and not len(converted):
        raise ValueError(f"{where} [{split}] is empty, or none of its rows has an answer.")
    if isinstance(converted, Dataset) and len(converted) < len(rows):
        print(f"Left out {len(rows) - len(converted)} of {len(rows)} rows of {where} [{split}]: they have no answer.")
    return converted
