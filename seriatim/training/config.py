"""Recipes: YAML, validated; dotted overrides; the ones that come with the package.

A recipe names its data, tokenizer, model, training and sampling settings, or those of a classifier; `docs/recipes.md`
lists the keys.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, StrictInt

from seriatim.core.construct import MOST_THREADS
from seriatim.core.errors import ConfigError, UsageError, nearest, shown
from seriatim.core.reading import Unreadable, parse_yaml, read_or_raise, read_yaml
from seriatim.core.validation import Strict, parse

LONGEST_NAME = 100  # bytes of a recipe's name, which names a folder
PathText = Annotated[Any, PlainValidator(lambda value: str_of(value))]  # pydantic's own refuses such bytes
Beta = Annotated[float, Field(ge=0, lt=1)]

MOST_IMAGES = 10**13  # seen in all: ten million passes over a million images
MOST_AT_ONCE = 1 << 20  # images of a batch
MOST_WORKERS = 256  # processes
MOST_SIDE = 1 << 14  # pixels


def thread_count(value: Any) -> Any:
    """Refuse what is neither "auto" nor a number of threads that a machine can start."""
    if value != "auto" and not (type(value) is int and 1 <= value <= MOST_THREADS):
        raise ValueError(f"must be 'auto' or a whole number from 1 to {MOST_THREADS}")
    return value


def str_of(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ValueError("must be a path")


class Common(Strict):
    """What every training has. Amounts are in images, so that another batch size means the same run."""

    images: StrictInt = Field(ge=1, le=MOST_IMAGES)  # images seen in all
    batch_size: StrictInt = Field(64, ge=1, le=MOST_AT_ONCE)
    learning_rate: float = Field(1e-3, gt=0, lt=1e35)
    warmup_images: StrictInt = Field(0, ge=0, le=MOST_IMAGES)
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = Field(0.02, ge=0, lt=1e35)
    clip: float = Field(3.0, gt=0, lt=1e35)  # norm of the gradient
    ema: float = Field(0.9999, ge=0, lt=1)  # decay of the weight average that is saved
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto: whichever is faster here
    # Of the CPU; auto: all, or one where that is faster
    threads: Annotated[int | str, BeforeValidator(thread_count)] = "auto"
    log_images: StrictInt = Field(2048, ge=1, le=MOST_IMAGES)  # a line of metrics this often
    save_images: StrictInt = Field(20_000, ge=0, le=MOST_IMAGES)  # a checkpoint this often; 0: only when stopped
    keep: StrictInt = Field(2, ge=1, le=MOST_IMAGES)  # newest checkpoints that stay, besides the best
    on_blow_up: Literal["warn", "stop"] = "warn"  # when the loss is a thousand times its own recent mean
    tensorboard: bool = False  # also write metrics for TensorBoard


class Training(Common):
    """How to train a generator."""

    accumulate: StrictInt = Field(1, ge=1, le=MOST_AT_ONCE)  # parts in which a batch is computed, to save memory
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    workers: StrictInt = Field(0, ge=0, le=MOST_WORKERS)  # processes that read images ahead
    sample_images: StrictInt = Field(0, ge=0, le=MOST_IMAGES)  # a grid of samples at fixed seeds this often; 0: never
    init_from: PathText | None = None  # a model folder whose weights to begin with; its classes may differ


class ClassifierTraining(Common):
    """How to train a classifier: SGD with Nesterov's momentum on cross-entropy."""

    batch_size: StrictInt = Field(512, ge=2, le=MOST_AT_ONCE)
    learning_rate: float = Field(0.3, gt=0, lt=1e35)
    schedule: Literal["constant", "cosine"] = "cosine"
    momentum: float = Field(0.9, gt=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0, lt=1e35)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    crop: StrictInt = Field(4, ge=0, le=MOST_SIDE)  # pixels by which images are moved at random, mirrored at the border
    cutout: StrictInt = Field(0, ge=0, le=MOST_SIDE)  # side of a square that is greyed at random; 0: none
    ema: float = Field(0.99, ge=0, lt=1)
    log_images: StrictInt = Field(25_000, ge=1, le=MOST_IMAGES)
    save_images: StrictInt = Field(200_000, ge=0, le=MOST_IMAGES)
    test_images: StrictInt = Field(0, ge=0, le=MOST_IMAGES)  # accuracy on the test images this often; 0: at the end


def plain_name(name: str) -> str:
    """Refuse a name that would be a path, since a run's folder is called by it."""
    try:
        length = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        raise ValueError("must be text that UTF-8 can hold") from None
    if not name.strip() or length > LONGEST_NAME:
        raise ValueError(f"must have 1 to {LONGEST_NAME} bytes, and not blanks alone")
    if any(c in "/\\:" or not c.isprintable() for c in name) or name.startswith(".") or ".." in name:
        raise ValueError(
            "must be a plain name, without /, \\, :, control characters, a leading dot or two dots in a row"
        )
    return name


class Described(Strict):
    """What every recipe begins with."""

    name: Annotated[str, AfterValidator(plain_name)]
    description: str = ""
    seed: StrictInt = Field(0, ge=0, lt=2**63)
    data: dict[str, Any]
    changes: list[str] = Field(default_factory=list)  # settings that were changed when the run was resumed; not yours


class Recipe(Described):
    """Everything that decides the training of a generator."""

    tokenizer: dict[str, Any]
    model: dict[str, Any]
    training: Training
    sampling: dict[str, Any] = Field(default_factory=dict)  # defaults of the trained model's requests


class ClassifierRecipe(Described):
    """Everything that decides the training of a classifier: `kind: classifier`."""

    kind: Literal["classifier"]
    model: dict[str, Any]
    training: ClassifierTraining


AnyRecipe = Recipe | ClassifierRecipe
RECIPES: dict[str, type[Recipe] | type[ClassifierRecipe]] = {"generator": Recipe, "classifier": ClassifierRecipe}


# --- finding ------------------------------------------------------------------------------------------------------


def recipe_folder() -> Path:
    """Where the packaged recipes are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def packaged() -> dict[str, Path]:
    """name -> file of each recipe that comes with the package."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A file, or the name of a packaged recipe."""
    path = Path(name)
    if path.is_file():
        return path
    if name in packaged():
        return packaged()[name]
    raise UsageError(f"recipe: {name!r} is neither a file nor a packaged recipe{nearest(name, packaged())}")


# --- reading ------------------------------------------------------------------------------------------------------


def read_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """`read_any` of a generator's recipe; a classifier's is refused."""
    recipe = read_any(name, overrides)
    if not isinstance(recipe, Recipe):
        raise UsageError(
            f"recipe: {name!r} trains a classifier, which `seriatim train` alone takes; name a generator's"
        )
    return recipe


def read_any(name: str, overrides: Iterable[str] = ()) -> AnyRecipe:
    """Read, override and validate a recipe; anything wrong is one line that names the key."""
    path = find_recipe(name)
    data = read_or_raise(lambda: read_yaml(path), path, ConfigError, "see `seriatim recipes show mar-digits` for one")
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}: is not a mapping of keys; see `seriatim recipes show mar-digits` for one")
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
    """Apply `section.key=value` settings; values are YAML."""
    sections = list(sections)
    result: dict[str, Any] = copy.deepcopy(dict(data))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{text!r} is no override; write section.key=value, such as training.images=5000")
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
    """The recipe as YAML that `read_any` takes back, every default filled in."""
    values = recipe.model_dump(mode="json")
    if not recipe.changes:
        del values["changes"]
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
