"""The double's head: draws with torch's own generator; guided, two rows for each token."""

import torch
from diffusion import respace
from diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from torch import nn

from seriatim.core.random import Noise
from seriatim.heads.ddpm import spread


class DiffLoss(nn.Module):
    def __init__(self, net, target_channels, num_sampling_steps):
        super().__init__()
        self.net, self.in_channels = net, target_channels
        self.gen_diffusion = respace.SpacedDiffusion(
            use_timesteps=spread(int(num_sampling_steps), 999),
            betas=get_named_beta_schedule("cosine", 1000),
            model_mean_type=ModelMeanType.EPSILON,
            model_var_type=ModelVarType.LEARNED_RANGE,
            loss_type=LossType.MSE,
        )

    def loss(self, z, target):
        """z (N, C), target (N, D) -> (N,), with torch's own random numbers."""
        found = self.net.loss(z, target, Noise.shared(int(torch.randint(1 << 30, ())), len(z)))
        return found.sum / found.count

    def sample(self, z, temperature=1.0, cfg=1.0):
        """z (N, C), or (2 N, C) where guided -> tokens of as many rows."""
        guided = cfg != 1.0
        start = torch.randn(len(z) // 2 if guided else len(z), self.in_channels).cuda()

        def network(x, t):
            if not guided:
                return self.net(x, t, z)
            half = x[: len(start)]
            eps, v = self.net(torch.cat([half, half]), t, z)
            eps_c, eps_u = eps.chunk(2)
            eps = eps_u + cfg * (eps_c - eps_u)
            return torch.cat([eps, eps]), v

        return self.gen_diffusion.walk(network, torch.cat([start, start]) if guided else start, temperature)
