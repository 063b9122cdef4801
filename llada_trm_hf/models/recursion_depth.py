"""How many recursion steps a model takes: a random number without gradient in training, then those with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .hub_model import check_at_least_one


class FreeStepsConfig(PreTrainedConfig):
    """
    Base of the configs of models whose depth in training is random, see [`draw_free_steps`]. ValueError for a number
    out of range.
    """

    max_free_steps: int = 0
    free_steps_probability: float = 0.5

    def __post_init__(self, **kwargs):
        if self.max_free_steps < 0:
            raise ValueError(f"max_free_steps must be 0 or more, got {self.max_free_steps}.")
        if not 0 <= self.free_steps_probability <= 1:
            raise ValueError(f"free_steps_probability must be between 0 and 1, got {self.free_steps_probability}.")
        super().__post_init__(**kwargs)


def draw_free_steps(config: FreeStepsConfig) -> int:
    """
    Steps without gradient before those with: from 1 to `max_free_steps` in a share `free_steps_probability` of the
    calls, else 0; drawn on the host by torch's generator. In a compiled graph there are none.

    Models that always train at one depth get worse with more steps than that; with a random number of steps without
    gradient before those with (the progressive loss of Deep Thinking, arXiv 2202.05826), they learn to stay where they
    have arrived, but learn slowly. A mixture of batches with and without such steps has both.
    """
    if torch.compiler.is_compiling() or not config.max_free_steps:
        return 0
    if torch.rand(()).item() < config.free_steps_probability:
        return int(torch.randint(1, config.max_free_steps + 1, ()).item())
    return 0


@contextmanager
def free_steps(device: torch.device) -> Iterator[None]:
    """
    Inside, there are no gradients. Autocast keeps the weights it has cast; older torch releases (issue 112583) would
    use those it casts here, without gradients, for the steps that follow.
    """
    with torch.no_grad():
        yield
    if torch.is_grad_enabled() and torch.is_autocast_enabled(device.type):
        torch.clear_autocast_cache()


class RecursionDepth(NamedTuple):
    """
    How many recursion steps a refiner's forward pass takes.

    Attributes:
        free: steps without gradient.
        steps: the steps after them, with gradient in grad mode.
    """

    free: int
    steps: int

    @classmethod
    def of(cls, refiner: PreTrainedModel, max_steps: int | None) -> "RecursionDepth":
        """
        For a refiner whose config has `trained_steps`, `max_free_steps` and `free_steps_probability`, and not
        `recall=False`. In training `trained_steps` (or `max_steps`), after those of [`draw_free_steps`]. Else
        `max_steps`, `config.max_recursive_steps` by default.
        """
        config = refiner.config
        if not refiner.training or not getattr(config, "recall", True):
            return cls(0, config.max_recursive_steps if max_steps is None else max_steps)
        return cls(draw_free_steps(config), config.trained_steps if max_steps is None else max_steps)


class RecursionDepthConfig(FreeStepsConfig):
    """Base of the configs of refiners whose depth in training is random, see [`RecursionDepth`]."""

    trained_steps: int = 4
    max_free_steps: int = 8

    def __post_init__(self, **kwargs):
        check_at_least_one(self, "trained_steps")
        super().__post_init__(**kwargs)


class RecallConfig(RecursionDepthConfig):
    """
    Base of the configs of refiners that were first made without recall: with it, they read their input again in every
    step, and their depth in training is random. Without, they train at one depth.
    """

    recall: bool = False
