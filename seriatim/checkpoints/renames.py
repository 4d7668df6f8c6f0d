"""Files of earlier formats: what their tensors are called now, and in which order an optimiser had them.

format 1 -> 2   conditions became modules of their own; a nested head holds a sequence model; the state of an optimiser
                is kept by the names of parameters, not by their numbers
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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


def in_order_of_format_1(names: Iterable[str]) -> list[str]:
    """Today's names of a model's parameters, in today's order, as the model of format 1 had them.

    The parameters of captions came last, and inside a nested head those of the inner head came before the backbone's.
    """

    def place(name: str) -> list[int]:
        parts = name.split(".")
        result = [int(parts[0] == "conditioner" and parts[1] not in ("no_class", "class_embedding"))]
        while parts[:2] == ["head", "model"]:
            parts = parts[2:]
            result.append(int(parts[0] != "head"))
        return result

    return sorted(names, key=place)
