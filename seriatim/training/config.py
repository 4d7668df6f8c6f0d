"""Recipes: YAML, validated; dotted overrides; the ones that come with the package.

A recipe names its data, tokenizer, model, training and sampling settings; `docs/recipes.md` lists the keys.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, StrictInt

from seriatim.core.errors import ConfigError, UsageError, nearest, one_line
from seriatim.core.validation import Strict, parse

Beta = Annotated[float, Field(ge=0, lt=1)]


class Training(Strict):
    """How to train. Amounts are in images, so that another batch size means the same run."""

    images: StrictInt = Field(ge=1)  # images seen in all
    batch_size: StrictInt = Field(64, ge=1)
    accumulate: StrictInt = Field(1, ge=1)  # parts in which a batch is computed, to save memory
    learning_rate: float = Field(1e-3, gt=0, lt=1e35)
    warmup_images: StrictInt = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = Field(0.02, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    clip: float = Field(3.0, gt=0)  # norm of the gradient
    ema: float = Field(0.9999, ge=0, lt=1)  # decay of the weight average that is saved
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto: whichever is faster here
    threads: Literal["auto"] | StrictInt = "auto"  # of the CPU; auto: all, or one where that is faster
    workers: StrictInt = Field(0, ge=0)  # processes that read images ahead
    log_images: StrictInt = Field(2048, ge=1)  # a line of metrics this often
    save_images: StrictInt = Field(20_000, ge=0)  # a checkpoint this often; 0: only when stopped
    keep: StrictInt = Field(2, ge=1)  # newest checkpoints that stay, besides the best
    sample_images: StrictInt = Field(0, ge=0)  # a grid of samples at fixed seeds this often; 0: never
    tensorboard: bool = False  # also write metrics for TensorBoard
    init_from: str | None = None  # a model folder whose weights to begin with; its classes may differ


class Recipe(Strict):
    """Everything that decides a training run."""

    name: str
    description: str = ""
    seed: StrictInt = Field(0, ge=0, lt=2**63)
    data: dict[str, Any]
    tokenizer: dict[str, Any]
    model: dict[str, Any]
    training: Training
    sampling: dict[str, Any] = Field(default_factory=dict)  # defaults of the trained model's requests


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
    """Read, override and validate a recipe; anything wrong is one line that names the key."""
    path = find_recipe(name)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: is not readable as YAML ({one_line(error)})") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}: is not a mapping of keys; see `seriatim recipes show mar-digits` for one")
    return parse(Recipe, override(data, overrides), where=path.name)


def override(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply `section.key=value` settings; values are YAML."""
    result: dict[str, Any] = copy.deepcopy(dict(data))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{text!r} is no override; write section.key=value, such as training.images=5000")
        parts = key.strip().split(".")
        if parts[0] not in Recipe.model_fields:
            raise ConfigError(f"unknown key {key.strip()!r}{nearest(parts[0], Recipe.model_fields)}")
        place = result
        for part in parts[:-1]:
            inner = place.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{key.strip()}: {part!r} is a value, not a section")
            place = inner
        try:
            place[parts[-1]] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key.strip()}: {value!r} is not a YAML value ({one_line(error)})") from error
    return result


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that `read_recipe` takes back, every default filled in."""
    return str(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
