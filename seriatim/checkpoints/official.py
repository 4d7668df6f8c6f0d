"""Weights as their authors publish them: torch files and safetensors, read without running anything.

A `.pth` is a pickle, which can run any program. Only torch's restricted reader opens it here, for tensors, plain
containers, NumPy's numbers and `argparse.Namespace` (training scripts keep their arguments in one). Anything else is
refused by name.
"""

from __future__ import annotations

import argparse
import io
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seriatim.core.array_reading import read_safetensors
from seriatim.core.errors import CheckpointError, UsageError, nearest, one_line, shown
from seriatim.core.files import expanded
from seriatim.core.reading import read_or_raise

SUFFIXES = {".pth", ".pt", ".ckpt", ".bin", ".safetensors"}
# What torch.compile, FSDP and activation checkpointing put into names, wherever the wrapped module is
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PREFIXES = ("module.", "model.")  # what data-parallel training, and a model that holds the model, put before all names
ZIP = b"PK"  # how a zip begins
TELL_NOTHING = ("", "state_dict")  # names of entries that don't say which weights they are


@dataclass
class OfficialFile:
    """What an official file holds."""

    path: Path
    tensors: dict[str, Tensor]  # by their official names; may still lie in the file, not in memory
    arguments: dict[str, Any] = field(default_factory=dict)  # of the training script, where they were kept
    which: str = "model"  # the entry that was taken

    def argument(self, name: str, default: float, *, least: float = 0, most: float = math.inf) -> float:
        """A number among the training script's arguments; CheckpointError where it is none, or out of range."""
        value = self.arguments.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CheckpointError(f"{self.path}: its argument {name} is {value!r}, not a number")
        if not least <= value <= most:
            raise CheckpointError(
                f"{self.path}: its argument {name} is {value!r}; it must be from {least:g} to {most:g}"
            )
        return value

    def whole(self, name: str, default: int, *, least: int = 0) -> int:
        """A whole number among the training script's arguments; CheckpointError where it is none, or below `least`."""
        value = self.argument(name, default, least=least)
        if value != int(value):
            raise CheckpointError(f"{self.path}: its argument {name} is {value!r}; it must be a whole number")
        return int(value)


def read_official(path: Path | str, *, which: str | None = None, entries: tuple[str, ...] = ("model",)) -> OfficialFile:
    """Read the weights of an official file.

    `entries` are the state dicts that such a file may hold, the one to prefer first; `which` asks for one of them, or
    for another one of the file. Where the file holds none of them, averaged weights come first, then the others. A flat
    file may hold several under the entries' names as prefixes.
    Raises UsageError where there is no such file or entry, CheckpointError where it is damaged or not allowed.
    """
    path = expanded(path)
    if not path.is_file():
        raise UsageError(f"path: {path} is no file; name the downloaded weights ({', '.join(sorted(SUFFIXES))})")
    content = read_tensors(path) if path.suffix == ".safetensors" else read_torch(path)
    raw = content.get("args")
    arguments = dict(vars(raw)) if isinstance(raw, argparse.Namespace) else dict(raw) if isinstance(raw, dict) else {}
    found = state_dicts(content, entries)
    chosen = which or next(iter(found))
    if chosen not in found:
        if list(found) not in ([name] for name in TELL_NOTHING):
            raise UsageError(f"which: {path} holds no {chosen!r}; it holds {', '.join(map(repr, found))}")
        chosen = next(iter(found))
    return OfficialFile(path, only_tensors(path, found[chosen]), arguments, chosen or "model")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises CheckpointError if it can't be read."""
    return read_or_raise(lambda: read_safetensors(path), path, CheckpointError, "copy or download it again")


def read_torch(path: Path) -> Mapping[str, Any]:
    """What a torch file holds."""
    try:
        with torch.serialization.safe_globals(harmless()), warnings.catch_warnings():
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
    return content


def read_storage(raw: bytes) -> Any:
    """The memory of a tensor that lies in a torch file inside a pickle, on the CPU wherever it was written.

    Raises ValueError for one that would be larger than what is there of it.
    """
    if raw.startswith(ZIP):  # a small zip may unpack to anything
        raise ValueError("a tensor inside it is packed, which torch never does")
    storage = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ValueError(f"the memory of a tensor inside it is {type(storage).__name__}")
    if storage._untyped_storage.nbytes() > len(raw):  # torch takes the size that is said, even where no bytes follow
        raise ValueError("a tensor inside it says that it is larger than what the file holds of it")
    return storage


def harmless() -> list[Any]:
    """What scripts keep beside weights, none of which runs anything: their arguments, and NumPy's numbers."""
    scalar = np.float64(0).__reduce__()[0]  # which makes a number of its type and bytes
    names = [(scalar, f"{package}.multiarray.scalar") for package in ("numpy.core", "numpy._core")]
    return [argparse.Namespace, np.dtype, *names, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"}]


def state_dicts(content: Mapping[str, Any], entries: tuple[str, ...]) -> dict[str, Mapping[str, Any]]:
    """The state dicts in what a file holds, the one to prefer first; "" is the whole content, where it is one."""
    found = {name: content[name] for name in entries if isinstance(content.get(name), Mapping)}
    others = [name for name, value in content.items() if name not in found and is_state_dict(value)]
    found |= {name: content[name] for name in sorted(others, key=lambda name: "ema" not in str(name))}
    found = found or {"": content}
    if len(found) > 1 or not found.keys() <= set(TELL_NOTHING):
        return found
    (whole,) = found.values()
    parts, left = {}, set(whole)
    for entry in sorted(entries, key=len, reverse=True):
        inside = {n: t for n, t in whole.items() if isinstance(n, str) and n.startswith(f"{entry}.") and n in left}
        left -= inside.keys()
        parts[entry] = {n[len(entry) + 1 :]: t for n, t in inside.items()}
    several = not left and sum(bool(part) for part in parts.values()) > 1
    return {entry: parts[entry] for entry in entries if parts[entry]} if several else found


def is_state_dict(value: Any) -> bool:
    """Whether this is a mapping of names to tensors, perhaps with scalars among them."""
    if not isinstance(value, Mapping) or any(not isinstance(name, str) for name in value):
        return False
    tensors = [isinstance(v, Tensor) and v.ndim > 0 for v in value.values()]
    return any(tensors) and all(t or is_scalar(v) for t, v in zip(tensors, value.values(), strict=True))


def is_scalar(value: Any) -> bool:
    """Whether this is a number or a text, such as a count of steps: no weight."""
    return (
        value is None
        or isinstance(value, (int, float, str, np.generic))
        or (isinstance(value, Tensor) and value.ndim == 0)
    )


def check_packing(path: Path) -> None:
    """Refuse a file whose parts would be larger than the file: torch packs none of them."""
    with path.open("rb") as file:
        begins = file.read(len(ZIP))
    if begins == ZIP or zipfile.is_zipfile(path):  # torch goes by the beginning, the library by the end
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("its parts are packed, which torch never does")


def only_tensors(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a state dict under their own names; scalars beside them are left out."""
    some = is_state_dict(state)
    tensors = {}
    for name, value in state.items():
        if some and is_scalar(value):
            continue
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: entry {shown(name)} is {type(value).__name__}, not a tensor")
        tensors[name] = value
    check_held(path, tensors)
    return without_prefix(tensors)


def check_held(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a tensor larger than its memory, and memory larger than the file: old files may name a size without it."""
    room, seen = path.stat().st_size, set()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            continue
        memory = tensor.untyped_storage()
        if tensor.device.type == "cpu" and memory.data_ptr() not in seen:  # several tensors may share one
            seen.add(memory.data_ptr())
            room -= memory.nbytes()
        if room < 0 or tensor.numel() * tensor.element_size() > memory.nbytes():
            raise CheckpointError(f"{path}: tensor {name!r} says that it is larger than what the file holds of it")


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without those of wrappers (torch.compile, FSDP, data-parallel training), nested in any order."""
    while True:
        bare = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
        prefix = next((p for p in PREFIXES if bare and all(name.startswith(p) for name in bare)), "")
        bare = {name[len(prefix) :]: tensor for name, tensor in bare.items()}
        if len(bare) < len(tensors) or bare.keys() == tensors.keys():  # two names that become one are left to be named
            return tensors
        tensors = bare


def one_file(path: Path | str, stem: str | None) -> Path:
    """The file itself; of a folder, its safetensors file of that name, or its only one."""
    path = expanded(path)
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
