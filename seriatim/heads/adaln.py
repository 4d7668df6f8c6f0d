"""The network of the diffusion and the flow head: a small MLP of x, modulated by a time and z (Li et al. 2024, 3.2).

t and z are added and modulate every block (adaLN); nothing attends to anything: a row is a token. What a time is and
what comes out is the head's business.

Shapes: N tokens, D features, C width of z, W width of the network, d blocks, O numbers that come out, S times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seriatim.core.errors import UsageError
from seriatim.heads.base import Head
from seriatim.nn.adaln import AdaLNBlock, AdaLNOutput
from seriatim.nn.blocks import xavier
from seriatim.nn.linear import Linear
from seriatim.nn.packed import version
from seriatim.nn.position import sinusoid

FREQUENCIES = 256
MODULATION_CAP = 1 << 22  # numbers held at once for the modulations of several steps: 16 MiB


class AdaLNHead(Head):
    """A head whose network is d blocks of width W; a subclass adds the loss, and a sampler that calls `walk`."""

    def __init__(self, dim: int, width: int, depth: int, draws: int, outputs: int) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("width", width), ("depth", depth), ("draws", draws)):
            if value < 1:
                raise UsageError(f"{name}: {value!r} is not allowed; it must be at least 1")
        self.output, self.width, self.draws = dim, width, draws
        self.time_embed = nn.Sequential(Linear(FREQUENCIES, width), nn.SiLU(), Linear(width, width))
        self.x_embed = Linear(dim, width)
        self.blocks: Sequence[AdaLNBlock] = nn.ModuleList(AdaLNBlock(width) for _ in range(depth))  # type: ignore[assignment]
        self.final = AdaLNOutput(width, outputs)
        self._times: tuple[Any, Tensor] | None = None
        self.initialise()

    def initialise(self) -> None:
        """Xavier; N(0, 0.02) for the time embedding; zero for modulations and output: 0 comes out at first."""
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

    def modulations(self, y: Tensor) -> list[tuple[Tensor, ...]]:
        """y (..., W), time plus condition -> shift, 1 + scale (and gate) of each block and the output, (..., W)."""
        y = F.silu(y)
        return [*(block.modulate(y) for block in self.blocks), self.final.modulate(y)]

    def network(self, x: Tensor, modulations: Sequence[Sequence[Tensor]]) -> Tensor:
        """x (N, D) -> (N, O)."""
        h = self.x_embed(x)  # (N, W)
        for block, modulation in zip(self.blocks, modulations, strict=False):
            h = block(h, *modulation)
        return self.final(h, *modulations[-1])

    def walk(self, times: Tensor, condition: Tensor) -> Iterator[tuple[int, list[list[Tensor]]]]:
        """From the last of `times` (S, W) to the first: its index, and shift, 1 + scale (and gate) of each block.

        A modulation depends on time and condition (N, W) only: those of many steps are made in one product, as many as
        fit in memory.
        """
        per_step = len(condition) * self.width * (3 * len(self.blocks) + 2)
        chunk = max(1, MODULATION_CAP // max(1, per_step))
        for end in range(len(times), 0, -chunk):
            begin = max(0, end - chunk)
            y = times[begin:end][:, None] + condition  # (chunk, N, W)
            steps = [[part.unbind() for part in parts] for parts in self.modulations(y)]  # chunk times (N, W)
            for i in range(end - 1, begin - 1, -1):
                yield i, [[part[i - begin] for part in parts] for parts in steps]

    def times_of(self, times: npt.NDArray[Any], device: torch.device) -> Tensor:
        """Times (S,), as the sinusoids take them, embedded (S, W): kept for the next call, until the weights change."""
        key = (device, times.dtype.str, times.tobytes(), version(self.time_embed))
        held = self._times  # another thread may put its own there meanwhile
        if held is None or held[0] != key:
            t = torch.from_numpy(times).to(device)
            held = self._times = (key, self.time_embed(sinusoid(t, FREQUENCIES)))
        return held[1]
