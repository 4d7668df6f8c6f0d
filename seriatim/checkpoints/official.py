"""Weights as their authors publish them: torch files and safetensors, read without running anything.

A `.pth` is a pickle, which can run any program. Only torch's restricted reader opens it here: tensors, plain containers
and `argparse.Namespace` (training scripts keep their arguments in one); anything else is refused by name.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seriatim.core.errors import CheckpointError, UsageError, nearest, one_line, shown
from seriatim.core.files import utf8_path

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SUFFIXES = {".pth", ".pt", ".ckpt", ".bin", ".safetensors"}


@dataclass
class OfficialFile:
    """What an official file holds."""

    path: Path
    tensors: dict[str, Tensor]  # by their official names; may still lie in the file, not in memory
    arguments: dict[str, Any] = field(default_factory=dict)  # of the training script, where they were kept
    which: str = "model"  # the entry that was taken


def read_official(path: Path | str, *, which: str | None = None, entries: tuple[str, ...] = ("model",)) -> OfficialFile:
    """Read the weights of an official file.

    `entries` are the state dicts that such a file may hold, the one to prefer first; `which` asks for one of them.
    A safetensors file holds one state dict, or several under the entries' names as prefixes.
    Raises UsageError where there is no such file or entry, CheckpointError where it is damaged or not allowed.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UsageError(f"path: {path} is no file; name the downloaded weights ({', '.join(sorted(SUFFIXES))})")
    arguments: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        found = read_safetensors(path, entries)
    else:
        found, arguments = read_torch(path, entries)
    chosen = which or next(iter(found))
    if chosen not in found:
        if list(found) in ([""], ["state_dict"]):  # the only one there is, under no telling name
            chosen = next(iter(found))
        else:
            raise UsageError(f"which: {path} holds no {chosen!r}; it holds {', '.join(map(repr, found))}")
    return OfficialFile(path, found[chosen], arguments, chosen or "model")


def read_torch(path: Path, entries: tuple[str, ...]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The state dicts of a torch file by entry ("" where the file is one), and the script's arguments."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice about what is refused below
            check_packing(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        name = re.search(r"(?:GLOBAL|global|class|function) `?([\w.]+)`?", str(error))
        what = f"it asks for {name[1]!r}" if name else "it is a pickle of another kind"
        raise CheckpointError(
            f"{path}: holds more than tensors ({what}), which could run any program; nothing of it was run; "
            "ask for a safetensors file"
        ) from None
    except Exception as error:  # a damaged pickle raises whatever its last whole byte led to
        raise CheckpointError(
            f"{path}: is not a whole torch file ({one_line(error)[:160]}); download it again"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not a mapping of tensors")
    raw = content.get("args")
    arguments = dict(vars(raw)) if isinstance(raw, argparse.Namespace) else dict(raw) if isinstance(raw, dict) else {}
    found = {name: content[name] for name in (*entries, "state_dict") if isinstance(content.get(name), Mapping)}
    if not found:
        found = {"": content}
    return {name: only_tensors(path, state) for name, state in found.items()}, arguments


def check_packing(path: Path) -> None:
    """Refuse a file whose parts would be larger than the file: torch packs none of them."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("its parts are packed, which torch never does")


def only_tensors(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: entry {shown(name)} is {type(value).__name__}, not a tensor")
        if value.layout == torch.strided and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: tensor {name!r} says that it is larger than what the file holds of it")
    return without_prefix(dict(state))


def read_safetensors(path: Path, entries: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a safetensors file, by prefix; "" where there is one alone."""
    try:
        with utf8_path(path) as readable, safe_open(readable, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # a file handle, not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({one_line(error)})") from error
    found = {}
    for entry in sorted(entries, key=len, reverse=True):
        inside = {n[len(entry) + 1 :]: t for n, t in tensors.items() if n.startswith(f"{entry}.")}
        if inside and len(inside) < len(tensors):
            found[entry] = without_prefix(inside)
    if found and sum(map(len, found.values())) == len(tensors):
        return {entry: found[entry] for entry in entries if entry in found}
    return {"": without_prefix(tensors)}


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop a wrapper's name in front of all names, such as `module.` of data-parallel training."""
    for prefix in ("module.", "_orig_mod.", "model."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    return tensors


def one_file(path: Path | str, stem: str | None) -> Path:
    """The file itself; of a folder, its safetensors file of that name, or its only one."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return path
    files = {file.stem: file for file in sorted(path.glob("*.safetensors"))}
    if stem in files:
        return files[stem]
    if len(files) == 1 and stem is None:
        return next(iter(files.values()))
    raise UsageError(
        f"path: {path} holds {', '.join(files) or 'no safetensors files'}; name one{nearest(stem or '', files)}"
    )


def renamed(
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, torch.Size],
    official: Callable[[str], str],
    where: str,
) -> dict[str, Tensor]:
    """Official tensors under our names, float32, each of the wanted shape but for leading ones.

    `wanted` has our names, `official` tells the other name of each. Raises CheckpointError that names what is missing,
    extra, of another shape or not finite.
    """
    names = {official(ours): ours for ours in wanted}
    complain(where, "lacks", sorted(names.keys() - tensors.keys()))
    complain(where, "has an unknown", sorted(tensors.keys() - names.keys()))
    result = {}
    for theirs, ours in names.items():
        tensor, shape = tensors[theirs], wanted[ours]
        if squeezed(tensor.shape) != squeezed(shape):
            raise CheckpointError(f"{where}: tensor {theirs!r} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
        result[ours] = as_float32(tensor, theirs, where).reshape(shape)
    return result


def as_float32(tensor: Tensor, name: str, where: str) -> Tensor:
    """A tensor's values in float32, all finite; CheckpointError where it has none such."""
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
    """Without leading ones."""
    sizes = list(shape)
    while len(sizes) > 1 and sizes[0] == 1:
        sizes.pop(0)
    return tuple(sizes)


def complain(where: str, verb: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(f"{where} {verb} tensor {', '.join(map(repr, names[:3]))}{more}; is it another model's?")
