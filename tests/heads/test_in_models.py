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
from seriatim.core.keys import Keys
from seriatim.core.settings import Settings
from seriatim.models.build import build_head, seeded
from seriatim.models.masked_model import MaskedModel

PARTS: dict[str, Any] = {
    "split": {"kind": "features"},
    "backbone": {"kind": "causal", "width": 24, "depth": 1, "heads": 2, "conditioning": "both"},
    "head": {"kind": "mixture", "components": 3, "depth": 0},
}
PAIRS = {**PARTS, "split": {"kind": "features", "group": 2, "order": "reversed"}}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("flow", {"width": 24, "depth": 2}, {"num_diffusion_steps": 6, "num_diffusion_steps_last": 2}),
    ("flow", {"width": 24, "depth": 2}, {"num_diffusion_steps": 5, "solver": "heun"}),
    ("energy", {"width": 24, "depth": 2, "noise": 8}, {"temperature": 0.7}),
    ("mixture", {"width": 24, "depth": 1, "components": 3, "covariance": "full"}, {"temperature": 0.9}),
    ("nested", PARTS, {"temperature": 0.9, "feature_schedule": "linear"}),
    ("nested", PARTS, {"guidance_mode": "resample", "top_p": 0.9}),
    ("nested", PAIRS, {"feature_schedule": "cosine"}),
    ("nested", {**PARTS, "head": {"kind": "bins", "bins": 16}}, {"top_k": 5}),
    ("nested", {**PARTS, "head": {"kind": "flow", "width": 16, "depth": 1}}, {"num_diffusion_steps": 4}),
]


@pytest.mark.parametrize(("kind", "config", "options"), CASES)
def test_a_head_in_a_model(kind: str, config: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    options = dict(options)
    bundle = make_bundle()
    with seeded(0):
        backbone = Masked(tokens=16, dim=4, width=32, depth=2, heads=2, buffer=3, dropout=0.0)
        bundle.model = MaskedModel(
            backbone, build_head({"kind": kind, **config}, dim=4, vocab=None, z_dim=32), classes=3
        ).eval()
    randomise(bundle.model, scale=0.05)
    bundle.sampling.clear()
    pipe = seriatim.load(save_bundle(bundle, tmp_path / "model"))
    shared = {"num_inference_steps": 4, "guidance_scale": 2.0, "temperature": options.pop("temperature", 1.0)}
    if "num_diffusion_steps_last" in options:
        shared["num_diffusion_steps_last"] = options.pop("num_diffusion_steps_last")
    given = {**shared, **options}
    result = pipe(class_labels=[0, 2], seed=3, **given)
    model, settings = bundle.model, Settings(**shared, head_options=options)
    condition = model.condition(torch.tensor([0, 2]), 2)
    expected = model.sample(condition, model.null(2), Keys.of_seeds(result.seeds), settings)
    assert torch.allclose(result.tokens, expected, atol=1e-4, rtol=1e-4)
    alone = pipe(class_labels=[2], seeds=[result.seeds[1]], **given)
    assert torch.allclose(alone.tokens[0], result.tokens[1], atol=1e-4, rtol=1e-4), "whatever else is in the batch"
    if kind == "flow":
        with pytest.raises(UsageError, match="solver: 'ddpm' is not known to the Flow head; allowed: euler, heun"):
            pipe(class_labels=[0], seed=3, solver="ddpm")
