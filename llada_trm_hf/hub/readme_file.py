"""The README.md of a checkpoint: the package's card, which is kept up to date, unless a person wrote or changed it."""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from .files import write_text
from .license import keep_license, read_metadata
from .model_card import model_card

README = "README.md"
# The last line of a card, which nobody sees: by its digest a card that somebody changed is known.
_SIGNATURE = re.compile(r"\n*<!-- llada-trm-hf ([0-9a-f]{16}): [^>]*-->\s*\Z")
_NOTE = "written anew with every save and push, unless you change this file"
_CHECKPOINT = re.compile(r"checkpoint-\d+")


def sign(card: object) -> str:
    """The text of a card with a last line by which [`is_generated`] knows it; an earlier such line is replaced."""
    text = _SIGNATURE.sub("", str(card)).rstrip()
    return f"{text}\n\n<!-- llada-trm-hf {_digest(text)}: {_NOTE} -->\n"


def is_generated(text: str) -> bool:
    """Whether a README is a card as this package wrote it (line ends aside): then a new one may replace it."""
    text = _with_plain_line_ends(text)
    signature = _SIGNATURE.search(text)
    return signature is not None and signature[1] == _digest(text[: signature.start()])


def read_readme(folder: str | os.PathLike) -> str | None:
    """The text of the folder's README.md; None without one."""
    path = Path(folder, README)
    return path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else None


def new_card(folder: str | os.PathLike, repo_id: str, license: str | None = None, **fields: Any) -> ModelCard:
    """[`model_card`], with the licence of the card that it replaces in the folder unless another is given."""
    card = model_card(folder, repo_id, license=license, **fields)
    return card if license else keep_license(card, read_metadata(Path(folder, README)))


def save_card(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    tags: Iterable[str] | None = None,
) -> None:
    """
    Writes the card of the model in `folder` as its README.md, or brings that up to date. Nothing happens if a person
    wrote or changed the README.md, in a Trainer's `checkpoint-N`, without a config.json, and in all processes but the
    first.

    Args:
        folder, revision, license, tags: see [`model_card`].
        repo_id: where the model will be; by default the code in the card loads it from a folder of this name.
    """
    name = os.path.basename(os.path.abspath(folder))
    if not is_first_process() or _CHECKPOINT.fullmatch(name) or not Path(folder, "config.json").is_file():
        return
    readme = read_readme(folder)
    if readme is None or is_generated(readme):
        text = sign(new_card(folder, repo_id or name, license, revision=revision, tags=tags))
        if text != readme:
            write_text(os.path.join(folder, README), text)


def is_first_process() -> bool:
    """Whether this process is the one that writes and uploads: the first of several that train together."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def _digest(text: str) -> str:
    return hashlib.sha256(_with_plain_line_ends(text).rstrip().encode()).hexdigest()[:16]


def _with_plain_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n")
