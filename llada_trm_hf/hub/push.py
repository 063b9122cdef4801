"""Checkpoints to the Hub, older ones included."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import CommitInfo

from ..cards import files_to_publish, publish
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
