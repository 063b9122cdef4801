"""What models need on their way to and from the Hub."""

from .legacy import import_legacy, read_legacy_hidden_pairs

__all__ = ["import_legacy", "read_legacy_hidden_pairs"]
