"""The table of capabilities has every class and every column's tests."""

import importlib.util
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests/models"))
import common
import common_generation
import test_every_model as suite
from sharded_training import MODES, NAMES
from test_hub_model import CASES


@pytest.fixture(scope="module")
def capabilities():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        spec = importlib.util.spec_from_file_location("capabilities", ROOT / "benchmarks/capabilities.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def test_every_class_and_test_is_in_the_table(capabilities):
    testers, trained, published = zip(*capabilities.ROWS.values())
    assert set(testers) == {name for name in vars(suite) if name.startswith("Test")}
    assert {name for name in trained if name} | {"head"} == set(NAMES)
    assert set(published) <= set(CASES)
    assert set(capabilities.SHARED_COLUMNS.values()) == set(MODES)
    known = {*dir(common.ModelTesterMixin), *dir(common_generation.GenerationTesterMixin)}
    for tests in capabilities.COLUMNS.values():
        assert {f"test_{test}" for test in tests} <= known


def test_the_page_is_of_this_table(capabilities):
    page = capabilities.PAGE.read_text(encoding="utf-8")
    for title in (*capabilities.ROWS, *capabilities.COLUMNS, *capabilities.SHARED_COLUMNS):
        assert f"| {title} |" in page, title
    assert capabilities.FAILED not in page
