"""A head, an order and a guidance schedule of your own, usable by every verb of the command line:

seriatim train mar-digits model.head='{kind: laplace}' --plugin examples/own_plugin.py --out runs/laplace
seriatim sample runs/laplace --order columns --sharpness 2 --plugin examples/own_plugin.py
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

import seriatim
from seriatim.core.keys import Keys
from seriatim.heads.base import Head, HeadLoss, column


class Laplace(Head):
    """p(x | z) = exp(-|x - place| / width) / (2 width), feature by feature; guided by moving the place."""

    @dataclass(frozen=True)
    class Options:
        sharpness: Annotated[float, "How many times narrower than learned the distribution is drawn."] = 1.0

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.output, self.config = dim, {"dim": dim}

    def bind(self, z_dim: int) -> None:
        if self.z_dim is None:
            self.final = nn.Linear(z_dim, 2 * self.output)
        super().bind(z_dim)

    def loss(self, z: Tensor, target: Tensor, keys: Keys) -> HeadLoss:
        place, log_width = self.final(z).float().chunk(2, dim=1)  # (N, D) each
        return HeadLoss(((target - place).abs() / log_width.exp() + log_width).sum(dim=1), z.new_ones(len(z)))

    @torch.no_grad()
    def sample(
        self, z: Tensor, keys: Keys, plan: Any = None, z_null: Any = None, guidance: Any = None, temperature: Any = 1.0
    ) -> Tensor:
        options = self.options() if plan is None else plan.options
        place, log_width = self.final(z).float().chunk(2, dim=1)
        if guidance is not None:
            null = self.final(z_null).float().chunk(2, dim=1)[0]
            place = null + guidance.column * (place - null)
        u = keys.uniform(self.output) - 0.5  # (N, D)
        noise = u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.4999999))
        return place - column(temperature) / options.sharpness * log_width.exp() * noise


seriatim.HEADS["laplace"] = Laplace
seriatim.ORDERS["columns"] = lambda h, w: [row * w + column for column in range(w) for row in range(h)]
seriatim.GUIDANCE_SCHEDULES["late"] = lambda scale, unknown, tokens: scale if 2 * unknown < tokens else 1.0
