"""Guidance over the image: the scale of each image at each step, and both passes of the backbone in one.

B images, L tokens, N tokens asked for, C width of z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seriatim.backbones.base import Parallel
from seriatim.conditions.base import Condition
from seriatim.core.schedules import guidance_at
from seriatim.core.settings import Settings

FEW_CONDITIONS = 8  # of a batch: with more, one pass of all images costs less than one for each condition


def scales_at(settings: Settings, full: list[float], left: list[int], tokens: int) -> list[float]:
    """The guidance scale of each image at a step after which left[b] of its tokens are unknown; full[b] is its w."""
    return [
        guidance_at(settings.guidance_schedule, w, m, tokens, settings.guidance_interval, settings.guidance_power)
        for w, m in zip(full, left, strict=True)
    ]


class GuidedPasses:
    """Conditional and unconditional rows in one pass of a parallel backbone, of the images that need them.

    A finished image needs none, and one whose scale is 1 no unconditional row. While nothing is known, z depends on the
    condition alone: it is computed once for each condition that the batch names.
    """

    def __init__(self, backbone: Parallel, condition: Condition, null: Condition, neighbours: bool) -> None:
        self.backbone, self.neighbours = backbone, neighbours
        self.both = condition.join(null)  # 2 B rows
        self.images = len(condition)
        self.chosen = torch.empty(0, dtype=torch.long)
        self.condition = condition

    def z(
        self, tokens: Tensor, known: Tensor, ask: Tensor, rows: Tensor, places: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """z and z_null (N, C) of rows and places (N,); scale (B,). All on the host but the tokens.

        z_null is None where no row is guided; where only some are, it equals z for the others.
        """
        asking = torch.zeros(self.images, dtype=torch.bool).scatter(0, rows, True)  # (B,)
        guided = asking & (scale != 1.0)
        names = self.both.names
        if names is not None and not bool(known.any()) and len(set(names)) <= FEW_CONDITIONS + 1:
            return self._of_nothing(rows, places, bool(guided.any()))
        chosen = torch.cat([asking, guided]).nonzero()[:, 0]  # rows of `both`
        if not torch.equal(chosen, self.chosen):
            there = chosen.to(tokens.device)
            self.chosen, self.index, self.index_there = chosen, chosen % self.images, there % self.images
            self.condition = self.both.select(there) if len(chosen) < len(self.both) else self.both
        z = self.backbone.z(
            self.condition, tokens[self.index_there], known[self.index], ask[self.index], self.neighbours
        )
        z, z_guided = z[: len(rows)], z[len(rows) :]
        if not bool(guided.any()):
            return z, None
        if bool(guided[rows].all()):
            return z, z_guided
        # Where the scale is 1, z itself stands for z_null: z + 1 (z - z).
        return z, z.index_copy(0, guided[rows].nonzero()[:, 0].to(z.device), z_guided)

    def _of_nothing(self, rows: Tensor, places: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        """The same while nothing is known: one condition at a time, so that z depends on nothing else."""
        spec, B, device = self.backbone.spec, self.images, self.both.vectors.device
        names = list(self.both.names or ())
        nothing = torch.zeros(1, spec.count, dtype=torch.bool)
        first = {name: row for row, name in reversed(list(enumerate(names)))}  # a row of each condition
        wanted = {name: first[name] for name in names[: 2 * B if guided else B]}
        every = [
            self.backbone.z(
                self.both.select(slice(row, row + 1)), spec.blank(1, device), nothing, ~nothing, self.neighbours
            )
            for row in wanted.values()
        ]  # (L, C) each
        number = {name: i for i, name in enumerate(wanted)}
        table = torch.cat(every)

        def of(offset: int) -> Tensor:
            which = torch.tensor([number[names[offset + row]] for row in rows.tolist()], dtype=torch.long)
            return table.index_select(0, (which * spec.count + places).to(device))

        return of(0), of(B) if guided else None
