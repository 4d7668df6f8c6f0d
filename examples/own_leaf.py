"""A leaf head of your own, inside ARINAR's recursion: one feature as a Laplace distribution of its own place and width.

    python examples/own_leaf.py --steps 300

A nested head asks little of a leaf: z in, one part out, with a density if it has one.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

import seriatim
from seriatim.core.random import Noise
from seriatim.heads import Head, HeadLoss, Nested
from seriatim.testing import check_head, known_density


class Laplace(Head):
    """p(x | z) = exp(-|x - place| / width) / (2 width), feature by feature."""

    guides = False  # says so when guidance is asked for
    has_density = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.output, self.config = dim, {"dim": dim}

    def bind(self, z_dim: int) -> None:  # whoever is around tells the width of z
        if self.z_dim is None:
            self.final = nn.Linear(z_dim, 2 * self.output)
        super().bind(z_dim)

    def distribution(self, z: Tensor) -> torch.distributions.Laplace:
        place, log_width = self.final(z).float().chunk(2, dim=1)  # (N, D) each
        return torch.distributions.Laplace(place, log_width.exp(), validate_args=False)

    def log_prob(self, z: Tensor, target: Tensor) -> Tensor:
        return self.distribution(z).log_prob(target).sum(dim=1)

    @override
    def loss(self, z: Tensor, target: Tensor, noise: Noise) -> HeadLoss:
        loss = -self.log_prob(z, target)
        return HeadLoss(loss, torch.ones_like(loss))

    @torch.no_grad()
    def sample(
        self, z: Tensor, noise: Noise, z_null: Any = None, guidance: Any = 1.0, temperature: float = 1.0
    ) -> Tensor:
        self.check_sampling(z, z_null, guidance, temperature)  # refuses what this head can't do
        p, u = self.distribution(z), noise.uniform(self.output) - 0.5  # (N, D)
        return p.loc - temperature * p.scale * u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.4999999))


seriatim.HEADS["laplace"] = Laplace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    check_head(Laplace, learn=False)
    backbone = {"kind": "causal", "width": 32, "depth": 1, "heads": 4}
    head = Nested(3, split={"kind": "features"}, backbone=backbone, head={"kind": "laplace"}, z_dim=6)
    optimiser = torch.optim.Adam(head.parameters(), lr=3e-3)
    for step in range(parser.parse_args().steps):
        noise = Noise.shared(step, 128)
        z = noise.normal(6)
        loss = head.loss(z, known_density(z, noise, 3), noise).sum.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    noise = Noise.shared(10**6, 1000)
    z = noise.normal(6)
    nats = -head.log_prob_of_parts(z, known_density(z, noise, 3)).mean(dim=0)
    print("nats of each feature, given those before it:", ", ".join(f"{x:.2f}" for x in nats.tolist()))


if __name__ == "__main__":
    main()
