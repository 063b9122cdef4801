"""Latent recursion for language models: LLaDA with a recursive refiner, in the Hugging Face ecosystem."""

from importlib.metadata import PackageNotFoundError, version

from . import hub, inspection
from .models import *  # noqa: F403
from .models import __all__ as _models

try:
    __version__ = version("llada-trm-hf")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.0.0"

__all__ = [*_models, "hub", "inspection"]
