"""The flow head is a rectified flow with the same small MLP as the diffusion head, but without its tables.

Liu et al. 2023 (Rectified Flow), Lipman et al. 2023 (Flow Matching): x_t = (1 - t) eps + t x, so that t = 0 is noise
and t = 1 is the token (Esser et al. 2024 count the other way). The network learns v = x - eps, and tokens are sampled
by integrating dx/dt = v(x_t, t, z) from t = 0 to 1. Unusual:
- the times in training are logit-normal (Esser et al. 2024, section 3.1): sigmoid of N(time_mean, time_std^2);
- guidance acts on v; there is no temperature, because sampling solves an ODE;
- there is a density, by the exact divergence of v (Chen et al. 2018), which costs D backward passes a step.

Shapes: N tokens, D features, C width of z, W width of the network, M draws of t for a token, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from seriatim.core.errors import UsageError, check_least, nearest
from seriatim.core.keys import Keys
from seriatim.heads.base import Guidance, HeadLoss
from seriatim.heads.denoiser import AdaLNHead
from seriatim.nn.linear import at_least_float32

TIME_SCALE = 100.0  # the network's input is 100 t; with 1000 t samples are no better, and the density needs more steps
LARGEST = 32  # the largest D for which `log_prob` is supported, because it costs D backward passes
MOST_STEPS = 10_000
DENSITY_STEPS = 32  # Runge-Kutta steps in `log_prob`

Velocity = Callable[[int, Tensor], Tensor]  # index of a time, x (N, D) -> v (N, D)


@dataclass(frozen=True)
class FlowOptions:
    """The options for solving the ODE from noise to a token."""

    num_diffusion_steps: Annotated[int, "Steps from noise to a token; heun runs the network twice in each step."] = 100
    solver: Annotated[str, "The solver: euler or heun."] = "euler"


@dataclass(frozen=True)
class FlowPlan:
    """The embeddings of the times that sampling visits."""

    options: FlowOptions
    times: Tensor  # (S, W)


class Flow(AdaLNHead):
    """p(x | z) by a velocity field, with d blocks of width W and `draws` times for each token of a training step."""

    tempers = False
    has_density = True  # False for more than LARGEST features
    Options = FlowOptions

    def __init__(
        self,
        dim: int,  # D
        width: int = 1024,  # W
        depth: int = 6,  # d
        *,
        draws: int = 4,  # M, the times drawn for each token of a training step
        time_mean: float = 0.0,  # the mean of logit(t); values above 0 train more often near the token
        time_std: float = 1.0,
        z_dim: int | None = None,  # C; None means that the model sets it
    ) -> None:
        if not math.isfinite(time_mean):
            raise UsageError(f"time_mean: {time_mean!r} is not allowed; it must be finite")
        if not 0 < time_std < math.inf:
            raise UsageError(f"time_std: {time_std!r} is not allowed; it must be above 0 and finite")
        super().__init__(dim, width, depth, draws, outputs=dim)
        self.time_mean, self.time_std, self.has_density = time_mean, time_std, dim <= LARGEST
        self.config = {"dim": dim, "width": width, "depth": depth, "draws": draws}
        self.config |= {"time_mean": time_mean, "time_std": time_std}
        if z_dim is not None:
            self.bind(z_dim)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """v (N, D), predicted from x (N, D) at times t (N,) in [0, 1] and z (N, C)."""
        y = self.embed_times(t) + self.z_embed(z)  # (N, W)
        return self.predict(x, y)

    def embed_times(self, t: Tensor) -> Tensor:
        """The embeddings (N, W) of times t (N,) in [0, 1]."""
        return self.embed(TIME_SCALE * t)

    def loss(self, z: Tensor, target: Tensor, keys: Keys) -> HeadLoss:
        """The loss per token, summed over M draws, of z (N, C) and target (N, D): mean over D of (v - v_hat)^2."""
        N, D = target.shape
        M = self.draws
        normal, eps = (at_least_float32(draw, z) for draw in (keys.fold("t").normal(M), keys.fold("eps").normal(M, D)))
        t = torch.sigmoid(self.time_mean + self.time_std * normal).T.reshape(M * N)  # draw by draw
        eps = eps.transpose(0, 1).reshape(M * N, D)
        x = at_least_float32(target, z).repeat(M, 1)  # (M N, D)
        y = self.embed_times(t) + self.z_embed(z).repeat(M, 1)  # (M N, W)
        v = at_least_float32(self.predict(torch.lerp(eps, x, t[:, None]), y))
        mse = (x - eps - v).square().mean(dim=-1).view(M, N).sum(dim=0)  # (N,), Liu et al., eq. 1
        return HeadLoss(mse, torch.full_like(mse, M))

    # --- sampling -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def plan(self, options: FlowOptions | None = None, device: torch.device | str = "cpu") -> FlowPlan:
        options = self.options() if options is None else options
        return FlowPlan(options, self.times(options.num_diffusion_steps, device))

    def times(self, steps: int, device: torch.device | str, backwards: bool = False) -> Tensor:
        """The embeddings of the times of `steps` equal steps, ordered for `walk`: the first visited time is last."""
        times = TIME_SCALE * np.arange(steps + 1) / steps  # in float64, which not every device has
        visited = torch.from_numpy(times if backwards else times[::-1].copy()).float().to(device)
        with torch.autocast(visited.device.type, enabled=False):
            return self.embed(visited)

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        keys: Keys,
        plan: FlowPlan | None = None,
        z_null: Tensor | None = None,
        guidance: Guidance | None = None,
        temperature: float | Tensor = 1.0,
    ) -> Tensor:
        """Sampled tokens (N, D)."""
        plan = self.plan(device=z.device) if plan is None else plan
        self.check_sampling(z_null, guidance, temperature)
        N = len(z)
        start = keys.fold("noise").normal(self.output)  # (N, D)
        with torch.autocast(z.device.type, enabled=False):
            rows = z.float() if guidance is None or z_null is None else torch.cat([z, z_null]).float()
            at = self._visits(plan.times, rows)

            def velocity(i: int, x: Tensor) -> Tensor:
                v = self.network(x if guidance is None else torch.cat([x, x]), at(i))
                return v if guidance is None else v[N:] + guidance.column * (v[:N] - v[N:])

            return FLOW_SOLVERS[plan.options.solver](velocity, start, plan.options.num_diffusion_steps)

    def check_options(self, options: FlowOptions, temperature: float = 1.0) -> None:
        super().check_options(options, temperature)
        steps, solver = options.num_diffusion_steps, options.solver
        if not 1 <= steps <= MOST_STEPS:
            raise UsageError(f"num_diffusion_steps: {steps!r} is not allowed; it must be from 1 to {MOST_STEPS:,}")
        if solver not in FLOW_SOLVERS:
            raise UsageError(f"solver: {solver!r} is not known to the Flow head{nearest(solver, FLOW_SOLVERS)}")

    def _visits(self, times: Tensor, z: Tensor) -> Callable[[int], Sequence[Sequence[Tensor]]]:
        """A function that returns the modulations of all rows at the i-th visited time, for `times` (S, W).

        It must be called with i in ascending order from 0; it may be called repeatedly with the same i.
        """
        walk = self.walk(times, self.z_embed(z))
        now: list[tuple[int, list[list[Tensor]]]] = [(-1, [])]

        def at(i: int) -> list[list[Tensor]]:
            if now[0][0] != i:
                now[0] = i, next(walk)[1]
            return now[0][1]

        return at

    # --- density --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_prob(self, z: Tensor, target: Tensor, steps: int = DENSITY_STEPS) -> Tensor:
        """log p(target | z) in nats, without guidance: (N,), for z (N, C) and target (N, D), with D at most LARGEST.

        log p(x_1) = log N(x_0; 0, I) - int_0^1 tr(dv/dx) dt along dx/dt = v (Chen et al. 2018, eq. 8). The integral
        runs from t = 1 back to 0 by fourth-order Runge-Kutta in `steps` equal steps, with an exact trace. The error is
        O(steps^-4): with 32 steps, at most 1e-3 nats on heads trained on known mixtures (docs/heads.md).
        """
        D = self.output
        if D > LARGEST:
            raise UsageError(f"log_prob: the Flow head has {D} features; its density is defined for at most {LARGEST}")
        check_least(1, steps=steps)
        with torch.autocast(z.device.type, enabled=False):
            at = self._visits(self.times(2 * steps, z.device, backwards=True), at_least_float32(z))

            def slope(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
                return velocity_and_divergence(lambda x: self.network(x, at(i)), x)

            x, divergence = runge_kutta_back(slope, at_least_float32(target, z), steps)
        return -0.5 * x.square().sum(dim=1) - 0.5 * D * math.log(2 * math.pi) - divergence


# --- solvers: from x at t = 0 to x at t = 1; they call `velocity` for the times 0, 1 / steps, ..., in this order ------


def euler(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """The Euler method, of first order: x' = x + h v(x, t)."""
    for i in range(steps):
        x = x + velocity(i, x) / steps
    return x


def heun(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """Heun's method, of second order: x' = x + h/2 (v(x, t) + v(x + h v(x, t), t + h))."""
    for i in range(steps):
        v = velocity(i, x)
        x = x + (v + velocity(i + 1, x + v / steps)) / (2 * steps)
    return x


FLOW_SOLVERS: dict[str, Callable[[Velocity, Tensor, int], Tensor]] = {"euler": euler, "heun": heun}


def velocity_and_divergence(field: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """v(x) (N, D) and the exact tr(dv/dx) (N,), by one backward pass for each feature; rows must be independent."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = field(x)
        diagonal = [
            torch.autograd.grad(v[:, d].sum(), x, retain_graph=d + 1 < x.shape[1])[0][:, d] for d in range(x.shape[1])
        ]
    return v.detach(), torch.stack(diagonal).sum(dim=0)


def runge_kutta_back(
    slope: Callable[[int, Tensor], tuple[Tensor, Tensor]], x: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """x at t = 0 and the integral of the divergence, from x at t = 1; `slope(i, x)` is at t = 1 - i / (2 steps)."""
    h, total = 1 / steps, x.new_zeros(len(x))
    for i in range(0, 2 * steps, 2):
        k1, d1 = slope(i, x)
        k2, d2 = slope(i + 1, x - h / 2 * k1)
        k3, d3 = slope(i + 1, x - h / 2 * k2)
        k4, d4 = slope(i + 2, x - h * k3)
        x = x - h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return x, total
