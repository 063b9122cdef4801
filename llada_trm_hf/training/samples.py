"""From the data a recipe names to tokens."""

import os

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data import load_reasoning_dataset, tokenize_reasoning
from ..data.reasoning import column_mapping
from ..data.reasoning_sources import SOURCES
from ..data.rows import Rows, is_data_file
from .recipe_arguments import DataArguments


def pretrained_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or repository; without a padding token, it pads with the end of the sequence."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_length(max_length: int, model: PreTrainedModel) -> None:
    """Raises ValueError if samples could be longer than the model's context."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise ValueError(f"max_length={max_length} is more than the model's context of {longest} tokens.")


def check_folder(name: str) -> None:
    """Raises FileNotFoundError for what is no folder, and cannot be a repository, which is named owner/name."""
    if not os.path.isdir(name) and (os.path.isabs(name) or name.count("/") != 1):
        raise FileNotFoundError(f"There is no folder {name}.")


def splits(what: DataArguments) -> list[tuple[str, str | None]]:
    """Split and local file of the training data and, if wanted, of the evaluation data."""
    chosen = [(what.split, what.data_files)]
    if what.eval_split is not None or what.eval_data_files is not None:
        chosen.append((what.eval_split or "test", what.eval_data_files or what.data_files))
    return chosen


def describe_data(what: DataArguments) -> dict[str, str]:
    """The dataset, for `BaseTrainer.data_description`; the name of a local file would mean nothing to others."""
    source = SOURCES.get(what.dataset_name)
    is_local = what.data_files is not None or is_data_file(what.dataset_name)
    described = {"name": "a local file" if is_local else what.dataset_name, "split": what.split}
    hub_name = what.dataset_name if source is None else source.hub_name
    if hub_name and not is_local:
        described["hub_name"] = hub_name
    if what.eval_split is not None:
        described["eval_split"] = what.eval_split
    return described


def reasoning_samples(
    what: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    path: str | None,
    align_steps_to_chunks: int | None = None,
) -> Rows:
    """Prompt, reasoning and answer of each problem as tokens; see `tokenize_reasoning`."""
    problems, response = load_reasoning_dataset(
        what.dataset_name,
        split,
        data_files=path,
        columns=column_mapping(what.columns),
        num_terms=what.num_terms,
        streaming=what.streaming,
    )
    return tokenize_reasoning(problems, tokenizer, response, what.max_length, align_steps_to_chunks)
