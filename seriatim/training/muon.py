"""Muon for the matrices of a model's trunk, with AdamW for all other parameters, as one optimiser.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". The update of a matrix is its momentum
made nearly orthogonal: all of its singular values are brought near 1. Its size is that of AdamW's updates (Liu et al.
2025, "Muon is scalable for LLM training"), so one learning rate and one weight decay serve both. The matrices may have
a rate of their own, because they often bear one that is several times as large.

Jordan's own code scales updates by max(1, O / I)^0.5 instead of 0.2 max(O, I)^0.5. A rate r there is r / (0.2 I^0.5)
here: 0.02 there is 0.006 here for matrices that take 256 numbers, and 0.003 for those that take 1024.

Shapes: a matrix is (O, I).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from seriatim.core.device import slow_in_bfloat16
from seriatim.core.errors import ConfigError
from seriatim.training.distributed import placed, whole

MOMENTUM = 0.95


class Orthogonal(torch.optim.Muon):
    """`torch.optim.Muon` for matrices that may be sharded, in float32 on a CPU without matrix products in bfloat16.

    PyTorch emulates such products there. Each process computes the whole update of a sharded matrix, and keeps its own
    part.
    """

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        example = self.param_groups[0]["params"][0]
        slow = slow_in_bfloat16(example.device)
        if not slow and whole(example) is example:
            return super().step(closure)
        assert closure is None, "no loop here hands the optimiser a closure"
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if "momentum_buffer" not in (state := self.state[parameter]):
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                mean = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                update = whole(parameter.grad.lerp(mean, momentum))
                update = orthogonal(update if slow else update.bfloat16(), group["ns_coefficients"], group["ns_steps"])
                parameter.mul_(1 - rate * group["weight_decay"])
                scale = 0.2 * max(parameter.shape) ** 0.5  # "match_rms_adamw"
                parameter.add_(placed(update.to(parameter.dtype), parameter), alpha=-rate * scale)
        return None


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """The matrix (O, I) with singular values near 1: X <- a X + (b A + c A^2) X with A = X X^T, `steps` times."""
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # A is then the smaller of both squares
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class MuonAndAdamW(Optimizer):
    """Both optimisers as one. They share `state` and the groups in `param_groups`, of which Muon's is the first.

    Muon's learning rate is that of AdamW times `relative_rate`, which its group keeps for whoever changes the rates.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        rest: list[dict[str, Any]],
        weight_decay: float,
        *,
        relative_rate: float = 1.0,
        **adamw: Any,
    ):
        group = {"params": matrices, "relative_rate": relative_rate}
        rate = adamw["lr"] * relative_rate
        made = Orthogonal([group], rate, weight_decay, MOMENTUM, nesterov=True, adjust_lr_fn="match_rms_adamw")
        self.both: tuple[Optimizer, Optimizer] = (made, AdamW(rest, **adamw))
        super().__init__([group for each in self.both for group in each.param_groups], {})
        self._share()

    def _share(self) -> None:
        first, *others = self.param_groups
        for each, groups in zip(self.both, ([first], others), strict=True):
            each.param_groups, each.state = groups, self.state

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # `load_state_dict` replaces groups and state
        self._share()

    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        assert closure is None, "no loop here hands the optimiser a closure"
        for each in self.both:
            each.step()
        return None


def trunk_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices of the backbone that are neither embeddings nor tables of positions.

    Embeddings are the tables and the layer that takes tokens (`token_embed`); tables of positions and mask tokens are
    parameters of the backbone itself, not of a layer inside it. Raises ConfigError if there is no such matrix.
    """
    backbone = model.get_submodule("backbone") if "backbone" in dict(model.named_children()) else nn.Module()
    found = []
    for name, parameter in backbone.named_parameters():
        layer = name.rpartition(".")[0]
        embeds = layer.split(".")[0] == "token_embed" or isinstance(backbone.get_submodule(layer), nn.Embedding)
        if layer and not embeds and parameter.ndim == 2 and parameter.requires_grad:
            found.append(parameter)
    if not found:
        raise ConfigError("training.optimiser: 'muon' needs a backbone with matrices, which it lacks; use adamw")
    return found
