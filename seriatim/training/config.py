"""Recipes: read from YAML files or the package, changed by dotted overrides, and validated.

A recipe has the settings of data, tokenizer, model, training and sampling, or those of a classifier or a tokenizer.
`docs/recipes.md` lists the keys.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, StrictInt, model_validator

from seriatim.core.construct import MOST_AT_ONCE, MOST_THREADS, MOST_WORKERS
from seriatim.core.errors import ConfigError, UsageError, nearest, shown
from seriatim.core.reading import Unreadable, parse_yaml, read_or_raise, read_yaml
from seriatim.core.validation import Strict, parse

LONGEST_NAME = 100  # the limit in bytes for a recipe's name, which becomes the name of a folder
PathText = Annotated[Any, PlainValidator(lambda value: str_of(value))]  # pydantic refuses paths that are not UTF-8
Beta = Annotated[float, Field(ge=0, lt=1)]

MOST_IMAGES = 10**13  # the limit for images seen: ten million passes over a million images
MOST_SIDE = 1 << 14  # pixels


def thread_count(value: Any) -> Any:
    """The value. Raises ValueError if it is neither "auto" nor a number of threads that a machine can start."""
    if value != "auto" and not (type(value) is int and 1 <= value <= MOST_THREADS):
        raise ValueError(f"must be 'auto' or a whole number from 1 to {MOST_THREADS}")
    return value


def micro_batch_size(value: Any) -> Any:
    """The value. Raises ValueError if it is neither None, "auto", nor a number of images."""
    if value is not None and value != "auto" and not (type(value) is int and 1 <= value <= MOST_AT_ONCE):
        raise ValueError(f"must be 'auto' or a whole number from 1 to {MOST_AT_ONCE}")
    return value


def preview_interval(value: Any) -> Any:
    """The value. Raises ValueError if it is neither "auto" nor a number of images."""
    if value != "auto" and not (type(value) is int and 0 <= value <= MOST_IMAGES):
        raise ValueError(f"must be 'auto' or a whole number from 0 to {MOST_IMAGES}")
    return value


def str_of(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    raise ValueError("must be a path" if value != "" else "is empty; name a path, or leave it out")


def optimiser_of(value: Any) -> str | dict[str, Any]:
    """The value. Raises ValueError if it is neither a name nor a mapping with a kind."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, dict) and isinstance(value.get("kind"), str):
        return value
    raise ValueError("must be a name such as adamw, or a mapping such as {kind: muon, matrix_rate: 0.006}")


class Common(Strict):
    """The settings of every training. Amounts are in images, so that they don't depend on the batch size."""

    images: StrictInt = Field(ge=1, le=MOST_IMAGES)  # the number of images seen in all
    batch_size: StrictInt = Field(64, ge=1, le=MOST_AT_ONCE)
    learning_rate: float = Field(1e-3, gt=0, lt=1e35)
    warmup_images: StrictInt = Field(0, ge=0, le=MOST_IMAGES)
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = Field(0.02, ge=0, lt=1e35)
    clip: float = Field(3.0, gt=0, lt=1e35)  # the largest norm of the gradient
    ema: float = Field(0.9999, ge=0, lt=1)  # the decay of the weight average that is saved
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto takes whichever is faster on this machine
    # The number of CPU threads; auto takes all, or one if that is faster.
    threads: Annotated[int | str, BeforeValidator(thread_count)] = "auto"
    log_images: StrictInt = Field(2048, ge=1, le=MOST_IMAGES)  # images between lines of metrics
    save_images: StrictInt = Field(20_000, ge=0, le=MOST_IMAGES)  # images between checkpoints; 0: only when stopped
    keep: StrictInt = Field(2, ge=1, le=MOST_IMAGES)  # how many newest checkpoints are kept, besides the best
    on_blow_up: Literal["warn", "stop"] = "warn"  # when the loss exceeds its recent mean a thousand times
    on_nan: Literal["stop", "skip"] = "stop"  # when a batch's loss or gradient is not finite; skip leaves it out
    max_skips: StrictInt = Field(10, ge=1, le=MOST_IMAGES)  # how many batches in a row may be skipped
    trackers: list[str] = Field(default_factory=list)  # names in TRACKERS to which metrics are sent as well
    tensorboard: bool = False  # the same as the name "tensorboard" in `trackers`


class Batched(Common):
    """The settings of trainings whose batches may be split, and read ahead by other processes."""

    accumulate: StrictInt = Field(1, ge=1, le=MOST_AT_ONCE)  # the parts into which a batch is split, to save memory
    # Or how many images each process computes at once; auto takes what fits into memory.
    micro_batch: Annotated[int | str | None, BeforeValidator(micro_batch_size)] = None
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    tf32: bool = True  # on CUDA, compute float32 products of the model in TF32
    workers: StrictInt = Field(0, ge=0, le=MOST_WORKERS)  # processes that read images ahead
    # The images between two previews, which are samples at fixed seeds; 0: never; auto: eight in a run.
    sample_images: Annotated[int | str, BeforeValidator(preview_interval)] = "auto"
    sample_rows: StrictInt = Field(10, ge=1, le=1000)  # the most classes that a preview shows
    sample_each: StrictInt = Field(4, ge=1, le=1000)  # the images of each class in a preview
    validate_images: StrictInt = Field(0, ge=0, le=MOST_IMAGES)  # images between validations besides those at saves
    freeze: list[str] = Field(default_factory=list)  # patterns of the names of parameters that are not trained

    @model_validator(mode="after")
    def split_once(self) -> Self:
        if self.micro_batch is not None and self.accumulate > 1:
            raise ValueError(
                f"micro_batch: {self.micro_batch!r} is not allowed with accumulate={self.accumulate}, as each says how "
                "a batch is split; leave one out"
            )
        return self


class Training(Batched):
    """How to train a generator."""

    shard: bool = False  # several processes also share weights, gradients and moments (FSDP2), not batches alone (DDP)
    # A name in OPTIMISERS: adamw, or muon for the matrices of the backbone; or a mapping of its `kind` and options.
    optimiser: Annotated[Any, PlainValidator(lambda value: optimiser_of(value))] = "adamw"
    # Masked lengths in training are padded to this many values, so that there are few shapes; 0 pads nothing.
    buckets: StrictInt = Field(16, ge=0, le=MOST_AT_ONCE)
    compile: bool = False  # torch.compile the blocks of the backbone and of the head's network
    checkpoint_activations: bool = False  # recompute the blocks in the backward pass, to save memory
    # The dtype in which the encoder of latents computes; bfloat16 is faster on CUDA, and changes tokens a little.
    encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    evaluate_images: StrictInt = Field(0, ge=0, le=MOST_IMAGES)  # samples that are compared with real images at saves
    evaluate_features: PathText | None = None  # the features in which they are compared
    init_from: PathText | None = None  # a model folder with the initial weights; its classes may differ


class ClassifierTraining(Common):
    """How to train a classifier, with cross-entropy and SGD with Nesterov's momentum."""

    batch_size: StrictInt = Field(512, ge=2, le=MOST_AT_ONCE)
    learning_rate: float = Field(0.3, gt=0, lt=1e35)
    schedule: Literal["constant", "cosine"] = "cosine"
    momentum: float = Field(0.9, gt=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0, lt=1e35)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    crop: StrictInt = Field(4, ge=0, le=MOST_SIDE)  # images are shifted at random by up to this many pixels
    cutout: StrictInt = Field(0, ge=0, le=MOST_SIDE)  # the side of a random grey square in each image; 0: none
    ema: float = Field(0.99, ge=0, lt=1)
    log_images: StrictInt = Field(25_000, ge=1, le=MOST_IMAGES)
    save_images: StrictInt = Field(200_000, ge=0, le=MOST_IMAGES)
    test_images: StrictInt = Field(0, ge=0, le=MOST_IMAGES)  # images between tests of the accuracy; 0: at the end


class TokenizerTraining(Batched):
    """How to train a tokenizer, with AdamW."""

    schedule: Literal["constant", "cosine"] = "cosine"
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0, lt=1e35)
    clip: float = Field(1.0, gt=0, lt=1e35)
    ema: float = Field(0.999, ge=0, lt=1)


Weight = Annotated[float, Field(ge=0, lt=1e35)]


class Objective(Strict):
    """What a tokenizer is trained for: the weights of the loss's terms, and what happens to latents before decoding.

    `training/tokenizer_losses.py` has the equations. A weight of 0 leaves a term out.
    """

    reconstruction: Literal["l1", "l2"] = "l1"  # the mean absolute, or squared, error of the values in [-1, 1]
    kl: Weight = 1e-6  # of continuous latents: the KL divergence, summed over an image's latents
    codebook: Weight = 1.0  # of codes: how far codewords are from the vectors that chose them
    commitment: Weight = 0.25  # of codes: how far vectors are from their codewords
    entropy: Weight = 0.0  # of codes: sure choices of which all are used
    revive_images: StrictInt = Field(0, ge=0, le=MOST_IMAGES)  # of codes: images without a use after which one is moved
    perceptual: Weight = 0.0  # of the distance in the features of `perceptual_features`
    perceptual_features: PathText | None = None  # an extractor, such as the run of a classifier, or lpips:FILE
    perceptual_layers: list[str] = Field(default_factory=list)  # names of its modules; empty: those that it proposes
    gan: Weight = 0.0  # of the adversarial term, besides its adaptive factor
    gan_start: StrictInt = Field(0, ge=0, le=MOST_IMAGES)  # images seen before the discriminator takes part
    gan_width: StrictInt = Field(64, ge=1, le=MOST_AT_ONCE)  # channels of the discriminator's first layer
    gan_layers: StrictInt = Field(3, ge=1, le=8)  # how often the discriminator halves the sides
    gan_learning_rate: float = Field(0.5, gt=0, lt=1e35)  # of the discriminator, relative to training.learning_rate
    latent_noise: Weight = 0.0  # the most noise on latents, relative to their spread
    interpolated_noise: Weight = 0.0  # l-DeTok's gamma: latents are interpolated with noise of this size
    mask: float = Field(0.0, ge=0, lt=1)  # l-DeTok's largest share of patches that the encoder does not see
    equivariance: float = Field(0.0, ge=0, le=1)  # EQ-VAE's share of steps in which latents are scaled and rotated

    @model_validator(mode="after")
    def complete(self) -> Self:
        for weight, others in (("perceptual", ("features", "layers")), ("gan", ("start",))):
            given = [f"{weight}_{name}" for name in others if getattr(self, f"{weight}_{name}")]
            if given and not getattr(self, weight):
                raise ValueError(f"{given[0]}: has no effect without a weight; set objective.{weight}, or leave it out")
        if self.perceptual and self.perceptual_features is None:
            raise ValueError(
                "perceptual_features: is required by objective.perceptual; name the run of a classifier, or lpips:FILE"
            )
        if self.latent_noise and self.interpolated_noise:
            raise ValueError("interpolated_noise: can't go with latent_noise, as each sets the noise; leave one out")
        return self


def plain_name(name: str) -> str:
    """The name. Raises ValueError if it would be a path, because it becomes the name of the run's folder."""
    try:
        length = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        raise ValueError("must be text that UTF-8 can hold") from None
    if not name.strip() or length > LONGEST_NAME:
        raise ValueError(f"must have 1 to {LONGEST_NAME} bytes, and not only blanks")
    if any(c in "/\\:" or not c.isprintable() for c in name) or name.startswith(".") or ".." in name:
        raise ValueError(
            "must be a plain name, without /, \\, :, control characters, a leading dot or two dots in a row"
        )
    return name


class Described(Strict):
    """The keys that every recipe has."""

    name: Annotated[str, AfterValidator(plain_name)]
    description: str = ""
    seed: StrictInt = Field(0, ge=0, lt=2**63)
    data: dict[str, Any]
    changes: list[str] = Field(default_factory=list)  # records settings changed on resuming; not for users


class Recipe(Described):
    """Everything that decides the training of a generator."""

    tokenizer: dict[str, Any]
    model: dict[str, Any]
    training: Training
    sampling: dict[str, Any] = Field(default_factory=dict)  # defaults of the trained model's requests


class ClassifierRecipe(Described):
    """Everything that decides the training of a classifier, marked by `kind: classifier`."""

    kind: Literal["classifier"]
    model: dict[str, Any]
    training: ClassifierTraining


class TokenizerRecipe(Described):
    """Everything that decides the training of a tokenizer, marked by `kind: tokenizer`."""

    kind: Literal["tokenizer"]
    tokenizer: dict[str, Any]
    objective: Objective = Field(default_factory=lambda: Objective())
    training: TokenizerTraining

    @model_validator(mode="after")
    def judged_in_time(self) -> Self:
        start, images = self.objective.gan_start, self.training.images
        if self.objective.gan and start >= images:
            raise ValueError(
                f"objective.gan_start: {start} is not allowed, as the run ends after {images} images and the "
                "discriminator would never be used; give fewer, or leave out objective.gan"
            )
        return self


AnyRecipe = Recipe | ClassifierRecipe | TokenizerRecipe
RECIPES: dict[str, type[Recipe] | type[ClassifierRecipe] | type[TokenizerRecipe]] = {
    "generator": Recipe,
    "classifier": ClassifierRecipe,
    "tokenizer": TokenizerRecipe,
}


# --- finding ------------------------------------------------------------------------------------------------------


def recipe_folder() -> Path:
    """The folder of the packaged recipes, which is in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def packaged() -> dict[str, Path]:
    """A map from the name of each packaged recipe to its file."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe, given its path or the name of a packaged recipe. Raises UsageError if there is none."""
    path = Path(name)
    if path.is_file():
        return path
    if name in packaged():
        return packaged()[name]
    raise UsageError(f"recipe: {name!r} is neither a file nor a packaged recipe{nearest(name, packaged())}")


# --- reading ------------------------------------------------------------------------------------------------------


def read_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a generator, as `read_any` reads it. Raises UsageError for one of another kind."""
    recipe = read_any(name, overrides)
    if not isinstance(recipe, Recipe):
        raise UsageError(
            f"recipe: {name!r} trains a {recipe.kind}, which `seriatim train` alone takes; name a generator's recipe"
        )
    return recipe


def read_any(name: str, overrides: Iterable[str] = ()) -> AnyRecipe:
    """The recipe `name` with overrides applied, validated. Raises ConfigError, one line that names the key."""
    path = find_recipe(name)
    data = read_or_raise(lambda: read_yaml(path), path, ConfigError, "see `seriatim recipes show mar-digits` for one")
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}: is not a mapping of keys; see `seriatim recipes show mar-digits` for an example")
    kind = data.get("kind", "generator")
    if not isinstance(kind, str) or kind not in RECIPES:
        raise ConfigError(f"{path.name}: kind: {shown(kind)} is not known{nearest(str(kind), RECIPES)}")
    cls = RECIPES[kind]
    if cls is Recipe:
        data = {key: value for key, value in data.items() if key != "kind"}
    return parse(cls, override(data, overrides, cls.model_fields), where=path.name)


def override(
    data: Mapping[str, Any], overrides: Iterable[str], sections: Iterable[str] = Recipe.model_fields
) -> dict[str, Any]:
    """The recipe's data with overrides such as `section.key=value` applied; values are YAML."""
    sections = list(sections)
    result: dict[str, Any] = copy.deepcopy(dict(data))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{text!r} is not an override; write section.key=value, such as training.images=5000")
        parts = key.strip().split(".")
        if parts[0] not in sections:
            raise ConfigError(f"unknown key {key.strip()!r}{nearest(parts[0], sections)}")
        place = result
        for part in parts[:-1]:
            inner = place.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{key.strip()}: {part!r} is a value, not a section")
            place = inner
        try:
            place[parts[-1]] = parse_yaml(value)
        except Unreadable as error:
            raise ConfigError(f"{key.strip()}: {shown(value)} {error}") from error
    return result


def dump(recipe: AnyRecipe) -> str:
    """The recipe as YAML that `read_any` can read, with every default filled in."""
    values = recipe.model_dump(mode="json")
    if not recipe.changes:
        del values["changes"]
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
