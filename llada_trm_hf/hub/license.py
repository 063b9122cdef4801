"""The licence in a model's card: given, or that of the model it builds on. It is never guessed."""

import os
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from huggingface_hub.repocard import metadata_load

LICENSE_FIELDS = ("license", "license_name", "license_link")


def license_of(name_or_path: str | None, contact_hub: bool = False, token: str | None = None) -> dict[str, Any]:
    """
    The licence that a model's card names, as fields of a card's metadata; empty if that is not known.

    Args:
        name_or_path: a folder or a repository.
        contact_hub: fetch the card of a repository that is not in the cache.
    """
    if not name_or_path:
        return {}
    if os.path.isdir(name_or_path):
        return license_in(read_metadata(Path(name_or_path, constants.REPOCARD_NAME)))
    path: Any
    try:
        if contact_hub:
            path = hf_hub_download(name_or_path, constants.REPOCARD_NAME, token=token)
        else:
            path = try_to_load_from_cache(name_or_path, constants.REPOCARD_NAME)
    except (HTTPError, OSError, ValueError):  # none there, none that this person may read, no name of a repository
        return {}
    return license_in(read_metadata(path), name_or_path) if isinstance(path, str) else {}


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata of a README.md; empty if there are none, or none that can be read."""
    try:
        return metadata_load(Path(path)) or {}
    except (OSError, ValueError, yaml.YAMLError):  # somebody else's file, which may be anything
        return {}


def license_in(metadata: dict[str, Any], repo_id: str | None = None) -> dict[str, Any]:
    """
    The fields of a licence in a card's metadata; empty without one. A link to a file beside the card becomes one that
    leads there from everywhere, or is left out if `repo_id`, where it is, is unknown.
    """
    found = {name: metadata[name] for name in LICENSE_FIELDS if isinstance(metadata.get(name), str)}
    if isinstance(metadata.get("license"), list):  # of several parts
        found["license"] = [str(name) for name in metadata["license"]]
    link = found.get("license_link", "")
    if link and "://" not in link:
        del found["license_link"]
        if repo_id is not None:
            found["license_link"] = f"{constants.ENDPOINT}/{repo_id}/blob/main/{link.removeprefix('./')}"
    return found if "license" in found else {}


def with_license(card: ModelCard, fields: dict[str, Any]) -> ModelCard:
    """The card with these fields instead of those of its licence, or as it is if there are none."""
    others = {name: value for name, value in card.data.to_dict().items() if name not in LICENSE_FIELDS}
    return with_metadata(card, {**others, **fields}) if fields else card


def keep_license(card: ModelCard, earlier: dict[str, Any]) -> ModelCard:
    """The card with the licence in the metadata of the one it replaces, if that was about the same base model."""
    same_base = earlier.get("base_model") == card.data.to_dict().get("base_model")
    return with_license(card, license_in(earlier)) if same_base else card


def with_metadata(card: ModelCard, metadata: dict[str, Any]) -> ModelCard:
    """The card with other metadata, in the order of huggingface_hub: the same ones always give the same text."""
    return ModelCard(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n{card.text}")
