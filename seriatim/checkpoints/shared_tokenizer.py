"""The tokenizer of a run's checkpoints, which is written once for all of them.

    RUN/checkpoints/tokenizer-0123456789abcdef.safetensors   weights and statistics; named by the start of its sha256
    RUN/checkpoints/000000123456/tokenizer.json              the name, bytes and sha256 of that file

Checkpoints of earlier versions hold a tokenizer.safetensors of their own instead, and so do model folders.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from seriatim.core.errors import CheckpointError
from seriatim.core.files import atomic_write, refuse_outside, verify_file
from seriatim.core.ownership import json_of
from seriatim.core.reading import read_json, read_or_raise

TOKENIZER, REFERENCE = "tokenizer.safetensors", "tokenizer.json"
SHARED = re.compile(r"tokenizer-[0-9a-f]{16}\.safetensors")
REMEDY = "copy it from the folder of the checkpoints where the run was made"


def share(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a tokenizer's tensors beside the checkpoints in `folder`, unless they are there, and return a reference."""
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    path = folder / f"tokenizer-{digest[:16]}.safetensors"
    if not path.is_file() or path.stat().st_size != len(data):
        atomic_write(path, lambda file: file.write_bytes(data))
    return {"file": path.name, "bytes": len(data), "sha256": digest}


def tokenizer_in(checkpoint: Path) -> str:
    """The name of the file in the folder of a checkpoint that holds the tokenizer, or refers to it."""
    return REFERENCE if (checkpoint / REFERENCE).is_file() else TOKENIZER


def tokenizer_file(checkpoint: Path) -> Path:
    """The file with the tokenizer's tensors of a checkpoint; one that checkpoints share is verified here.

    Raises CheckpointError if the shared file is missing or damaged, or lies outside of the checkpoints' folder.
    """
    if tokenizer_in(checkpoint) == TOKENIZER:
        return checkpoint / TOKENIZER
    path = checkpoint / REFERENCE
    values = read_or_raise(lambda: read_json(path, dict), path, CheckpointError, "use another checkpoint")
    name, size, digest = (values.get(key) for key in ("file", "bytes", "sha256"))
    if type(name) is not str or not SHARED.fullmatch(name) or type(size) is not int or type(digest) is not str:
        raise CheckpointError(f"{path} does not give the name, bytes and sha256 of a tokenizer; use another checkpoint")
    home = checkpoint.resolve().parent
    refuse_outside(home, name)
    verify_file(home / name, size, digest, REMEDY, listed_in=str(path))
    return home / name


def drop_unused(folder: Path) -> None:
    """Delete the shared tokenizers that no checkpoint in `folder` refers to; one that is set aside counts as well."""
    used = {json_of(path).get("file") for path in folder.glob(f"*/{REFERENCE}")}
    if None not in used:  # a reference that can't be read may mean any of them
        for path in list(folder.iterdir()):
            if SHARED.fullmatch(path.name) and path.name not in used:
                path.unlink(missing_ok=True)
