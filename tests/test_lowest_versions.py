"""What `make lowest` installs is what setup.py and the README claim."""

import sys

import pytest
from conftest import ROOT
from run_programs import run_program

sys.path.insert(0, str(ROOT / "scripts"))
from lowest_versions import lowest_versions


def test_the_readme_claims_what_is_tested():
    command = [sys.executable, str(ROOT / "scripts/lowest_versions.py")]
    lines = run_program(command, check=True).stdout.splitlines()
    lowest = dict(line.split("==") for line in lines)
    assert {"torch", "transformers", "trl", "lm-eval", "onnxruntime", "matplotlib", "pytest"} <= lowest.keys()
    readme = (ROOT / "README.md").read_text()
    for name in ("torch", "transformers"):
        assert f"{name} >= {lowest[name]}" in readme


def test_claims_that_cannot_be_installed_together():
    assert lowest_versions(["torch>=2.10", "types-tqdm", "torch>=2.10"]) == {"torch": "2.10"}
    with pytest.raises(ValueError, match=r"torch>=2.10 in one place and torch>=2.9"):
        lowest_versions(["torch>=2.10", "torch>=2.9"])
    with pytest.raises(ValueError, match=r"expected name or name>=version, got 'torch<3'"):
        lowest_versions(["torch<3"])
