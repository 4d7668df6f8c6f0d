"""Solvers: from noise to a token, along the timesteps of a chain.

Each is a function of the chain's tables, of `predict`, and of the draws; it asks `predict` once for each timestep, from
the last to the first, and ends without noise (alpha_bar = 1). Guidance is inside `predict`.

    ddpm        Ho et al. 2020: ancestral, noise at each step, of the learned variance
    sde-dpm++   Lu et al. 2022, SDE-DPM-Solver++ 2M: noise at each step too, second order, multistep
    ddim        Song et al. 2021, eta = 0: the probability flow ODE, first order; an ODE has no temperature
    dpm++       Lu et al. 2022, DPM-Solver++ 2M: the same ODE, second order, multistep

A solver of your own: `SOLVERS["mine"] = mine`, and, if it is an ODE's, `ODES["mine"] = 0.7`: the head then begins it
with `from_noise`.

Shapes: N tokens, D features, T timesteps. alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), lambda =
log(alpha / sigma).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from seriatim.core.errors import UsageError, nearest
from seriatim.heads.ddpm import Tables, log_variance, predict_x0

Predict = Callable[[int, Tensor], tuple[Tensor, Tensor]]  # index into the chain, x (N, D) -> eps (N, D), v (N, D)
Solver = Callable[[Tables, Predict, Tensor, Tensor, float | Tensor], Tensor]  # the temperature: one, or (N, 1)


def ddpm(chain: Tables, predict: Predict, start: Tensor, noise: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) with the learned variance: start (N, D), noise (T, N, D).

    The temperature scales the noise of each step, as published, and not that of the start.
    """
    T, x = len(chain), start
    for i in range(T - 1, -1, -1):
        eps, v = predict(i, x)
        x0 = predict_x0(chain, x, i, eps)
        x = chain.at("posterior_mean_coef1", i) * x0 + chain.at("posterior_mean_coef2", i) * x
        if i > 0:
            x = x + temperature * torch.exp(0.5 * log_variance(chain, i, v)) * noise[T - 1 - i]
    return x


def ddim(chain: Tables, predict: Predict, start: Tensor, _noise: Tensor, _temperature: float | Tensor = 1.0) -> Tensor:
    """x' = alpha' x_0 + sigma' eps (Song et al. 2021, eq. 12 with sigma_t = 0): start (N, D), noise unused."""
    alpha, sigma = chain.sqrt_alphas_cumprod, chain.sqrt_one_minus_alphas_cumprod
    x = start
    for i in range(len(chain) - 1, -1, -1):
        eps, _ = predict(i, x)
        x0 = predict_x0(chain, x, i, eps)
        x = float(alpha[i - 1]) * x0 + float(sigma[i - 1]) * eps if i > 0 else x0
    return x


def dpm_plus_plus(
    chain: Tables, predict: Predict, start: Tensor, _noise: Tensor, _temperature: float | Tensor = 1.0
) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095, algorithm 2): start (N, D), noise unused.

    x' = sigma'/sigma x - alpha' (e^-h - 1) D, h = lambda' - lambda, D = (1 + 1/2r) x_0 - 1/2r x_0 of the step before,
    r = h of the step before / h. The first step has none before it, the last has h = inf: both are of first order.
    """
    return _multistep(chain, predict, start)


def sde_dpm_plus_plus(
    chain: Tables, predict: Predict, start: Tensor, noise: Tensor, temperature: float | Tensor = 1.0
) -> Tensor:
    """SDE-DPM-Solver++ 2M (Lu et al. 2022): start (N, D), noise (T, N, D). The learned variance is not used.

    x' = sigma'/sigma e^-h x - alpha' (e^-2h - 1) D + sigma' sqrt(1 - e^-2h) noise, h and D as above. With D = x_0 it is
    `ddpm` with its lower variance: the second order is what spreads few steps as far as many.
    """
    return _multistep(chain, predict, start, noise, temperature)


def _multistep(
    chain: Tables, predict: Predict, start: Tensor, noise: Tensor | None = None, temperature: float | Tensor = 1.0
) -> Tensor:
    """The ODE's solver, or with noise the SDE's."""
    alpha, sigma = chain.sqrt_alphas_cumprod, chain.sqrt_one_minus_alphas_cumprod
    steps = -np.diff(np.log(alpha / sigma))  # (T-1,): h of the step from i+1 to i
    x, before = start, None
    for i in range(len(chain) - 1, -1, -1):
        eps, _ = predict(i, x)
        x0 = predict_x0(chain, x, i, eps)
        if i == 0:
            return x0
        h, D = steps[i - 1], x0
        if before is not None:
            r = steps[i] / h
            D = x0 + float(1 / (2 * r)) * (x0 - before)
        if noise is None:
            x = float(sigma[i - 1] / sigma[i]) * x - float(alpha[i - 1] * math.expm1(-h)) * D
        else:
            x = float(sigma[i - 1] / sigma[i] * math.exp(-h)) * x - float(alpha[i - 1] * math.expm1(-2 * h)) * D
            x = x + temperature * float(sigma[i - 1] * math.sqrt(-math.expm1(-2 * h))) * noise[len(chain) - 1 - i]
        before = x0
    raise AssertionError("a chain has at least one timestep")


def from_noise(chain: Tables, predict: Predict, noise: Tensor) -> tuple[Predict, Tensor]:
    """An ODE's first step, from alpha = 0 to the last timestep: noise (N, D) -> `predict` and start for the solver.

    N(0, I) at the last timestep lacks the mean alpha E[x_0], and an ODE keeps to the end what it lacks. At alpha = 0
    the noise lacks nothing, and eps is x itself, guided or not. A step of the first order leads from there to
    x' = alpha x_0 + sigma eps, with x_0 predicted from the noise at the last timestep. The solver's own first step
    takes that x_0 and eps again: nothing is predicted twice.
    """
    last, sigma = len(chain) - 1, float(chain.sqrt_one_minus_alphas_cumprod[-1])
    eps, v = predict(last, noise)

    def onwards(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        return (noise, v) if i == last else predict(i, x)

    return onwards, (noise - sigma * eps) + sigma * noise  # alpha x_0 + sigma eps


SOLVERS: dict[str, Solver] = {"ddpm": ddpm, "sde-dpm++": sde_dpm_plus_plus, "ddim": ddim, "dpm++": dpm_plus_plus}

# Those of SOLVERS that solve an ODE: they draw their start only, have no temperature, and visit the timesteps of
# `ddpm.ode_spread` with this share of lambda. On mixtures whose truth is known, equal steps in
# t, in lambda, and powers of t were farther from it with dpm++ and 10 or 15 steps, in 2-D or in 16-D (docs/log.md).
ODES: dict[str, float] = {"ddim": 0.0, "dpm++": 0.7}

# Those that visit such timesteps too, and are no ODE's: they draw noise for each step.
SDES: dict[str, float] = {"sde-dpm++": 0.5}


def check_solver(name: str, temperature: float | Tensor = 1.0) -> None:
    """Refuse a solver that is not known, and a temperature that it doesn't have."""
    if name not in SOLVERS:
        raise UsageError(f"solver: {name!r} is not known{nearest(name, SOLVERS)}")
    if name in ODES and (isinstance(temperature, Tensor) or temperature != 1.0):
        raise UsageError(
            f"temperature: {temperature} is not allowed; the {name} solver is an ODE and has none; "
            "use solver=ddpm, or set temperature=1"
        )
