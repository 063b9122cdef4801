"""
Prints the lowest versions that setup.py claims, those of all extras together, for `pip install -c`:

    python scripts/lowest_versions.py > lowest.txt

What has no lowest version, and what is only needed indirectly, is left to pip.
"""

import sys
from distutils.core import run_setup  # of setuptools
from pathlib import Path

import setuptools  # noqa: F401


def lowest_versions(requirements: list[str]) -> dict[str, str]:
    """By name; ValueError for two claims about one package, or a claim that is no plain `name>=version`."""
    lowest: dict[str, str] = {}
    for requirement in requirements:
        name, _, version = requirement.partition(">=")
        if not version and name.replace("-", "").replace("_", "").isalnum():
            continue
        if not version.replace(".", "").isdigit():
            raise ValueError(f"setup.py: expected name or name>=version, got {requirement!r}.")
        if lowest.setdefault(name, version) != version:
            raise ValueError(f"setup.py claims {name}>={lowest[name]} in one place and {requirement} in another.")
    return lowest


def main() -> None:
    setup = run_setup(str(Path(__file__).resolve().parents[1] / "setup.py"), stop_after="init")
    requirements = [*setup.install_requires]
    for extra in setup.extras_require.values():
        requirements += extra
    for name, version in lowest_versions(requirements).items():
        sys.stdout.write(f"{name}=={version}\n")


if __name__ == "__main__":
    main()
