"""The difference between two models in each figure, with its interval, as numbers, a table and sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seriatim.evaluation.intervals import Interval, between_runs, of_figure, of_runs, paired, samples_to_tell
from seriatim.evaluation.metrics import Figure
from seriatim.evaluation.rows import model_name, safe

LOWER_IS_BETTER = ("FD", "FID", "sFD", "sFID", "KD", "KID")
HIGHER_IS_BETTER = ("precision", "recall", "IS", "accuracy")  # of `diversity` and `nearest` neither is
MOST_TIMES = 100  # as many samples are named that would tell a difference; more are as good as none


@dataclass(frozen=True)
class Difference:
    """One figure of two models."""

    name: str
    a: Interval
    b: Interval
    difference: Interval  # B - A
    real: float | None  # the same figure of as many real images
    runs: int  # the smaller number of runs of the two

    @property
    def told(self) -> bool:
        """Whether the interval of the difference excludes zero."""
        return self.difference.excludes_zero

    @property
    def better(self) -> str | None:
        """ "A" or "B"; None where no difference can be told, or where neither direction is better."""
        kind = self.name.partition("[")[0]
        if not self.told or kind not in LOWER_IS_BETTER + HIGHER_IS_BETTER:
            return None
        return "B" if (self.difference.value > 0) == (kind in HIGHER_IS_BETTER) else "A"

    def as_json(self) -> dict[str, Any]:
        def said(x: Interval) -> dict[str, float]:
            return {"value": x.value, "half_width": x.half, "degrees_of_freedom": x.degrees}

        return {
            "a": said(self.a),
            "b": said(self.b),
            "difference": said(self.difference),
            "told": self.told,
            "better": self.better,
        } | ({} if self.real is None else {"real": self.real})


def difference_of(name: str, a: Sequence[Figure], b: Sequence[Figure], real: Figure | None) -> Difference:
    """From the figure of each run of A and of B: over samples with one run of each, or else over runs."""
    beside = None if real is None else real.value
    if len(a) == len(b) == 1:
        return Difference(name, of_figure(a[0]), of_figure(b[0]), paired(a[0], b[0]), beside, 1)
    means = [of_runs([x.value for x in side]) for side in (a, b)]
    return Difference(name, means[0], means[1], between_runs(a, b), beside, min(len(a), len(b)))


def sentences(found: Mapping[str, Difference], num: int) -> list[str]:
    """What can be said of each figure, in plain words."""
    return [sentence(each, num) for each in found.values()]


def sentence(each: Difference, num: int) -> str:
    d = each.difference
    if each.told:
        than = {"A": ": A is better", "B": ": B is better", None: ""}[each.better]
        return f"{each.name}: B's is {'higher' if d.value > 0 else 'lower'} by {plus_minus(d, absolute=True)}{than}"
    if d.value == d.half == 0:
        return f"{each.name}: there is no difference at all"
    text = f"{each.name}: no difference can be told, B - A is {plus_minus(d)}"
    # Only an accuracy is a mean over images, whose error falls with the root of their number and which has no bias.
    if each.name.partition("[")[0] == "accuracy" and each.runs == 1 and d.value:
        needed = samples_to_tell(d, num)
        if num < needed <= MOST_TIMES * num:
            text += f"; if it is as large as it seems, about {two_digits(needed):,} samples would tell it"
    return text


def plus_minus(x: Interval, *, absolute: bool = False) -> str:
    return f"{abs(x.value) if absolute else x.value:.4g} ± {x.half:.2g}"


def two_digits(count: int) -> int:
    """The count rounded up to two digits."""
    unit = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return -(-count // unit) * unit


def rows_of(found: Mapping[str, Difference]) -> list[tuple[str, ...]]:
    """Cells for each figure: its name, A, B, B - A, the real images', and who is better."""
    return [
        (
            name,
            plus_minus(each.a),
            plus_minus(each.b),
            plus_minus(each.difference),
            "" if each.real is None else f"{each.real:.4g}",
            f"{each.better} is better" if each.better else "they differ" if each.told else "not told",
        )
        for name, each in found.items()
    ]


def heads_of(report: Mapping[str, Any]) -> tuple[str, ...]:
    """The heads of these columns."""
    return "figure", title("A", report["a"]), title("B", report["b"]), "B - A", f"{report['num_real']:,} real", ""


def title(side: str, runs: Sequence[Mapping[str, Any]]) -> str:
    name = model_name(runs[0]["source"])
    return f"{side}: {name}" + (f" and {len(runs) - 1} more" if len(runs) > 1 else "")


def settings_that_differ(report: Mapping[str, Any]) -> list[str]:
    """A line for each sampling setting that the models have stored with other values."""
    return [
        f"{name.removeprefix('head_options.')}: {value_of(x['a'])} in A, {value_of(x['b'])} in B, as each has stored"
        for name, x in report["settings_that_differ"].items()
    ]


def value_of(x: Any) -> str:
    return "none" if x is None else str(x)


def lines_for_a_page(report: Mapping[str, Any], found: Mapping[str, Difference]) -> str:
    """The table in markdown, with the models, the number of samples and the reference below it."""
    rows = [heads_of(report), *rows_of(found)]
    lines = ["| " + " | ".join(map(safe, row)) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    pixels = report["reference_pixels_sha256"]
    reference = report["reference"].get("file_sha256") or pixels or report["reference"].get("sha256", "")
    features = report["features"]
    lines += ["", f"{report['num']:,} samples of each; {report['interval']}."]
    lines += [f"Features {safe(features['name'])} {features['sha256'][:8]}, reference {reference[:8]}."]
    for side in "ab":
        models = ", ".join(f"{safe(x['source'] or 'model')} {x['sha256'][:8]} (seed {x['seed']})" for x in report[side])
        lines.append(f"{side.upper()}: {models}.")
    lines += ["", *(f"- {safe(text)}" for text in (*settings_that_differ(report), *report["conclusions"]))]
    return "\n".join(lines)
