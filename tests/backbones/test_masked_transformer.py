"""The masked backbone: what it may look at, batches of unequal images, bounds on memory."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from helpers import randomise

from seriatim.backbones.masked_transformer import Masked
from seriatim.backbones.requests import neighbour_table, positions_in
from seriatim.conditions.base import Condition
from seriatim.core.errors import UsageError

L, D, E, C = 12, 4, 32, 24


@pytest.fixture
def backbone() -> Masked:
    made = Masked(L, D, width=(E, C), depth=(2, 1), heads=(4, 3), buffer=3, dropout=0.0).eval()
    randomise(made)
    return made


def inputs(B: int) -> tuple[Condition, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    known = torch.rand(B, L, generator=g) < 0.4
    return Condition(torch.randn(B, 1, E, generator=g)), torch.randn(B, L, D, generator=g), known


@torch.no_grad()
def test_images_with_unequal_known_counts_equal_each_alone(backbone: Masked) -> None:
    condition, tokens, known = inputs(5)
    known[0], known[1] = False, True
    ask = torch.ones_like(known)
    assert len(set(known.sum(1).tolist())) > 2, "the case must be ragged"
    together = backbone.z(condition, tokens, known, ask).view(5, L, C)
    for i in range(5):
        one = slice(i, i + 1)
        alone = backbone.z(condition.select(one), tokens[one], known[one], ask[one])
        assert torch.allclose(together[i], alone, atol=2e-5), i


@torch.no_grad()
def test_unknown_tokens_are_never_looked_at(backbone: Masked) -> None:
    condition, tokens, known = inputs(3)
    z = backbone.z(condition, tokens, known, ~known)
    changed = torch.where(known[..., None], tokens, torch.full_like(tokens, 1e6))
    assert torch.equal(backbone.z(condition, changed, known, ~known), z)
    changed = tokens + known[..., None]
    assert not torch.allclose(backbone.z(condition, changed, known, ~known), z, atol=1e-2)


@torch.no_grad()
def test_z_is_that_of_the_rows_asked_for_in_raster_order(backbone: Masked) -> None:
    condition, tokens, known = inputs(3)
    every = backbone.z(condition, tokens, known, torch.ones_like(known)).view(3, L, C)
    ask = torch.zeros_like(known)
    ask[0, [7, 2]], ask[2, 5] = True, True
    z = backbone.z(condition, tokens, known, ask)
    assert torch.allclose(z, torch.stack([every[0, 2], every[0, 7], every[2, 5]]), atol=1e-5)
    spread = (every - every.mean(dim=1, keepdim=True)).abs().mean()
    assert spread > 0.05, "positions must be told apart"


@torch.no_grad()
def test_the_condition_and_where_tokens_stand_matter(backbone: Masked) -> None:
    condition, tokens, known = inputs(2)
    z = backbone.z(condition, tokens, known, ~known)
    other = backbone.z(Condition(condition.vectors.flip(0)), tokens, known, ~known)
    assert not torch.allclose(z, other, atol=1e-2)


@torch.no_grad()
def test_a_row_cap_changes_nothing(backbone: Masked) -> None:
    condition, tokens, known = inputs(5)
    whole = backbone.z(condition, tokens, known, ~known)
    sizes: list[int] = []
    backbone.encoder[0].register_forward_pre_hook(lambda _, a: sizes.append(len(a[0])))
    backbone.row_cap = 2 * (L + 3)
    assert torch.allclose(backbone.z(condition, tokens, known, ~known), whole, atol=2e-5)
    assert sizes == [2, 2, 1]


def test_positions_in_a_mask() -> None:
    known = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0]], dtype=torch.bool)
    index, valid = positions_in(known)
    assert index[0].tolist() == [1, 3] and index[1, 0] == 0
    assert valid is not None and valid.tolist() == [[True, True], [True, False]]
    index, valid = positions_in(known[:1])
    assert index.tolist() == [[1, 3]] and valid is None


@torch.no_grad()
def test_neighbours_are_those_on_the_grid() -> None:
    backbone = Masked(L, D, width=(E, C), depth=1, heads=(4, 3), buffer=3, grid=(3, 4), dropout=0.0).eval()
    randomise(backbone)
    condition, tokens, known = inputs(3)
    every = backbone.z(condition, tokens, known, torch.ones_like(known)).view(3, L, C)
    z = backbone.z(condition, tokens, known, ~known, neighbours=True)
    rows, places = (~known).nonzero().unbind(1)
    assert z.shape == (len(rows), 5, C)
    for n, (image, place) in enumerate(zip(rows.tolist(), places.tolist(), strict=True)):
        row, column = divmod(place, 4)
        around = [(row, column), (row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        for k, (i, j) in enumerate(around):
            there = every[image, 4 * i + j] if 0 <= i < 3 and 0 <= j < 4 else torch.zeros(C)
            assert torch.allclose(z[n, k], there, atol=2e-5), (place, k)


def test_the_table_of_neighbours() -> None:
    assert neighbour_table((1, 3)).tolist() == [[0, 3, 3, 3, 1], [1, 3, 3, 0, 2], [2, 3, 3, 1, 3]]
    assert neighbour_table((2, 2))[3].tolist() == [3, 1, 4, 2, 4]


@torch.no_grad()
def test_several_vectors_of_a_condition_fill_the_buffer() -> None:
    backbone = Masked(L, D, width=(E, C), depth=1, heads=(4, 3), buffer=6, dropout=0.0).eval()
    randomise(backbone)
    _, tokens, known = inputs(2)
    vectors = torch.randn(2, 3, E, generator=torch.Generator().manual_seed(2))
    z = backbone.z(Condition(vectors), tokens, known, ~known)
    assert torch.allclose(backbone.z(Condition(vectors.repeat_interleave(2, dim=1)), tokens, known, ~known), z)
    assert not torch.allclose(backbone.z(Condition(vectors.flip(1)), tokens, known, ~known), z, atol=1e-2)
    valid = torch.tensor([[False, True, True], [True, True, True]])
    padded = backbone.z(Condition(vectors, valid), tokens, known, ~known)
    other = torch.where(valid[..., None], vectors, 100.0)
    assert torch.equal(backbone.z(Condition(other, valid), tokens, known, ~known), padded), "padding is looked at"
    one = int((~known[0]).sum())
    assert not torch.allclose(padded[:one], z[:one], atol=1e-3) and torch.allclose(padded[one:], z[one:], atol=1e-5)
    with pytest.raises(UsageError, match=r"buffer: 6 tokens can't hold a condition of 4 vectors; choose a mult"):
        backbone.z(Condition(torch.randn(2, 4, E)), tokens, known, ~known)


@pytest.mark.parametrize(
    ("shape", "valid", "words"),
    [
        ((3, 1, E), None, r"condition: shape \(3, 1, 32\) is not \(2, P, 32\)"),
        ((2, 1, E - 1), None, r"condition: shape \(2, 1, 31\) is not \(2, P, 32\)"),
        ((2, 3, E), torch.ones(2, 1, dtype=torch.bool), r"condition.valid: torch.bool of shape \(2, 1\)"),
        ((2, 3, E), torch.ones(2, 3), "condition.valid: torch.float32 of shape"),
    ],
)
def test_a_condition_of_another_shape_is_refused(
    backbone: Masked, shape: tuple[int, ...], valid: torch.Tensor | None, words: str
) -> None:
    _, tokens, known = inputs(2)
    with pytest.raises(UsageError, match=words):
        backbone.z(Condition(torch.zeros(shape), valid), tokens, known, ~known)


def test_config_rebuilds_the_same_shapes(backbone: Masked) -> None:
    twin = Masked(**backbone.config)
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in backbone.state_dict().items()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"width": 30, "heads": 4}, "heads: 4 does not divide the width 30"),
        ({"depth": (1, 2, 3)}, "depth: "),
        ({"depth": 0}, "depth: "),
        ({"buffer": 0}, "buffer: 0"),
        ({"dropout": 1.0}, "dropout: 1.0"),
    ],
)
def test_bad_sizes_are_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Masked(4, 4, **{"width": 32, **arguments})  # type: ignore[arg-type]


def test_positions_may_begin_with_sines() -> None:
    plain, begun = (Masked(6, 2, width=16, depth=1, heads=2, buffer=2, positions=p, grid=g) for p, g in SINES)
    assert "positions" not in plain.config and plain.config["grid"] == begun.config["grid"] == [2, 3]
    assert Masked(4, 2, width=16, depth=1).config.keys().isdisjoint({"positions", "grid"})
    assert begun.encoder_positions[:2].std() < 0.1 < begun.encoder_positions[2:].std()
    again = Masked(**begun.config)
    assert torch.equal(again.output_positions, begun.output_positions) and begun.output_positions.requires_grad
    assert plain.state_dict().keys() == begun.state_dict().keys()
    with pytest.raises(UsageError, match="grid: 6 tokens do not form a square; for sincos, give their rows"):
        Masked(6, 2, width=16, depth=1, heads=2, positions="sincos")
    with pytest.raises(UsageError, match="positions: 'sine' is not known; did you mean 'sincos'"):
        Masked(6, 2, width=16, depth=1, heads=2, positions="sine")  # type: ignore[arg-type]


SINES: list[tuple[Literal["random", "sincos"], tuple[int, int]]] = [("random", (2, 3)), ("sincos", (2, 3))]
