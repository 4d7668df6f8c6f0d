"""The tables of a discrete diffusion: Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (cosine, learned range, respacing).

There are T timesteps 0..T-1, and alpha_bar_t = prod (1 - beta_s). All tables are float64 of shape (T,); they are cast
to float32 when they are looked up.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seriatim.core.errors import UsageError

Array = npt.NDArray[np.float64]

STABLE_START = 980  # see `respaced`
STABLE_START_ODE = 965
STABLE_START_FEW = 950
FEW_STEPS = 10


class Tables:
    """The tables that a reverse step needs, for the timesteps of a chain with the given betas (T,)."""

    def __init__(self, betas: Array, timesteps: npt.NDArray[np.int64] | None = None) -> None:
        """`timesteps` are those of the full chain, ascending, which the network takes; None means all of them."""
        abar: Array = np.cumprod(1.0 - betas, dtype=np.float64)
        previous = np.append(1.0, abar[:-1])
        variance = betas * (1.0 - previous) / (1.0 - abar)
        self.timesteps = np.arange(len(betas)) if timesteps is None else timesteps
        self.betas, self.log_betas = betas, np.log(betas)
        self.alphas_cumprod = abar
        self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod = np.sqrt(abar), np.sqrt(1.0 - abar)
        self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / abar), np.sqrt(1.0 / abar - 1)
        self.posterior_mean_coef1 = betas * np.sqrt(previous) / (1.0 - abar)  # of x_0 (Ho et al., eq. 7)
        self.posterior_mean_coef2 = (1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - abar)  # of x_t
        self.posterior_variance = variance
        # The last reverse step has variance 0, so its logarithm is replaced by that of the step before.
        clipped = np.append(variance[1], variance[1:]) if len(betas) > 1 else betas
        self.posterior_log_variance_clipped = np.log(clipped)

    def __len__(self) -> int:
        return len(self.betas)

    @overload
    def at(self, name: str, t: Tensor) -> Tensor: ...

    @overload
    def at(self, name: str, t: int) -> float: ...

    @overload
    def at(self, name: str, t: Tensor | int) -> Tensor | float: ...

    def at(self, name: str, t: Tensor | int) -> Tensor | float:
        """Table `name` at the timesteps t, in float32, on t's device, with a last axis for features: (*t, 1).

        If t is an int, the result is a float, so that a loop over steps does not access the device.
        """
        if isinstance(t, int):
            return float(getattr(self, name)[t])
        return _on_device(self, name, t.device)[t][..., None]


@lru_cache(maxsize=4096)
def _on_device(tables: Tables, name: str, device: torch.device) -> Tensor:
    """Table `name` as a float32 tensor (T,), which is cached for each device."""
    return torch.from_numpy(getattr(tables, name)).to(device, torch.float32)


@lru_cache(maxsize=8)
def full_chain(steps: int = 1000) -> Tables:
    """beta_t = min(1 - abar(t+1)/abar(t), 0.999), abar(u) = cos^2((u + 0.008)/1.008 pi/2) (Nichol & Dhariwal, 17)."""
    abar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return Tables(np.array([min(1 - after / before, 0.999) for before, after in pairwise(abar)]))


def spread(count: int, start: int) -> list[int]:
    """`count` equally spaced timesteps from 0 to `start`, rounded half to even, ascending.

    With start = T - 1 these are the timesteps of the official respacing. A single step is at `start`.
    """
    if count == 1:
        return [start]
    stride = start / (count - 1)
    steps, position = [], 0.0
    for _ in range(count):  # adding instead of multiplying reproduces the published rounding
        steps.append(round(position))
        position += stride
    return steps


def ode_spread(count: int, start: int, share: float, chain: Tables) -> list[int]:
    """`count` different timesteps up to `start`, ascending, for all solvers except `ddpm`.

    They lie `share` of the way from equal steps in t to equal steps in lambda = log(alpha / sigma), and are rounded.
    The lowest one is half a step above 0.
    """
    u = (np.arange(count) + 0.5) / (count - 0.5)  # (count,), the last one is 1
    minus_lambda = 0.5 * np.log(1.0 / chain.alphas_cumprod - 1.0)  # (T,), ascending
    there = minus_lambda[0] + (minus_lambda[start] - minus_lambda[0]) * u
    in_lambda = np.interp(there, minus_lambda, np.arange(len(chain)))
    steps = [round(t) for t in ((1 - share) * start * u + share * in_lambda).tolist()]
    for i in range(1, count):
        steps[i] = max(steps[i], steps[i - 1] + 1)
    for i in range(count - 1, -1, -1):  # moves timesteps back that the loop above has moved beyond `start`
        steps[i] = min(steps[i], start - (count - 1 - i))
    return steps


@lru_cache(maxsize=512)  # annealing the number of steps over the image uses dozens of chains
def respaced(count: int, start: int | None = None, steps: int = 1000, ode_share: float | None = None) -> Tables:
    """The chain restricted to `count` timesteps up to `start`; raises UsageError.

    The timesteps are those of `spread`, or of `ode_spread` if `ode_share` is given. The default start is 980 of a chain
    of 1000 steps, or 950 for at most 10 steps: at t = 999 the first reverse step multiplies an error of the network by
    316 (100 steps) to 3493 (10 steps). Starting from N(0, 1) at 980 costs no quality, because alpha_bar there is below
    1e-3. An ODE first takes a step from pure noise (`solvers.from_noise`), so it may start lower, at 965, where an
    error of x_0 is half as large; `sde-dpm++` works equally well from either.
    """
    stable = STABLE_START_FEW if count <= FEW_STEPS else STABLE_START if ode_share is None else STABLE_START_ODE
    first = min(steps - 1, round(stable * steps / 1000)) if start is None else start
    if not 0 <= first < steps:
        raise UsageError(f"start_timestep: {start!r} is not allowed; it must be from 0 to {steps - 1}")
    if not 1 <= count <= first + 1:
        raise UsageError(f"num_diffusion_steps: {count!r} is not allowed; it must be from 1 to {first + 1}")
    full = full_chain(steps)
    return restricted(full, spread(count, first) if ode_share is None else ode_spread(count, first, ode_share, full))


def restricted(chain: Tables, timesteps: list[int]) -> Tables:
    """The chain restricted to the given timesteps (ascending): beta_i = 1 - abar_i / abar_{i-1}."""
    abar = chain.alphas_cumprod[timesteps]
    betas = 1.0 - abar / np.append(1.0, abar[:-1])
    return Tables(betas, np.array(timesteps))


def predict_x0(chain: Tables, x_t: Tensor, t: Tensor | int, eps: Tensor) -> Tensor:
    """x_0 = x_t / sqrt(abar_t) - eps sqrt(1/abar_t - 1) (Ho et al. 2020, eq. 9 solved for x_0)."""
    return chain.at("sqrt_recip_alphas_cumprod", t) * x_t - chain.at("sqrt_recipm1_alphas_cumprod", t) * eps


def log_variance(chain: Tables, t: Tensor | int, v: Tensor) -> Tensor:
    """log sigma^2 = f log beta_t + (1 - f) log beta~_t, f = (v + 1)/2, not clipped (Nichol & Dhariwal 2021, eq. 15)."""
    low, high = chain.at("posterior_log_variance_clipped", t), chain.at("log_betas", t)
    f = (v + 1) / 2
    return f * high + (1 - f) * low
