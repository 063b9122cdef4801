"""Masked-diffusion generation as a repository of its own, for any model that predicts masked tokens in place."""

import os
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo

from ..cards import custom_generate_card, publish
from ..cards.publishing import check_repo_id
from ..models.generate import generate
from ..models.modeling_hub import write_code


def export_custom_generate(folder: str | os.PathLike, repo_id: str | None = None) -> None:
    """
    Writes masked-diffusion generation into `folder`, as transformers loads it: `custom_generate/generate.py`, the
    files it imports, and a card.

    Args:
        folder: created if need be.
        repo_id: where it will be, for the code in the card; the folder by default.
    """
    write_code(Path(folder, "custom_generate"), generate)
    custom_generate_card(repo_id or os.fspath(folder)).save(Path(folder, "README.md"))


def custom_generate_files(repo_id: str) -> dict[str, str | bytes]:
    """The files that `push_custom_generate` uploads, without contacting the Hub."""
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as folder:
        export_custom_generate(folder, repo_id)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def push_custom_generate(
    repo_id: str, private: bool = False, revision: str | None = None, token: str | None = None
) -> CommitInfo:
    """
    Uploads masked-diffusion generation in one commit; then `model.generate(..., custom_generate=repo_id,
    trust_remote_code=True)` runs it. Arguments and errors as for `publish`, and a ValueError for an impossible name.
    """
    return publish(custom_generate_files(repo_id), repo_id, private, revision, token, "Upload custom_generate")
