"""To the Hub: checkpoints, older ones included, and masked-diffusion generation for other models."""

import inspect
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import HTTPError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from transformers import PreTrainedModel

from ..generation.generate import generate
from ..models.backbone_wrapper import BackboneWrapper
from ..models.hub_model import write_code
from .checkpoint_files import check_repo_id, files_to_publish
from .legacy import import_legacy
from .license import keep_license, license_of, read_metadata, with_license, with_metadata
from .model_card import CARD_FIELDS, CUSTOM_GENERATE_CARD
from .readme_file import README, is_first_process, is_generated, read_readme, sign

RETRY_DELAYS = (1, 2, 4)  # seconds
# What `from_pretrained` may load in place of the weights that are uploaded, if an earlier upload left it.
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def push_checkpoint(
    checkpoint: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    description: str | None = None,
    revision: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    tags: Iterable[str] | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """
    Uploads a model in one commit: `publish` of its `files_to_publish`, which say the other arguments and errors.

    Args:
        checkpoint: folder of `save_pretrained` or a trainer, or an older `compressor.pt` / `trm.pt`, which is read
            without executing anything in it and uploaded as safetensors.
    """
    with folder_of(checkpoint) as folder:
        files = files_to_publish(folder, repo_id, description, revision, base_model, license, tags)
        return publish(
            files, repo_id, private, revision, token, commit_message, commit_description, create_pr, license
        )


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    max_shard_size: int | str | None = "50GB",
    save_backbone: bool = True,
    token: str | bool | None = None,
    **arguments: Any,
) -> CommitInfo | None:
    """
    `model.push_to_hub`: what `save_pretrained` writes, uploaded by [`push_checkpoint`]. Of several processes the first
    uploads; all must call this, since the weights may have to be gathered.

    Args:
        repo_id: `owner/name`, or the name alone for a repository of the token's owner.
        max_shard_size: see `save_pretrained`.
        save_backbone: whether the backbone of a hybrid or a latent thinker is uploaded too.
        token, arguments: see [`push_checkpoint`].

    Returns:
        The commit; None in all processes but the first.
    """
    inspect.signature(push_checkpoint).bind("", repo_id, **arguments)  # before the work, not after it
    check_repo_id(repo_id, needs_owner=False)
    token = _token(token)
    saving: dict[str, Any] = {"max_shard_size": max_shard_size, "is_main_process": is_first_process()}
    if not save_backbone:
        if not isinstance(model, BackboneWrapper):
            raise ValueError(f"save_backbone=False needs a model with a backbone, got a {type(model).__name__}.")
        saving["save_backbone"] = False
    tags = arguments.pop("tags", None) or ()
    tags = [*(model.model_tags or ()), *([tags] if isinstance(tags, str) else tags)]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **saving)
        return push_folder(folder, repo_id, token=token, tags=tags, **arguments)


def push_folder(
    folder: str | os.PathLike, repo_id: str | None = None, *, token: str | bool | None = None, **arguments: Any
) -> CommitInfo | None:
    """
    [`push_checkpoint`] as transformers names repositories: without an owner it is the token's, and without a name that
    of the folder. Nothing happens in all processes but the first.
    """
    if not is_first_process():
        return None
    repo_id = repo_id or os.path.basename(os.path.abspath(folder))
    if "/" not in repo_id:
        check_repo_id(repo_id, needs_owner=False)
        repo_id = f"{HfApi(token=_token(token)).whoami()['name']}/{repo_id}"
    return push_checkpoint(folder, repo_id, token=token, **arguments)


def push_custom_generate(
    repo_id: str, private: bool | None = None, revision: str | None = None, token: str | bool | None = None
) -> CommitInfo:
    """
    Uploads masked-diffusion generation; then `model.generate(..., custom_generate=repo_id, trust_remote_code=True)`
    runs it. Arguments and errors as for `publish`, and a ValueError for an impossible name.
    """
    return publish(custom_generate_files(repo_id), repo_id, private, revision, token, "Upload custom_generate")


def export_custom_generate(folder: str | os.PathLike, repo_id: str | None = None) -> None:
    """
    Writes masked-diffusion generation into `folder`, as transformers loads it: `custom_generate/generate.py`, the
    files it imports, and a card, whose code loads it from `repo_id` (by default the folder), unless there is a
    README.md that a person wrote or changed.
    """
    write_code(Path(folder, "custom_generate"), generate)
    readme = read_readme(folder)
    if readme is None or is_generated(readme):
        card = CUSTOM_GENERATE_CARD.read_text(encoding="utf-8").replace("{{ repo_id }}", repo_id or os.fspath(folder))
        Path(folder, README).write_text(sign(ModelCard(card)), encoding="utf-8")


def custom_generate_files(repo_id: str) -> dict[str, str | bytes]:
    """The files that `push_custom_generate` uploads, without contacting the Hub."""
    check_repo_id(repo_id)
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


def publish(
    files: dict[str, str | bytes],
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
) -> CommitInfo:
    """
    Uploads files in one commit, creating the repository and the branch if they do not exist. A broken connection is
    tried again: what arrived is not sent twice, and a commit that was made is not made again. The card in a repository
    stays if a person wrote or changed it; weights there that these would not replace, but hide behind, are deleted.

    Args:
        files: see `files_to_publish`.
        repo_id, revision: `owner/name`, and the branch if not the main one.
        private: whether a new repository is private; by default what its owner has chosen for new ones.
        token: by default the one of `hf auth login` or `HF_TOKEN`.
        commit_message, commit_description: by default "Upload model", and nothing.
        create_pr: open a pull request with the commit instead.
        license: the one given for the card, which then is not that of the card in the repository.

    Raises:
        ValueError: without a token, or if the repository is public although `private` is set.
        HfHubHTTPError: if the Hub refuses.
    """
    token = _token(token)
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} exists and is public: make it private on the Hub first, or leave out private.")
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    info, delays = api.model_info(repo_id, revision=revision), iter(RETRY_DELAYS)
    there = {sibling.rfilename for sibling in info.siblings or ()}
    files = _with_final_card(files, repo_id, info.sha if README in there else None, license, token)
    while True:
        try:
            # The client tries uploads again, but not the commit: it cannot know whether one whose answer was lost was
            # made. Asking again is safe, because it first compares the files and commits nothing if none differs.
            return api.create_commit(
                repo_id,
                [*(CommitOperationAdd(path, content) for path, content in files.items()), *_deletions(there, files)],
                commit_message=commit_message or "Upload model",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=info.sha,
            )
        except HTTPError as error:
            response, delay = getattr(error, "response", None), next(delays, None)
            # 412: the branch has moved on, maybe by a commit whose answer was lost.
            is_refusal = response is not None and response.status_code < 500 and response.status_code != 412
            if delay is None or is_refusal or create_pr:  # (asked again, it would open a second pull request)
                raise
            print(f"The upload was interrupted ({type(error).__name__}); trying again.", file=sys.stderr)
            time.sleep(delay)
            there = set(api.list_repo_files(repo_id, revision=revision))


def _deletions(there: Iterable[str], files: dict[str, str | bytes]) -> list[CommitOperationDelete]:
    """Of the weights in the repository, those that are not replaced by the new ones."""
    if not any(_WEIGHTS.fullmatch(path) for path in files):
        return []
    return [CommitOperationDelete(path) for path in sorted(set(there) - set(files)) if _WEIGHTS.fullmatch(path)]


def _with_final_card(
    files: dict[str, str | bytes], repo_id: str, commit: str | None, license: str | None, token: str
) -> dict[str, str | bytes]:
    """
    The files with the card as it has to be where the card of `commit` stands: not at all, if a person wrote or changed
    that one. If that is no more than metadata (from the page that makes a repository), they stay, and so does the
    licence of an earlier card of the package, unless another is given.
    """
    readme = files.get(README)
    text = readme.decode() if isinstance(readme, bytes) else ""
    if not is_generated(text):  # a person's, or none
        return files
    card, earlier = ModelCard(text), dict[str, Any]()
    base = card.data.to_dict().get("base_model")
    if commit is not None:
        path = hf_hub_download(repo_id, README, revision=commit, token=token)
        before = Path(path).read_text(encoding="utf-8-sig", errors="replace")
        earlier = read_metadata(path)
        if not is_generated(before):
            if REGEX_YAML_BLOCK.sub("", before, count=1).strip():
                print(f"The README.md of {repo_id} is of a person's: it stays as it is.", file=sys.stderr)
                return {path: content for path, content in files.items() if path != README}
            earlier["base_model"] = base
        card = with_metadata(
            card, {**{name: earlier[name] for name in earlier if name not in CARD_FIELDS}, **card.data.to_dict()}
        )
    if license is None:
        card = keep_license(card, earlier)
        if "license" not in card.data.to_dict():
            card = with_license(card, license_of(base, contact_hub=True, token=token))
    return {**files, README: sign(card).encode()}


def _token(token: str | bool | None) -> str:
    found = token if isinstance(token, str) else get_token() if token is not False else None
    if not found:
        raise ValueError("There is no token for the Hub: run `hf auth login`, or set HF_TOKEN.")
    return found
