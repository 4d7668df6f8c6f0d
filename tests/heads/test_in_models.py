"""Every head in a masked model: the pipeline draws what the naive sampler does, and a folder brings it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_bundle, randomise

import seriatim
from seriatim.backbones.masked_transformer import Masked
from seriatim.checkpoints.native import save_bundle
from seriatim.core.errors import UsageError
from seriatim.core.random import Noise
from seriatim.heads.base import Head
from seriatim.heads.flow import Flow
from seriatim.heads.mixture import Mixture
from seriatim.models.build import seeded
from seriatim.models.masked_model import MaskedModel
from seriatim.models.nested import Nested

PARTS: dict[str, Any] = {
    "split": {"kind": "features"},
    "backbone": {"kind": "causal", "width": 24, "depth": 1, "heads": 2, "conditioning": "both"},
    "head": {"kind": "mixture", "components": 3, "depth": 0},
}
PAIRS = {**PARTS, "split": {"kind": "features", "group": 2, "order": "reversed"}}
CASES: list[tuple[type[Head], dict[str, Any], dict[str, Any]]] = [
    (Flow, {"width": 24, "depth": 2}, {"num_diffusion_steps": 6, "num_diffusion_steps_last": 2}),
    (Flow, {"width": 24, "depth": 2}, {"num_diffusion_steps": 5, "solver": "heun"}),
    (Mixture, {"width": 24, "depth": 1, "components": 3, "covariance": "full"}, {"temperature": 0.9}),
    (Nested, PARTS, {"temperature": 0.9, "feature_schedule": "linear"}),
    (Nested, PARTS, {"guidance_mode": "resample", "top_p": 0.9}),
    (Nested, PAIRS, {"feature_schedule": "cosine"}),
    (Nested, {**PARTS, "head": {"kind": "bins", "bins": 16}}, {"top_k": 5}),
    (Nested, {**PARTS, "head": {"kind": "flow", "width": 16, "depth": 1}}, {"num_diffusion_steps": 4}),
]


@pytest.mark.parametrize(("kind", "config", "options"), CASES)
def test_a_head_in_a_model(kind: type[Head], config: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    bundle = make_bundle()
    with seeded(0):
        backbone = Masked(tokens=16, dim=4, width=32, depth=2, heads=2, buffer=3, dropout=0.0)
        bundle.model = MaskedModel(backbone, kind(dim=4, **config), classes=3).eval()
    randomise(bundle.model, scale=0.05)
    bundle.sampling.clear()
    pipe = seriatim.load(save_bundle(bundle, tmp_path / "model"))
    asked = {"num_inference_steps": 4, "guidance_scale": 2.0, **options}
    given = dict(asked)
    result = pipe(class_labels=[0, 2], seed=3, **given)
    asked["steps"] = asked.pop("num_inference_steps")
    expected = bundle.model.sample(torch.tensor([0, 2]), Noise.per_image(result.seeds), **asked)
    assert torch.allclose(result.tokens, expected, atol=1e-4, rtol=1e-4)
    alone = pipe(class_labels=[2], seeds=[result.seeds[1]], **given)
    assert torch.allclose(alone.tokens[0], result.tokens[1], atol=1e-4, rtol=1e-4), "whatever else is in the batch"
    if kind is Flow:
        with pytest.raises(UsageError, match="solver: 'ddpm' is not known to the Flow head; allowed: euler, heun"):
            pipe(class_labels=[0], seed=3, solver="ddpm")
