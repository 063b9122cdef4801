"""Checkpoints to the Hub, older ones included."""

import os
import tempfile

from huggingface_hub import CommitInfo

from ..cards import files_to_publish, publish
from ..cards.publishing import Upload
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
        ValueError: without a token, or if the repository is public although `private` is set.
        HfHubHTTPError: if the Hub refuses.
    """
    with tempfile.TemporaryDirectory() as scratch:
        uploads = files_to_push(checkpoint, repo_id, description, revision, base_model, scratch)
        return publish(uploads, repo_id, private, revision)


def files_to_push(
    checkpoint: str | os.PathLike,
    repo_id: str,
    description: str | None,
    revision: str | None,
    base_model: str | None,
    scratch: str,
) -> list[Upload]:
    """
    What `push_checkpoint` uploads, without contacting the Hub.

    Args:
        checkpoint, repo_id, description, revision, base_model: see `push_checkpoint`.
        scratch: an empty folder that stays until the files are uploaded; an older checkpoint is converted there.
    """
    if os.path.isfile(checkpoint):
        import_legacy(checkpoint).save_pretrained(scratch)
        checkpoint = scratch
    return files_to_publish(checkpoint, repo_id, description, revision, base_model)
