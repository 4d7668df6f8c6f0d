"""The double's ancestral sampler: Ho et al. 2020, algorithm 2, with the learned variance of Nichol & Dhariwal 2021."""

import numpy as np
import torch


class SpacedDiffusion:
    def __init__(self, use_timesteps, betas, model_mean_type, model_var_type, loss_type):
        self.timesteps = sorted(use_timesteps)
        abar = np.cumprod(1 - betas)[self.timesteps]
        before = np.append(1.0, abar[:-1])
        self.abar, self.before, self.betas = abar, before, 1 - abar / before
        variance = self.betas * (1 - before) / (1 - abar)
        self.low, self.high = np.log(np.append(variance[1], variance[1:])), np.log(self.betas)

    def walk(self, network, x, temperature):
        """From noise x (N, D) to tokens (N, D); normal numbers in each step, the last ones without effect."""
        for i in reversed(range(len(self.timesteps))):
            eps, v = network(x, torch.full((len(x),), self.timesteps[i]).cuda())
            abar, before, beta = float(self.abar[i]), float(self.before[i]), float(self.betas[i])
            x0 = x * (1 / abar) ** 0.5 - eps * (1 / abar - 1) ** 0.5
            mean = (beta * before**0.5 * x0 + (1 - before) * (1 - beta) ** 0.5 * x) / (1 - abar)
            share = (v + 1) / 2
            deviation = torch.exp(0.5 * (share * float(self.high[i]) + (1 - share) * float(self.low[i])))
            x = mean + (i > 0) * temperature * deviation * torch.randn_like(x)
        return x
