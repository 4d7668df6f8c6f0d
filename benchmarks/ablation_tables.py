"""Tables in markdown and pictures of what `ablation` wrote."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ablation_cells import COMPARED
from known_density_tables import BUDGETS, Interval, Results, head_of, interval, is_truth, row_of, show, student

Row = dict[str, Any]

GROUPS = 10  # of the jackknife that gives the standard error of one training's figures
KNOWN_SCORES = ("distance", "excess", "outside")
UNITS = {"images": "images", "seconds": "s of updates"}


def pairs(cells: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, other) for name, other in COMPARED if name in cells and other in cells]


def sizes(rows: Sequence[Row], budget: str) -> list[str]:
    """Parameters of trunk and head, and what the other budget was at this one: the mean over seeds."""
    size = rows[0]["parameters"]
    other = statistics.fmean(r["train_seconds" if budget == "images" else "images"] for r in rows)
    return [f"{size['backbone']:,} + {size['head']:,}", f"{other:,.1f}" if other < 100 else f"{other:,.0f}"]


def budget_of(rows: Sequence[Row], budget: str) -> str:
    return f"{rows[0]['settings'][budget]:,g} {UNITS[budget]}"


def other_of(budget: str) -> str:
    return UNITS["seconds" if budget == "images" else "images"]


# --- known density --------------------------------------------------------------------------------------------------


def known_tables(rows: Sequence[Row], tasks: Sequence[str], cells: Sequence[str]) -> Iterator[str]:
    """Scores with 95 % t-intervals over seeds, then differences seed by seed."""
    results = Results(rows)
    for task in tasks:
        names = [name for name in results.names(task, cells) if not is_truth(name)]
        if not names:
            continue
        for budget in BUDGETS:
            judged = {name: list(results.of(task, name, budget).values()) for name in names}
            judged = {name: made for name, made in judged.items() if made}
            if not judged:
                continue
            first = next(iter(judged.values()))
            yield f"\n**{task}**, at this budget: {budget_of(first, budget)}, {seeds_of(first)}\n"
            yield head_of(["cell", "parameters, trunk + head", other_of(budget), *KNOWN_SCORES])
            for name in results.names(task, cells):
                told = sizes(judged[name], budget) if name in judged else ["", ""]
                if name in judged or is_truth(name):
                    yield row_of([name, *told, *known_scores(results, task, name, budget)])
        yield from known_differences(results, task, names)


def seeds_of(rows: Sequence[Row]) -> str:
    count = len({r["seed"] for r in rows})
    return f"{count} seeds" if count > 1 else "one seed"


def known_scores(results: Results, task: str, name: str, budget: str) -> list[str]:
    return [
        show(results.score(task, name, budget, score), percent=score == "outside", signed=score == "excess")
        for score in KNOWN_SCORES
    ]


def known_differences(results: Results, task: str, names: Sequence[str]) -> Iterator[str]:
    compared = pairs(names)
    if not compared:
        return
    yield f"\n**{task}**, differences in distance seed by seed, at these budgets (below 0: the first is nearer)\n"
    yield head_of(["cell less another", *(f"equal {budget}" for budget in BUDGETS)])
    for name, other in compared:
        values = [results.difference(task, name, other, budget, "distance") for budget in BUDGETS]
        yield row_of([f"{name} less {other}", *(show(value, signed=True) for value in values)])


# --- pictures: a jackknife in the place of seeds --------------------------------------------------------------------


def with_interval(rows: Sequence[Row], score: str) -> Interval | None:
    """The mean over seeds, and half a 95 % interval.

    Several seeds are judged by the variance between them, which contains that of the samples. One seed has its
    jackknife's standard error alone, which GROUPS groups give GROUPS - 1 degrees of freedom.
    """
    given = [r for r in rows if score in r["scores"]]
    if len(given) != 1:
        return interval([r["scores"][score] for r in given])
    return given[0]["scores"][score], student(GROUPS - 1) * given[0]["errors"][score]


def less(a: Interval | None, b: Interval | None) -> Interval | None:
    """Of two independent samples: variances add up. Degrees of freedom are those of one, which is never too narrow."""
    if a is None or b is None:
        return None
    return a[0] - b[0], math.hypot(a[1] or 0.0, b[1] or 0.0)


class Pictures:
    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.guidance = sorted({r["guidance"] for r in rows})
        self.scores = list(dict.fromkeys(score for r in rows for score in r["scores"]))

    def of(self, name: str, budget: str, guidance: float) -> list[Row]:
        return [r for r in self.rows if (r["name"], r["budget"], r["guidance"]) == (name, budget, guidance)]

    def difference(self, name: str, other: str, budget: str, guidance: float, score: str) -> Interval | None:
        """name less other: seed by seed where both have several, else of the two trainings."""
        a, b = (self.of(n, budget, guidance) for n in (name, other))
        ours, theirs = ({r["seed"]: r["scores"][score] for r in rows if score in r["scores"]} for rows in (a, b))
        both = sorted(ours.keys() & theirs.keys())
        if len(both) > 1:
            return interval([ours[seed] - theirs[seed] for seed in both])
        return less(with_interval(a, score), with_interval(b, score))


def cifar_tables(rows: Sequence[Row], truths: dict[str, Any], cells: Sequence[str]) -> Iterator[str]:
    made = Pictures(rows)
    for budget in BUDGETS:
        for guidance in made.guidance:
            judged = {name: made.of(name, budget, guidance) for name in cells}
            judged = {name: found for name, found in judged.items() if found}
            if not judged:
                continue
            first = next(iter(judged.values()))
            count, seeds = f"{first[0]['settings']['samples']:,} samples", seeds_of(first)
            at = budget_of(first, budget)
            yield f"\n**CIFAR-10 (JPEG)**, at this budget: {at}, {seeds}; guidance {guidance:g}, {count}\n"
            columns = ["cell", "parameters, trunk + head", other_of(budget), "ms to sample one", *made.scores]
            yield head_of(columns)
            for name, label in (("real", "as many real images"), ("codes", "these as codes, decoded")):
                if name in truths:
                    yield row_of([label, "", "", "", *(show(with_interval([truths[name]], s)) for s in made.scores)])
            for name, given in judged.items():
                speed = 1000 * statistics.fmean(r["sample_seconds"] for r in given)
                values = [show(with_interval(given, score)) for score in made.scores]
                yield row_of([name, *sizes(given, budget), f"{speed:.0f}", *values])
    compared = pairs(cells)
    for budget in BUDGETS:
        every = [(score, guidance) for score in made.scores for guidance in made.guidance]
        if not compared or not any(r["budget"] == budget for r in rows):
            continue
        yield f"\n**CIFAR-10 (JPEG)**, differences at this budget: equal {budget}\n"
        yield head_of(["cell less another", *(f"{score}, guidance {guidance:g}" for score, guidance in every)])
        for name, other in compared:
            found = [made.difference(name, other, budget, guidance, score) for score, guidance in every]
            yield row_of([f"{name} less {other}", *(show(value, signed=True) for value in found)])


def picture(folder: Path, rows: Sequence[Row], cells: Sequence[str], budget: str, guidance: float, file: Path) -> bool:
    """A row a cell, of the same seeds and classes; real images and their codes above. False where there is none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seed = min((r["seed"] for r in rows), default=0)
    strips = {"real": folder / "real.png", "real as codes": folder / "codes.png"}
    found = {name: folder / f"{name}-{seed}-{budget}-{guidance:g}.png" for name in cells}
    found = {name: path for name, path in found.items() if path.exists()}
    if not found:
        return False
    images = {name: plt.imread(path) for name, path in (strips | found).items() if path.exists()}  # (H, n W, 3)
    height, width = next(iter(images.values())).shape[:2]
    inches = 12.0
    canvas, panels = plt.subplots(
        len(images),
        1,
        figsize=(inches + 1.6, len(images) * (inches * height / width + 0.06)),
        squeeze=False,
        layout="constrained",
    )
    for panel, (name, image) in zip(panels[:, 0], images.items(), strict=True):
        panel.imshow(image, interpolation="nearest")
        panel.set_ylabel(name, rotation=0, ha="right", va="center")
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    canvas.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(canvas)
    return True
