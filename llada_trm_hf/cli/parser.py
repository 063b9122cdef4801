"""Argument parsers whose errors are one line."""

import argparse
import sys
from typing import Any, NoReturn

from transformers import HfArgumentParser


class _OneLineErrors:
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (--help lists the options)", file=sys.stderr)  # type: ignore[attr-defined]
        raise SystemExit(2)


class CommandParser(_OneLineErrors, argparse.ArgumentParser):
    """For a command with options of its own."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)


class DataclassParser(_OneLineErrors, HfArgumentParser):
    """For a command whose options are the fields of dataclasses."""
