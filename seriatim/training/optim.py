"""The optimisers of generators by name, SGD for classifiers, and a weight average whose decay warms up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from seriatim.core.construct import arguments, checked_types
from seriatim.core.errors import ConfigError, nearest, shown
from seriatim.core.schedules import ema_decay, learning_rate
from seriatim.training.config import Common
from seriatim.training.muon import MuonAndAdamW, trunk_matrices

WHERE = "training.optimiser"  # the key of a recipe that errors name


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of parameters, with and without weight decay.

    Vectors (norms and biases) and everything in the head are not decayed (Li et al. 2024, official training code). The
    rest is, including embeddings and positions.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free_of_decay = parameter.ndim <= 1 or name.startswith("head.")
            (free if free_of_decay else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def adamw(model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=is_fused(model))


def muon(
    model: nn.Module,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    *,
    matrix_rate: float | None = None,  # the learning rate of Muon; None means that of everything else
) -> MuonAndAdamW:
    """Muon for the matrices of the backbone, and AdamW for everything else.

    Both rates follow the same schedule.
    """
    if matrix_rate is not None and not 0 < matrix_rate < math.inf:
        raise ConfigError(f"{WHERE}.matrix_rate: {matrix_rate!r} is not allowed; it must be above 0 and finite")
    relative_rate = 1.0 if matrix_rate is None else matrix_rate / learning_rate
    matrices = trunk_matrices(model)
    taken = {id(parameter) for parameter in matrices}
    rest = parameter_groups(model, weight_decay)
    for group in rest:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in taken]
    return MuonAndAdamW(
        matrices,
        rest,
        weight_decay,
        relative_rate=relative_rate,
        lr=learning_rate,
        betas=betas,
        fused=is_fused(model),
    )


def is_fused(model: nn.Module) -> bool | None:
    """True on CUDA and on CPUs, where a fused AdamW reads every tensor once; None leaves the choice to torch."""
    return True if next(model.parameters()).device.type in ("cpu", "cuda") else None


# A maker is called with a model, the learning rate, the betas and the weight decay, and with its options by name.
Maker = Callable[..., torch.optim.Optimizer]
OPTIMISERS: dict[str, Maker] = {"adamw": adamw, "muon": muon}
SHARED = 4  # arguments that every maker has; those after them are the options of its own


def make_optimiser(
    chosen: str | Mapping[str, Any],
    model: nn.Module,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimiser of a model: a name in OPTIMISERS, or a mapping of its `kind`, that name, and options of its own.

    Raises ConfigError for an unknown name or option.
    """
    options = {"kind": chosen} if isinstance(chosen, str) else dict(chosen)
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in OPTIMISERS:
        raise ConfigError(f"{WHERE}: {shown(kind)} is not known{nearest(str(kind)[:100], OPTIMISERS)}")
    maker = OPTIMISERS[kind]
    allowed = list(arguments(maker))[SHARED:]
    for name in options:
        if name not in allowed:
            raise ConfigError(f"{WHERE}: {kind} has no option {shown(name)}{nearest(str(name)[:100], allowed)}")
    return maker(model, learning_rate, betas, weight_decay, **checked_types(maker, options, WHERE))


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group of parameters; one with `relative_rate` has so many times the rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("relative_rate", 1.0)


def rate_after(settings: Common, seen: int, total: int) -> float:
    """The learning rate of the step after which `seen` of `total` images were seen."""
    return settings.learning_rate * learning_rate(seen, total, settings.warmup_images, settings.schedule)


def sgd(model: nn.Module, learning_rate: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with Nesterov's momentum; vectors (norms and biases) are not decayed."""
    groups = parameter_groups(model, weight_decay)
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=True)


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of the weights. Its decay warms up; call `update_parameters` after each step."""

    @torch.no_grad()
    def update(average: Any, current: Any, _: Tensor | int) -> None:
        # The number of updates that torch hands over is on the device of the weights; this one is on the host.
        torch._foreach_lerp_(average, current, 1 - ema_decay(int(made.n_averaged), decay))

    made = AveragedModel(model, multi_avg_fn=update)
    return made
