"""A checkpoint's folder to the Hub: what of it is uploaded, with which card, in one commit."""

import json
import os
import sys
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session, validate_repo_id

from .model_card import model_card
from .training_record import read_json

# Weights, configs, code, tokenizers: what loads the model. The rest stays where it is: optimizer states, pickles, logs
# and metrics (the card has the results), and `trainer_state.json`, which names folders of this machine.
UPLOADED = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "training_settings.json",
    "*.py",
    "custom_generate/*.py",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "README.md",
)
RETRY_DELAYS = (1, 2, 4)  # seconds


@dataclass(frozen=True)
class Upload:
    """
    A file to upload.

    Attributes:
        path: in the repository.
        content: the file's path on this machine, or what it holds.
    """

    path: str
    content: str | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else os.path.getsize(self.content)


def files_to_publish(
    folder: str | os.PathLike,
    repo_id: str,
    description: str | None = None,
    revision: str | None = None,
    base_model: str | None = None,
    new_card: bool = False,
) -> list[Upload]:
    """
    What of `folder` is uploaded, without contacting the Hub. A README.md in it is uploaded as it is; without one there
    is a card made from the checkpoint.

    Args:
        folder: of `save_pretrained` or a trainer.
        repo_id: `owner/name`.
        description: a paragraph for the card.
        revision: the branch; by default the main one.
        base_model: the repository of the model it stands on, instead of what its config says.
        new_card: make a card even if there is a README.md.

    Raises:
        FileNotFoundError, ValueError: for a checkpoint that nobody else could load, or an impossible name.
    """
    for name in (repo_id, base_model):
        if name is not None:
            _check_name(name)
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no checkpoint {folder}.")
    found = [path for path in sorted(folder.glob("**/*")) if path.is_file()]
    contents: dict[str, str | bytes] = {path.relative_to(folder).as_posix(): str(path) for path in found}
    contents = {name: path for name, path in contents.items() if any(_matches(name, p) for p in UPLOADED)}
    config = read_json(str(folder / "config.json"))
    if not config:
        raise FileNotFoundError(f"{folder} holds no model: there is no config.json.")
    if base_model is not None:
        config["backbone_name_or_path"] = base_model
        contents["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    _check_complete(folder, config, set(contents))
    if new_card or "README.md" not in contents:
        contents["README.md"] = str(model_card(folder, repo_id, description, revision, base_model)).encode()
    elif description is not None:
        raise ValueError(f"{folder} has a README.md, which is uploaded as it is: put the description there.")
    return [Upload(name, content) for name, content in contents.items()]


def publish(
    uploads: list[Upload],
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload model",
) -> CommitInfo:
    """
    Uploads files in one commit, making the repository and the branch if they do not exist. If the connection breaks,
    it is tried again; what arrived is not sent twice, and a commit that was made is not made again.

    Args:
        uploads: see `files_to_publish`.
        repo_id: `owner/name`.
        private: whether a new repository is private.
        revision: the branch; by default the main one.
        token: by default the one of `hf auth login` or `HF_TOKEN`.
        commit_message: its title.

    Raises:
        ValueError: without a token, or if the repository is public and `private` is wanted.
        HfHubHTTPError: for what the Hub refuses.
    """
    token = token or get_token()
    if token is None:
        raise ValueError("There is no token for the Hub: run `hf auth login`, or set HF_TOKEN.")
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} exists and is public: make it private on the Hub first, or leave out private.")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    parent, delays = api.model_info(repo_id, revision=revision).sha, iter(RETRY_DELAYS)
    while True:
        try:
            # Of a commit whose connection broke it is not known whether it was made. The client first asks which files
            # differ from the branch's, and commits nothing if none does.
            return api.create_commit(
                repo_id,
                [CommitOperationAdd(upload.path, upload.content) for upload in uploads],
                commit_message=commit_message,
                revision=revision,
                parent_commit=parent,
            )
        except Exception as error:
            delay = next(delays, None)
            if delay is None or not _is_transient(error):
                raise
            print(f"The upload was interrupted ({type(error).__name__}); trying again.", file=sys.stderr)
            time.sleep(delay)


def _check_name(name: str) -> None:
    validate_repo_id(name)
    if name.count("/") != 1:
        raise ValueError(f"A repository is named owner/name, got {name!r}.")


def _matches(name: str, pattern: str) -> bool:
    """Folder by folder: unlike in fnmatch, `*` stands for no slash."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch, parts, patterns))


def _check_complete(folder: Path, config: dict[str, Any], names: set[str]) -> None:
    """Raises an error for what a stranger's process could not load."""
    index = read_json(str(folder / "model.safetensors.index.json"))
    needed = set(index.get("weight_map", {}).values()) or {"model.safetensors"}
    needed |= {f"{reference.split('.')[0]}.py" for reference in config.get("auto_map", {}).values()}
    missing = sorted(needed - names)
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: save the model with save_pretrained.")
    if "auto_map" not in config:
        raise ValueError(f"{folder}/config.json names no code (auto_map): save the model with this package.")
    backbone = config.get("backbone_name_or_path") or ""
    if not config.get("backbone_in_checkpoint", True) and (os.path.isabs(backbone) or os.path.isdir(backbone)):
        raise ValueError(
            f"{folder} holds no backbone and names a folder of this machine, {backbone}, which nobody else has: name "
            f"its repository (--base_model owner/name), or save the model whole."
        )


def _is_transient(error: BaseException) -> bool:
    """Whether another attempt may succeed; the client wraps what went wrong with a large file."""
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        # 412: the commit of a broken connection was made in the meantime.
        return error.response.status_code >= 500 or error.response.status_code == 412
    transport: Any = sys.modules[type(get_session()).__module__.split(".")[0]]  # httpx, or what replaces it
    if isinstance(error, transport.TransportError):
        return True
    return error.__cause__ is not None and _is_transient(error.__cause__)
