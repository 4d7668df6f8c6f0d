"""The pictures of docs/sampling.md: orders, guidance over the known share, tokens per step.

python benchmarks/schedule_pictures.py --out docs/images
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from seriatim.core.files import atomic_write
from seriatim.core.keys import Keys
from seriatim.core.orders import ORDERS, RANDOM
from seriatim.core.schedules import tokens_per_step
from seriatim.core.settings import Settings

SIDE, FIRST = 16, 32  # of the grid; how many of the first tokens are marked
L, STEPS, SCALE = SIDE * SIDE, 64, 4.0


def save(draw: Callable[[Figure], None], path: Path, size: tuple[float, float]) -> None:
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    print(atomic_write(path, lambda file: figure.savefig(file, format="png")))  # noqa: T201


def orders(figure: Figure) -> None:
    named = {name: function(SIDE, SIDE) for name, function in ORDERS.items()}
    all_orders = {RANDOM: Keys.of_seeds([0]).permutation(L)[0].tolist(), **named}
    panels = figure.subplots(1, len(all_orders), sharey=True)
    for axes, (name, order) in zip(panels, all_orders.items(), strict=True):
        drawn = torch.empty(L, dtype=torch.long)
        drawn[torch.tensor(order)] = torch.arange(L)
        shown = axes.imshow(drawn.view(SIDE, SIDE).numpy(), cmap="viridis_r")
        first = torch.tensor(order[:FIRST])
        axes.plot(first % SIDE, first // SIDE, "o", markersize=4.5, color="white", markeredgecolor="black")
        axes.set(title=name, xticks=[], yticks=[])
    figure.colorbar(shown, ax=panels, label="tokens drawn before it", shrink=0.85, ticks=[0, 64, 128, 192, 255])


def guidance(figure: Figure) -> None:
    schedules: dict[str, tuple[str, dict[str, Any]]] = {
        "linear": ("linear", {}),
        "constant": ("constant", {}),
        "interval 0.25 to 0.9": ("interval", {"guidance_interval": (0.25, 0.9)}),
        "power-cosine, power 0.5": ("power-cosine", {"guidance_power": 0.5}),
        "power-cosine, power 1": ("power-cosine", {}),
        "power-cosine, power 3": ("power-cosine", {"guidance_power": 3.0}),
    }
    axes = figure.subplots()
    known = list(range(1, L + 1))
    for i, (label, (schedule, options)) in enumerate(schedules.items()):
        settings = Settings(guidance_schedule=schedule, **options)
        scales = [settings.guidance_at(SCALE, L - k, L) for k in known]
        axes.plot([k / L for k in known], scales, label=label, drawstyle="steps-mid", linewidth=4 if i == 1 else 1.5)
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="share of the image that is known after a step", ylabel=f"scale, guidance_scale = {SCALE:g}")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def counts(figure: Figure) -> None:
    schedules: dict[str, dict[str, Any]] = {
        "cosine": {},
        "cosine, at least 2": {"min_tokens": 2},
        "cosine, at least 3": {"min_tokens": 3},
        "linear": {"schedule": "linear"},
        "cosine, half of the image known": {"unknown": L // 2},
    }
    left, right = figure.subplots(1, 2)
    steps = range(1, STEPS + 1)
    for width, (label, options) in zip((5, 3, 1.5, 1.5, 1.5), schedules.items(), strict=True):  # they overlap
        drawn = torch.tensor(tokens_per_step(STEPS, L, **options))
        left.plot(steps, drawn, label=label, drawstyle="steps-mid", linewidth=width)
        right.plot(steps, L - options.get("unknown", L) + drawn.cumsum(0), label=label, linewidth=width)
    left.set(xlabel=f"step, of {STEPS}", ylabel="tokens drawn", ylim=(0, None))
    right.set(xlabel=f"step, of {STEPS}", ylabel=f"tokens known, of {L}", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")


def main(command: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    out = parser.parse_args(command).out
    out.mkdir(parents=True, exist_ok=True)
    save(orders, out / "orders.png", (11, 3.1))
    save(guidance, out / "guidance.png", (8, 3.6))
    save(counts, out / "tokens-per-step.png", (10, 3.8))


if __name__ == "__main__":
    main()
