"""The network of the diffusion and the flow head: a small MLP of x, modulated by a time and z (Li et al. 2024, 3.2).

The embeddings of t and z are added and modulate every block (adaLN). There is no attention, so each row is a token of
its own. The head defines what a time means and what the network predicts.

Shapes: N tokens, D features, C width of z, W width of the network, d blocks, O predicted numbers, S times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seriatim.core.errors import check_least
from seriatim.heads.base import Head
from seriatim.nn.adaln import AdaLNBlock, AdaLNOutput
from seriatim.nn.block import xavier
from seriatim.nn.linear import Linear, at_least_float32
from seriatim.nn.position import sinusoid

FREQUENCIES = 256
MODULATION_CAP = 1 << 22  # modulation numbers that are held at once on a CPU: 16 MiB


class AdaLNHead(Head):
    """A head whose network has d blocks of width W; a subclass adds the loss and a sampler that calls `walk`."""

    def __init__(self, dim: int, width: int, depth: int, draws: int, outputs: int) -> None:
        super().__init__()
        check_least(1, dim=dim, width=width, depth=depth, draws=draws)
        self.output, self.width, self.draws = dim, width, draws
        self.time_embed = nn.Sequential(Linear(FREQUENCIES, width), nn.SiLU(), Linear(width, width))
        self.x_embed = Linear(dim, width)
        self.blocks: Sequence[AdaLNBlock] = nn.ModuleList(AdaLNBlock(width) for _ in range(depth))  # type: ignore[assignment]
        self.final = AdaLNOutput(width, outputs)
        self.initialise()

    def initialise(self) -> None:
        """Initialise with Xavier, the time embedding with N(0, 0.02), and modulations and output with zeros.

        So the network predicts 0 at first.
        """
        xavier(self)
        for name, weight in self.time_embed.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(weight, std=0.02)
        for layer in (*(block.modulation for block in self.blocks), self.final.modulation, self.final.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def bind(self, z_dim: int) -> None:
        if self.z_dim is None:
            self.z_embed = Linear(z_dim, self.width)
            xavier(self.z_embed)
        super().bind(z_dim)

    def embed(self, times: Tensor) -> Tensor:
        """The embeddings (T, W) of times (T,) for the sinusoids, in the network's dtype, or float32 at least."""
        return self.time_embed(at_least_float32(sinusoid(times, FREQUENCIES), self.blocks[0].norm.weight))

    def modulations(self, y: Tensor) -> list[tuple[Tensor, ...]]:
        """Shift, 1 + scale (and gate), each (..., W), of all blocks and the output; y (..., W) is time + condition."""
        y = F.silu(y)
        return [layer.modulate(y) for layer in (*self.blocks, self.final)]

    def network(self, x: Tensor, modulations: Sequence[Sequence[Tensor]]) -> Tensor:
        """x (N, D) -> the network's prediction (N, O)."""
        h = self.x_embed(x)  # (N, W)
        for block, modulation in zip(self.blocks, modulations, strict=False):
            h = block.modulated(h, *modulation)
        return self.final.modulated(h, *modulations[-1])

    def predict(self, x: Tensor, y: Tensor) -> Tensor:
        """x (N, D) and y (N, W), time + condition -> the network's prediction (N, O).

        Each block computes its own modulations, so a block can be compiled, or recomputed in the backward pass.
        """
        y = F.silu(y)
        h = self.x_embed(x)  # (N, W)
        for block in self.blocks:
            h = block(h, y)
        return self.final(h, y)

    def walk(self, times: Tensor, condition: Tensor) -> Iterator[tuple[int, list[list[Tensor]]]]:
        """Iterate from the last of `times` (S, W) to the first, as (index, modulations of all blocks and the output).

        A modulation depends only on the time and the condition (N, W), so the modulations of as many steps as fit into
        the device's memory budget are computed in one product.
        """
        device, held = condition.device, MODULATION_CAP
        if device.type == "cuda" and torch.cuda.is_available():  # an eighth of the free memory, in float32
            held = max(held, torch.cuda.mem_get_info(device)[0] // 32)
        per_step = len(condition) * self.width * (3 * len(self.blocks) + 2)
        chunk = max(1, held // max(1, per_step))
        for end in range(len(times), 0, -chunk):
            begin = max(0, end - chunk)
            y = times[begin:end][:, None] + condition  # (chunk, N, W)
            steps = [[part.unbind() for part in parts] for parts in self.modulations(y)]  # chunk times (N, W)
            for i in range(end - 1, begin - 1, -1):
                yield i, [[part[i - begin] for part in parts] for parts in steps]
