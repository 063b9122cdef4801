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
    torch's Muon, orthogonalising in float32: torch does it in bfloat16, which most CPUs only emulate, about ten times
    as slow for the small matrices that are trained there. Updates are scaled as by its `match_rms_adamw`.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                momentum = state["momentum_buffer"]
                momentum.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                update = orthogonalize(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(0.2 * max(parameter.shape) ** 0.5 * group["lr"] * update)


def orthogonalize(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float
) -> torch.Tensor:
    """`matrix` `[M, N]` with singular values near 1, by the Newton-Schulz iteration of Muon."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    result = (matrix.mT if tall else matrix).float()
    result = result / result.norm().clamp(min=epsilon)
    for _ in range(steps):
        gram = result @ result.mT
        result = torch.addmm(result, torch.addmm(gram, gram, gram, beta=b, alpha=c), result, beta=a)
    return (result.mT if tall else result).to(matrix.dtype)


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
