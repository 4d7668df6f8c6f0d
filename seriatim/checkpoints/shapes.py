"""From official tensors to a model: sizes that shapes reveal, other names, and the checks that all converters share.

Everything here is strict: a tensor that is missing, unknown, of another shape or not finite is a CheckpointError, one
line that begins with the file and names the tensor.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seriatim.checkpoints.official import OfficialFile
from seriatim.core.construct import LARGEST_LAYERS, check_sizes
from seriatim.core.errors import CheckpointError, ConfigError, UsageError, one_line
from seriatim.models.base import SequenceModel
from seriatim.models.build import build_model
from seriatim.tokenizers.base import Tokenizer
from seriatim.zoo import PRESETS, Preset

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ANOTHER = "is it another model's?"


def refuse(where: Path | str, verb: str, names: Iterable[str], hint: str = ANOTHER) -> None:
    """Raise CheckpointError that says what a file lacks or has too much, if it does."""
    found = sorted(names)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise CheckpointError(f"{where} {verb} tensor {', '.join(map(repr, found[:3]))}{more}; {hint}")


# --- sizes --------------------------------------------------------------------------------------------------------


def shape(tensors: Mapping[str, Tensor], name: str, axes: int, where: str, hint: str = ANOTHER) -> list[int]:
    """The sizes of a tensor that must be there."""
    if name not in tensors:
        refuse(where, "lacks", [name], hint)
    if tensors[name].ndim != axes:
        raise CheckpointError(f"{where}: tensor {name!r} has shape {tuple(tensors[name].shape)}, not {axes} axes")
    if not tensors[name].numel():
        raise CheckpointError(f"{where}: tensor {name!r} is empty")
    return list(tensors[name].shape)


def count(tensors: Mapping[str, Tensor], prefix: str, where: str) -> int:
    """How many blocks there are under a name, numbered from 0; no more than are ever built."""
    # Numbers stay texts, because a name may have more digits than Python converts.
    found = {m[1] for name in tensors if (m := re.match(rf"{re.escape(prefix)}\.([0-9]+)\.", name))}
    if len(found) > LARGEST_LAYERS:
        raise CheckpointError(
            f"{where}: has {len(found):,} blocks under the name {prefix!r}; at most {LARGEST_LAYERS} are built; "
            f"{ANOTHER}"
        )
    missing = next(i for i in itertools.count() if str(i) not in found)
    if missing < len(found) or not found:
        refuse(where, "lacks", [f"{prefix}.{missing}.*"])
    return len(found)


def named_preset(config: Mapping[str, Any], name: str | None, where: str, among: Iterable[str]) -> Preset | None:
    """The preset called `name`, or the one with the trunk of `config`, whatever its head; None: there is none."""

    def trunk(model: Mapping[str, Any]) -> list[list[int]]:
        return [value if isinstance(value, list) else [value] * 2 for value in (model["width"], model["depth"])]

    if name is not None and trunk(PRESETS[name].model) != trunk(config):
        (width, _), (depth, _) = trunk(config)
        raise CheckpointError(f"{where}: has {depth} blocks of width {width}, which is not {name}")
    names = among if name is None else (name,)
    return next((PRESETS[n] for n in names if trunk(PRESETS[n].model) == trunk(config)), None)


# --- names and values ---------------------------------------------------------------------------------------------


def official_name(ours: str, table: Mapping[str, str]) -> str:
    """What the official code calls our tensor; KeyError where the table does not say.

    A table holds ours -> official, where {i} stands for a number and {p} for the last part of a name.
    """
    parts = ours.split(".")
    for at in (None, *(i for i, part in enumerate(parts) if part.isdigit())):
        key = parts if at is None else [*parts[:at], "{i}", *parts[at + 1 :]]
        for name in (".".join(key), ".".join([*key[:-1], "{p}"])):
            if name in table:
                return table[name].format(i="" if at is None else parts[at], p=parts[-1])
    raise KeyError(ours)


def mapped(
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, torch.Size],
    official: Callable[[str], str],
    where: str,
    hint: str = ANOTHER,
) -> dict[str, Tensor]:
    """Official tensors under our names, float32, each of the wanted shape but for what `squeezed` leaves out.

    `wanted` has our names, `official` tells the other name of each.
    """
    names = {official(ours): ours for ours in wanted}
    refuse(where, "lacks", names.keys() - tensors.keys(), hint)
    refuse(where, "has an unknown", tensors.keys() - names.keys(), hint)
    result = {}
    for theirs, ours in names.items():
        tensor, size = tensors[theirs], wanted[ours]
        if squeezed(tensor.shape) != squeezed(size):
            raise CheckpointError(f"{where}: tensor {theirs!r} has shape {tuple(tensor.shape)}, not {tuple(size)}")
        result[ours] = as_float32(tensor, theirs, where).reshape(size)
    return result


def as_float32(tensor: Tensor, name: str, where: str) -> Tensor:
    """A tensor's values in float32, all finite."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in FLOATS:
        kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device.type}".replace("torch.", "")
        raise CheckpointError(
            f"{where}: tensor {name!r} is {kind}; only plain tensors of 16, 32 or 64-bit floats are read"
        )
    values = tensor.detach().float()
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{where}: tensor {name!r} has values that are not finite; the file is unusable")
    return values


def squeezed(shape: torch.Size) -> tuple[int, ...]:
    """Without leading ones, and a convolution of 1x1 as the matrix that it is."""
    sizes = list(shape)
    if len(sizes) == 4 and sizes[2:] == [1, 1]:
        sizes = sizes[:2]
    while len(sizes) > 1 and sizes[0] == 1:
        sizes.pop(0)
    return tuple(sizes)


# --- autoencoders -------------------------------------------------------------------------------------------------


class Autoencoder:
    """The sizes of an autoencoder that the tensors of an official file show; `hint` ends the errors."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str, hint: str) -> None:
        self.tensors, self.where, self.hint = tensors, where, hint

    def width(self, name: str, axis: int, axes: int = 4) -> int:
        return shape(self.tensors, name, axes, self.where, self.hint)[axis]

    def count(self, pattern: str) -> int:
        """How many tensors the pattern names for the numbers 0, 1, ...; at least 1."""
        return max(1, next(i for i in itertools.count() if pattern.format(i) not in self.tensors))

    def widths(self, pattern: str) -> list[int]:
        return [self.width(pattern.format(i), 0) for i in range(self.count(pattern))]

    def check(self, make: Callable[[], object], sizes: Mapping[str, Any]) -> None:
        """Raise CheckpointError if the sizes are too large, or `make()` says that no tokenizer has them."""
        check_tokenizer(make, sizes, self.where)

    def fill(self, module: nn.Module, official: Callable[[str], str]) -> None:
        """Give a module on the meta device the weights, in memory that it does not share with the tensors."""
        wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
        weights = mapped(self.tensors, wanted, official, self.where, self.hint)
        module.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)


def check_tokenizer(make: Callable[[], object], sizes: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for sizes that no tokenizer has, and before `make()` for those that take long to build."""
    try:
        check_sizes(sizes, "tokenizer")
        make()
    except UsageError as error:
        raise CheckpointError(
            f"{where}: its tensors are not those of a tokenizer we know: {one_line(error)}"
        ) from error


def official_autoencoder(module: nn.Module, official: Callable[[str], str]) -> dict[str, Tensor]:
    """The weights under official names, of official shapes: the matrices of an attention are convolutions there."""
    result = {}
    for name, tensor in module.state_dict().items():
        matrix = ".attentions." in name and tensor.ndim == 2
        result[official(name)] = tensor[..., None, None] if matrix else tensor  # (C, C, 1, 1)
    return result


# --- models -------------------------------------------------------------------------------------------------------


def loaded(
    config: Mapping[str, Any], file: OfficialFile, tensors: Mapping[str, Tensor], official: Callable[[str], str]
) -> SequenceModel:
    """The model of a config, with official tensors strictly as its weights."""
    try:
        with torch.device("meta"):  # no memory and no random numbers for weights that are about to come
            model = build_model(config)
    except ConfigError as error:
        raise CheckpointError(f"{file.path}: its shapes make no model ({one_line(error)})") from error
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict(mapped(tensors, wanted, official, str(file.path)), assign=True)
    return model.eval()


def check_fit(model: SequenceModel, tokenizer: Tokenizer, class_names: list[str], option: str) -> None:
    """Refuse a tokenizer of other tokens (`option` is its name on the command line), and too many or too few names."""
    ours, theirs = model.spec, tokenizer.spec
    if (ours.count, ours.dim, ours.vocab) != (theirs.count, theirs.dim, theirs.vocab):
        raise UsageError(
            f"{option}: makes {theirs.count} tokens ({theirs.what}) from {tokenizer.size[0]}x{tokenizer.size[1]} "
            f"pixels, the model takes {ours.count} ({ours.what}); it is not the tokenizer that this model was "
            "trained with"
        )
    if class_names and len(class_names) != model.classes:
        raise UsageError(f"class_names: {len(class_names)} names for a model of {model.classes} classes")
