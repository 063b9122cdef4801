"""Choosing what trains, by module name."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel


@dataclass
class TrainableReport:
    """How many parameters of a model train, and the names of the modules that hold them."""

    trainable: int
    total: int
    modules: list[str]

    @property
    def percent(self) -> float:
        return 100.0 * self.trainable / max(self.total, 1)

    def __str__(self) -> str:
        return f"trainable parameters: {self.trainable:,} of {self.total:,} ({self.percent:.2f}%)"


def last_layers(model: PreTrainedModel, number: int) -> list[str]:
    """Patterns for [`set_trainable`] of the last `number` transformer layers of `model`, or of a hybrid's backbone."""
    prefix = "backbone" if hasattr(model, "backbone") else ""
    transformer: PreTrainedModel = model.get_submodule(prefix)
    depth = transformer.config.get_text_config().num_hidden_layers
    if not 0 < number <= depth:
        raise ValueError(f"train_last_layers must be between 1 and the {depth} layers of the backbone, got {number}.")
    modules = transformer.named_modules(prefix=prefix)
    layers = next(name for name, module in modules if isinstance(module, nn.ModuleList) and len(module) == depth)
    return [f"{layers}.{layer}" for layer in range(depth - number, depth)]


def set_trainable(model: nn.Module, patterns: Sequence[str], train_layer_norms: bool = False) -> TrainableReport:
    """
    Freezes `model` except the modules whose names match, and prints how much trains.

    Args:
        patterns: names of modules or parameters, with `*`, `?` and `[...]` as in file names. A module includes all
            it contains: `["refiner"]`, `["backbone.model.layers.3*", "refiner"]`, `["*"]`.
        train_layer_norms: also train every normalisation layer.

    Raises:
        ValueError: for a pattern that matches nothing; lists the names that exist.
    """
    chosen: set[int] = set()
    for pattern in patterns:
        matched = [module for name, module in model.named_modules() if name and fnmatchcase(name, pattern)]
        parameters = [parameter for name, parameter in model.named_parameters() if fnmatchcase(name, pattern)]
        parameters += [parameter for module in matched for parameter in module.parameters()]
        if not parameters:
            names = [name for name, _ in model.named_modules() if name and name.count(".") < 2]
            raise ValueError(f"{pattern!r} matches no module of the model. It has: {', '.join(names)}.")
        chosen.update(map(id, parameters))
    if train_layer_norms:
        norms = (module for module in model.modules() if "Norm" in type(module).__name__)
        chosen.update(id(parameter) for norm in norms for parameter in norm.parameters(recurse=False))

    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    report = TrainableReport(
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in model.parameters()),
        modules=[n for n, m in model.named_modules() if any(p.requires_grad for p in m.parameters(recurse=False))],
    )
    print(report)
    return report
