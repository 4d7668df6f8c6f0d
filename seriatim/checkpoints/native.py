"""Seriatim's own model folder.

    config.json            the model, the tokenizer, class names, sampling defaults, where it came from
    model.safetensors      the model's weights
    tokenizer.safetensors  the tokenizer's weights and statistics
    manifest.json          bytes and sha256 of the three, written last

A folder appears whole or not at all. Nothing in it is executed: no pickle is read.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from seriatim import __version__
from seriatim.checkpoints.official import read_tensors
from seriatim.checkpoints.renames import FORMAT, READABLE, renamed
from seriatim.checkpoints.run_names import find
from seriatim.checkpoints.shapes import refuse
from seriatim.checkpoints.shared_tokenizer import tokenizer_file, tokenizer_in
from seriatim.checkpoints.unfinished import is_checkpoint
from seriatim.core.errors import (
    CheckpointError,
    NumericsError,
    UsageError,
    one_line,
    shown,
)
from seriatim.core.files import (
    MANIFEST,
    atomic_folder,
    put_back,
    read_manifest,
    verify_manifest,
    write_json,
    write_manifest,
    write_text,
)
from seriatim.core.flatten import WHITE, Colour, as_colour
from seriatim.core.ownership import json_of
from seriatim.core.reading import Unreadable, read_json
from seriatim.models.base import SequenceModel
from seriatim.models.build import build_model, model_config
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.kinds import build_tokenizer, tokenizer_config

CONFIG, MODEL, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.safetensors", "README.md"
CLASSIFIER = "classifier.safetensors"  # of a classifier's folder, which is no model folder
OTHER = "these are not this model's weights"
PARTS = (CONFIG, MODEL, TOKENIZER, CARD, MANIFEST)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # weights that float32 can stand for


@dataclass
class Bundle:
    """All that sampling needs of a model."""

    model: SequenceModel
    tokenizer: Tokenizer
    class_names: list[str] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)  # defaults of a request
    provenance: dict[str, Any] = field(default_factory=dict)  # how it was made: for people
    sha256: str = ""  # of the weights file, once saved or loaded
    background: Colour = WHITE  # what transparent parts of its training images showed; those of an edit do too


def save_bundle(bundle: Bundle, folder: Path | str, *, card: str | None = None) -> Path:
    """Write a model folder, replacing one that is there only when the new one is complete.

    `card` becomes its README.md, which the manifest leaves out: people may edit it.
    """
    config = bundle_config(bundle)
    folder = save_folder(replaceable(folder), config, {MODEL: bundle.model, TOKENIZER: bundle.tokenizer}, card)
    bundle.sha256 = read_manifest(folder)[MODEL][1]
    return folder


def bundle_config(bundle: Bundle) -> dict[str, Any]:
    """All of a bundle but its weights, as plain data."""
    return {
        "model": model_config(bundle.model),
        "tokenizer": tokenizer_config(bundle.tokenizer),
        "class_names": check_class_names(bundle.class_names, bundle.model.classes),
        "sampling": bundle.sampling,
        "provenance": bundle.provenance,
        **({"background": list(bundle.background)} if bundle.background != WHITE else {}),
    }


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    write_json(folder / CONFIG, {"format": FORMAT, "seriatim": __version__, **config})


def save_folder(
    folder: Path, config: Mapping[str, Any], modules: Mapping[str, nn.Module], card: str | None = None
) -> Path:
    """Write a config and the weights of modules, each under its file's name, and a manifest; whole or not at all."""
    for file, module in modules.items():
        check_finite_weights(module.state_dict(), Path(file).stem)
    with atomic_folder(folder) as temporary:
        write_config(temporary, config)
        for file, module in modules.items():
            write_tensors(temporary / file, module.state_dict())
        if card is not None:
            write_text(temporary / CARD, card)
        write_manifest(temporary, (CONFIG, *modules))
    return folder


@contextlib.contextmanager
def opened(folder: Path, *files: str) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """The config of a folder and the sha256 of its files, all checked; `files` are those it must have.

    What goes wrong inside with the config becomes a CheckpointError, one line that names the file.
    """
    tokenizer = tokenizer_in(folder) if is_checkpoint(folder) else TOKENIZER
    hashes = verify_manifest(folder, (CONFIG, *(tokenizer if file == TOKENIZER else file for file in files)))
    path = folder / CONFIG
    try:
        config = read_json(path, dict)
        if config["format"] not in READABLE:
            raise ValueError(
                f"format {shown(config['format'])} is not {FORMAT}; it was written by seriatim "
                f"{shown(config.get('seriatim'))}, this is {__version__}"
            )
        yield config, hashes
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)
        what = f"it {what}" if isinstance(error, Unreadable) else what
        raise CheckpointError(f"{path} cannot be used: {what}") from error


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of a config that is a mapping."""
    if not isinstance(config[name], Mapping):
        raise ValueError(f"{name}: {shown(config[name])} is not a mapping of keys")
    return dict(config[name])


def check_class_names(names: Any, classes: int) -> list[str]:
    """The names of a model's classes: a different text for each of them, or none at all."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"class_names: {shown(names)} is not allowed; give a list of texts")
    if names and len(names) != classes:
        raise UsageError(f"class_names: {len(names)} given for {classes} classes; give one for each, or none")
    twice = next((name for name, times in Counter(names).items() if times > 1), None)
    if twice is not None:
        raise UsageError(f"class_names: {shown(twice)} is given twice; every class needs a name of its own")
    return list(names)


def replaceable(folder: Path | str, parts: Sequence[str] = PARTS, what: str = "a model") -> Path:
    """Refuse to write a model, or `what` has these `parts`, over anything but such a folder or an empty one."""
    folder = Path(folder).resolve()
    put_back(folder)
    if folder.exists():
        empty = folder.is_dir() and not any(folder.iterdir())
        if not empty and not is_ours(folder):
            raise UsageError(f"folder: {folder} exists and is not {what} folder; choose a new or empty one")
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in parts)
        if foreign:
            raise UsageError(f"folder: {folder} holds {foreign[0]!r}, which is no part of {what}; choose another")
    return folder


def is_ours(folder: Path) -> bool:
    """Whether a model, a tokenizer or a classifier was written to `folder` here, as its manifest or config proves."""
    if not (folder / CONFIG).is_file() or not (folder / MANIFEST).is_file():
        return False
    if {"format", "seriatim"} <= json_of(folder / CONFIG).keys():
        return True
    try:
        return CONFIG in read_manifest(folder)
    except (CheckpointError, OSError, RecursionError):
        return False


def check_finite_weights(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise NumericsError if weights can't be used, before they replace ones that can."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericsError(
                f"{name}: {key!r} has values that are not finite; nothing was written; lower training.learning_rate"
            )


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.touch()
    mode = path.stat().st_mode  # safetensors replaces the file by a private one, which colleagues could not read
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
        path.chmod(mode)
    except SafetensorError as error:  # how this library reports a full disk
        raise told_by(error) from error


def write_torch(path: Path, content: Any) -> None:
    """Write a file as torch does; the disk's errors are an OSError, as those of other writers."""
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # how torch reports a full disk
            raise told_by(error) from error


def told_by(error: Exception) -> OSError:
    """The error of the system that a library's error tells of in its message."""
    number = re.search(r"(?:os error |\[Errno )(\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(0, one_line(error))


def find_bundle(name: Path | str) -> Path:
    """The model folder that a name stands for, or the checkpoint."""
    return find(name).folder


def load_bundle(name: Path | str) -> Bundle:
    """Read a model by its name (`run_names`), every file checked against its sha256, every tensor against the config.

    Raises CheckpointError, one line that names the file, when anything is missing, damaged or does not fit.
    """
    found = find(name)
    try:
        return read_bundle(found.folder, found.weights)
    except CheckpointError:
        if found.folder.exists() or found.folder == Path(name):
            raise
    return load_bundle(name)  # the run goes on, and has deleted this checkpoint since: there is a newer one


def read_bundle(folder: Path, weights: str = MODEL) -> Bundle:
    """The bundle of a model folder, or of a checkpoint that has a config; `weights` is the file of the model's."""
    if (folder / CLASSIFIER).exists():
        raise CheckpointError(f"{folder} holds a classifier, which draws nothing; name a model folder")
    if (folder / TOKENIZER).exists() and not (folder / weights).exists() and "model" not in json_of(folder / CONFIG):
        raise CheckpointError(
            f"{folder} holds a tokenizer, which draws nothing alone; name a model folder, or train a generator with "
            "tokenizer.from"
        )
    with opened(folder, weights, TOKENIZER) as (config, hashes):
        with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
            model = build_model(section(config, "model"))
            tokenizer = build_tokenizer(section(config, "tokenizer"), stored=True)
        class_names = check_class_names(config["class_names"], model.classes)
        sampling, provenance = section(config, "sampling"), section(config, "provenance")
        background = as_colour(config.get("background", WHITE))
    fill(model, folder / weights, written=int(config["format"]))
    fill(tokenizer, stored_tokenizer(folder))
    return Bundle(model.eval(), tokenizer.eval(), class_names, sampling, provenance, hashes[weights], background)


def stored_tokenizer(folder: Path) -> Path:
    """The file with the tokenizer of a model folder or a checkpoint; what checkpoints share is verified here."""
    return tokenizer_file(folder) if is_checkpoint(folder) else folder / TOKENIZER


def read_finite(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, which are refused unless they are finite."""
    tensors = read_tensors(path)
    for name, tensor in tensors.items():
        check_finite(tensor, name, path)
    return tensors


def check_finite(tensor: Tensor, name: str, path: Path) -> None:
    if tensor.dtype in FLOATS and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{path}: tensor {name!r} has values that are not finite; the model is unusable")


def as_wanted(tensor: Tensor, wanted: Tensor, name: str, path: Path) -> Tensor:
    """The tensor in the dtype that the model has: other floating-point numbers are cast, all else is refused."""
    if tensor.shape != wanted.shape:
        raise CheckpointError(
            f"{path}: tensor {name!r} has shape {tuple(tensor.shape)}, the config says {tuple(wanted.shape)}"
        )
    if tensor.dtype == wanted.dtype:
        return tensor
    if wanted.dtype != torch.float32 or tensor.dtype not in FLOATS:
        ours, theirs = (str(t.dtype).removeprefix("torch.") for t in (wanted, tensor))
        fit = ", or as float16, bfloat16 or float64" if wanted.dtype == torch.float32 else ""
        raise CheckpointError(f"{path}: tensor {name!r} is {theirs}; save it as {ours}{fit}")
    cast = tensor.float()
    check_finite(cast, name, path)  # float64 has a larger range than float32
    return cast


def fill(module: nn.Module, path: Path, *, assign: bool = True, written: int = FORMAT) -> None:
    """Give `module` the tensors of `path`: all of them and no others, of the same shapes, in its own dtypes.

    With `assign` they replace its own; without, they are copied into those, which an optimiser may hold. `written` is
    the format of the file.
    """
    module.load_state_dict(fitting(module, path, written), assign=assign)


def fitting(module: nn.Module, path: Path, written: int = FORMAT) -> dict[str, Tensor]:
    """The tensors of `path`, which are refused unless they are those of `module`, by name and shape."""
    tensors = renamed(read_finite(path), written)
    wanted = module.state_dict()
    refuse(path, "lacks", wanted.keys() - tensors.keys(), OTHER)
    refuse(path, "has an unknown", tensors.keys() - wanted.keys(), OTHER)
    return {name: as_wanted(tensor, wanted[name], name, path) for name, tensor in tensors.items()}
