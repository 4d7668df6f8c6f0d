"""Names of tensors in files of earlier formats, and what they are called now.

format 1 -> 2   conditions became modules of their own; a nested head holds a sequence model
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

FORMAT = 2  # of model folders and checkpoints that are written now
READABLE = (1, 2)

CONDITIONS = {
    "no_class": "conditioner.no_class",
    "class_embedding": "conditioner.class_embedding",
    "captions.null": "conditioner.no_caption",
}


def renamed(tensors: Mapping[str, Tensor], written: int) -> dict[str, Tensor]:
    """The tensors of a model in a file of format `written`, under today's names."""
    return {name if written >= 2 else from_format_1(name): tensor for name, tensor in tensors.items()}


def from_format_1(name: str) -> str:
    """A tensor's name in format 1 -> its name in format 2."""
    if name in CONDITIONS:
        return CONDITIONS[name]
    if name.startswith("captions."):
        return "conditioner." + name.removeprefix("captions.")
    # Inside the head of the model: "head.backbone.x" and "head.head.x" belonged to a nested head, at any depth.
    parts = name.split(".")
    depth = 0
    while depth + 1 < len(parts) and parts[depth] == "head" and parts[depth + 1] in ("backbone", "head"):
        parts.insert(depth + 1, "model")
        depth += 2
    return ".".join(parts)
