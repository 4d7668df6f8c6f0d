"""The optimisers of generators by name, SGD for classifiers, and a weight average whose decay warms up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from seriatim.core.errors import ConfigError, nearest
from seriatim.core.schedules import ema_decay, learning_rate
from seriatim.training.config import Common
from seriatim.training.muon import MuonAndAdamW, trunk_matrices


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


def muon(model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float) -> MuonAndAdamW:
    """Muon for the matrices of the backbone, and AdamW for everything else."""
    matrices = trunk_matrices(model)
    taken = {id(parameter) for parameter in matrices}
    rest = parameter_groups(model, weight_decay)
    for group in rest:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in taken]
    return MuonAndAdamW(matrices, rest, weight_decay, lr=learning_rate, betas=betas, fused=is_fused(model))


def is_fused(model: nn.Module) -> bool | None:
    """True on CUDA and on CPUs, where a fused AdamW reads every tensor once; None leaves the choice to torch."""
    return True if next(model.parameters()).device.type in ("cpu", "cuda") else None


Maker = Callable[[nn.Module, float, tuple[float, float], float], torch.optim.Optimizer]
OPTIMISERS: dict[str, Maker] = {"adamw": adamw, "muon": muon}


def make_optimiser(
    name: str, model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """The optimiser `name` of OPTIMISERS for a model; raises ConfigError for an unknown name."""
    if name not in OPTIMISERS:
        raise ConfigError(f"training.optimiser: {name!r} is not known{nearest(name, OPTIMISERS)}")
    return OPTIMISERS[name](model, learning_rate, betas, weight_decay)


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
