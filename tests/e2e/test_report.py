"""The README's figures are those of benchmarks/results."""

import sys

from conftest import ROOT
from run_programs import run_program


def test_the_readme_says_what_was_measured():
    command = [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"]
    assert run_program(command).returncode == 0, "run python benchmarks/report.py"
