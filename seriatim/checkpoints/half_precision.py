"""A copy of a model folder whose large weights are in half precision: half as many bytes, for sharing and shipping.

It loads like any model: weights are cast to float32. Tensors of up to 1,024 numbers (biases, norms, the mean and scale
of tokens) stay as they are, because they cost nothing and some of them are squared or divided by; larger ones are
rounded, those that were measured (such as the centres of `kmeans`) like those that were trained. Absolute paths in the
recipe of its training are cut to their last two parts, since a copy is for others.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from seriatim.checkpoints.location import located
from seriatim.checkpoints.native import CARD, CLASSIFIER, CONFIG, PARTS, read_finite, replaceable, write_tensors
from seriatim.checkpoints.run_names import find
from seriatim.checkpoints.unfinished import is_checkpoint
from seriatim.core.errors import NumericsError, UsageError
from seriatim.core.files import (
    atomic_folder,
    read_manifest,
    verify_manifest,
    write_json,
    write_manifest,
    write_text,
)
from seriatim.core.reading import read_json, read_text

SMALL = 1024  # numbers of a tensor up to which it keeps its precision
TENSORS = ".safetensors"


def half_copy(name: Path | str, out: Path | str, *, summary: str | None = None, card: str | None = None) -> Path:
    """Write the model, tokenizer or classifier that `name` stands for to the folder `out`, in half precision.

    `summary` is a sentence for lists of models, `card` replaces the README.md. The provenance of the copy says that it
    is one. Raises CheckpointError for a damaged folder or an unknown name, UsageError for a checkpoint of a run, and
    NumericsError for weights beyond the range of half precision.
    """
    folder = find(located(os.fspath(name))).folder
    if is_checkpoint(folder):
        raise UsageError(f"model: {name} is a checkpoint of a run; name a model folder, or a run that is finished")
    files = read_manifest(folder)
    verify_manifest(folder, tuple(files))
    config = read_json(folder / CONFIG, dict)
    config["provenance"] = {**config.get("provenance", {}), "precision": "half"}
    if summary is not None:
        config["provenance"]["summary"] = summary
    text = card if card is not None else read_text(folder / CARD) if (folder / CARD).is_file() else None
    recipe = config.get("provenance", {}).get("recipe", {})
    for path in absolute_paths(recipe):  # a value of the card's recipe is the end of a line
        text = None if text is None else re.sub(rf"(?m)(?<=: ){re.escape(path)}$", shortened(path), text)
    if recipe:
        config["provenance"] = {**config["provenance"], "recipe": without_folders(recipe)}
    with atomic_folder(replaceable(out, (*PARTS, CLASSIFIER))) as temporary:
        write_json(temporary / CONFIG, config)
        for file in files:
            if file.endswith(TENSORS):
                tensors = read_finite(folder / file)
                write_tensors(temporary / file, {key: halved(tensor, key) for key, tensor in tensors.items()})
        if text is not None:
            write_text(temporary / CARD, text)
        write_manifest(temporary, tuple(files))
    return Path(out)


def absolute_paths(value: Any) -> set[str]:
    """All absolute paths among the texts of plain data."""
    if isinstance(value, str):
        return {value} if PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute() else set()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set().union(*(absolute_paths(part) for part in inner))


def without_folders(value: Any) -> Any:
    """Plain data with every absolute path `shortened`."""
    if isinstance(value, dict):
        return {key: without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_folders(part) for part in value]
    return shortened(value) if isinstance(value, str) and absolute_paths(value) else value


def shortened(path: str) -> str:
    """The last two parts of an absolute path: `cifar10/train` of `/home/me/cifar10/train`."""
    kind = PurePosixPath if PurePosixPath(path).is_absolute() else PureWindowsPath
    return "/".join(kind(path).parts[1:][-2:])


def halved(tensor: Tensor, name: str) -> Tensor:
    """A float32 tensor of more than SMALL numbers in float16, and any other tensor as it is."""
    if tensor.dtype != torch.float32 or tensor.numel() <= SMALL:
        return tensor
    made = tensor.half()
    if not bool(torch.isfinite(made).all()):
        raise NumericsError(f"{name}: has values of {float(tensor.abs().max()):.3g}; half precision ends at 65,504")
    return made
