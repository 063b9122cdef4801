"""The rules of the house: what may import what. Read from the source, so a lazy import counts too."""

import ast
import sys
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "llada_trm_hf"
FLOORS = {
    "models": 0,
    "generation": 0,
    "hub": 1,
    "inspection": 1,
    "data": 1,
    "hidden_pairs": 2,
    "training": 2,
    "evaluation": 3,
    "rl": 3,
    "recipes": 4,
    "cli": 5,
}
GROUND_FLOOR = [name for name, floor in FLOORS.items() if floor == 0]


def module_name(path, package):
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, package):
    """Every import of a file, as the full dotted names of the modules it names, and the AST node."""
    module = module_name(path, package)
    here = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            target = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            for alias in node.names:
                # `from package import module` names the module, `from module import name` the module before it.
                inner = package.parent.joinpath(*target.split("."), alias.name)
                is_module = inner.with_suffix(".py").exists() or (inner / "__init__.py").exists()
                yield (f"{target}.{alias.name}" if is_module else target), node


def import_graph(package):
    """For each module of the package, the modules of the package it imports."""
    files = {module_name(path, package): path for path in package.rglob("*.py")}
    return {
        module: {target for target, _ in imports(path, package) if target.split(".")[0] == package.name}
        for module, path in files.items()
    }


def floor_violations(package):
    violations = []
    for module, targets in import_graph(package).items():
        parts = module.split(".")
        for target in targets:
            # The package itself stands on top of all its floors.
            here, there = (FLOORS[p[1]] if len(p) > 1 else len(FLOORS) for p in (parts, target.split(".")))
            if there > here:
                violations.append(f"{module} imports {target}")
    return sorted(violations)


def import_cycle(graph):
    """A circle of modules, or nothing."""
    done = set()

    def visit(module, path):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for target in sorted(graph.get(module, ())):
            circle = visit(target, [*path, module])
            if circle:
                return circle
        done.add(module)
        return None

    return next((circle for module in sorted(graph) if (circle := visit(module, []))), None)


def export_violations(package):
    """What would keep the files of the ground floor from travelling to the Hub as one flat folder."""
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    files = [
        path for folder in GROUND_FLOOR for path in (package / folder).rglob("*.py") if path.name != "__init__.py"
    ]
    names = Counter(path.name for path in files)
    violations = [f"{name} is the name of {number} files" for name, number in names.items() if number > 1]
    for path in files:
        for target, node in imports(path, package):
            if isinstance(node, ast.Import) or not node.level:
                ok = target.split(".")[0] in allowed
            else:
                parts = target.split(".")
                ok = node.module is not None and parts[1] in GROUND_FLOOR
                ok = ok and package.parent.joinpath(*parts).with_suffix(".py") in files
            if not ok:
                violations.append(f"{path.name}: {ast.unparse(node)}")
    return violations


def test_floors():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(FLOORS)
    assert floor_violations(PACKAGE) == []


def test_no_import_cycle():
    graph = import_graph(PACKAGE)
    assert len(graph) > 20 and sum(map(len, graph.values())) > 40
    assert import_cycle(graph) is None


def test_ground_floor_is_exportable():
    assert export_violations(PACKAGE) == []


def test_files_hold_a_concept_each():
    lengths = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines())
        for path in PACKAGE.rglob("*.py")
        # (`registered_models.py` lists classes: with a checkpoint, another list takes its place.)
        if path.name not in ("__init__.py", "__main__.py", "registered_models.py")
    }
    assert {name: length for name, length in lengths.items() if not 40 <= length <= 450} == {}
    assert len(lengths) <= 120


@pytest.fixture
def house(tmp_path):
    """A package that keeps the rules, to be broken."""
    package = tmp_path / "llada_trm_hf"
    for name in ("models/family", "generation", "data", "training"):
        (package / name).mkdir(parents=True)
    (package / "__init__.py").write_text("from .models import Model\n")
    (package / "models/__init__.py").write_text("from .family.modeling import Model\n")
    (package / "models/family/modeling.py").write_text(
        "import json\nimport torch.nn as nn\n"
        "from ...generation.sampler import Sampler\nfrom ..configuration import Config\n"
    )
    (package / "generation/sampler.py").write_text("import torch\n")
    (package / "models/configuration.py").write_text("from transformers import PreTrainedConfig\n")
    (package / "data/__init__.py").write_text("from ..models import Model\n")
    (package / "training/__init__.py").write_text(
        "from ..data import x\nfrom llada_trm_hf.models.family.modeling import Model\n"
    )
    return package


def test_the_rules_hold_where_they_are_kept(house):
    assert floor_violations(house) == [] and import_cycle(import_graph(house)) is None
    assert export_violations(house) == []


@pytest.mark.parametrize(
    "line",
    [
        "import numpy",
        "from tqdm import tqdm",
        "def f():\n    import datasets",
        "from ...data import x",
        "from llada_trm_hf.models.configuration import Config",
        "import llada_trm_hf",
        "from .. import configuration",
        "from ..layers.norm import Norm",
        "from .missing import x",
    ],
)
def test_broken_export_rule_is_found(house, line):
    (house / "models/family/modeling.py").write_text(line)
    assert len(export_violations(house)) == 1


def test_two_files_of_one_name_are_found(house):
    (house / "generation/modeling.py").write_text("import torch\n")
    assert export_violations(house) == ["modeling.py is the name of 2 files"]


@pytest.mark.parametrize(
    "file, line, found",
    [
        (
            "models/configuration.py",
            "from ..data import x",
            "llada_trm_hf.models.configuration imports llada_trm_hf.data",
        ),
        ("data/__init__.py", "from .. import training", "llada_trm_hf.data imports llada_trm_hf.training"),
        ("data/__init__.py", "import llada_trm_hf.training", "llada_trm_hf.data imports llada_trm_hf.training"),
        ("data/__init__.py", "def f():\n    import llada_trm_hf", "llada_trm_hf.data imports llada_trm_hf"),
    ],
)
def test_broken_floor_is_found(house, file, line, found):
    (house / file).write_text(line)
    assert floor_violations(house) == [found]


def test_import_cycle_is_found(house):
    (house / "models/configuration.py").write_text("def f():\n    from .family.modeling import Model\n")
    assert set(import_cycle(import_graph(house))) == {
        f"llada_trm_hf.models.{name}" for name in ("configuration", "family.modeling")
    }
