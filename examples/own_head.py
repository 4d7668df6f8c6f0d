"""A head of your own inside ARINAR's recursion: python examples/own_head.py --steps 300"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

import seriatim
from seriatim.core.keys import Keys
from seriatim.heads.base import Head, HeadLoss, column
from seriatim.models.build import build_head
from seriatim.testing import check_head, known_density


class Laplace(Head):
    """p(x | z) = exp(-|x - place| / width) / (2 width), feature by feature."""

    guides = False  # refused by name, where guidance is asked for
    has_density = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.output, self.config = dim, {"dim": dim}

    def bind(self, z_dim: int) -> None:  # whoever is around tells the width of z
        if self.z_dim is None:
            self.final = nn.Linear(z_dim, 2 * self.output)
        super().bind(z_dim)

    def log_prob(self, z: Tensor, target: Tensor) -> Tensor:
        place, log_width = self.final(z).float().chunk(2, dim=1)  # (N, D) each
        return (-(target - place).abs() / log_width.exp() - log_width - 0.693147).sum(dim=1)  # ln 2

    def loss(self, z: Tensor, target: Tensor, keys: Keys) -> HeadLoss:  # this one draws nothing from the keys
        return HeadLoss(-self.log_prob(z, target), z.new_ones(len(z)))  # a sum for each token, and of how many draws

    @torch.no_grad()
    def sample(
        self, z: Tensor, keys: Keys, plan: Any = None, z_null: Any = None, guidance: Any = None, temperature: Any = 1.0
    ) -> Tensor:
        self.check_sampling(z_null, guidance, temperature)  # refuses what this head can't do
        place, log_width = self.final(z).float().chunk(2, dim=1)
        u = keys.uniform(self.output) - 0.5  # (N, D); who draws twice folds first: keys.fold("other").uniform()
        return place - column(temperature) * log_width.exp() * u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.4999999))


seriatim.HEADS["laplace"] = Laplace
check_head(Laplace, learn=False)
inner = {"kind": "causal", "width": 32, "depth": 1, "heads": 4, "head": {"kind": "laplace"}}
head = build_head({"kind": "nested", "split": {"kind": "features"}, "model": inner}, dim=3, vocab=None, z_dim=6)
optimiser = torch.optim.Adam(head.parameters(), lr=3e-3)
for step in range(int(sys.argv[-1]) if len(sys.argv) > 1 else 300):
    keys = Keys.of(step).fold(torch.arange(128))
    z = keys.fold("z").normal(6)
    loss = head.loss(z, known_density(z, keys, 3), keys).sum.mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
print(f"{loss.item() / 3:.2f} nats of each feature, given those before it")
