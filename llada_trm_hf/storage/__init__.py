"""Files: written whole or not at all, by one run at a time, and read without executing what they hold."""

from .atomic import write_atomically
from .legacy_pickle import read_legacy_hidden_pairs, read_legacy_pickle
from .sole_run import sole_run

__all__ = ["read_legacy_hidden_pairs", "read_legacy_pickle", "sole_run", "write_atomically"]
