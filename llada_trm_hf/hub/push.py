"""To the Hub: checkpoints, older ones included, and masked-diffusion generation for other models."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo

from ..cards import CUSTOM_GENERATE_CARD, files_to_publish, publish
from ..cards.publishing import check_repo_id
from ..models.generate import generate
from ..models.modeling_hub import write_code
from .legacy import import_legacy


def push_checkpoint(
    checkpoint: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    description: str | None = None,
    revision: str | None = None,
    base_model: str | None = None,
) -> CommitInfo:
    """
    Uploads a model in one commit; see `publish` for what happens when the connection breaks.

    Args:
        checkpoint: folder of `save_pretrained` or a trainer, or an older `compressor.pt` / `trm.pt`, which is read
            without executing anything in it and uploaded as safetensors.
        repo_id, description, revision, base_model: see `files_to_publish`.
        private: whether a new repository is private.

    Raises:
        FileNotFoundError, ValueError: for a checkpoint nobody else could load, before anything is sent.
        ValueError, HfHubHTTPError: see `publish`.
    """
    with folder_of(checkpoint) as folder:
        files = files_to_publish(folder, repo_id, description, revision, base_model)
        return publish(files, repo_id, private, revision)


@contextmanager
def folder_of(checkpoint: str | os.PathLike) -> Iterator[str | os.PathLike]:
    """The folder of a checkpoint; for an older file a temporary one into which it is converted."""
    if not os.path.isfile(checkpoint):
        yield checkpoint
        return
    with tempfile.TemporaryDirectory() as folder:
        import_legacy(checkpoint).save_pretrained(folder)
        yield folder


def export_custom_generate(folder: str | os.PathLike, repo_id: str | None = None) -> None:
    """
    Writes masked-diffusion generation into `folder`, as transformers loads it: `custom_generate/generate.py`, the
    files it imports, and a card.

    Args:
        folder: created if need be.
        repo_id: where it will be, for the code in the card; the folder by default.
    """
    write_code(Path(folder, "custom_generate"), generate)
    card = CUSTOM_GENERATE_CARD.read_text(encoding="utf-8").replace("{{ repo_id }}", repo_id or os.fspath(folder))
    Path(folder, "README.md").write_text(card, encoding="utf-8")


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
