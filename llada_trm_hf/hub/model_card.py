"""The model card of a checkpoint's folder. It says nothing that the folder does not."""

import html
import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..models.latent_thinking.thinking_chat_template import latent_thinking_template_files
from .license import LICENSE_FIELDS, license_of, with_license
from .training_record import TrainingRecord, read_json, read_training_record

TEMPLATE = str(Path(__file__).with_name("MODEL_CARD.md"))
CUSTOM_GENERATE_CARD = Path(__file__).with_name("CUSTOM_GENERATE_CARD.md")
LIBRARY = "llada-trm-hf"
# The metadata that a card is given here; others are a person's.
CARD_FIELDS = {
    *("base_model", "base_model_relation", "datasets", "library_name", "model-index", "model_name", "pipeline_tag"),
    *("tags", *LICENSE_FIELDS),
}


class _Kind(NamedTuple):
    name: str
    auto_class: str
    pipeline_tag: str
    tags: tuple[str, ...]


_HYBRID = _Kind("hybrid", "AutoModelForMaskedLM", "text-generation", ("masked-diffusion", "latent-recursion"))
_BACKBONE = _Kind("backbone", "AutoModelForMaskedLM", "text-generation", ("masked-diffusion",))
_ENCODER = _Kind("encoder", "AutoModel", "feature-extraction", ("masked-diffusion",))
_REFINER = _Kind("refiner", "AutoModel", "feature-extraction", ("latent-recursion",))
_THINKER = _Kind("thinker", "AutoModel", "feature-extraction", ("latent-recursion",))
_KINDS = {
    "llada_trm": _HYBRID,
    "latent_thinking": _Kind("latent_thinking", "AutoModelForCausalLM", "text-generation", ("latent-recursion",)),
    "dimension_compressor": _Kind("compressor", "AutoModel", "feature-extraction", ("hidden-states",)),
    "sequence_trm": _Kind("trm", "AutoModel", "feature-extraction", ("latent-recursion",)),
}


def model_card(
    folder: str | os.PathLike,
    repo_id: str,
    description: str | None = None,
    revision: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    tags: Iterable[str] | None = None,
) -> ModelCard:
    """
    The card of the model in `folder`, from the template `MODEL_CARD.md`, its config and what training left there.

    Args:
        folder: of `save_pretrained` or a trainer.
        repo_id: where the model will be; the code in the card loads it from there.
        description: your own paragraph.
        revision: the branch it will be on, if not the default one.
        base_model: the repository of the model it builds on; by default the one its config names.
        license: its identifier on the Hub, such as `apache-2.0`; by default that of the model it builds on, if that
            one's card is in its folder or in the cache.
        tags: more of them.

    Raises:
        FileNotFoundError, ValueError: without a config, and for a JSON file that holds no object.
    """
    config = read_config(folder)
    kind, record, refiner = _kind(config), read_training_record(folder), config.get("refiner_config", config)
    refiner = refiner.get("refiner_configs", [refiner])[0]  # several refiners have the same sizes
    base = base_model or _base_model(config)
    tokenizer = read_json(Path(folder, "tokenizer_config.json"))
    has_backbone, model_name = config.get("backbone_in_checkpoint", True), Path(repo_id).name
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag=kind.pipeline_tag,
            base_model=base,
            base_model_relation=None if has_backbone or not base else "adapter",
            datasets=[record.data["hub_name"]] if record.data.get("hub_name") else None,
            tags=[*kind.tags, str(config.get("model_type")), *(tags or ()), LIBRARY],
            model_name=model_name,
            eval_results=_eval_results(kind, record),
        ),
        template_path=TEMPLATE,
        quoted=partial(json.dumps, ensure_ascii=False),
        kind=kind.name,
        auto_class=kind.auto_class,
        model_name=_plain(model_name),
        repo_id=repo_id,
        revision=revision,
        description=description,
        config=config,
        base_name=f"`{_plain(base)}`" if base else None if has_backbone else "its backbone",
        has_backbone=has_backbone,
        refiner=refiner,
        tokenizer_name=repo_id if tokenizer else base,
        has_chat_template=bool(tokenizer.get("chat_template")) or Path(folder, "chat_template.jinja").is_file(),
        writes_thought=bool(latent_thinking_template_files(folder)),
        settings=_settings(record),
        results={_plain(name.replace("_", " ")): _number(value) for name, value in record.metrics.items()},
        results_step=record.metrics_step,
        weights_step=record.weights_step,
        results_data=_plain(_dataset(record.data, "eval_split") or ""),
    )
    fields = license_of(base_model) or license_of(config.get("backbone_name_or_path"))
    return with_license(card, {"license": license} if license else fields)


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The `config.json` of a checkpoint; a FileNotFoundError without one, a ValueError for anything but an object."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"There is no checkpoint {folder}.")
    config = read_json(Path(folder, "config.json"))
    if not config:
        raise FileNotFoundError(f"{folder} holds no model: there is no config.json.")
    return config


def _base_model(config: dict[str, Any]) -> str | None:
    """The repository of the model this one builds on; None if it is a local folder or unknown."""
    name = config.get("backbone_name_or_path")
    with suppress(HFValidationError):
        if name and not os.path.exists(name):
            validate_repo_id(name)
            return name
    return None


def _kind(config: dict[str, Any]) -> _Kind:
    model_type, auto_map = config.get("model_type"), config.get("auto_map", {"AutoModelForMaskedLM": ""})
    if model_type == "latent_thinking" and "AutoModel" in auto_map:
        return _THINKER
    if model_type in _KINDS:
        return _KINDS[model_type]
    if "vocab_size" not in config:  # your own refiners included
        return _REFINER
    return _BACKBONE if "AutoModelForMaskedLM" in auto_map else _ENCODER


def _settings(record: TrainingRecord) -> dict[str, str]:
    """The rows of the table of settings."""
    rows = {"data": _dataset(record.data, "split"), "steps": record.num_steps, "epochs": record.num_epochs}
    rows |= record.settings
    return {_plain(name.replace("_", " ")): _number(value) for name, value in rows.items() if value is not None}


def _dataset(data: dict[str, str], split: str) -> str | None:
    """Name and split of the dataset; None if either is unknown."""
    if not data.get("name") or not data.get(split):
        return None
    return f"{data.get('hub_name') or data['name']}, {data[split]}"


def _eval_results(kind: _Kind, record: TrainingRecord) -> list[EvalResult] | None:
    """The metrics of the weights that were saved; those of other weights are in the text only."""
    if record.metrics_step != record.weights_step or not _dataset(record.data, "eval_split"):
        return None
    return [
        EvalResult(
            task_type=kind.pipeline_tag,
            dataset_type=record.data.get("hub_name") or record.data["name"],
            dataset_name=record.data["name"],
            dataset_split=record.data["eval_split"],
            metric_type=name,
            metric_value=value,
        )
        for name, value in record.metrics.items()
        if math.isfinite(value)
    ] or None


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _plain(value)


def _plain(text: Any) -> str:
    """In one line, without meaning in Markdown's tables and in HTML: settings of a checkpoint may be anybody's."""
    return html.escape(" ".join(str(text).split()), quote=False).replace("|", "\\|").replace("`", "'")
