"""`sweep`: one evaluation for each value of a request's fields, as a table and as curves."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seriatim.core.errors import UsageError, nearest
from seriatim.core.files import atomic_write, writable_folder, write_json, write_text
from seriatim.core.ownership import owned
from seriatim.core.processes import place
from seriatim.evaluation.identity import holds_features, is_sweep
from seriatim.evaluation.reference import Images, Statistics
from seriatim.evaluation.rows import markdown, model_name, safe
from seriatim.evaluation.run import Evaluation, evaluate
from seriatim.pipeline.pipeline import Pipeline
from seriatim.pipeline.request import request_fields

MOST_POINTS = 10_000
JSON, TABLE, CURVES = "sweep.json", "sweep.md", "curves.png"


@dataclass(frozen=True)
class Sweep:
    """What `sweep` gives; `points` lack figures as long as other processes have not done their share."""

    folder: Path
    values: dict[str, list[Any]]  # of each field
    points: list[tuple[dict[str, Any], Evaluation]] = field(default_factory=list)

    @property
    def missing(self) -> int:
        return sum(point.missing for _, point in self.points)


def sweep(
    pipe: Pipeline,
    data: Images | Statistics,
    out: Path | str,
    fields: Mapping[str, Sequence[Any]],
    **settings: Any,
) -> Sweep:
    """Evaluate every combination of the fields' values; other arguments are those of `evaluate`.

    Each point is an evaluation of its own in `out`, all with the same seeds and one cache of real images; the same call
    goes on where another was stopped. Points whose figures are read to choose one are no longer a measurement of it:
    evaluate the chosen one again with another seed.
    """
    folder = Path(out)
    cache = settings.pop("cache", None) or folder
    owned(folder, "sweep", is_sweep)
    owned(Path(cache), "cache of features", holds_features, argument="cache")
    if not fields:
        raise UsageError("fields: is empty; name one with its values, such as guidance_scale=1,1.5,2,3")
    count = math.prod(len(values) for values in fields.values())
    if count > MOST_POINTS:
        raise UsageError(f"{next(iter(fields))}: {count:,} points in all; sweep at most {MOST_POINTS:,}")
    combinations = [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]
    names = [point_name(combination) for combination in combinations]
    for name in fields:
        if name not in request_fields():
            raise UsageError(f"{name}: is not a setting of a request{nearest(name, request_fields())}")
        if name in settings:
            raise UsageError(f"{name}: is given a value and also swept; leave one out")
    if len(set(names)) < len(names):
        raise UsageError(f"{next(iter(fields))}: a value is given twice; leave one out")
    for combination in combinations:  # all of them, before hours of work on the first
        pipe.request(**{**combination, "seed": 0})
    writable_folder(folder)
    points = []
    for combination, name in zip(combinations, names, strict=True):
        points.append((combination, evaluate(pipe, data, folder / name, cache=cache, **settings, **combination)))
    done = Sweep(folder, {name: list(values) for name, values in fields.items()}, points)
    if not done.missing and not place().rank:
        write_json(
            folder / JSON,
            {"fields": done.values, "points": [{"values": point, **made.report} for point, made in points]},
        )
        write_text(folder / TABLE, table(done) + "\n")
        curves(done, folder / CURVES)
    return done


def point_name(combination: Mapping[str, Any]) -> str:
    """A folder's name: `guidance_scale=1.5,solver=ddim`."""
    text = ",".join(f"{name}={value}" for name, value in combination.items())
    return re.sub(r"[^\w.,=+-]", "_", text)[:120]


def table(done: Sweep) -> str:
    """The markdown of all points, the swept fields in front."""
    lines = markdown([made.report for _, made in done.points]).splitlines()
    heads = [f"| {' | '.join(done.values)} ", "|---" * len(done.values)]
    heads += [f"| {' | '.join(safe(str(value)) for value in point.values())} " for point, _ in done.points]
    return "\n".join(head + line for head, line in zip(heads, lines, strict=True))


def curves(done: Sweep, path: Path) -> Path:
    """A panel for each figure over the first field, a line for each combination of the others, real images dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    names = list(done.points[0][1].figures or {})
    over = next(iter(done.values))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    drawing = Drawing(figsize=(4 * columns, 3 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(drawing)
    report = done.points[0][1].report
    says = f"{model_name(report['settings']['model']['source'])}, {report['num']:,} samples a point"
    drawing.suptitle(f"{says}, {report['num_real']:,} real images beside them", fontsize=9, parse_math=False)
    panels = drawing.subplots(rows, columns, squeeze=False).ravel()
    lines: dict[str, list[tuple[Any, Evaluation]]] = {}
    for point, made in done.points:
        others = ", ".join(f"{name}={value}" for name, value in point.items() if name != over)
        lines.setdefault(others, []).append((point[over], made))
    numeric = all(isinstance(value, (int, float)) for value in done.values[over])
    for panel, name in zip(panels, names, strict=False):
        for label, line in lines.items():
            line = sorted(line, key=lambda point: point[0]) if numeric else line
            x = [value if numeric else str(value) for value, _ in line]
            figures = [made.figures[name] for _, made in line if made.figures is not None]
            y, errors = [float(figure.value) for figure in figures], [float(figure.error) for figure in figures]
            between = "-" if numeric else "none"  # from one name to the next there is no way
            named = label.replace("$", r"\$") or None  # a dollar begins a formula
            panel.errorbar(x, y, yerr=errors, marker="o", capsize=2, linestyle=between, label=named)
        real = done.points[0][1].real or {}
        if name in real:
            panel.axhline(real[name].value, color="grey", linestyle="--", linewidth=1, label="real images")
        panel.set_xlabel(over)
        panel.set_title(name, parse_math=False)
        panel.grid(alpha=0.3)
        if name in real or len(lines) > 1:
            panel.legend(fontsize=7, loc="best")
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    return atomic_write(path, lambda file: drawing.savefig(file, format="png"))
