"""Files: written whole or not at all, by one run at a time, and read without executing what they hold."""

from .atomic import write_atomically
from .legacy_pickle import read_legacy_hidden_pairs, read_legacy_pickle
from .sole_run import output_dir_lock

__all__ = ["output_dir_lock", "read_legacy_hidden_pairs", "read_legacy_pickle", "write_atomically"]
