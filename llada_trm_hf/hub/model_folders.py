"""Models as users name them: is there such a folder or repository, and does it hold the kind that is meant?"""

import os
from collections.abc import Collection

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..models.hub_model import REFINERS, backbone_place
from .training_record import read_json

# What models of these types are called, and what an option may take: the others are whole language models.
_NAMES = {
    "llada_trm": "a hybrid",
    "latent_thinking": "a latent-thinking model",
    "dimension_compressor": "a compressor",
    "sequence_trm": "a SequenceTRM",
}
BACKBONE, LANGUAGE_MODEL, TOKENIZER = "a backbone", "a language model", "a tokenizer"
HYBRID, LATENT_THINKING, COMPRESSOR, SEQUENCE_TRM = _NAMES.values()
_NO_BACKBONES, _NO_LANGUAGE_MODELS = _NAMES.keys(), {"dimension_compressor", "sequence_trm"}
# Files that tell what a folder without config.json holds.
_OTHER_FOLDERS = {
    "datagen_config.json": "hidden pairs of datagen, no model",
    "metadata.jsonl": "hidden pairs, no model",
    "problems.jsonl": "results of an evaluation, no model",
    "results.json": "a demo: its model is in checkpoint",
}


def check_model(name: str, option: str, kind: str) -> None:
    """
    Raises an error, which names the option, unless `name` is a folder with a model of this kind (one of the constants
    above), or can be a repository. What is in a repository is found out when it is loaded.

    Raises:
        FileNotFoundError: for a folder that is not there, or holds no model, or lacks the backbone it needs.
        ValueError: for a folder with another kind of model.
    """
    if not os.path.isdir(name):
        _check_repository(name, option)
        return
    entries = os.listdir(name)
    if kind == TOKENIZER or "adapter_config.json" in entries:  # of PEFT: the model it is for is named in there
        return
    if "config.json" not in entries:
        raise FileNotFoundError(f"--{option}: {name} {_contents(entries)} (there is no config.json).")
    config = read_json(os.path.join(name, "config.json"))
    model_type = config.get("model_type")
    if not _fits(model_type, kind):
        found = _NAMES.get(model_type or "", "a refiner" if model_type in REFINERS else f"a {model_type} model")
        raise ValueError(f"--{option}: {name} holds {found}, and this takes {kind}.")
    if config.get("backbone_in_checkpoint") is False:
        backbone = backbone_place(str(config.get("backbone_name_or_path")), name)
        if not os.path.isdir(backbone):
            _check_repository(backbone, f"{option}: {name} holds no backbone, but names one")


def load_tokenizer(source: str, **arguments: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer in a folder or repository; where a checkpoint without backbone has none, the backbone's. Without a
    padding token it pads with the end of the sequence. Raises ValueError if its files are damaged.
    """
    if os.path.isdir(source) and not _has_tokenizer(source):
        config = read_json(os.path.join(source, "config.json"))
        backbone = config.get("backbone_name_or_path")
        if backbone is None:
            raise FileNotFoundError(f"{source} holds no tokenizer: save one there with tokenizer.save_pretrained.")
        source = backbone_place(backbone, source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **arguments)
    except (OSError, ImportError):  # it is not there, or needs a package: that says it
        raise
    except Exception as error:  # of the Rust library, in any class
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"The tokenizer of {source} cannot be read ({problem}): copy its files again.") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _has_tokenizer(folder: str) -> bool:
    files = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
    return any(cached_file(folder, name, _raise_exceptions_for_missing_entries=False) for name in files)


def _check_repository(name: str, option: str) -> None:
    if os.path.exists(name):
        raise NotADirectoryError(f"--{option}: {name} is a file: name the folder of a model.")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(f"--{option}: There is no folder {name}.") from None
    if constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(name, "config.json"), str):
        there = "and no repository of that name was downloaded to this machine (HF_HUB_OFFLINE is set)"
        raise FileNotFoundError(f"--{option}: There is no folder {name}, {there}.")


def _fits(model_type: str | None, kind: str) -> bool:
    if kind in (BACKBONE, LANGUAGE_MODEL):
        others: Collection[str] = _NO_BACKBONES if kind == BACKBONE else _NO_LANGUAGE_MODELS
        return model_type is not None and model_type not in others and model_type not in REFINERS
    return _NAMES.get(model_type or "") == kind


def _contents(entries: list[str]) -> str:
    """What a folder without config.json holds, as far as one can tell."""
    if not entries:
        return "is empty"
    checkpoints = sorted(entry for entry in entries if entry.startswith("checkpoint-"))
    if checkpoints:
        return f"holds an unfinished training run: name one of its checkpoints, such as {checkpoints[-1]}"
    known = [text for file, text in _OTHER_FOLDERS.items() if file in entries]
    return f"holds {known[0] if known else 'no model'}"
