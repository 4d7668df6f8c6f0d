"""Tables in markdown, and a picture of the curves, of the rows that `budget` wrote.

A row is a contestant with a seed, judged at a point: a guidance scale, its schedule, and other settings of sampling.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from judged_samples import BATCH, cell
from known_density_tables import head_of, interval, row_of, show

from seriatim.core.files import atomic_write

Row = dict[str, Any]

FLOOR = 0.3  # the least recall with which an accuracy counts: without it, one good picture of each class would do
SHOWN = ("FD", "accuracy", "precision", "recall")


class Curve:
    """The rows of one contestant: point -> a row for each seed, of samples that chose a guidance or that confirm it."""

    def __init__(self, name: str, rows: Sequence[Row]) -> None:
        self.name, self.first = name, rows[0]
        self.seeds = sorted({row["seed"] for row in rows})
        self.rows = rows
        order = sorted(rows, key=lambda row: (row["scale"], row["point"]))
        self.points = list(dict.fromkeys(row["point"] for row in order if not row["confirming"]))

    def at(self, point: str, *, confirming: bool = False) -> list[Row]:
        return [row for row in self.rows if row["point"] == point and row["confirming"] == confirming]

    def mean(self, point: str, figure: str) -> float | None:
        """The mean over the seeds; None where the figure could not be had."""
        values = [row["figures"][figure][0] for row in self.at(point) if figure in row["figures"]]
        return statistics.fmean(values) if values else None

    def closest(self) -> str:
        """The point of the least distance."""
        return min(self.points, key=lambda point: self.mean(point, "FD") or 0.0)

    def surest(self) -> str | None:
        """The point of the highest accuracy with a recall of at least FLOOR; None if there is none."""
        found = [(self.mean(point, "accuracy"), point) for point in self.points]
        able = [(value, point) for value, point in found if value is not None and self.recalls(point)]
        return max(able)[1] if able else None

    def recalls(self, point: str) -> bool:
        return (self.mean(point, "recall") or 0.0) >= FLOOR

    def shown(self, point: str | None, figure: str) -> str:
        """A figure with its interval, of the samples that confirm the point where there are any."""
        rows = [] if point is None else self.at(point, confirming=True) or self.at(point)
        values = [row["figures"][figure] for row in rows if figure in row["figures"]]
        if not values:
            return "-"
        return cell(values[0]) if len(values) == 1 else show(interval([value for value, _ in values]))


def best(rows: Sequence[Row]) -> tuple[str, str | None]:
    """The point of a contestant's least distance, and that of its highest accuracy with enough recall."""
    curve = Curve(rows[0]["name"], rows)
    return curve.closest(), curve.surest()


def curves_of(rows: Sequence[Row]) -> list[Curve]:
    """The curve of each contestant that was judged, from the least distance to the largest."""
    names = dict.fromkeys(row["name"] for row in rows if not row["confirming"])
    found = [Curve(name, [row for row in rows if row["name"] == name]) for name in names]
    return sorted(found, key=lambda curve: curve.mean(curve.closest(), "FD") or 0.0)


def tables(rows: Sequence[Row], failed: Sequence[Row]) -> str:
    """The best of each contestant, then the whole curves, then who failed."""
    return "\n".join([*summary(curves_of(rows)), *whole_curves(curves_of(rows)), *failures(failed)]).strip()


def summary(found: Sequence[Curve]) -> Iterator[str]:
    if not found:
        return
    minutes_each, samples = found[0].first["settings"]["minutes"], found[0].first["samples"]
    yield (
        f"{minutes_each:g} minutes of one thread for each training, {samples:,} samples at each guidance, drawn by one "
        f"thread in batches of {BATCH}; ± is 95 %.\n"
    )
    yield head_of([
        "contestant", "seeds", "images", "images/s", "minutes", "parameters", "loss",
        "least FD", "at", "accuracy", "recall",
        f"highest accuracy with recall >= {FLOOR}", "at", "FD", "recall", "s a sample",
    ])  # fmt: skip
    for curve in found:
        rows = [row for point in curve.points[:1] for row in curve.at(point)]
        closest, surest = curve.closest(), curve.surest()
        yield row_of([
            curve.name,
            str(len(curve.seeds)),
            f"{mean(rows, 'images'):,.0f}",
            f"{mean(rows, 'images_per_second'):.1f}",
            minutes(rows),
            f"{curve.first['parameters']:,}",
            show(interval([row["loss"] for row in rows])),
            *(curve.shown(closest, "FD"), closest, curve.shown(closest, "accuracy"), curve.shown(closest, "recall")),
            *(curve.shown(surest, "accuracy"), surest or "-", curve.shown(surest, "FD"), curve.shown(surest, "recall")),
            f"{mean(curve.at(closest), 'sample_seconds'):.3f}",
        ])  # fmt: skip


def mean(rows: Sequence[Row], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def minutes(rows: Sequence[Row]) -> str:
    """The processor time of the trainings that were not stopped on the way."""
    values = [row["seconds"] / 60 for row in rows if row["seconds"] is not None]
    return f"{statistics.fmean(values):.1f}" if values else "-"


def whole_curves(found: Sequence[Curve]) -> Iterator[str]:
    for curve in found[:1]:
        figures = [figure for figure in SHOWN if figure in curve.first["figures"]]
        yield "\n" + head_of(["contestant", "guidance", *figures, "s a sample"])
        real = [cell(curve.first["real"][figure]) for figure in figures]
        yield row_of(["real images", "", *real, ""])
    for curve in found:
        for point in curve.points:
            cells = [curve.shown(point, figure) for figure in figures]
            yield row_of([curve.name, point, *cells, f"{mean(curve.at(point), 'sample_seconds'):.3f}"])


def failures(failed: Sequence[Row]) -> Iterator[str]:
    for row in failed:
        yield f"\n{row['name']}, seed {row['seed']}, failed: {row['why']}"


def curves(rows: Sequence[Row], file: Path) -> None:
    """Accuracy against recall, and the distance over the scale, of each contestant's constant guidance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for curve in curves_of(rows):
        points = [point for point in curve.points if point.replace(".", "", 1).isdigit()]
        pairs = [(curve.mean(point, "recall"), curve.mean(point, "accuracy")) for point in points]
        if all(None not in pair for pair in pairs):
            left.plot(*zip(*pairs, strict=True), marker=".", label=curve.name)
        right.plot(
            [float(point) for point in points],
            [curve.mean(point, "FD") for point in points],
            marker=".",
            label=curve.name,
        )
    left.axvline(FLOOR, color="grey", linewidth=0.8)
    left.set(xlabel="recall", ylabel="accuracy")
    right.set(xlabel="guidance scale", ylabel="Frechet distance", yscale="log")
    right.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    atomic_write(file, lambda handle: canvas.savefig(handle, dpi=110, format="png"))
    plt.close(canvas)
