"""`compare`: is model B better than model A? Both are evaluated with the same seeds; differences have intervals.

OUT/a-0/, OUT/b-0/, ...   the evaluation of each run of A and of B
OUT/real/KEY/             features of real images, which all of them share
OUT/compare.json          figures, differences, settings, hashes, versions
OUT/compare.md            the table and the sentences, for a page
OUT/compare.png           the same seeds side by side, those of A above those of B
OUT/compare.seeds.json    which seeds these are
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from seriatim.core.errors import SeriatimError, UsageError
from seriatim.core.files import writable_folder, write_json, write_text
from seriatim.core.ownership import json_of, owned
from seriatim.core.processes import place
from seriatim.core.random import derive_seed
from seriatim.core.terminal import say
from seriatim.evaluation.base import FeatureExtractor, check_pictures
from seriatim.evaluation.blocks import Share
from seriatim.evaluation.differences import Difference, difference_of, lines_for_a_page, sentences
from seriatim.evaluation.identity import COMPARISON, flat, holds_features, is_comparison, said
from seriatim.evaluation.impartial import check_impartial
from seriatim.evaluation.reference import Images, Statistics
from seriatim.evaluation.run import Evaluation, asked, evaluate, possible_sides
from seriatim.evaluation.side_by_side import PICTURE, save_picture, shown
from seriatim.pipeline.labels import name_of
from seriatim.pipeline.loading import load
from seriatim.pipeline.pipeline import Pipeline

TABLE, SEEDS = "compare.md", "compare.seeds.json"
MOST_RUNS = 100  # of each side

Model = Pipeline | str | os.PathLike[str]
Opener = Callable[[], AbstractContextManager[Pipeline]]  # opens a model, which is freed when the context ends


@dataclass(frozen=True)
class Contestant:
    """One run of A or of B."""

    name: str  # "a-0": its folder in OUT
    open: Opener
    seed: int  # of its samples


@dataclass(frozen=True)
class Card:
    """What is known of a contestant before anything is drawn."""

    name: str
    source: str
    sha256: str  # of the weights; empty for a model that was never saved
    tokenizer: str
    request: dict[str, Any]  # flat, without the seed
    shape: tuple[int, ...]  # channels, height and width of its images
    classes: tuple[str, ...]  # names, or numbers as text


@dataclass(frozen=True)
class Comparison:
    """What `compare` gives. `figures` is empty until all shares are done, and in all processes but the first."""

    folder: Path
    a: list[Evaluation]  # of each run
    b: list[Evaluation]
    figures: dict[str, Difference] = field(default_factory=dict)
    conclusions: list[str] = field(default_factory=list)  # a sentence for each figure
    report: dict[str, Any] = field(default_factory=dict)  # what compare.json holds

    @property
    def missing(self) -> int:
        """Images that other processes still owe."""
        return sum(made.missing for made in (*self.a, *self.b))


def compare(
    a: Model | Sequence[Model],
    b: Model | Sequence[Model],
    data: Images | Statistics,
    out: Path | str,
    *,
    num: int,
    features: FeatureExtractor,
    real: Images | None = None,
    figures: Sequence[str] = (),
    seed: int = 0,
    batch_size: int | None = None,
    share: Share | None = None,
    cache: Path | str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quiet: bool = False,
    **settings: Any,
) -> Comparison:
    """Evaluate two models with the same labels from the same seeds, and give the difference B - A of each figure.

    `a` and `b` are each a pipeline, the name of a model, or several of these: runs of the same training with other
    seeds. With one of each, the 95 % intervals are over samples of these two models; with several of each they are over
    runs, and at least two of each are needed. Run i of both sides draws with the seed `seed` + i. Models that are given
    by name are loaded one after another, on `device` and with `dtype`. Other arguments are those of `evaluate`, and
    `settings`, those of a request, hold for all models; what is not given is what each model has stored.

    The same call goes on where another was stopped, and more runs may be added to it.
    Raises UsageError for models that can't be compared: of other classes or images, or runs of one side whose stored
    settings differ.
    """
    sides = [[opener(model, device, dtype) for model in several(given)] for given in (a, b)]
    return compare_opened(
        sides[0],
        sides[1],
        data,
        out,
        num=num,
        features=features,
        real=real,
        figures=figures,
        seed=seed,
        batch_size=batch_size,
        share=share,
        cache=cache,
        quiet=quiet,
        **settings,
    )


def several(given: Model | Sequence[Model]) -> Sequence[Model]:
    return [given] if isinstance(given, (Pipeline, str, os.PathLike)) else list(given)


def opener(model: Model, device: str | torch.device, dtype: str | torch.dtype) -> Opener:
    @contextlib.contextmanager
    def opened() -> Iterator[Pipeline]:
        yield model if isinstance(model, Pipeline) else load(model, device=device, dtype=dtype)

    return opened


def compare_opened(
    a: Sequence[Opener],
    b: Sequence[Opener],
    data: Images | Statistics,
    out: Path | str,
    *,
    num: int,
    features: FeatureExtractor,
    seed: int = 0,
    batch_size: int | None = None,
    share: Share | None = None,
    cache: Path | str | None = None,
    quiet: bool = False,
    real: Images | None = None,
    figures: Sequence[str] = (),
    **settings: Any,
) -> Comparison:
    """`compare` of models that are opened when they are needed, and only one of them at a time."""
    folder = Path(out)
    owned(folder, "comparison", is_comparison)
    if cache is not None:
        owned(Path(cache), "cache of features", holds_features, argument="cache")
    check_runs(len(a), len(b))
    sides = {
        side: [Contestant(f"{side}-{i}", each, seed + i) for i, each in enumerate(openers)]
        for side, openers in (("a", a), ("b", b))
    }

    def check_data(pipe: Pipeline) -> None:
        possible_sides(pipe, data, real, num, features, figures)

    cards = {
        side: [
            card_of(each, num, features, settings, check_data if each.name == "a-0" else None) for each in contestants
        ]
        for side, contestants in sides.items()
    }
    check_comparable(cards["a"], cards["b"])
    writable_folder(folder)
    chosen = shown(num, len(cards["a"][0].classes))
    key = key_of(cards, seed, chosen)
    draws = not place().rank and (share is None or share.process == 0)
    todo = draws and (key is None or json_of(folder / SEEDS).get("key") != key or not (folder / PICTURE).is_file())
    pictures: dict[str, list[Image.Image]] = {}
    done: dict[tuple[str, int], Evaluation] = {}

    def evaluated(pipe: Pipeline, each: Contestant) -> Evaluation:
        return evaluate(
            pipe,
            data,
            folder / each.name,
            num=num,
            features=features,
            real=real,
            figures=figures,
            seed=each.seed,
            batch_size=batch_size,
            share=share,
            cache=cache or folder,
            quiet=quiet,
            **settings,
        )

    order = [(side, i) for i in range(max(len(a), len(b))) for side in "ab" if i < len(sides[side])]
    for step, (side, i) in enumerate(order):  # pair after pair
        each = sides[side][i]
        if not quiet:
            say(f"{step + 1}/{len(order)}: {each.name}, {cards[side][i].source or 'a model in memory'}")
        with each.open() as pipe:
            done[side, i] = evaluated(pipe, each)
            if todo and i == 0:
                request = asked(pipe, num, seed, settings).part([image for row in chosen for image in row])
                pictures[side] = pipe(request=request, batch_size=batch_size, progress=not quiet).images
    for side, i in order:  # meanwhile another process may have done its share of these
        if done[side, i].missing:
            with sides[side][i].open() as pipe:
                done[side, i] = evaluated(pipe, sides[side][i])
    if todo:
        save_picture(folder, pictures, chosen, cards["a"][0].classes)
        seeds = [[derive_seed(seed, image) for image in row] for row in chosen]
        write_json(folder / SEEDS, {"key": key, "images": chosen, "seeds": seeds})
    result = Comparison(folder, [done["a", i] for i in range(len(a))], [done["b", i] for i in range(len(b))])
    if result.missing or place().rank:  # the first process compares
        return result
    return compared(result, cards)


def compared(done: Comparison, cards: Mapping[str, list[Card]]) -> Comparison:
    """The differences, written to compare.json and compare.md."""
    first = done.a[0]
    assert first.figures is not None, "all shares are done"
    found = {
        name: difference_of(
            name,
            [made.figures[name] for made in done.a if made.figures is not None],
            [made.figures[name] for made in done.b if made.figures is not None],
            None if first.real is None or name not in first.real else first.real[name],
        )
        for name in first.figures
    }
    num = int(first.report["num"])
    says = sentences(found, num)
    a, b = cards["a"][0].request, cards["b"][0].request
    other = {name: {"a": a.get(name), "b": b.get(name)} for name in sorted({*a, *b}) if a.get(name) != b.get(name)}
    report: dict[str, Any] = {
        side: [
            {
                "folder": made.folder.name,
                "source": card.source,
                "sha256": card.sha256,
                "seed": made.settings["request"]["seed"],
                "figures": {name: {"value": x.value, "error": x.error} for name, x in (made.figures or {}).items()},
                "pixels_sha256": made.report["pixels_sha256"]["samples"],
            }
            for made, card in zip(evaluations, cards[side], strict=True)
        ]
        for side, evaluations in (("a", done.a), ("b", done.b))
    }
    report |= {
        "num": num,
        "num_real": first.num_real,
        "interval": over_what(len(done.a), len(done.b)),
        "figures": {name: each.as_json() for name, each in found.items()},
        "conclusions": says,
        "settings_that_differ": other,
        "request": {name: value for name, value in a.items() if name not in other},
        "features": first.settings["features"],
        "reference": first.settings["reference"],
        "real": first.settings["real"],
        "reference_pixels_sha256": first.report["pixels_sha256"]["reference"],
        "versions": first.report["versions"],
        "seconds": round(sum(made.seconds for made in (*done.a, *done.b)), 2),
    }
    report["markdown"] = lines_for_a_page(report, found)
    write_text(done.folder / TABLE, report["markdown"] + "\n")
    write_json(done.folder / COMPARISON, report)
    return Comparison(done.folder, done.a, done.b, found, says, report)


def over_what(runs_of_a: int, runs_of_b: int) -> str:
    """What the intervals are over, in a sentence."""
    if runs_of_a == 1:
        return (
            "± is a 95 % interval (Student's t) over samples of these two models, from the same seeds in both; it says "
            "nothing of what another training would give: for that, compare several runs of each"
        )
    return (
        f"± is a 95 % interval (Student's t) over training runs, {runs_of_a} of A and {runs_of_b} of B: it holds "
        "what varies between trainings and between samples"
    )


# --- what is refused before hours of work ---------------------------------------------------------------------------


def check_runs(runs_of_a: int, runs_of_b: int) -> None:
    for name, ours, theirs in (("a", runs_of_a, runs_of_b), ("b", runs_of_b, runs_of_a)):
        if not 1 <= ours <= MOST_RUNS:
            raise UsageError(f"{name}: {ours} runs are not allowed; give from 1 to {MOST_RUNS}")
        if ours == 1 and theirs > 1:
            raise UsageError(
                f"{name}: one run can't be compared with {theirs}, because an interval over runs needs at least two of "
                "each; give another run of it, or compare one with one"
            )


def card_of(
    contestant: Contestant,
    num: int,
    features: FeatureExtractor,
    settings: Mapping[str, Any],
    check: Callable[[Pipeline], None] | None,
) -> Card:
    """Open a model, check that it can be evaluated, and write down what it is. Its errors begin with its name.

    `check` is what else is checked while it is open.
    """
    try:
        with contestant.open() as pipe:
            check_pictures(pipe.tokenizer)
            check_impartial(pipe.bundle.provenance, features)
            request = flat(said(asked(pipe, num, contestant.seed, settings)))
            if check is not None:
                check(pipe)
            classes = tuple(name_of(c, pipe.class_names) for c in range(pipe.model.classes))
            return Card(
                contestant.name,
                pipe.source,
                pipe.bundle.sha256,
                pipe.tokenizer.fingerprint(),
                {name: value for name, value in request.items() if name != "seed"},
                (pipe.tokenizer.channels, *pipe.tokenizer.size),
                classes,
            )
    except SeriatimError as error:
        raise type(error)(f"{contestant.name}: {error}") from error


def check_comparable(a: Sequence[Card], b: Sequence[Card]) -> None:
    first = a[0]
    for card in (*a, *b):
        if card.shape != first.shape:
            raise UsageError(
                f"{card.name}: draws images of {card.shape} (channels, H, W), {first.name} of {first.shape}; only "
                "models of the same images can be compared"
            )
        if card.classes != first.classes:
            raise UsageError(f"{card.name}: {other_classes(first, card)}; only models of the same classes are compared")
    for side in (a, b):
        known: dict[tuple[str, str], str] = {}
        for card in side:
            weights = card.sha256, card.tokenizer
            if card.sha256 and weights in known:
                raise UsageError(
                    f"{card.name}: has the same weights as {known[weights]}, so it is no other run; leave it out"
                )
            known[weights] = card.name
            for name in sorted({*card.request, *side[0].request}):
                ours, theirs = side[0].request.get(name), card.request.get(name)
                if ours != theirs:
                    setting = name.removeprefix("head_options.")
                    raise UsageError(
                        f"{setting}: is {ours!r} in {side[0].name} and {theirs!r} in {card.name}, but runs of one side "
                        f"draw alike; give {setting} for all"
                    )


def other_classes(first: Card, card: Card) -> str:
    """How the classes differ, in words."""
    ours, theirs = first.classes, card.classes
    if len(ours) != len(theirs):
        return f"has {len(theirs)} classes, {first.name} has {len(ours)}"
    c = next(c for c in range(len(ours)) if ours[c] != theirs[c])
    return f"its class {c} is {theirs[c]!r}, that of {first.name} is {ours[c]!r}"


# --- the picture ----------------------------------------------------------------------------------------------------


def key_of(cards: Mapping[str, Sequence[Card]], seed: int, chosen: Sequence[Sequence[int]]) -> str | None:
    """The hash of all that the picture depends on; None where a model was never saved, whose weights have no hash."""
    if not all(cards[side][0].sha256 for side in "ab"):
        return None
    models = [[cards[side][0].sha256, cards[side][0].tokenizer, cards[side][0].request] for side in "ab"]
    return hashlib.sha256(json.dumps([models, seed, chosen], sort_keys=True).encode()).hexdigest()
