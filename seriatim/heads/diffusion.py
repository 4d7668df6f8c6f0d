"""The diffusion head of MAR, in which a small MLP denoises one token, conditioned on z.

Li et al. 2024, section 3.2 and 3.3: p(x | z) is the distribution of samples of a DDPM reverse process. The loss is
E || eps - eps_theta(x_t | t, z) ||^2 (eq. 1) plus a variational term that trains only the variance (Nichol & Dhariwal
2021). Unusual:
- t and z are added and modulate every block (adaLN); there is no attention, so each row is a token of its own;
- guidance acts only on eps; the variance is that of the conditional row;
- sampling starts below the last timestep (`ddpm.respaced`) and always runs in float32, by one of `solvers.py`.

Shapes: N tokens, D features, C width of z, W width of the network, d blocks, T steps, M draws of t for a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from seriatim.core.errors import UsageError, check_least
from seriatim.core.keys import Keys
from seriatim.heads.base import Guidance, HeadLoss, column
from seriatim.heads.ddpm import Tables, full_chain, log_variance, predict_x0, respaced, restricted
from seriatim.heads.denoiser import AdaLNHead
from seriatim.heads.solvers import ODES, SDES, SOLVERS, Predict, check_solver, from_noise
from seriatim.nn.linear import at_least_float32


@dataclass(frozen=True)
class DiffusionOptions:
    """The options for denoising a token."""

    num_diffusion_steps: Annotated[int, "Denoising steps for each token."] = 100
    start_timestep: Annotated[
        int | None, "The timestep where denoising starts; 999 is the published one. None means a more stable start."
    ] = None
    timesteps: Annotated[
        Sequence[int] | None, "All timesteps, ascending; they replace num_diffusion_steps and start_timestep."
    ] = None
    solver: Annotated[str, "The solver: ddpm, sde-dpm++, ddim or dpm++."] = "ddpm"


@dataclass(frozen=True)
class DiffusionPlan:
    """The tables of the timesteps that sampling visits, and the embeddings of these timesteps."""

    options: DiffusionOptions
    chain: Tables  # S steps
    times: Tensor  # (S, W)


class Diffusion(AdaLNHead):
    """p(x | z) by denoising, with d blocks of width W and `draws` timesteps for each token of a training step."""

    Options = DiffusionOptions

    def __init__(
        self,
        dim: int,  # D
        width: int = 1024,  # W
        depth: int = 6,  # d
        *,
        draws: int = 4,  # M, the timesteps drawn for each token of a training step
        train_steps: int = 1000,  # the length of the full chain
        z_dim: int | None = None,  # C; None means that the model sets it
    ) -> None:
        super().__init__(dim, width, depth, draws, outputs=2 * dim)  # eps, and v, which interpolates the variance
        check_least(2, train_steps=train_steps)
        self.train_steps = train_steps
        self.config = {"dim": dim, "width": width, "depth": depth, "draws": draws, "train_steps": train_steps}
        if z_dim is not None:
            self.bind(z_dim)

    # --- the network ----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """eps (N, D) and v (N, D), predicted from x (N, D) at timesteps t (N,) of the full chain and z (N, C)."""
        y = self.embed_times(t) + self.z_embed(z)  # (N, W)
        eps, v = self.predict(x, y).chunk(2, dim=-1)
        return eps, v

    def embed_times(self, t: Tensor) -> Tensor:
        """The embeddings (N, W) of timesteps (N,) of the full chain; with many rows, each timestep is computed once."""
        if len(t) < self.train_steps:
            return self.embed(t)
        every = torch.arange(self.train_steps, device=t.device)
        return F.embedding(t, self.embed(every))

    # --- training -------------------------------------------------------------------------------------------------

    def loss(self, z: Tensor, target: Tensor, keys: Keys) -> HeadLoss:
        """The loss per token, summed over M draws: mean over D of (eps - eps_hat)^2, plus vb.

        z is (N, C) and target (N, D).
        """
        N, D = target.shape
        M, chain = self.draws, full_chain(self.train_steps)
        t = keys.fold("t").integers(self.train_steps, M).T.reshape(M * N)  # (M N,), draw by draw
        eps = keys.fold("eps").normal(M, D).transpose(0, 1).reshape(M * N, D)
        x0 = at_least_float32(target, z).repeat(M, 1)  # (M N, D)
        x_t = chain.at("sqrt_alphas_cumprod", t) * x0 + chain.at("sqrt_one_minus_alphas_cumprod", t) * eps
        y = self.embed_times(t) + self.z_embed(z).repeat(M, 1)  # (M N, W)
        eps_hat, v = at_least_float32(self.predict(x_t, y)).chunk(2, dim=-1)
        mse = (eps - eps_hat).square().mean(dim=-1)  # (M N,), eq. 1
        vb = variational_bound(chain, x0, x_t, t, eps_hat.detach(), v)  # (M N,), trains v only
        mse, vb = mse.view(M, N).sum(dim=0), vb.view(M, N).sum(dim=0)
        return HeadLoss(mse + vb, torch.full_like(mse, M), {"mse": mse, "vb": vb})

    # --- sampling -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def plan(self, options: DiffusionOptions | None = None, device: torch.device | str = "cpu") -> DiffusionPlan:
        options = self.options() if options is None else options
        chain = self.chain(options)
        times = torch.from_numpy(chain.timesteps).to(device, torch.float32)
        with torch.autocast(times.device.type, enabled=False):
            return DiffusionPlan(options, chain, self.embed(times))

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        keys: Keys,
        plan: DiffusionPlan | None = None,
        z_null: Tensor | None = None,
        guidance: Guidance | None = None,
        temperature: float | Tensor = 1.0,
    ) -> Tensor:
        """Sampled tokens (N, D). The temperature scales the noise of each step; ODE solvers have no such noise."""
        plan = self.plan(device=z.device) if plan is None else plan
        options, chain, solver = plan.options, plan.chain, plan.options.solver
        self.check_sampling(z_null, guidance, temperature)
        check_solver(solver, temperature)
        N, D = len(z), self.output
        # (T+1, N, D): the start, then the noise of each step. An ODE solver needs only the start: (1, N, D).
        draws = keys.fold("noise").normal(1 if solver in ODES else len(chain) + 1, D).transpose(0, 1).contiguous()
        if N == 0:
            return draws[0]
        with torch.autocast(z.device.type, enabled=False):
            rows = z.float() if guidance is None or z_null is None else torch.cat([z, z_null]).float()
            scale = None if guidance is None else guidance.scale[:, None]  # (N, 1)
            walk = self.walk(plan.times, self.z_embed(rows))

            def predict(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
                at, modulations = next(walk)
                assert at == i, f"the {solver} solver asked for timestep {i} of the chain, not for {at}"
                eps, v = self.network(x if scale is None else torch.cat([x, x]), modulations).chunk(2, dim=-1)
                if scale is not None:
                    eps_null = eps[N:]
                    eps, v = eps_null + scale * (eps[:N] - eps_null), v[:N]
                return eps, v

            begin: tuple[Predict, Tensor] = (predict, draws[0])
            # The published start, and timesteps that the caller gives, are used unchanged.
            if solver in ODES and options.timesteps is None and options.start_timestep != self.train_steps - 1:
                begin = from_noise(chain, predict, draws[0])
            return SOLVERS[solver](chain, *begin, draws[1:], column(temperature))

    def chain(self, options: DiffusionOptions) -> Tables:
        """The tables of the timesteps that sampling visits; raises UsageError for steps outside the full chain."""
        if options.timesteps is None:
            share = (ODES | SDES).get(options.solver)
            return respaced(options.num_diffusion_steps, options.start_timestep, self.train_steps, share)
        steps = list(options.timesteps)
        ascending = all(a < b for a, b in pairwise(steps))
        if not steps or not ascending or not 0 <= steps[0] <= steps[-1] < self.train_steps:
            raise UsageError(f"timesteps: must ascend from 0 or more to at most {self.train_steps - 1}")
        return restricted(full_chain(self.train_steps), steps)

    def check_options(self, options: DiffusionOptions, temperature: float = 1.0) -> None:
        super().check_options(options, temperature)
        check_solver(options.solver, temperature)
        self.chain(options)


# --- formulas -----------------------------------------------------------------------------------------------------


def variational_bound(chain: Tables, x0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor, v: Tensor) -> Tensor:
    """The term of the variational bound at t, in bits per feature: (N,).

    For t > 0 it is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at t = 0 it is the negative log-likelihood of x_0 in
    bins of width 2/255. These are the bins of 8-bit images; they are kept for tokens because they are published so.
    """
    mean = chain.at("posterior_mean_coef1", t) * x0 + chain.at("posterior_mean_coef2", t) * x_t
    guess = chain.at("posterior_mean_coef1", t) * predict_x0(chain, x_t, t, eps)
    guess = guess + chain.at("posterior_mean_coef2", t) * x_t
    log_var = log_variance(chain, t, v)
    true_log_var = chain.at("posterior_log_variance_clipped", t)
    kl = normal_kl(mean, true_log_var, guess, log_var)  # (N, D)
    nll = -binned_log_likelihood(x0, guess, 0.5 * log_var)
    return torch.where(t[:, None] == 0, nll, kl).mean(dim=-1) / math.log(2.0)


def normal_kl(mean: Tensor, log_var: Tensor, mean_p: Tensor, log_var_p: Tensor) -> Tensor:
    """The elementwise KL(N(mean, e^log_var) || N(mean_p, e^log_var_p)) in nats."""
    difference = log_var - log_var_p
    return 0.5 * (-1.0 - difference + difference.exp() + (mean - mean_p).square() * torch.exp(-log_var_p))


def binned_log_likelihood(
    x: Tensor, mean: Tensor, log_std: Tensor, half: float = 1 / 255, edge: float = 0.999
) -> Tensor:
    """The log probability of the bins [x - half, x + half] under a Gaussian; the outermost bins extend to infinity."""
    centred, inverse = x - mean, torch.exp(-log_std)
    upper = normal_cdf(inverse * (centred + half))
    lower = normal_cdf(inverse * (centred - half))
    tiny = 1e-12
    inside = (upper - lower).clamp(min=tiny).log()
    low_end, high_end = upper.clamp(min=tiny).log(), (1 - lower).clamp(min=tiny).log()
    return torch.where(x < -edge, low_end, torch.where(x > edge, high_end, inside))


def normal_cdf(x: Tensor) -> Tensor:
    """The published tanh approximation of the Gaussian CDF: 0.5 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
