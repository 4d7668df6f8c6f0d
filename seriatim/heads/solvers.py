"""Diffusion solvers, which turn noise into a token along the timesteps of a chain.

A solver is a function of the chain's tables, of `predict`, and of the noise. It calls `predict` once for each timestep,
from the last to the first, and ends without noise (alpha_bar = 1). `predict` includes guidance.

    ddpm        Ho et al. 2020: ancestral sampling, with noise of the learned variance at each step
    sde-dpm++   Lu et al. 2022, SDE-DPM-Solver++ 2M: multistep, of second order, with noise at each step
    ddim        Song et al. 2021, eta = 0: the probability flow ODE, of first order; an ODE has no temperature
    dpm++       Lu et al. 2022, DPM-Solver++ 2M: the same ODE, multistep, of second order

You can add your own solver with `SOLVERS["mine"] = mine`. If it solves an ODE, also set `ODES["mine"] = 0.7` (see
below); the head then starts it with `from_noise`.

Shapes: N tokens, D features, T timesteps. alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), lambda =
log(alpha / sigma).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from seriatim.core.errors import UsageError, check_known
from seriatim.heads.ddpm import Tables, log_variance, predict_x0

Predict = Callable[[int, Tensor], tuple[Tensor, Tensor]]  # index into the chain, x (N, D) -> eps (N, D), v (N, D)
Solver = Callable[[Tables, Predict, Tensor, Tensor, float | Tensor], Tensor]  # the temperature is a float or (N, 1)


def ddpm(chain: Tables, predict: Predict, start: Tensor, noise: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) with the learned variance: start (N, D), noise (T, N, D).

    The temperature scales the noise of each step but not the start, as published.
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
    """DDIM: x' = alpha' x_0 + sigma' eps (Song et al. 2021, eq. 12 with sigma_t = 0); start (N, D), noise unused."""
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

    x' = sigma'/sigma x - alpha' (e^-h - 1) D, where h = lambda' - lambda, D = (1 + 1/2r) x_0 - 1/2r x_0_previous, and
    r = h_previous / h. The first step has no previous step and the last step has h = inf, so both are of first order.
    """
    return _multistep(chain, predict, start)


def sde_dpm_plus_plus(
    chain: Tables, predict: Predict, start: Tensor, noise: Tensor, temperature: float | Tensor = 1.0
) -> Tensor:
    """SDE-DPM-Solver++ 2M (Lu et al. 2022): start (N, D), noise (T, N, D). The learned variance is not used.

    x' = sigma'/sigma e^-h x - alpha' (e^-2h - 1) D + sigma' sqrt(1 - e^-2h) noise, with h and D of `dpm_plus_plus`.
    With D = x_0 this would be `ddpm` with its lower variance; the second order keeps the spread of the samples with few
    steps.
    """
    return _multistep(chain, predict, start, noise, temperature)


def _multistep(
    chain: Tables, predict: Predict, start: Tensor, noise: Tensor | None = None, temperature: float | Tensor = 1.0
) -> Tensor:
    """The second-order multistep solver of the ODE, or of the SDE if `noise` is given."""
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
    """The first step of an ODE solver, from noise (N, D) at alpha = 0: the `predict` and the start for the solver.

    Starting with N(0, I) at the last timestep would omit the mean alpha E[x_0], and an ODE carries this error to the
    end. At alpha = 0 pure noise is the correct start, and eps is x itself, with or without guidance. A first-order step
    leads from there to x' = alpha x_0 + sigma eps at the last timestep, with x_0 predicted from the noise. The
    returned `predict` gives the solver's own first step the same x_0 and eps, so that the network runs only once.
    """
    last, sigma = len(chain) - 1, float(chain.sqrt_one_minus_alphas_cumprod[-1])
    eps, v = predict(last, noise)

    def onwards(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        return (noise, v) if i == last else predict(i, x)

    return onwards, (noise - sigma * eps) + sigma * noise  # alpha x_0 + sigma eps


SOLVERS: dict[str, Solver] = {"ddpm": ddpm, "sde-dpm++": sde_dpm_plus_plus, "ddim": ddim, "dpm++": dpm_plus_plus}

# The solvers that solve an ODE. They draw only their start, have no temperature, and visit the timesteps of
# `ddpm.ode_spread` with this share of lambda. On known mixtures, equal steps in t, equal steps in lambda and powers of
# t gave larger errors with dpm++ and 10 or 15 steps, in 2-D or in 16-D (docs/log.md).
ODES: dict[str, float] = {"ddim": 0.0, "dpm++": 0.7}

# The solvers that also visit timesteps of `ddpm.ode_spread`, but solve an SDE and draw noise for each step.
SDES: dict[str, float] = {"sde-dpm++": 0.5}


def check_solver(name: str, temperature: float | Tensor = 1.0) -> None:
    """Raise UsageError for an unknown solver, and for a temperature other than 1 with an ODE solver."""
    check_known(SOLVERS, solver=name)
    if name in ODES and (isinstance(temperature, Tensor) or temperature != 1.0):
        raise UsageError(
            f"temperature: {temperature} is not allowed; the {name} solver solves an ODE and has no temperature; "
            "use solver=ddpm, or set temperature=1"
        )
