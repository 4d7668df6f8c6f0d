"""Tables in markdown and a figure of what `known_density` wrote.

A row is a file's contents: task, name, seed, budget, scores. Intervals are 95 % t-intervals of a mean over seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Interval = tuple[float, float | None]  # mean, and half the interval; None: of one seed

BUDGETS = ("images", "seconds")
SCORES = ("gap", "distance", "excess", "outside")


def is_truth(name: str) -> bool:
    """Whether it is no contestant, but as many true sequences, or such sequences coded."""
    return name.startswith("truth")


def interval(values: Sequence[float]) -> Interval | None:
    """None where there is none."""
    if not values:
        return None
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def student(degrees: int) -> float:
    """Half a 95 % interval of Student's t with these degrees of freedom, in standard errors."""
    from scipy.stats import t

    return float(t.ppf(0.975, degrees))


def show(value: Interval | None, percent: bool = False, signed: bool = False) -> str:
    """Mean ± half the interval, to the first digit of the latter that matters."""
    if value is None:
        return "-"
    mean, half = value
    if not math.isfinite(mean):
        return "diverged"
    scale = 100 if percent else 1
    mean, half = scale * mean, None if half is None else scale * half
    size = abs(mean) / 30 if half is None else max(half, abs(mean) / 1000)
    digits = 3 if size <= 0 else min(4, max(0, 1 - math.floor(math.log10(size))))
    text = f"{mean:{'+' if signed else ''}.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")
    return text + (" %" if percent else "")


class Results:
    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def of(self, task: str, name: str, budget: str) -> dict[int, Row]:
        """seed -> row."""
        budget = "" if is_truth(name) else budget
        return {r["seed"]: r for r in self.rows if (r["task"], r["name"], r["budget"]) == (task, name, budget)}

    def scores(self, task: str, name: str, budget: str, score: str) -> dict[int, float]:
        rows = self.of(task, name, budget)
        return {seed: float(r["scores"][score]) for seed, r in sorted(rows.items()) if score in r["scores"]}

    def score(self, task: str, name: str, budget: str, score: str) -> Interval | None:
        return interval(list(self.scores(task, name, budget, score).values()))

    def difference(self, task: str, name: str, other: str, budget: str, score: str) -> Interval | None:
        """name less other, seed by seed."""
        ours, theirs = (self.scores(task, n, budget, score) for n in (name, other))
        return interval([ours[seed] - theirs[seed] for seed in ours if seed in theirs])

    def names(self, task: str, names: Sequence[str]) -> list[str]:
        truths = sorted({r["name"] for r in self.rows if is_truth(r["name"])})
        return [n for n in (*truths, *names) if any(self.of(task, n, budget) for budget in BUDGETS)]


def row_of(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def head_of(cells: Sequence[str]) -> str:
    return row_of(cells) + "\n|" + "---|" * len(cells)


def tables(rows: Sequence[Row], tasks: Sequence[str], names: Sequence[str], against: Sequence[str]) -> Iterator[str]:
    """Lines of markdown: scores, then differences from the contestants `against`, of distance and of gap."""
    results = Results(rows)
    for task in tasks:
        entropy = results.score(task, "truth", "", "entropy")
        about = "" if entropy is None else f": {entropy[0]:.3f} nats per token are the truth's own"
        for budget in BUDGETS:
            judged = [r for n in names for r in results.of(task, n, budget).values()]
            if not judged:
                continue
            whole = judged[0]["settings"][budget]
            unit = "sequences" if budget == "images" else "s of updates"
            yield f"\n**{task}**, after {whole:,g} {unit}{about}\n"
            other = "seconds" if budget == "images" else "sequences"
            yield head_of(["contestant", "parameters", other, "gap", "distance", "excess", "outside"])
            for name in results.names(task, names):
                yield row_of(score_cells(results, task, name, budget))
        yield from differences(results, task, names, against)
    yield from speed(rows, tasks, names)


def score_cells(results: Results, task: str, name: str, budget: str) -> list[str]:
    seeds = list(results.of(task, name, budget).values())
    cells = [name, "", ""]
    if not is_truth(name) and seeds:
        size = seeds[0]["parameters"]
        took = "train_seconds" if budget == "images" else "images"
        mean = statistics.fmean(r[took] for r in seeds)
        cells[1:] = [
            f"{size['backbone']:,} + {size['head']:,}",
            f"{mean:.1f}" if budget == "images" else f"{mean:,.0f}",
        ]
    values = {score: results.score(task, name, budget, score) for score in SCORES}
    return [*cells, *(show(v, percent=s == "outside", signed=s == "excess") for s, v in values.items())]


def differences(results: Results, task: str, names: Sequence[str], against: Sequence[str]) -> Iterator[str]:
    present = results.names(task, names)
    columns = [
        (score, other, budget)
        for score, other in zip(("distance", "gap"), against, strict=True)
        if other in present
        for budget in BUDGETS
    ]
    if not columns or len(present) < 2:
        return
    yield f"\n**{task}**, differences seed by seed\n"
    yield head_of(["contestant", *(f"{score} less that of {other}, equal {b}" for score, other, b in columns)])
    for name in present:
        if is_truth(name):
            continue
        cells = []
        for score, other, budget in columns:
            value = None if name == other else results.difference(task, name, other, budget, score)
            cells.append(show(value, signed=True))
        yield row_of([name, *cells])


def speed(rows: Sequence[Row], tasks: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    timed = {(r["task"], r["name"]): r for r in rows if r["budget"] == "speed"}
    shown = [task for task in tasks if any((task, n) in timed for n in names)]
    if not shown:
        return
    one = next(iter(timed.values()))
    yield f"\nSampling, ms of a processor for a token, {one['threads']} thread, {one['dtype']}\n"
    yield head_of(["contestant", *(f"{task}, batch {batch}" for task in shown for batch in (1, 64))])
    for name in names:
        if any((task, name) in timed for task in shown):
            cells = [timed.get((task, name), {}).get(str(batch)) for task in shown for batch in (1, 64)]
            yield row_of([name, *("-" if v is None else f"{v:.3g}" for v in cells)])


def figure(
    rows: Sequence[Row],
    tasks: Sequence[str],
    names: Sequence[str],
    file: Path,
    scores: Sequence[str] = ("distance", "gap"),
) -> None:
    """A column for each task, a row for each score, both budgets."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = Results(rows)
    height = 0.8 + 0.2 * len(names)
    canvas, panels = plt.subplots(
        len(scores),
        len(tasks),
        figsize=(3.2 * len(tasks) + 1.6, len(scores) * height),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for across, task in enumerate(tasks):
        for panel, score in zip(panels[:, across], scores, strict=True):
            for budget, colour, shift in zip(BUDGETS, ("tab:blue", "tab:red"), (-0.13, 0.13), strict=True):
                for place, name in enumerate(names):
                    value = results.score(task, name, budget, score)
                    if value is not None and math.isfinite(value[0]):
                        # an interval that reaches below 0 can't be drawn on this axis: it is cut at a tenth
                        low = min(value[1] or 0.0, 0.9 * abs(value[0]))
                        spread = [[low], [value[1] or 0.0]]
                        panel.errorbar([value[0]], [place + shift], xerr=spread, fmt=".", color=colour, capsize=2)
            floor = results.score(task, "truth", "", score)
            if floor is not None:
                panel.axvline(floor[0], color="grey", linewidth=0.8)
            unit = ", nats per token" if score == "gap" else " from the truth (grey: of the truth)"
            panel.set(xscale="log", title=task, xlabel=score + unit)
            panel.grid(axis="y", alpha=0.3)
    panels[0, 0].set_yticks(range(len(names)), names, fontsize="small")
    panels[0, 0].invert_yaxis()
    lines = [
        plt.Line2D([], [], color=c, marker=".", label=f"equal {b}")
        for b, c in zip(BUDGETS, ("tab:blue", "tab:red"), strict=True)
    ]
    panels[0, 0].legend(handles=lines, fontsize="small")
    canvas.savefig(file, dpi=110)
    plt.close(canvas)
