"""Presets: exact sizes, and nothing claimed that isn't so."""

from __future__ import annotations

import pytest
import torch

from seriatim.core.errors import UsageError
from seriatim.models.build import build_model, parameter_count
from seriatim.training.config import read_recipe
from seriatim.training.optim import parameter_groups
from seriatim.training.setup import build
from seriatim.zoo import PRESETS, preset

# reference: the released checkpoints of MAR, the official models of LlamaGen
OFFICIAL = {
    "mar-b": 207_924_768, "mar-l": 478_326_304, "mar-h": 942_403_104,
    "llamagen-b": 110_888_448, "llamagen-l": 342_910_976, "llamagen-xl": 774_699_520,
    "llamagen-xxl": 1_410_972_672, "llamagen-3b": 3_096_659_200,
}  # fmt: skip
OFFICIAL_DECAYED = {"mar-b": 104, "mar-l": 136, "mar-h": 168}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_exact(name: str) -> None:
    with torch.device("meta"):
        model = build_model(PRESETS[name].model)
    assert parameter_count(model) == PRESETS[name].parameters == OFFICIAL.get(name, PRESETS[name].parameters)
    assert model.tokens == PRESETS[name].tokens


@pytest.mark.parametrize("name", OFFICIAL_DECAYED)
def test_weight_decay_falls_on_the_official_tensors(name: str) -> None:
    """Their number is that of the official training code: everything but vectors and the head."""
    with torch.device("meta"):
        decayed, free = parameter_groups(build_model(PRESETS[name].model), 0.02)
    assert len(decayed["params"]) == OFFICIAL_DECAYED[name] and decayed["weight_decay"] == 0.02
    assert free["weight_decay"] == 0.0


def test_a_preset_with_a_recipe_is_that_recipes_model() -> None:
    for name, entry in PRESETS.items():
        if entry.recipe:
            recipe = read_recipe(entry.recipe)
            _, _, model = build(recipe)
            assert parameter_count(model) == entry.parameters, name
            assert entry.sampling == recipe.sampling, name


def test_published_figures_name_their_source() -> None:
    for entry in PRESETS.values():
        assert entry.published is None or "authors" in entry.published["source"]


def test_a_text_model_has_the_official_size() -> None:
    config = {**preset("llamagen-xl").model, "classes": 0, "caption_dim": 2048, "caption_tokens": 120}
    with torch.device("meta"):
        model = build_model(config)
    assert parameter_count(model) == 777_678_080, "what stands for no caption is not trained"


def test_llamagen_presets_rotate_their_prefix_and_the_authors_weights_do_not() -> None:
    for size in ("b", "l", "xl", "xxl", "3b"):
        entry = preset(f"llamagen-{size}")
        assert "rotate_prefix" not in entry.model and entry.original() == {**entry.model, "rotate_prefix": False}
    with torch.device("meta"):
        assert build_model(preset("llamagen-b").model).backbone.config["rotate_prefix"] is True
    assert preset("mar-b").original() == preset("mar-b").model


def test_unknown_presets_are_named() -> None:
    with pytest.raises(UsageError, match="did you mean 'mar-b'"):
        preset("marb")
