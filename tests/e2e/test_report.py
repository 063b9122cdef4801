"""The README's figures are those of benchmarks/results."""

import subprocess
import sys

from conftest import ROOT


def test_the_readme_says_what_was_measured():
    command = [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"]
    assert subprocess.run(command).returncode == 0, "run python benchmarks/report.py"
