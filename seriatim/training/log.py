"""What a run leaves to read: metrics.jsonl, the loss curve, the environment."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from seriatim import __version__
from seriatim.core.files import atomic_write


class MetricsLog:
    """One JSON object a line, handed to the system line by line: a killed run keeps what it has measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        path.write_text("")

    def write(self, **values: Any) -> None:
        self.rows.append(values)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def loss_curve(rows: Sequence[dict[str, Any]], path: Path, title: str = "") -> Path:
    """Draw the loss over images seen, and its terms, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    images = [row["images"] for row in rows]
    terms = [key for key in rows[0] if key == "loss" or key.startswith("loss_")] if rows else []
    for key in terms:
        axes.plot(
            images, [row[key] for row in rows], label=key.replace("loss_", ""), linewidth=2 if key == "loss" else 1
        )
    axes.set(xlabel="images seen", ylabel="loss, mean since the last point", title=title)
    if terms and min(row[key] for row in rows for key in terms) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    if terms:
        axes.legend()
    return atomic_write(path, lambda file: figure.savefig(file, format="png"))


def environment() -> dict[str, Any]:
    """Versions and machine, for a run folder."""
    return {
        "seriatim": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }
