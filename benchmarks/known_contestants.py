"""Who takes part in `known_density`: trunks x heads of about the same size, as `build_model` takes them.

A further one is an entry of CONTESTANTS; what the package can't build yet is left out, and said so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

from known_processes import Process
from torch import Tensor

from seriatim.core.keys import Keys
from seriatim.core.random import derive_seed
from seriatim.core.settings import Settings
from seriatim.models.base import SequenceModel
from seriatim.models.build import build_model, seeded
from seriatim.models.registry import BACKBONES, HEADS, MODELS

HELD_OUT = 512


@dataclass(frozen=True)
class Contestant:
    """A model's config, as `build_model` takes it but for the sizes of the task, and how it is sampled."""

    model: dict[str, Any]
    order: str = "random"  # or raster: in which it samples and is scored
    steps: int | None = None  # over a sequence; None: a token each
    sampling: dict[str, Any] = field(default_factory=dict)  # of the head
    codes: int | None = None  # k-means centres; None: tokens are features
    scored: tuple[int, int] = (HELD_OUT, 64)  # held-out sequences for the gap, and D up to which it is computed

    def missing(self) -> list[str]:
        """What it needs and the package's tables lack."""
        kinds = ((MODELS, self.model["kind"]), (BACKBONES, self.model.get("backbone", self.model["kind"])))
        needs = (*kinds, (HEADS, self.model["head"]["kind"]))
        return list(dict.fromkeys(name for table, name in needs if name not in table))

    def build(self, process: Process, seed: int) -> SequenceModel:
        sizes: dict[str, Any] = {"vocab": self.codes} if self.codes else {"dim": process.dim}
        with seeded(derive_seed("weights", seed)):
            return build_model(self.model, tokens=process.tokens, classes=process.classes, **sizes)

    def sample(self, model: SequenceModel, labels: Tensor, keys: Keys) -> Tensor:
        """labels (B,), keys of B rows -> tokens (B, L, D) or codes (B, L)."""
        several = not model.one_by_one
        settings = Settings(
            num_inference_steps=self.steps or model.tokens if several else None, head_options=dict(self.sampling)
        )
        order = list(range(model.tokens)) if several and self.order == "raster" else None
        condition = model.condition(labels, len(labels))
        return model.sample(condition, model.null(len(labels), condition), keys, settings, order=order)


# Every mask ratio alike: with that the mean loss is the any-order likelihood's own (as MAR trains, few are ever known)
MASKED = {"kind": "masked", "width": 64, "depth": [1, 2], "heads": 4, "buffer": 2, "dropout": 0.0, "label_dropout": 0.0,
          "min_mask_ratio": 0.01, "mask_ratio_std": 10.0}  # fmt: skip
CAUSAL = {"kind": "causal", "width": 64, "depth": 3, "heads": 4, "dropout": 0.0, "label_dropout": 0.0}
TRUNKS: dict[str, tuple[dict[str, Any], str]] = {
    "masked": (MASKED, "random"),
    "causal": (CAUSAL | {"order": "raster"}, "raster"),
    "causal-random": (CAUSAL | {"order": "random"}, "random"),
}
LEAVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # head, and how it samples
    "diffusion": (
        {"kind": "diffusion", "width": 64, "depth": 3},
        {"num_diffusion_steps": 20, "solver": "sde-dpm++"},
    ),
    "flow": ({"kind": "flow", "width": 64, "depth": 3}, {"num_diffusion_steps": 20}),
    "energy": ({"kind": "energy", "width": 64, "depth": 3}, {}),
    "mixture1": ({"kind": "mixture", "components": 1, "width": 64, "depth": 3}, {}),
    "mixture4": ({"kind": "mixture", "components": 4, "width": 64, "depth": 3}, {}),
    "mixture16": ({"kind": "mixture", "components": 16, "width": 64, "depth": 3}, {}),
}
INNER = {"kind": "causal", "width": 64, "depth": 1, "heads": 4, "norm": "layer", "mlp": "gelu-tanh",
         "positions": "learned", "conditioning": "both"}  # fmt: skip
MORE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the masked trunk alone
    "full4": ({"kind": "mixture", "components": 4, "covariance": "full", "width": 64, "depth": 3}, {}),
    # feature by feature: ARINAR's head, TokenBridge's
    "arinar4": ({"kind": "nested", "split": {"kind": "features"}, "backbone": INNER,
                 "head": {"kind": "mixture", "components": 4, "depth": 0}}, {}),
    "tokenbridge": ({"kind": "nested", "split": {"kind": "features"}, "backbone": INNER,
                     "head": {"kind": "bins", "bins": 64}}, {}),
}  # fmt: skip


def arinar(components: int = 4, depth: int = 1, order: str = "natural") -> tuple[dict[str, Any], dict[str, Any]]:
    """Feature by feature, one mixture each (Zhao et al. 2025): as "arinar4", with other settings."""
    nested, sampling = MORE["arinar4"]
    changed = {"split": {"kind": "features", "order": order}, "backbone": INNER | {"depth": depth}}
    return {**nested, **changed, "head": {"kind": "mixture", "components": components, "depth": 0}}, sampling


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the masked trunk alone; only where they are named
    "arinar1": arinar(components=1),
    "arinar2": arinar(components=2),
    "arinar8": arinar(components=8),
    "arinar4-deep": arinar(depth=2),
    "arinar4-reversed": arinar(order="reversed"),
}


def table_of_contestants() -> dict[str, Contestant]:
    pairs = [*product(("masked", "causal"), LEAVES), ("causal-random", "diffusion"), ("causal-random", "mixture4")]
    made = {}
    for trunk, leaf in pairs:
        (model, order), (head, sampling) = TRUNKS[trunk], LEAVES[leaf]
        # a flow's density costs D backward passes at each step of its solver
        scored = (64, 2) if leaf == "flow" else (HELD_OUT, 64)
        made[f"{trunk}-{leaf}"] = Contestant({**model, "head": head}, order, None, sampling, None, scored)
    for leaf, (head, sampling) in MORE.items():
        made[f"masked-{leaf}"] = Contestant({**MASKED, "head": head}, "random", None, sampling)
    made["masked-categorical"] = Contestant({**MASKED, "head": {"kind": "categorical"}}, codes=256)
    for leaf, (head, sampling) in VARIANTS.items():
        made[f"masked-{leaf}"] = Contestant({**MASKED, "head": head}, "random", None, sampling)
    return made


CONTESTANTS: dict[str, Contestant] = table_of_contestants()
USUAL = [name for name in CONTESTANTS if name.removeprefix("masked-") not in VARIANTS]
