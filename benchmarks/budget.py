"""Which recipe makes the best pictures in so many minutes? Contestants with equal time of training, judged alike.

    python benchmarks/budget.py --list
    python benchmarks/budget.py --data cifar10/train --real-data cifar10/test --classifier classifier:runs/classifier \\
        --minutes 10 --out runs/budget --only base muon unet

A contestant is a recipe: the base, a small causal model with a flow head, and what the contestant changes. Names joined
by + make one contestant that changes all of it (`muon+patch-2`), and --contestant adds one of your own. `unet` is the
opponent: a UNet with flow matching. Each training has one thread and as many images as it manages in --minutes, by the
clock of `base` (see equal_minutes.py), so that its learning rate falls to the end.

Judged are samples at each --guidance, in the classifier's features: the Frechet distance to --data, accuracy, precision
and recall, and the seconds of one thread for a sample. The tables have the whole curve of each contestant, the guidance
of the least distance, and that of the highest accuracy with enough recall. With --confirm both are judged again by
other samples than those that chose them. Intervals are 95 % of Student's t over the seeds, where there are several, and
else over ten groups of the samples.

What is done already in --out is not done again, and a training goes on from its last checkpoint: stop at any time. Some
of --only or --seeds do some of the work, so that several processes can share it; --report makes the tables of what is
there. A contestant whose loss is not finite is reported as such, and the others go on.

    OUT/NAME-SEED/                 the run, its budget, and the judged samples
    OUT/NAME-SEED/row-*.json       what the tables are made of
    OUT/pictures/NAME-SEED-*.png   samples, a class in each row
    OUT/tables.md, OUT/curves.png  the results
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from ablation_cells import read, refuse_other
from budget_contestants import CONTESTANTS, Contestant, composed, recipe_values
from budget_tables import best, curves, tables
from equal_minutes import cache_latents, facts_of, generator, train_for
from judged_samples import Judge, draw
from unet_flow import registered

from seriatim.core.errors import NumericsError, SeriatimError, UsageError, one_line, shown
from seriatim.core.files import write_json, write_text
from seriatim.core.reading import Unreadable, parse_yaml
from seriatim.core.schedules import GUIDANCE_OPTIONS
from seriatim.core.settings import Settings
from seriatim.core.validation import parse
from seriatim.models.build import parameter_count
from seriatim.pipeline.loading import load
from seriatim.pipeline.pipeline import Pipeline
from seriatim.training.config import Recipe, override

CONFIRMING = 1000  # what is added to the seed of samples that confirm a guidance


@dataclass(frozen=True)
class Point:
    """Settings of a request at which samples are judged, and a name for them."""

    name: str
    scale: float
    schedule: str = "constant"
    options: tuple[float, ...] = ()  # of the schedule

    @classmethod
    def of(cls, text: str) -> Point:
        """From SCALE, or SCALE:SCHEDULE and the schedule's numbers, such as 4:interval:0.2:1."""
        scale, schedule, *options = (text if ":" in text else f"{text}:constant").split(":")
        try:
            made = cls(text.replace(":", "-"), float(scale), schedule, tuple(map(float, options)))
        except ValueError:
            raise UsageError(f"guidance: {text!r} is not allowed; give 4, 4:linear or 4:interval:0.2:1") from None
        parse(Settings, made.over_tokens, where=f"guidance {text}", error=UsageError)
        return made

    @property
    def over_tokens(self) -> dict[str, Any]:
        """The settings of a request to a model that generates an image token by token."""
        told: dict[str, Any] = {"guidance_scale": self.scale, "guidance_schedule": self.schedule}
        name = GUIDANCE_OPTIONS.get(self.schedule, "guidance_power")
        value = self.options if name == "guidance_interval" else next(iter(self.options), None)
        return told | ({name: value} if self.options else {})

    def settings(self, pipe: Pipeline) -> dict[str, Any] | None:
        """The settings of a request; None if the model has no such schedule.

        A model whose image is one token has no schedule over the tokens. Its interval is one of the times of its flow.
        """
        if pipe.model.tokens > 1 or self.schedule == "constant":
            return self.over_tokens
        if self.schedule != "interval":
            return None
        low, high = self.options
        told = {"guidance_scale": self.scale, "guidance_schedule": "constant"}
        return {**told, "guidance_from": low, "guidance_to": high}


@dataclass(frozen=True)
class Work:
    """One contestant with one seed."""

    name: str
    seed: int
    changes: dict[str, Any]
    given: argparse.Namespace

    @property
    def folder(self) -> Path:
        out: Path = self.given.out
        return out / f"{self.name}-{self.seed}"

    @property
    def told(self) -> dict[str, Any]:
        """What all results of this contestant depend on; folders of images may move."""
        given = self.given
        return {
            "minutes": given.minutes,
            "changes": self.changes,
            "overrides": given.overrides,
            "dtype": given.dtype,
            "sampling_dtype": given.sampling_dtype,
            "size": given.size,
            "classifier": str(given.classifier),
        }

    def recipe(self, images: int, save_images: int, latents: Path | None = None) -> Recipe:
        """The recipe for so many images, which are those of --data, or their `latents`."""
        values = recipe_values(self.changes)
        warmup = values.pop("warmup")
        values["data"] |= {"path": str(self.given.data), "size": self.given.size}
        if values["tokenizer"].get("patch") == "whole":
            values["tokenizer"]["patch"] = self.given.size
        values["training"] |= {"dtype": self.given.dtype, "keep": 1, "images": images, "save_images": save_images}
        values["training"]["warmup_images"] = round(warmup * images)
        values |= {"name": self.name, "seed": self.seed}
        made = override(values, self.given.overrides)
        if latents is not None:
            made["data"] = {"kind": "latents", "path": str(latents)}
        return parse(Recipe, made, where=self.name)

    def train(self) -> None:
        """Train for the time; the images of a trained tokenizer are encoded before, which does not count."""
        recipe, latents = self.recipe(1, 0), None
        if "from" in recipe.tokenizer:
            text = json.dumps([recipe.tokenizer, recipe.data], sort_keys=True)
            latents = self.given.out / "cache" / hashlib.sha256(text.encode()).hexdigest()[:16]
            cache_latents(recipe, latents)
        reference = generator(Work("base", 0, {}, self.given).recipe)
        train_for(self.given.minutes, partial(self.recipe, latents=latents), self.folder, reference, self.given.out)

    def judged(self, pipe: Pipeline, point: Point, judge: Judge, *, confirming: bool = False) -> dict[str, Any] | None:
        """The row of a point; None if the model has no such schedule of guidance."""
        asked = point.settings(pipe)
        if asked is None:
            return None
        settings = {**asked, **self.given.sampling}
        stem = "+".join([point.name, *(f"{key}={value}" for key, value in self.given.sampling.items())])
        seed = self.seed + CONFIRMING if confirming else self.seed
        file = self.folder / f"row-{stem}{'-confirmed' if confirming else ''}.json"
        told = {**self.told, "samples": judge.samples, "sampling": self.given.sampling}
        if not refuse_other(file, told):
            figures = judge(pipe, file.with_name(file.stem.replace("row-", "judged-", 1)), seed, **settings)
            row = {"name": self.name, "seed": self.seed, "point": stem, "scale": point.scale, "confirming": confirming}
            row |= {"samples": judge.samples, "parameters": parameter_count(pipe.model), **facts_of(self.folder)}
            if confirming:  # the picture is there
                row["sample_seconds"] = read(self.folder / f"row-{stem}.json")["sample_seconds"]
            else:
                picture = self.given.out / "pictures" / f"{self.folder.name}-{stem}.png"
                picture.parent.mkdir(parents=True, exist_ok=True)
                row["sample_seconds"] = draw(pipe, picture, self.seed, settings)
            write_json(file, {**row, **figures, "settings": told})
        return read(file)

    def rows(self, points: Sequence[Point], judge: Judge, *, confirming: bool = False) -> list[dict[str, Any]]:
        """Train, and judge at each point; a training that failed has no rows, and is not tried again."""
        failed = self.folder / "failed.json"
        if refuse_other(failed, self.told):
            return []
        try:
            self.train()
            pipe = load(self.folder / "run", device="cpu", dtype=self.given.sampling_dtype)
            if not pipe.model.classes:
                points = [Point("1", 1.0)]  # without classes there is nothing to guide to
            found = (self.judged(pipe, point, judge, confirming=confirming) for point in points)
            return [row for row in found if row is not None]
        except NumericsError as error:
            write_json(failed, {"name": self.name, "seed": self.seed, "why": one_line(error), "settings": self.told})
            print(f"failed: {self.name}-{self.seed}: {one_line(error)}", file=sys.stderr, flush=True)  # noqa: T201
            return []


def carry_out(given: argparse.Namespace) -> None:
    """Train and judge all that is asked for; the guidance that is best over all seeds is confirmed."""
    paths = {"data": given.data, "real": given.real_data, "classifier": given.classifier, "size": given.size}
    judge = Judge(**paths, samples=given.samples, cache=given.out / "real")
    for name in given.only:
        works = [Work(name, seed, composed(name, given.table), given) for seed in given.seeds]
        rows = [row for work in works for row in work.rows(given.points, judge)]
        if given.confirm and rows:
            chosen = {label for label in best(rows) if label is not None}
            again = [point for point in given.points if any(label.split("+")[0] == point.name for label in chosen)]
            confirming = Judge(**paths, samples=given.confirm, cache=given.out / "real")
            for work in works:
                work.rows(again, confirming, confirming=True)


def listed(table: dict[str, Contestant]) -> str:
    """A line for each contestant: its name, the lever, and what it changes."""
    wide = max(map(len, table))
    lines = []
    for name, contestant in table.items():
        changes = yaml.safe_dump(contestant.changes, default_flow_style=True, width=1 << 20).strip()
        after = f"{contestant.of}, and " if contestant.of else ""
        lines.append(f"{name:{wide}}  {contestant.lever}: {after}{changes}")
    return "\n".join(lines)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [read(file) for file in sorted(out.glob("*/row-*.json"))]


def report(given: argparse.Namespace) -> str:
    """The tables of all that is in --out, which are written there too, and the picture of the curves."""
    rows = rows_of(given.out)
    failed = [read(file) for file in sorted(given.out.glob("*/failed.json"))]
    if not rows and not failed:
        raise UsageError(f"out: {given.out} has no results; run without --report first")
    text = tables(rows, failed)
    write_text(given.out / "tables.md", text + "\n")
    if rows:
        curves(rows, given.out / "curves.png")
    return text


def mapping(option: str, text: str) -> dict[str, Any]:
    try:
        value = parse_yaml(text)
    except Unreadable as error:
        raise UsageError(f"{option}: {shown(text)} {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{option}: {shown(text)} is not a mapping such as {{num_diffusion_steps: 50}}")
    return value


def arguments(command: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("overrides", nargs="*", help="of all recipes, such as model.depth=2")
    add("--list", action="store_true", help="print the contestants and what each changes")
    add("--report", action="store_true", help="make the tables of what is in --out; nothing is trained")
    add("--out", type=Path, default=Path("runs/budget"))
    add("--only", nargs="+", metavar="NAME", help="some contestants, or several joined by + (default: all)")
    add("--contestant", action="append", default=[], metavar="NAME={KEY: VALUE}", help="one of your own, as YAML")
    add("--data", type=Path, help="class folders of training images")
    add("--real-data", type=Path, help="class folders of other images")
    add("--classifier", help="the run of a classifier, which judges")
    add("--size", type=int, default=32, help="the side of an image")
    add("--minutes", type=float, default=10.0, help="of one thread, for each training")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of training")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--guidance", nargs="+", default=["1.5", "2", "3", "4", "6"], metavar="SCALE[:SCHEDULE...]",
        help="constant unless a schedule is named: 4:linear, 4:interval:0.2:1, 4:power-cosine:2")  # fmt: skip
    add("--samples", type=int, default=1000, help="judged at each guidance")
    add("--confirm", type=int, default=0, metavar="SAMPLES", help="judge the best guidance again by so many others")
    add("--sampling", default="{}", help="other settings of all requests, as YAML: {num_diffusion_steps: 50}")
    add("--sampling-dtype", default="float32", choices=["bfloat16", "float32"], help="of the backbone in sampling")
    given = parser.parse_args(command)
    own = dict(text.partition("=")[::2] for text in given.contestant)
    own = {name: Contestant("your own", mapping("contestant", told)) for name, told in own.items()}
    given.table = CONTESTANTS | own
    given.points = [Point.of(text) for text in given.guidance]
    given.sampling, given.only = mapping("sampling", given.sampling), given.only or list(given.table)
    for name in given.only:
        recipe_values(composed(name, given.table))  # refuses an unknown name now, not after hours
    for name, kind in (("data", "folder"), ("real_data", "folder"), ("classifier", "trained classifier")):
        if getattr(given, name) is None and not given.list and not given.report:
            raise UsageError(f"{name.replace('_', '-')}: is missing; name a {kind}, or give --list or --report")
    return given


def main(command: Sequence[str] | None = None) -> int:
    torch.set_num_threads(1)
    try:
        with registered():
            given = arguments(command)
            if not given.list and not given.report:
                carry_out(given)
            print(listed(given.table) if given.list else report(given))  # noqa: T201
    except SeriatimError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)  # noqa: T201
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
