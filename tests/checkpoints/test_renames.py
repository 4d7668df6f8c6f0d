"""Names and orders of format 1: what release 0.1 wrote is found again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seriatim.checkpoints.renames import from_format_1, in_order_of_format_1
from seriatim.models.build import build_model

MIXTURE = {"kind": "mixture", "components": 2, "depth": 0}
BACKBONE = {"kind": "causal", "width": 8, "depth": 1, "heads": 1, "conditioning": "both"}


def nested(head: dict[str, Any], group: int = 1) -> dict[str, Any]:
    return {"kind": "nested", "split": {"kind": "features", "group": group}, "backbone": BACKBONE, "head": head}


def model(head: dict[str, Any], kind: str = "masked", **more: Any) -> torch.nn.Module:
    sizes = {"tokens": 4, "dim": 4, "width": 8, "depth": 1, "heads": 1, "classes": 3}
    return build_model({"kind": kind, **sizes, **more, "head": head})


# What `named_parameters` of release 0.1 gave, where its order was another than today's: the first of each part.
NESTED = [
    "no_class",
    "class_embedding",
    "backbone.encoder_positions",
    "head.head.final.weight",
    "head.head.final.bias",
    "head.backbone.token_embed.weight",
]
TWICE = [
    "no_class",
    "class_embedding",
    "backbone.encoder_positions",
    "head.head.head.final.weight",
    "head.head.backbone.token_embed.weight",
    "head.backbone.token_embed.weight",
]
CAPTIONS = ["backbone.token_embed.weight", "head.final.weight", "captions.mlp.fc1.weight", "captions.mlp.down.weight"]


@pytest.mark.parametrize(
    ("made", "old"),
    [
        (lambda: model(nested(MIXTURE)), NESTED),
        (lambda: model(nested(nested(MIXTURE), group=2)), TWICE),
        (
            lambda: model({**MIXTURE, "width": 8}, "causal", classes=0, caption_dim=5, caption_tokens=2),
            CAPTIONS,
        ),
    ],
    ids=["nested", "nested twice", "captions"],
)
def test_parameters_come_in_the_order_of_release_0_1(made: Any, old: list[str]) -> None:
    today = [name for name, _ in made().named_parameters()]
    then = in_order_of_format_1(today)
    assert sorted(then) == sorted(today) and then != today
    wanted = [from_format_1(name) for name in old]
    assert set(wanted) <= set(today), sorted(set(wanted) - set(today))
    assert sorted(wanted, key=then.index) == wanted
    assert [name for name in then if name.startswith("backbone.")] == [n for n in today if n.startswith("backbone.")]


def test_other_models_keep_their_order() -> None:
    today = [name for name, _ in model({"kind": "diffusion", "width": 8, "depth": 1}).named_parameters()]
    assert in_order_of_format_1(today) == today


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("no_class", "conditioner.no_class"),
        ("captions.null", "conditioner.no_caption"),
        ("captions.mlp.down.weight", "conditioner.mlp.down.weight"),
        ("head.final.weight", "head.final.weight"),
        ("head.backbone.blocks.0.attention.qkv.weight", "head.model.backbone.blocks.0.attention.qkv.weight"),
        ("head.head.head.final.bias", "head.model.head.model.head.final.bias"),
        ("backbone.encoder.0.norm1.bias", "backbone.encoder.0.norm1.bias"),
    ],
)
def test_names(old: str, new: str) -> None:
    assert from_format_1(old) == new
