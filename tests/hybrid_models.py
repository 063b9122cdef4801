"""What the tests of hybrids share."""

import copy

import torch
from conftest import MASK
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from llada_trm_hf import LLaDATRMForMaskedDiffusion

AUTO_CLASSES = [AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM, LLaDATRMForMaskedDiffusion]


def random_tokens(*shape, seed=0):
    return torch.randint(2, MASK, shape, generator=torch.Generator().manual_seed(seed))


def assert_same_model(loaded, model, input_ids):
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == tensor.dtype, name
    # A copy, because tensors of a memory-mapped file are not aligned, and other kernels round differently.
    found, expected = copy.deepcopy(loaded)(input_ids), model(input_ids)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.refinement_steps, expected.refinement_steps)
