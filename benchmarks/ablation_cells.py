"""The eight cells of Li et al. 2024, table 1: which model each needs, how it samples, and with which it is compared.

    raster    causal, row by row
    random    causal, each image in an order of its own
    masked    bidirectional (MAR), in random order, one token a step
    several   the same, several tokens a step: the weights of `masked`, sampled otherwise

each with cross-entropy on codes (`-ce`) and with Diffusion Loss on features (`-diffusion`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from seriatim.core.errors import DataError, one_line

ROWS = ("raster", "random", "masked", "several")
LOSSES = ("ce", "diffusion")
SHARE = 4  # `several` takes as many steps as there are tokens, over this


@dataclass(frozen=True)
class Cell:
    row: str
    loss: str

    @property
    def name(self) -> str:
        return f"{self.row}-{self.loss}"

    @property
    def trunk(self) -> str:
        """The row whose weights it has."""
        return "masked" if self.row == "several" else self.row

    @property
    def training(self) -> str:
        return f"{self.trunk}-{self.loss}"

    def steps(self, tokens: int) -> int:
        return max(1, tokens // SHARE) if self.row == "several" else tokens


CELLS = {cell.name: cell for cell in (Cell(row, loss) for row, loss in product(ROWS, LOSSES))}

# name, and the one it is compared with: the loss, all else equal; then each row with the one above
COMPARED: tuple[tuple[str, str], ...] = (
    *((f"{row}-diffusion", f"{row}-ce") for row in ROWS),
    *((f"{now}-{loss}", f"{before}-{loss}") for loss in LOSSES for before, now in pairwise(ROWS)),
)


def read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{file} is no JSON of results ({one_line(error)}); delete it") from None


def refuse_other(file: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the file is there; one that was made with other settings is refused."""
    if not file.exists():
        return False
    made, now = read(file).get("settings", {}), json.loads(json.dumps(settings))
    for key in now:
        if made.get(key) != now[key]:
            message = f"out: {file} was made with {key} {made.get(key)}, not {now[key]}; choose another folder"
            raise DataError(f"{message}, or delete it")
    return True
