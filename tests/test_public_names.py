"""Everything public is imported from the root, when it is first used."""

import importlib
import sys

import pytest
from run_programs import run_program

import llada_trm_hf


def test_every_name_is_found():
    assert all(getattr(llada_trm_hf, name) is not None for name in llada_trm_hf.__all__)
    assert set(llada_trm_hf.__all__) <= set(dir(llada_trm_hf))
    with pytest.raises(AttributeError, match="MaskedDifusionTrainer"):
        _ = llada_trm_hf.MaskedDifusionTrainer


@pytest.mark.parametrize("folder", llada_trm_hf._LAZY)
def test_the_root_lists_what_the_folders_export(folder):
    module = importlib.import_module(f"llada_trm_hf.{folder}")
    assert set(llada_trm_hf._LAZY[folder]) == set(module.__all__)
    for name in module.__all__:
        assert getattr(llada_trm_hf, name) is getattr(module, name)


def test_importing_the_package_imports_models_only():
    """Datasets, trainers and what draws are imported when one of their names is used."""
    program = """
import sys
import llada_trm_hf
from transformers import AutoConfig
assert AutoConfig.for_model("llada").vocab_size and AutoConfig.for_model("llada_moe").num_experts
heavy = {"datasets", "trl", "matplotlib", "llada_trm_hf.training", "llada_trm_hf.data", "llada_trm_hf.hub"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
from llada_trm_hf import MaskedDiffusionTrainer
assert "llada_trm_hf.training" in sys.modules
"""
    run_program([sys.executable, "-c", program], check=True)
