"""Prepare a run before its first step: build the parts of a recipe, write the run folder, compare a resumed run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from seriatim.backbones.base import Sequential
from seriatim.checkpoints.native import Bundle, check_class_names
from seriatim.checkpoints.run_names import is_local
from seriatim.checkpoints.tokenizer import load_tokenizer
from seriatim.core.construct import check_room
from seriatim.core.errors import ConfigError, Stopped, UsageError, one_line
from seriatim.core.files import expanded, write_json, write_text
from seriatim.core.ownership import json_of
from seriatim.core.plugins import plugin_changes
from seriatim.core.progress import Progress
from seriatim.core.random import derive_seed
from seriatim.core.stopping import StopRequest
from seriatim.core.terminal import say
from seriatim.data.base import ImageData, StreamData
from seriatim.data.held_out import build_divided
from seriatim.data.loader import to_float
from seriatim.models.base import SequenceModel
from seriatim.models.build import build_model, seeded
from seriatim.models.registry import BACKBONES
from seriatim.pipeline.pipeline import Pipeline
from seriatim.pipeline.request import left_out
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.kinds import TOKENIZERS, build_tokenizer
from seriatim.tokenizers.kl import KL
from seriatim.tokenizers.vq import VQ
from seriatim.training.config import AnyRecipe, Recipe, dump, read_any
from seriatim.training.data_record import check_record, write_record
from seriatim.training.freezing import freeze
from seriatim.training.log import environment
from seriatim.training.optim import rate_after
from seriatim.training.run_folder import ENVIRONMENT, RECIPE, check_out

# A resumed run may change these settings, because they affect no weights (but by the order of sums and, where there is
# dropout, by its masks), or only how long training lasts.
FREE = {
    "changes",
    "data.check",
    "data.empty",
    "data.labels",
    "data.loose",
    "data.max_bad",
    "data.max_pixels",
    "data.memory",
    "data.path",
    "data.test_path",
    "data.validation",
    "description",
    "objective.perceptual_features",
    "sampling",
    "tokenizer.from",
    "tokenizer.path",
    "training.accumulate",
    "training.checkpoint_activations",
    "training.evaluate_features",
    "training.evaluate_images",
    "training.images",
    "training.keep",
    "training.log_images",
    "training.micro_batch",
    "training.on_blow_up",
    "training.sample_each",
    "training.sample_images",
    "training.sample_rows",
    "training.save_images",
    "training.shard",
    "training.tensorboard",
    "training.test_images",
    "training.threads",
    "training.trackers",
    "training.validate_images",
    "training.workers",
}
# A resumed run may also change these, which affect weights, because they help a run whose loss blew up. recipe.yaml
# records every change of either kind.
CURES = {
    "training.learning_rate",
    "training.optimiser.matrix_rate",
    "training.clip",
    "training.dtype",
    "training.on_nan",
    "training.max_skips",
}
# "auto" means the value that the run measured and recorded.
MEASURED = {"training.dtype", "training.micro_batch", "training.threads"}

FIT_BATCH = 512  # images at once when the tokenizer measures its statistics
FIT_IMAGES = 10_000  # about how many images it measures


def build_inputs(recipe: Recipe) -> tuple[ImageData, Tokenizer]:
    """The data and the tokenizer of a recipe. `tokenizer: {from: FOLDER, ...}` names a saved tokenizer."""
    data = build_divided(recipe.data)
    given = {"size": list(data.size), "channels": data.channels, **recipe.tokenizer}
    source = given.pop("from", None)
    if source == "" or (source is not None and not isinstance(source, str)):
        raise ConfigError(f"tokenizer.from: {source!r} is not allowed; name a tokenizer, model or run folder")
    if source is None:
        check_kind(given.get("kind"), data)
        if given.get("path") is None:  # with a path, the files state the size of the weights
            check_room(lambda: build_tokenizer(given), given, "tokenizer")
        tokenizer = build_tokenizer(given)
        if isinstance(tokenizer, (KL, VQ)):
            raise ConfigError(
                f"tokenizer.kind: {recipe.tokenizer['kind']!r} begins with random weights; train one with a "
                "recipe such as kl-32, and name its run, or another folder with trained weights, by "
                "tokenizer.from=FOLDER; the folder of training.init_from is possible too"
            )
    else:
        folder = expanded(source)
        if not is_local(folder):
            raise ConfigError(
                f"tokenizer.from: there is no folder {folder}; make one with `seriatim convert`, or name a model folder"
            )
        tokenizer = load_tokenizer(folder, **given)
    for part in (data, data.held_out):
        if part is not None:
            part.check_tokenizer(tokenizer)
    if tokenizer.size != data.size or tokenizer.channels != data.channels:
        ours, theirs = (f"{x.channels} x {x.size[0]} x {x.size[1]}" for x in (tokenizer, data))
        raise ConfigError(f"tokenizer: made for images of {ours}, but the data has {theirs}; make the sizes equal")
    return data, tokenizer


def check_kind(kind: Any, data: ImageData) -> None:
    """Raise ConfigError if the tokenizer takes pictures and the data has none, or the other way round.

    An unknown kind is refused later.
    """
    if isinstance(kind, str) and kind in TOKENIZERS and TOKENIZERS[kind].pictures != data.pictures:
        fitting = ", ".join(name for name, cls in TOKENIZERS.items() if cls.pictures == data.pictures)
        what = "pictures" if data.pictures else "arrays, no pictures"
        raise ConfigError(f"tokenizer.kind: {kind!r} is not allowed; the data holds {what}, which need {fitting}")


def fit_tokenizer(
    tokenizer: Tokenizer, data: ImageData, *, quiet: bool = False, stop: StopRequest | None = None
) -> None:
    """Measure the statistics of tokens. Images and a cache of their moments give the same result."""
    if data.cached:
        tokenizer.fit_moments(unless_stopped(data.some(FIT_IMAGES, FIT_BATCH), stop))
    else:
        tokenizer.fit(unless_stopped(look_over(data, FIT_IMAGES, FIT_BATCH, quiet=quiet), stop))


def unless_stopped(batches: Iterable[Tensor], stop: StopRequest | None) -> Iterator[Tensor]:
    """Yield the batches; raise Stopped once the process is asked to stop."""
    for batch in batches:
        if stop is not None and stop.requested:
            raise Stopped(f"{stop.requested}: stopped before the first step; begin it again with --resume=auto")
        yield batch


def look_over(data: ImageData, most: int, size: int, *, quiet: bool = False) -> Iterator[Tensor]:
    """Yield about `most` images from all over the data, `size` at a time, in [-1, 1], with a progress bar."""
    total = len(range(0, data.count, max(1, data.count // most)))
    if isinstance(data, StreamData):
        total = min(most, data.count or most)
    with Progress(total, "measuring tokens", "images", quiet=quiet) as bar:
        for images in data.some(most, size):
            yield to_float(images)
            bar.advance(len(images))


def build(recipe: Recipe) -> tuple[ImageData, Tokenizer, SequenceModel]:
    """The data, tokenizer and model of a recipe. Initial weights depend on its seed alone."""
    data, tokenizer = build_inputs(recipe)
    check_class_names(data.class_names, len(data.class_names))
    sizes: dict[str, Any] = {"tokens": tokenizer.count, "classes": len(data.class_names)}
    sizes |= {"dim": tokenizer.dim} if tokenizer.vocab is None else {"vocab": tokenizer.vocab}
    backbone = BACKBONES.get(str(recipe.model.get("backbone", recipe.model.get("kind"))))
    if recipe.model.get("positions") == "sincos" or (backbone is not None and issubclass(backbone, Sequential)):
        sizes["grid"] = list(tokenizer.grid)
    check_room(lambda: build_model(recipe.model, **sizes), {**recipe.model, **sizes}, "model")
    with seeded(derive_seed(recipe.seed, "weights")):
        model = build_model(recipe.model, **sizes)
    freeze(model, recipe.training.freeze)
    try:  # wrong sampling defaults must be found now, not after training
        Pipeline(Bundle(model, tokenizer, data.class_names, dict(recipe.sampling))).request(seed=0)
    except UsageError as error:
        raise ConfigError(f"sampling: {one_line(error)}") from error
    for name in left_out(recipe.sampling, model):
        say(f"sampling.{name}: is left out, since the {type(model.head).__name__} head has no such option")
    return data, tokenizer, model


def begin_run(out: Path, recipe: AnyRecipe, data: ImageData, *, resume: bool) -> None:
    """Write the description of a new run, with the recipe last, or check that a resumed run is the same."""
    if resume:
        return check_same_run(out, recipe, data)
    check_out(out, resume=False, overwrite=False)  # again, since another process may have begun a run meanwhile
    write_record(out, data)
    write_json(out / ENVIRONMENT, environment())
    write_text(out / RECIPE, dump(recipe.model_copy(update={"changes": []})))  # changes are those of another run
    return None


def check_same_run(out: Path, recipe: AnyRecipe, data: ImageData) -> None:
    """Raise ConfigError or DataError, which names what differs, if the settings or images are not those of the run."""
    first = read_any(str(out / RECIPE))
    if type(first) is not type(recipe):
        kinds = [r.kind if not isinstance(r, Recipe) else "generator" for r in (first, recipe)]
        raise ConfigError(f"kind: {out} holds the run of a {kinds[0]}, not of a {kinds[1]}; begin another run")
    before, now = flat(first), flat(recipe)
    for key in sorted(before.keys() | now.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in FREE | CURES)
        measured = key in MEASURED and now.get(key) == "auto"
        if before.get(key) != now.get(key) and not free and not measured:
            raise ConfigError(
                f"{key}: {before.get(key)!r} in {out / 'recipe.yaml'}, {now.get(key)!r} now; a resumed run keeps its "
                f"settings, except for {', '.join(sorted(CURES))}: change it back, or begin another run"
            )
    check_record(out, data)


def changes_of(out: Path, recipe: AnyRecipe, seen: int) -> list[str]:
    """A list of all changes of settings when the run was resumed; those made now, after `seen` images, are reported."""
    first = read_any(str(out / RECIPE))
    before, now = flat(first), flat(recipe)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    changed = [key for key in changed if key != "changes" and not (key in MEASURED and now[key] == "auto")]
    new = [f"after {seen} images: {key} from {before.get(key)} to {now.get(key)}" for key in changed]
    plugins = json_of(out / ENVIRONMENT).get("plugins")
    if isinstance(plugins, list):  # earlier releases wrote none
        new += [f"after {seen} images: {change}" for change in plugin_changes(plugins)]
    for change in new:
        say(change)
    old, new_end = first.training.images, recipe.training.images
    if recipe.training.schedule == "cosine" and old != new_end:
        rates = [rate_after(settings, seen, settings.images) for settings in (first.training, recipe.training)]
        say(
            f"the cosine schedule now ends after {new_end} images, not after {old}: after {seen} images the learning "
            f"rate goes from {rates[0]:.3g} to {rates[1]:.3g}"
        )
    return [*first.changes, *new]


def refuse_fewer_images(images: int, seen: int, out: Path) -> None:
    """Raise UsageError if a resumed run would end before the images that it has already seen."""
    if images < seen:
        raise UsageError(
            f"training.images: {images} is less than the {seen} images that the run in {out} has seen; to end it where "
            f"it stands, which writes {out / 'model'}, set training.images={seen}"
        )


def flat(recipe: AnyRecipe) -> dict[str, Any]:
    """The recipe as a flat mapping such as `{"training.images": 5000, ...}`."""

    def walk(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        result = {}
        for key, value in values.items():
            inner = walk(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
            result.update(inner)
        return result

    values = recipe.model_dump(mode="json")
    if isinstance(values["training"].get("optimiser"), str):  # a name is short for a mapping without options
        values["training"]["optimiser"] = {"kind": values["training"]["optimiser"]}
    return walk(values, "")
