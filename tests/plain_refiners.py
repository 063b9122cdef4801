"""What the plain references of several refiners share, and the paddings they are compared under."""

import torch

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
