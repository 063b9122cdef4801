"""Reinforcement learning of latent thoughts with TRL, which the extra `rl` installs."""

try:
    import trl  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ImportError("GRPO needs TRL: pip install 'llada-trm-hf[rl]'") from error

from .arguments import LatentGRPOTrainingArguments
from .grpo_trainer import LatentGRPOTrainer
from .rewards import correctness_reward

__all__ = ["LatentGRPOTrainer", "LatentGRPOTrainingArguments", "correctness_reward"]
