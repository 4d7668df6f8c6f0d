"""A backbone of one's own, written from `seriatim/backbones/base.py` alone, in a masked model.

    python examples/own_backbone.py

Every token looks at the mean of what is known: no attention at all. It passes the generic tests and trains.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seriatim.backbones.base import Parallel
from seriatim.conditions.base import Condition
from seriatim.core.keys import Keys
from seriatim.core.settings import Settings
from seriatim.core.spec import TokenSpec, grid_of
from seriatim.heads.mixture import Mixture
from seriatim.models.masked_model import MaskedModel
from seriatim.testing import check_backbone, check_model


class Mean(Parallel):
    """z of a token: an MLP of its position, the condition, and the mean of the known tokens with their positions."""

    def __init__(self, tokens: int, dim: int, *, width: int = 32) -> None:
        super().__init__()
        self.spec = TokenSpec(tokens, dim=dim, grid=grid_of(None, tokens))
        self.width = self.z_dim = width
        self.config = {"tokens": tokens, "dim": dim, "width": width}
        self.embed = nn.Linear(dim, width)
        self.positions = nn.Parameter(torch.randn(tokens, width))
        self.each = nn.Sequential(nn.SiLU(), nn.Linear(width, width))
        self.out = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def z(self, condition: Condition, tokens: Tensor, known: Tensor, ask: Tensor, neighbours: bool = False) -> Tensor:
        there = known.to(tokens.device)[..., None]  # (B, L, 1); masks may be on the host
        x = self.each(self.embed(tokens) + self.positions)  # (B, L, C)
        seen = torch.where(there, x, 0.0).sum(dim=1) / (1 + there.sum(dim=1))  # (B, C)
        context = seen + condition.vectors.mean(dim=1)  # (B, C)
        every = self.out(context[:, None] + self.positions)  # (B, L, C)
        rows, places = (index.to(tokens.device) for index in ask.nonzero().unbind(1))  # (N,), image by image
        if not neighbours:
            return every[rows, places]
        h, w = self.spec.grid or (1, self.tokens)
        padded = nn.functional.pad(every.unflatten(1, (h, w)), (0, 0, 1, 1, 1, 1))  # zeros outside the grid
        i, j = places // w + 1, places % w + 1
        around = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))  # itself, above, below, left, right
        return torch.stack([padded[rows, i + down, j + right] for down, right in around], dim=1)  # (N, 5, C)


def make(tokens: int = 16) -> MaskedModel:
    return MaskedModel(Mean(tokens, 2), Mixture(2, 4, width=32, depth=1), classes=2)


def main(steps: int = 200) -> None:
    check_backbone(lambda: Mean(16, 2))
    check_model(make, guidance_mode="resample")
    model = make()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        keys = Keys.of(step).fold(torch.arange(32))
        labels = keys.fold("label").integers(2)
        tokens = labels[:, None, None] * 2.0 - 1 + 0.1 * keys.fold("tokens").normal(16, 2)  # all -1, or all 1
        loss = model(tokens, labels, keys, Keys.of(step, "step")).mean
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    condition = model.condition(torch.tensor([0, 1]), 2)
    drawn = model.sample(condition, model.null(2), Keys.of_seeds([1, 2]), Settings(num_inference_steps=4))
    print(f"loss {float(loss.detach()):.2f}; means of class 0 and 1: {drawn.mean(dim=(1, 2)).tolist()}")
    assert float(drawn[0].mean()) < -0.5 and float(drawn[1].mean()) > 0.5


if __name__ == "__main__":
    main()
