"""What models need on their way to and from the Hub."""

from ..storage import read_legacy_hidden_pairs
from .legacy import import_legacy

__all__ = ["import_legacy", "read_legacy_hidden_pairs"]
