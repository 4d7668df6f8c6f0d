"""Classifier-free guidance: the scale of each image at each step, and both passes of the backbone in one batch.

Shapes: B images, L tokens, N tokens asked for, C width of z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seriatim.backbones.base import Parallel
from seriatim.conditions.base import Condition
from seriatim.core.schedules import guidance_at
from seriatim.core.settings import Settings

FEW_CONDITIONS = 8  # above this number, one pass over all images costs less than one pass for each condition


def scales_at(settings: Settings, full: list[float], left: list[int], tokens: int) -> list[float]:
    """The guidance scale of each image at one step.

    full[b] is the scale w that was asked for image b; left[b] counts its unknown tokens after the step.
    """
    return [
        guidance_at(settings.guidance_schedule, w, m, tokens, settings.guidance_interval, settings.guidance_power)
        for w, m in zip(full, left, strict=True)
    ]


class GuidedPasses:
    """Runs a parallel backbone once for the conditional and the unconditional rows of those images that need them.

    A finished image needs no row, and an image whose guidance scale is 1 needs no unconditional row. While no token is
    known, z depends on the condition alone, so it is computed once for each distinct condition of the batch.
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
        """z and z_null (N, C) for the tokens at rows and places (N,), with guidance scales (B,).

        All arguments but the tokens are on the host. z_null is None if no row is guided; if only some rows are, z_null
        equals z in the others.
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
            self.condition = self.both.select(chosen) if len(chosen) < len(self.both) else self.both
        z = self.backbone.z(
            self.condition, tokens[self.index_there], known[self.index], ask[self.index], self.neighbours
        )
        z, z_guided = z[: len(rows)], z[len(rows) :]
        if not bool(guided.any()):
            return z, None
        if bool(guided[rows].all()):
            return z, z_guided
        # Rows of scale 1 take z as their z_null, because guidance then leaves z as it is.
        return z, z.index_copy(0, guided[rows].nonzero()[:, 0].to(z.device), z_guided)

    def _of_nothing(self, rows: Tensor, places: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        """z and z_null (N, C) while no token is known.

        Each distinct condition is computed alone, so that z does not depend on what else is in the batch.
        """
        spec, B, device = self.backbone.spec, self.images, self.both.vectors.device
        names = list(self.both.names or ())
        nothing = torch.zeros(1, spec.count, dtype=torch.bool)
        first = {name: row for row, name in reversed(list(enumerate(names)))}  # the first row of each condition
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
