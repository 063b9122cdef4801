"""What the plain references of several refiners share, and the paddings they are compared under."""

import pytest
import torch

from llada_trm_hf.models.recursion_depth import RecursionDepth

MASKS = {
    "none": None,
    "left": torch.tensor([[0] * 4 + [1] * 7, [0] * 1 + [1] * 10, [1] * 11]),
    "right": torch.tensor([[1] * 7 + [0] * 4, [1] * 1 + [0] * 10, [1] * 11]),
    "holes": torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1], [1, 0] * 5 + [1], [1] * 11]),
}


def rotated(x):
    """RoPE of `x` `[T, heads, d]` as multiplication of complex numbers, whose imaginary parts are the second half."""
    length, _, size = x.shape
    angles = torch.arange(length, dtype=x.dtype)[:, None] / 10000 ** (torch.arange(0, size, 2, dtype=x.dtype) / size)
    turned = (
        torch.complex(x[..., : size // 2], x[..., size // 2 :]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.cat([turned.real, turned.imag], dim=-1)


# Recall, and steps without gradient before two or more with it, in training; None is not training.
WAYS = {"first version": (False, None), "recall": (True, None), "in training": (True, 0), "free steps": (True, 2)}
way = pytest.mark.parametrize("recall, free_steps", WAYS.values(), ids=WAYS.keys())


def fix_depth(monkeypatch, free_steps, steps=2):
    """Every forward pass takes so many steps without and with gradient."""
    depth = RecursionDepth(free_steps, steps)
    monkeypatch.setattr(RecursionDepth, "of", classmethod(lambda cls, refiner, max_steps: depth))
