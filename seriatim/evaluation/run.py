"""`evaluate`: samples of a model against real images, resumable, over several processes, with everything written down.

    OUT/settings.json   what this evaluation is; another setting is refused
    OUT/samples/        features of the samples, block by block
    OUT/real/KEY/       features of real images, by extractor and images
    OUT/results.json    figures, settings, hashes, versions
    OUT/neighbours.png  samples beside the training images they are nearest to, where asked for

n images, F features, K classes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seriatim.core.errors import UsageError, shown
from seriatim.core.files import writable_folder, write_json
from seriatim.core.processes import place
from seriatim.core.random import derive_seed
from seriatim.evaluation.base import FeatureExtractor, check_pictures
from seriatim.evaluation.blocks import SIZE, Blocks, ImagesOf, Share, eight_bits, features_of
from seriatim.evaluation.figures import (
    Reference,
    Set,
    check_count,
    check_figures,
    check_possible,
    class_map,
    figures_of,
)
from seriatim.evaluation.identity import SETTINGS, check_folders, said, same_settings
from seriatim.evaluation.impartial import check_impartial
from seriatim.evaluation.memory import nearest_picture
from seriatim.evaluation.metrics import Figure
from seriatim.evaluation.reference import (
    Images,
    Part,
    Statistics,
    as_many,
    balanced,
    described,
    fingerprints_of,
    halves,
    whole,
)
from seriatim.evaluation.rows import markdown
from seriatim.pipeline.labels import label_of, name_of
from seriatim.pipeline.metadata import versions
from seriatim.pipeline.pipeline import BATCH_TOKENS, Pipeline
from seriatim.pipeline.request import SampleRequest

FORMAT = 1
RESULTS, NEIGHBOURS = "results.json", "neighbours.json"
OURS = ("class_labels", "num_images_per_label", "seeds", "generator")  # evaluation chooses these itself
MOST_IMAGES = 10_000_000  # of an evaluation
MOST_NEIGHBOURS = 1000  # rows of a picture
READ_AT_ONCE = 64  # real images


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` gives. `figures` is None until all shares are done, and in all processes but the first."""

    folder: Path
    settings: dict[str, Any]
    figures: dict[str, Figure] | None = None  # of the samples
    real: dict[str, Figure] | None = None  # the same figures of as many real images
    num_real: int = 0  # how many those are; fewer than the samples where there were no more
    as_many: dict[str, Figure] | None = None  # then: of as many samples
    missing: int = 0  # images that other processes still owe
    seconds: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)  # what results.json holds


def evaluate(
    pipe: Pipeline,
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
    neighbours: int = 0,
    quiet: bool = False,
    **settings: Any,
) -> Evaluation:
    """Draw `num` images, class after class, and measure them against `data`, and other real images beside them.

    `data` is the reference, as a rule the training images: all of them. `real` are others, such as a test set; without
    it each class of `data` is halved, and one half is the reference. Image i has the seed hash(seed, i) in whatever
    batch or process; `settings` are those of a request. The same call goes on where another was stopped; features of
    real images are kept in `cache` (default: `out`), which several evaluations may share. `figures` are all that can
    be had here, or those of FIGURES that are named. `neighbours` is how many
    samples neighbours.png shows beside the images of `data` that they are nearest to.
    Raises UsageError for another evaluation's folder and for features that the tokenizer was trained with, DataError
    for too few images or classes that don't match.
    """
    begin = time.monotonic()
    folder = Path(out)
    check_folders(folder, None if cache is None else Path(cache))
    check_pictures(pipe.tokenizer)
    check_impartial(pipe.bundle.provenance, features)
    if not 0 <= neighbours <= MOST_NEIGHBOURS:
        raise UsageError(f"neighbours: {neighbours!r} is not allowed; it must be from 0 to {MOST_NEIGHBOURS}")
    request = asked(pipe, num, seed, settings)
    which = check_figures(figures)
    classes = pipe.model.classes
    reference, comparison = possible_sides(pipe, data, real, num, features, figures)

    writable_folder(folder)
    cached = Path(cache) if cache is not None else folder
    extractor = features.to(pipe.device).eval()
    hashes = {
        "features": {"name": extractor.name, "sha256": extractor.fingerprint(), "config": extractor.config},
        "reference": described(data, reference),
        "real": described(real or data, comparison),
    }
    chosen = {
        "format": FORMAT,
        "num": num,
        "classes": balanced_names(pipe),
        "figures": list(which),
        "block": SIZE,
        "model": {"source": pipe.source, "sha256": pipe.bundle.sha256, "tokenizer": pipe.tokenizer.fingerprint()},
        "request": said(request),
        **hashes,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe.device.type,
    }
    same_settings(folder / SETTINGS, chosen, {"reference": reference, "real": comparison})

    samples = Blocks(folder / "samples", num)
    parts = [part for part in (reference, comparison) if part is not None]
    stores = [Blocks(features_folder(cached, extractor, part), len(part)) for part in parts]
    names = ("reference", "real images")[-len(parts) :]
    works: list[tuple[Blocks, ImagesOf, str]] = [
        (store, partial(pictures, part), name) for part, store, name in zip(parts, stores, names, strict=True)
    ]
    works.append((samples, partial(drawn, pipe, request, batch_size), "samples"))
    for store, images_of, name in works:
        store.fill(features_of(images_of, extractor, name, pipe.device), name, share=share, quiet=quiet)
    missing = sum(len(block) for store in (samples, *stores) for block in store.missing())
    if missing or place().rank:  # the first process computes the figures
        return Evaluation(folder, chosen, missing=missing, seconds=time.monotonic() - begin)

    vectors = [store.read() for store in stores]
    beside = vectors[-1]
    given = data if isinstance(data, Statistics) and extractor.standard else None
    against = Reference(
        vectors[0] if reference is not None else None,
        None if reference is None else reference.labels,
        None if given is None else given.pool,
        None if given is None else given.spatial,
        class_map(extractor, classes, pipe.class_names),
        beside,
    )
    drawn_vectors = samples.read()
    if neighbours and reference is not None:

        def again(images: Sequence[int]) -> Tensor:
            return eight_bits(pipe(request=request.part(images), output_type="pt", progress=False).images * 2 - 1)

        path = folder / NEIGHBOURS
        rows = nearest_picture(path.with_suffix(".png"), drawn_vectors, reference, vectors[0], again, neighbours)
        write_json(path, [{**row, "seed": derive_seed(request.seed, row["sample"])} for row in rows])
    return judged(
        Evaluation(folder, chosen),
        Set(drawn_vectors, balanced(num, classes)),
        Set(beside, comparison.labels),
        against,
        extractor,
        which,
        near_what(pipe, data, reference),
        versions(pipe.device, pipe.dtype) | {"threads": str(torch.get_num_threads())},
        begin,
        quiet,
    )


def judged(
    made: Evaluation,
    samples: Set,
    beside: Set,
    against: Reference,
    extractor: FeatureExtractor,
    which: Sequence[str],
    nearest_to: str,
    machine: Mapping[str, str],
    begin: float,
    quiet: bool,
) -> Evaluation:
    """The figures of both sides, written to results.json."""
    ours = figures_of(samples, against, extractor, which, quiet=quiet)
    theirs = figures_of(beside, against, extractor, which, quiet=quiet)
    fewer = None
    count = len(beside.vectors)
    if count < len(samples.vectors):
        labels = None if samples.labels is None else samples.labels[:count]
        fewer = figures_of(Set(samples.vectors.first(count), labels), against, extractor, which, quiet=quiet)
    seconds = round(time.monotonic() - begin, 2)
    report: dict[str, Any] = {
        "figures": {
            name: {"value": x.value, "error": x.error}
            | ({"real": theirs[name].value, "real_error": theirs[name].error} if name in theirs else {})
            | ({"as_many": fewer[name].value, "as_many_error": fewer[name].error} if fewer else {})
            for name, x in ours.items()
        },
        "num": len(samples.vectors),
        "num_real": count,
        "error": "standard error: jackknife over 10 groups of the images measured, the reference taken as given; of a "
        "kernel distance over subsets, their spread",
        "nearest_to": nearest_to,
        "pixels_sha256": {
            "samples": samples.vectors.pixels,
            "reference": "" if against.vectors is None else against.vectors.pixels,
            "real": beside.vectors.pixels,
        },
        "settings": made.settings,
        "versions": dict(machine),
        "seconds": seconds,
    }
    report["markdown"] = markdown([report])
    write_json(made.folder / RESULTS, report)
    return Evaluation(made.folder, made.settings, ours, theirs, count, fewer, 0, seconds, report)


# --- what is asked ------------------------------------------------------------------------------------------------


def asked(pipe: Pipeline, num: int, seed: int, settings: Mapping[str, Any]) -> SampleRequest:
    """A request with every class once, whose images 0 to `num` - 1 are those of the evaluation (`request.part`)."""
    for name in OURS:
        if settings.get(name) is not None:
            raise UsageError(f"{name}: is not for evaluation, which draws every class alike; leave it out")
    if isinstance(num, bool) or not isinstance(num, int) or not 1 <= num <= MOST_IMAGES:
        raise UsageError(f"num: {shown(num)} is not allowed; it must be an integer from 1 to {MOST_IMAGES:,}")
    classes = range(pipe.model.classes)
    labels = tuple(label_of(c, pipe.class_names) for c in classes) if classes else (None,)
    request = pipe.request(**{**settings, "seed": seed, "class_labels": labels})
    if isinstance(request.order, tuple) and request.order and isinstance(request.order[0], tuple):
        raise UsageError("order: one for each image is not for evaluation; give a name, or one order for all")
    return request


def possible_sides(
    pipe: Pipeline,
    data: Images | Statistics,
    real: Images | None,
    num: int,
    features: FeatureExtractor,
    figures: Sequence[str],
) -> tuple[Part | None, Part]:
    """`sides`, once it is checked that they hold what the figures need."""
    which = check_figures(figures)
    reference, comparison = sides(pipe, data, real, num)
    check_count("num", num, features, which)
    if not (isinstance(data, Statistics) and data.pool is not None and features.standard):
        if reference is None:
            raise UsageError(
                f"data: {getattr(data, 'path', data)} holds statistics of Inception's features and no images; "
                "evaluate with features inception"
            )
        check_count("data", len(reference), features, which)
    check_count("real_data", len(comparison), features, which)
    if figures:
        path = str(getattr(data, "path", "data"))
        check_possible(figures, features, pipe.model.classes, pipe.class_names, reference, path)
    return reference, comparison


def sides(pipe: Pipeline, data: Images | Statistics, real: Images | None, num: int) -> tuple[Part | None, Part]:
    """The reference, None where only its statistics are known, and as many other real images as samples."""
    classes, names = pipe.model.classes, pipe.class_names
    source = data.images if isinstance(data, Statistics) else data
    for name, images in (("data", source), ("real_data", real)):
        if images is not None:
            check_shape(name, images, pipe)
    reference = None if source is None else whole(source, classes, names)
    if real is not None:
        return reference, as_many(whole(real, classes, names), num, classes)
    if isinstance(data, Statistics) or reference is None:
        raise UsageError("real_data: is required beside a reference file: images that the reference does not hold")
    reference, rest = halves(reference)
    if not len(rest):
        raise UsageError("data: one image can't be halved into a reference and others; give more, or real_data")
    return reference, as_many(rest, num, classes)


def near_what(pipe: Pipeline, data: Images | Statistics, reference: Part | None) -> str:
    """What `nearest` is the way to: it tells of copies only where that is all of the training images."""
    if reference is None:
        return "no images"
    trained_on = pipe.bundle.provenance.get("data", {}).get("fingerprint")
    if isinstance(data, Statistics) or trained_on not in fingerprints_of(data):
        return f"{len(reference):,} images, not known to be those of training: copies of others are not seen"
    if len(reference) < data.count:
        return f"{len(reference):,} of {data.count:,} training images: copies of the rest are not seen; name real_data"
    return f"all {data.count:,} training images"


def check_shape(argument: str, images: Images, pipe: Pipeline) -> None:
    theirs, ours = (images.channels, *images.size), (pipe.tokenizer.channels, *pipe.tokenizer.size)
    if theirs != ours:
        raise UsageError(f"{argument}: images are {theirs} (channels, H, W), the model draws {ours}; set data.size")


def balanced_names(pipe: Pipeline) -> list[str]:
    return [name_of(c, pipe.class_names) for c in range(pipe.model.classes)]


def features_folder(cached: Path, extractor: FeatureExtractor, part: Part) -> Path:
    """The folder of these images' features: that of an earlier version if it exists, or else this version's."""
    says = [f"{extractor.fingerprint()} {text} {SIZE}".encode() for text in part.fingerprints()]
    folders = [cached / "real" / hashlib.sha256(text).hexdigest()[:16] for text in says]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


# --- images -------------------------------------------------------------------------------------------------------


def pictures(part: Part, block: range) -> Iterator[Tensor]:
    for index in part.index[block.start : block.stop].split(READ_AT_ONCE):
        yield eight_bits(part.data.images(index))


def drawn(pipe: Pipeline, request: SampleRequest, batch_size: int | None, block: range) -> Iterator[Tensor]:
    size = batch_size or max(1, BATCH_TOKENS // pipe.model.tokens)
    for first in range(block.start, block.stop, size):
        some = range(first, min(first + size, block.stop))
        result = pipe(request=request.part(some), batch_size=size, output_type="pt", progress=False)
        yield eight_bits(result.images * 2 - 1)


# --- a row for people ---------------------------------------------------------------------------------------------
