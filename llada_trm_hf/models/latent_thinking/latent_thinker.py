"""The thinker: compressor, SequenceTRM and projector, from the hidden states of a prompt to input embeddings."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from ..hub_model import HubModel
from ..recursion_depth import draw_free_steps
from .configuration_latent_thinking import LatentThinkingConfig
from .dimension_compressor import DimensionCompressor
from .sequence_trm import SequenceTRM


@dataclass
class LatentThought(ModelOutput):
    """
    Args:
        latents: `[B, num_latents, D]`, input embeddings.
        halt_probability: `[B]`, after the last step.
        num_steps: LongTensor `[B]`, supervision steps taken.
    """

    latents: torch.Tensor = None  # type: ignore[assignment]
    halt_probability: torch.Tensor = None  # type: ignore[assignment]
    num_steps: torch.Tensor = None  # type: ignore[assignment]


class LatentThinker(HubModel, PreTrainedModel):
    """
    Hidden states `[B, L, D]` are compressed to `[B, L, D']`, the SequenceTRM reasons over them to a prediction
    `[B, D']`, and a linear map makes `num_latents` input embeddings of it.

    In training it takes `trm_config.n_supervision_steps` steps and never halts; in a share of the batches a random
    number of further ones (`trm_config.max_free_steps`), against getting worse with more at inference. Gradients reach
    all three parts, the context through the compressor too, by the last `trm_config.n_trained_recursions` latent
    recursions of the last step (with one, the approximation of the TRM paper), not the halting head: what it learned
    in distillation stays. At inference each sample halts on its own, after `config.max_reasoning_steps` at the latest.
    """

    config: LatentThinkingConfig
    config_class = LatentThinkingConfig
    base_model_prefix = ""
    main_input_name = "hidden_states"
    auto_classes = ("AutoModel",)

    def __init__(
        self,
        config: LatentThinkingConfig,
        compressor: DimensionCompressor | None = None,
        trm: SequenceTRM | None = None,
    ):
        super().__init__(config)
        self.compressor = DimensionCompressor(config.compressor_config) if compressor is None else compressor
        self.trm = SequenceTRM(config.trm_config) if trm is None else trm
        size, width = config.trm_config.hidden_size, config.compressor_config.hidden_size
        # Predictions differ in length from model to model; embeddings should not.
        self.norm = nn.RMSNorm(size, eps=1e-5, elementwise_affine=False)
        self.projector = nn.Linear(size, config.num_latents * width)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.projector:
            init.normal_(module.weight, std=0.02 / module.in_features**0.5)
            init.zeros_(module.bias)

    @torch.no_grad()
    def project_decompressed(self, scale: float) -> None:
        """
        Sets the projector so that each latent is the decompressed prediction, of root mean square `scale` like the
        word embeddings: where the SequenceTRM predicts a last-layer state, that takes the place of a token, as in
        Coconut (arXiv 2412.06769).
        """
        weight = self.compressor.weight  # [D', D]
        decompress = weight.T * (scale * weight.shape[1] ** 0.5 / weight.norm())
        self.projector.weight.copy_(decompress.repeat(self.config.num_latents, 1))
        init.zeros_(self.projector.bias)

    @can_return_tuple
    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, max_steps: int | None = None
    ) -> LatentThought:
        """
        Args:
            hidden_states: `[B, L, D]`, last-layer states of the prompt, in any float dtype.
            mask: `[B, L]`, 0 for what is not to be read.
            max_steps: at inference, instead of `config.max_reasoning_steps`.
        """
        config = self.config
        context = self.compressor.compress(hidden_states)  # [B, L, D']
        if self.training:
            steps = config.trm_config.n_supervision_steps + draw_free_steps(config.trm_config)
            thought = self.trm.reason(context, mask, steps, halt_threshold=1.0)
        else:
            thought = self.trm.reason(
                context,
                mask,
                config.max_reasoning_steps if max_steps is None else max_steps,
                config.halt_threshold,
                config.num_trajectories,
                config.noise_std,
                select_by=config.select_by,
                convergence_threshold=config.convergence_threshold,
            )
        latents = self.projector(self.norm(thought.prediction))  # [B, num_latents * D]
        return LatentThought(
            latents=latents.unflatten(-1, (config.num_latents, -1)),
            halt_probability=thought.halt_probability,
            num_steps=thought.num_steps,
        )
