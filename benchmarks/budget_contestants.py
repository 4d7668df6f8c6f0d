"""The contestants of `budget`, as data: a base recipe, and what each of them changes.

A change is a dotted key of a recipe and its value. Changes are composed by name: `muon+patch-2` makes those of `muon`,
then those of `patch-2`. Two values are not a recipe's: `warmup` is the share of all images in which the learning rate
rises, because the number of images differs between contestants, and the patch `whole` is as large as the image.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from seriatim.core.errors import UsageError, nearest

FLOW: dict[str, Any] = {"kind": "flow", "width": 256, "depth": 3, "draws": 2}
BASE: dict[str, Any] = {
    "data": {"kind": "folder", "check": False},
    "tokenizer": {"kind": "pixels", "patch": 4, "components": 16, "whiten": 0.5},
    "model": {"kind": "causal", "width": 256, "depth": 6, "heads": 4, "dropout": 0.0, "head": FLOW},
    "training": {
        "batch_size": 64, "learning_rate": 1e-3, "schedule": "cosine", "ema": 0.999, "threads": 1, "sample_images": 0,
    },
    "sampling": {"num_diffusion_steps": 25, "guidance_schedule": "constant"},
    "warmup": 0.05,
}  # fmt: skip

# In training every mask ratio occurs, since sampling goes through all of them; the first, of nothing known, often.
MASKED: dict[str, Any] = {
    "kind": "masked", "width": 256, "depth": 3, "heads": 4, "buffer": 4, "dropout": 0.0, "min_mask_ratio": 0.1,
    "mask_ratio_std": 0.6, "head": FLOW,
}  # fmt: skip
UNET: dict[str, Any] = {
    "kind": "masked", "backbone": "class-only", "width": 256,
    "head": {"kind": "unet", "widths": [32, 64, 128], "layers": 2, "attention": [2]},
}  # fmt: skip


@dataclass(frozen=True)
class Contestant:
    lever: str  # what it varies
    changes: dict[str, Any] = field(default_factory=dict)
    of: str = ""  # the contestant whose changes come before its own


def muon(rate: float) -> dict[str, Any]:
    return {"training.optimiser": {"kind": "muon", "matrix_rate": rate}}


CONTESTANTS: dict[str, Contestant] = {
    "base": Contestant("the prototype"),
    # The prototype's Muon had the rate 0.02 by another convention, 0.006 here, and decayed matrices a little more.
    "muon": Contestant("optimiser", muon(0.006)),
    "muon-0.003": Contestant("optimiser", muon(0.003)),
    "muon-0.012": Contestant("optimiser", muon(0.012)),
    "muon-0.024": Contestant("optimiser", muon(0.024)),
    "rate-5e-4": Contestant("rate", {"training.learning_rate": 5e-4}),
    "rate-2e-3": Contestant("rate", {"training.learning_rate": 2e-3}),
    "rate-4e-3": Contestant("rate", {"training.learning_rate": 4e-3}),
    "constant": Contestant("schedule", {"training.schedule": "constant"}),
    "warmup-0.01": Contestant("schedule", {"warmup": 0.01}),
    "warmup-0.2": Contestant("schedule", {"warmup": 0.2}),
    "decay-0": Contestant("weight decay", {"training.weight_decay": 0.0}),
    "decay-0.1": Contestant("weight decay", {"training.weight_decay": 0.1}),
    "decay-0.3": Contestant("weight decay", {"training.weight_decay": 0.3}),
    "betas-0.99": Contestant("moments", {"training.betas": [0.9, 0.99]}),
    # The decay of the average warms up, so that a short training sees little of values above 0.99.
    "ema-0": Contestant("average", {"training.ema": 0.0}),
    "ema-0.98": Contestant("average", {"training.ema": 0.98}),
    "ema-0.995": Contestant("average", {"training.ema": 0.995}),
    "components-8": Contestant("tokenizer", {"tokenizer.components": 8}),
    "components-24": Contestant("tokenizer", {"tokenizer.components": 24}),
    "components-48": Contestant("tokenizer", {"tokenizer.components": 48}),
    "whiten-0": Contestant("tokenizer", {"tokenizer.whiten": 0.0}),
    "whiten-0.25": Contestant("tokenizer", {"tokenizer.whiten": 0.25}),
    "whiten-1": Contestant("tokenizer", {"tokenizer.whiten": 1.0}),
    "patch-2": Contestant("tokenizer", {"tokenizer.patch": 2, "tokenizer.components": 8}),
    "patch-8": Contestant("tokenizer", {"tokenizer.patch": 8, "tokenizer.components": 48}),
    "diffusion": Contestant("head", {"model.head": {**FLOW, "kind": "diffusion"}, "sampling.solver": "sde-dpm++"}),
    "energy": Contestant(
        "head",
        {"model.head": {"kind": "energy", "width": 256, "depth": 3}, "sampling": {"guidance_schedule": "constant"}},
    ),
    "draws-1": Contestant("head", {"model.head.draws": 1}),
    "draws-4": Contestant("head", {"model.head.draws": 4}),
    "draws-8": Contestant("head", {"model.head.draws": 8}),
    "head-width-128": Contestant("head", {"model.head.width": 128}),
    "head-width-384": Contestant("head", {"model.head.width": 384}),
    "head-depth-2": Contestant("head", {"model.head.depth": 2}),
    "head-depth-6": Contestant("head", {"model.head.depth": 6}),
    "times-later": Contestant("head", {"model.head.time_mean": 0.5}),
    "times-earlier": Contestant("head", {"model.head.time_mean": -0.5}),
    "masked": Contestant("backbone", {"model": MASKED, "sampling.num_inference_steps": 32}),
    "masked-depth-6": Contestant("backbone", {"model": {**MASKED, "depth": 6}, "sampling.num_inference_steps": 32}),
    "any-order": Contestant("backbone", {"model.order": "random"}),
    "adaln": Contestant("backbone", {"model.conditioning": "adaln"}),
    "width-192": Contestant("size", {"model.width": 192, "model.heads": 3}),
    "width-320": Contestant("size", {"model.width": 320, "model.heads": 5}),
    "width-384": Contestant("size", {"model.width": 384, "model.heads": 6}),
    "depth-4": Contestant("size", {"model.depth": 4}),
    "depth-8": Contestant("size", {"model.depth": 8}),
    "depth-12": Contestant("size", {"model.depth": 12}),
    "batch-16": Contestant("batch", {"training.batch_size": 16}),
    "batch-32": Contestant("batch", {"training.batch_size": 32}),
    "batch-128": Contestant("batch", {"training.batch_size": 128}),
    "no-mirror": Contestant("augmentation", {"data.flip": False}),
    "label-dropout-0.05": Contestant("class dropout", {"model.label_dropout": 0.05}),
    "label-dropout-0.2": Contestant("class dropout", {"model.label_dropout": 0.2}),
    "unet": Contestant(
        "opponent",
        {
            "tokenizer": {"kind": "pixels", "patch": "whole"},
            "model": UNET,
            "sampling": {
                "num_diffusion_steps": 15,
                "solver": "heun",
                "num_inference_steps": 1,
                "guidance_schedule": "constant",
            },
        },
    ),
    "unet-shallow": Contestant("opponent's size", {"model.head.layers": 1}, "unet"),
    "unet-wide": Contestant("opponent's size", {"model.head.widths": [64, 64, 128]}, "unet"),
    "unet-wider": Contestant("opponent's size", {"model.head.widths": [64, 128, 256]}, "unet"),
    "unet-patch-2": Contestant(
        "opponent's size",
        {"model.head.widths": [128, 128], "model.head.layers": 1, "model.head.attention": [1], "model.head.patch": 2},
        "unet",
    ),
    "unet-rate-2e-3": Contestant("opponent's rate", {"training.learning_rate": 2e-3}, "unet"),
    "unet-rate-5e-4": Contestant("opponent's rate", {"training.learning_rate": 5e-4}, "unet"),
    "unet-batch-32": Contestant("opponent's batch", {"training.batch_size": 32}, "unet"),
    "unet-dropout": Contestant("opponent's network", {"model.head.dropout": 0.1}, "unet"),
}


def composed(name: str, table: Mapping[str, Contestant]) -> dict[str, Any]:
    """The changes of a contestant, of a name in `table` or several of them joined by +, in their order."""
    found: dict[str, Any] = {}
    for part in name.split("+"):
        if part not in table:
            raise UsageError(f"only: {part!r} is no contestant{nearest(part, table)}; --list shows all")
        before = composed(table[part].of, table) if table[part].of else {}
        found |= before | table[part].changes
    return found


def recipe_values(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The base recipe with the changes made."""
    made = copy.deepcopy(BASE)
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = made
        for section in sections:
            if not isinstance(place.get(section), dict):
                raise UsageError(f"{key}: {section!r} is no section of the recipe of this contestant")
            place = place[section]
        place[last] = copy.deepcopy(value)
    return made
