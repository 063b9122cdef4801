"""To the Hub: checkpoints, older ones included, and masked-diffusion generation for other models."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id
from transformers.dynamic_module_utils import get_relative_imports

from ..generation.generate import generate
from ..models.hub_model import write_code
from .legacy import import_legacy
from .model_card import CUSTOM_GENERATE_CARD, model_card, read_config
from .training_record import TRAINING_SETTINGS_FILE, read_json

# What loads the model, besides the code that `auto_map` names. The rest stays: optimizer states, pickles, logs and
# metrics (the card has the results), and `trainer_state.json`, which names folders of this machine.
UPLOADED = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    TRAINING_SETTINGS_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "README.md",
)
RETRY_DELAYS = (1, 2, 4)  # seconds


def push_checkpoint(
    checkpoint: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    description: str | None = None,
    revision: str | None = None,
    base_model: str | None = None,
) -> CommitInfo:
    """
    Uploads a model in one commit: `publish` of its `files_to_publish`, which say the other arguments and errors.

    Args:
        checkpoint: folder of `save_pretrained` or a trainer, or an older `compressor.pt` / `trm.pt`, which is read
            without executing anything in it and uploaded as safetensors.
    """
    with folder_of(checkpoint) as folder:
        files = files_to_publish(folder, repo_id, description, revision, base_model)
        return publish(files, repo_id, private, revision)


def push_custom_generate(
    repo_id: str, private: bool = False, revision: str | None = None, token: str | None = None
) -> CommitInfo:
    """
    Uploads masked-diffusion generation; then `model.generate(..., custom_generate=repo_id, trust_remote_code=True)`
    runs it. Arguments and errors as for `publish`, and a ValueError for an impossible name.
    """
    return publish(custom_generate_files(repo_id), repo_id, private, revision, token, "Upload custom_generate")


def export_custom_generate(folder: str | os.PathLike, repo_id: str | None = None) -> None:
    """
    Writes masked-diffusion generation into `folder`, as transformers loads it: `custom_generate/generate.py`, the
    files it imports, and a card, whose code loads it from `repo_id` (by default the folder).
    """
    write_code(Path(folder, "custom_generate"), generate)
    card = CUSTOM_GENERATE_CARD.read_text(encoding="utf-8").replace("{{ repo_id }}", repo_id or os.fspath(folder))
    Path(folder, "README.md").write_text(card, encoding="utf-8")


def custom_generate_files(repo_id: str) -> dict[str, str | bytes]:
    """The files that `push_custom_generate` uploads, without contacting the Hub."""
    _check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as folder:
        export_custom_generate(folder, repo_id)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@contextmanager
def folder_of(checkpoint: str | os.PathLike) -> Iterator[str | os.PathLike]:
    """The folder of a checkpoint; for an older file a temporary one into which it is converted."""
    if not os.path.isfile(checkpoint):
        yield checkpoint
        return
    with tempfile.TemporaryDirectory() as folder:
        import_legacy(checkpoint).save_pretrained(folder)
        yield folder


def files_to_publish(
    folder: str | os.PathLike,
    repo_id: str,
    description: str | None = None,
    revision: str | None = None,
    base_model: str | None = None,
    new_card: bool = False,
) -> dict[str, str | bytes]:
    """
    The files of `folder` that are uploaded, without contacting the Hub. Of its Python files only those that `auto_map`
    names, and what they import. A README.md is uploaded as it is; without one a card is made from the checkpoint.

    Args:
        folder, repo_id, description, revision, base_model: see `model_card`; the config names `base_model` too.
        new_card: make a card even if there is a README.md.

    Returns:
        Path in the repository -> path on this machine, or the file's bytes.

    Raises:
        FileNotFoundError, ValueError: for a checkpoint that nobody else could load, or an impossible name.
    """
    for name in (repo_id, base_model):
        if name is not None:
            _check_repo_id(name)
    folder = Path(folder)
    config = read_config(folder)
    code = _code_files(folder, config.get("auto_map"))
    tokenizer_code = _code_files(folder, read_json(folder / "tokenizer_config.json").get("auto_map"))
    paths = [path for pattern in UPLOADED for path in folder.glob(pattern)]
    paths += [folder / name for name in code | tokenizer_code]
    contents: dict[str, str | bytes] = {p.relative_to(folder).as_posix(): str(p) for p in paths if p.is_file()}
    backbone = config.get("backbone_name_or_path")
    # A whole model does not need to say where its backbone was on this machine.
    is_private = config.get("backbone_in_checkpoint", True) and backbone and _is_local(folder, backbone)
    if base_model is not None or is_private:
        config["backbone_name_or_path"] = base_model
        contents["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    _check_loadable(folder, config, code, set(contents))
    if new_card or "README.md" not in contents:
        contents["README.md"] = str(model_card(folder, repo_id, description, revision, base_model)).encode()
    elif description is not None:
        raise ValueError(f"{folder} has a README.md, which is uploaded as it is: put the description there.")
    return dict(sorted(contents.items()))


def publish(
    files: dict[str, str | bytes],
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload model",
) -> CommitInfo:
    """
    Uploads files in one commit, creating the repository and the branch if they do not exist. A broken connection is
    tried again: what arrived is not sent twice, and a commit that was made is not made again.

    Args:
        files: see `files_to_publish`.
        repo_id, revision: `owner/name`, and the branch if not the main one.
        private: whether a new repository is private.
        token: by default the one of `hf auth login` or `HF_TOKEN`.

    Raises:
        ValueError: without a token, or if the repository is public although `private` is set.
        HfHubHTTPError: if the Hub refuses.
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
            # The client tries uploads again, but not the commit: it cannot know whether one whose answer was lost was
            # made. Asking again is safe, because it first compares the files and commits nothing if none differs.
            return api.create_commit(
                repo_id,
                [CommitOperationAdd(path, content) for path, content in files.items()],
                commit_message=commit_message,
                revision=revision,
                parent_commit=parent,
            )
        except HTTPError as error:
            response, delay = getattr(error, "response", None), next(delays, None)
            # 412: the branch has moved on, maybe by a commit whose answer was lost.
            is_refusal = response is not None and response.status_code < 500 and response.status_code != 412
            if delay is None or is_refusal:
                raise
            print(f"The upload was interrupted ({type(error).__name__}); trying again.", file=sys.stderr)
            time.sleep(delay)


def _check_repo_id(name: str) -> None:
    validate_repo_id(name)
    if name.count("/") != 1:
        raise ValueError(f"A repository is named owner/name, got {name!r}.")


def _code_files(folder: Path, auto_map: Any) -> set[str]:
    """The files that an `auto_map` names and, recursively, those that they import, whether they exist or not."""
    files: set[str] = set()
    waiting = [f"{reference.split('.')[0]}.py" for reference in _references(auto_map) if "--" not in reference]
    while waiting:
        name = waiting.pop()
        if name not in files and (folder / name).is_file():
            waiting += [f"{module}.py" for module in get_relative_imports(folder / name)]
        files.add(name)
    return files


def _references(auto_map: Any) -> list[str]:
    """Of a model's map (Auto class -> reference) or a tokenizer's (Auto class -> two references, maybe None)."""
    if isinstance(auto_map, str):
        return [auto_map]
    values = auto_map.values() if isinstance(auto_map, dict) else auto_map or ()
    return [reference for value in values for reference in _references(value)]


def _check_loadable(folder: Path, config: dict[str, Any], code: set[str], names: set[str]) -> None:
    """Raises an error for what another machine could not load."""
    index = read_json(folder / "model.safetensors.index.json")
    weights = set(index.get("weight_map", {}).values()) or {"model.safetensors"}
    missing = sorted((weights | code) - names)
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: save the model with save_pretrained.")
    if "auto_map" not in config:
        raise ValueError(f"{folder}/config.json names no code (auto_map): save the model with this package.")
    backbone = config.get("backbone_name_or_path") or ""
    if not config.get("backbone_in_checkpoint", True) and _is_local(folder, backbone):
        hint = "name its repository (--base_model owner/name), or save the model whole"
        raise ValueError(f"{folder} holds no backbone and names a folder of this machine, {backbone}: {hint}.")


def _is_local(folder: Path, backbone: str) -> bool:
    """
    Whether a backbone's name is that of a folder, which another machine could take for somebody's repository: older
    checkpoints name it relative to where training ran, mostly a folder above the checkpoint.
    """
    if os.path.isabs(backbone) or backbone.startswith(".") or backbone.count("/") > 1 or os.path.isdir(backbone):
        return True
    return any((place / backbone).is_dir() for place in (folder.resolve(), *folder.resolve().parents))
