"""Muon for the matrices of the hidden layers and AdamW for all other parameters, as one optimizer."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from .arguments import MaskedDiffusionTrainingArguments


class MuonWithAdamW(Optimizer):
    """
    Two optimizers over different parameters, which the Trainer, accelerate and schedulers drive as one: it holds the
    parameter groups of both, AdamW's first, and the state of both.
    """

    def __init__(self, adamw: Optimizer, muon: Optimizer):
        self.adamw, self.muon = adamw, muon
        super().__init__([*adamw.param_groups, *muon.param_groups], {})
        self._share()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.adamw.step()
        self.muon.step()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called at the end of `load_state_dict`, which has replaced groups and state."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        number = len(self.adamw.param_groups)
        self.adamw.param_groups, self.muon.param_groups = self.param_groups[:number], self.param_groups[number:]
        self.adamw.state = self.muon.state = self.state


class CPUMuon(torch.optim.Muon):
    """
    torch's Muon with its Newton-Schulz steps in float32 or better. torch takes them in bfloat16, fast on a GPU, but on
    a CPU without bfloat16 instructions a step of small matrices takes eleven times as long. Updates have the size of
    AdamW's, whatever `adjust_lr_fn` says.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every matrix that has a gradient; there is no `closure`."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            parameters: list[torch.Tensor] = []
            gradients: list[torch.Tensor] = []
            averages: list[torch.Tensor] = []
            self._init_group(group, parameters, gradients, averages)
            for parameter, gradient, average in zip(parameters, gradients, averages):
                average.lerp_(gradient, 1 - momentum)
                update = gradient.lerp(average, momentum) if group["nesterov"] else average
                update = orthogonalized(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                parameter.mul_(1 - lr * group["weight_decay"])
                # (torch's "match_rms_adamw")
                parameter.add_(update, alpha=-lr * 0.2 * max(parameter.shape) ** 0.5)


def orthogonalized(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """
    `matrix` `[A, B]` with all its singular values moved to about 1, by `steps` Newton-Schulz steps of a polynomial of
    degree five with these coefficients (https://kellerjordan.github.io/posts/muon).
    """
    first, third, fifth = coefficients
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide.to(torch.promote_types(wide.dtype, torch.float32))
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=third, alpha=fifth), wide, beta=first)
    return (wide if matrix.shape[0] <= matrix.shape[1] else wide.T).to(matrix.dtype)


def hidden_matrices(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """
    The trainable parameters Muon is meant for, by name: the matrices of linear layers between embeddings and LM head.
    (The experts of a mixture are stacked, `[E, D, D']`, and not included.)
    """
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    outer.add(id(model.get_output_embeddings().weight))
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim == 2 and id(parameter) in linear - outer
    }


def muon_with_adamw(
    model: PreTrainedModel,
    args: MaskedDiffusionTrainingArguments,
    decayed: list[str],
    adamw: type[Optimizer],
    adamw_settings: dict[str, Any],
) -> MuonWithAdamW:
    """
    An optimizer for the parameters of `model` that train. Muon's updates are scaled to the size of AdamW's (arXiv
    2502.16982, equation 4), so that the same learning rate and weight decay work for both.

    Args:
        decayed: names of the parameters with weight decay.
        adamw, adamw_settings: the optimizer of the parameters that are not `hidden_matrices`.
    """
    matrices = hidden_matrices(model)
    if not matrices:
        raise ValueError("use_muon: no matrix of a hidden layer trains; leave it out.")
    rest = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in matrices}
    groups = [
        {"params": [p for n, p in rest.items() if n in decayed], "weight_decay": args.weight_decay},
        {"params": [p for n, p in rest.items() if n not in decayed], "weight_decay": 0.0},
    ]
    on_cpu = all(matrix.device.type == "cpu" for matrix in matrices.values())
    muon = (CPUMuon if on_cpu else torch.optim.Muon)(
        matrices.values(),
        lr=args.learning_rate if args.muon_learning_rate is None else args.muon_learning_rate,
        weight_decay=args.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonWithAdamW(adamw(groups, **adamw_settings), muon)
