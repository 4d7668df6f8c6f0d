"""The bidirectional backbone: its contract, what it may look at, captions, neighbours, memory, bad sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import randomise

from seriatim.backbones.bidirectional_transformer import Bidirectional
from seriatim.conditions.base import Condition
from seriatim.core.errors import UsageError
from seriatim.models.build import seeded
from seriatim.models.registry import BACKBONES
from seriatim.nn.position import sincos_positions
from seriatim.testing import check_backbone

L, D, C = 12, 4, 24


@pytest.fixture
def backbone() -> Bidirectional:
    made = Bidirectional(L, D, width=C, depth=2, heads=3, buffer=4, dropout=0.0).eval()
    randomise(made)
    return made


def inputs(B: int) -> tuple[Condition, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    known = torch.rand(B, L, generator=g) < 0.4
    return Condition(torch.randn(B, 1, C, generator=g)), torch.randn(B, L, D, generator=g), known


@pytest.mark.parametrize("tokens", [{"dim": 3}, {"vocab": 7}])
def test_the_contract(tokens: dict[str, Any]) -> None:
    made = check_backbone(lambda: Bidirectional(9, **tokens, width=24, depth=2, heads=2, buffer=3, dropout=0.0))
    assert BACKBONES["bidirectional"] is type(made)


@torch.no_grad()
def test_unknown_tokens_may_hold_anything(backbone: Bidirectional) -> None:
    condition, tokens, known = inputs(3)
    z = backbone.z(condition, tokens, known, ~known)
    changed = torch.where(known[..., None], tokens, torch.full_like(tokens, torch.nan))
    assert torch.equal(backbone.z(condition, changed, known, ~known), z)
    codes = Bidirectional(L, vocab=7, width=C, depth=1, heads=3, buffer=4, dropout=0.0).eval()
    drawn = torch.arange(L).expand(3, L) % 7
    z = codes.z(condition, drawn, known, ~known)
    assert torch.equal(codes.z(condition, drawn.masked_fill(~known, 10**6), known, ~known), z)


@torch.no_grad()
def test_neighbours_are_z_of_the_tokens_around(backbone: Bidirectional) -> None:
    """Twelve tokens form a grid of 1 x 12, so a token has neighbours to its left and right only."""
    condition, tokens, known = inputs(2)
    every = backbone.z(condition, tokens, known, torch.ones_like(known)).view(2, L, C)
    ask = torch.zeros_like(known)
    ask[0, 5], ask[1, 0] = True, True
    z = backbone.z(condition, tokens, known, ask, neighbours=True)
    h, w = backbone.spec.grid or (1, L)
    for row, (b, p) in enumerate([(0, 5), (1, 0)]):
        y, x = divmod(p, w)
        around = [(y, x), (y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        for k, (i, j) in enumerate(around):
            inside = 0 <= i < h and 0 <= j < w
            expected = every[b, i * w + j] if inside else torch.zeros(C)
            assert torch.allclose(z[row, k], expected, atol=1e-5)


@torch.no_grad()
def test_hidden_vectors_of_a_condition_are_not_looked_at(backbone: Bidirectional) -> None:
    _, tokens, known = inputs(2)
    vectors = torch.randn(2, 2, C)
    valid = torch.tensor([[True, False], [True, True]])
    z = backbone.z(Condition(vectors, valid), tokens, known, ~known)
    changed = vectors.clone()
    changed[0, 1] = 100.0
    assert torch.allclose(backbone.z(Condition(changed, valid), tokens, known, ~known), z, atol=1e-5)
    with pytest.raises(UsageError, match="buffer: 4 tokens can't hold a condition of 3 vectors"):
        backbone.z(Condition(torch.randn(2, 3, C)), tokens, known, ~known)


@torch.no_grad()
def test_a_row_cap_changes_nothing(backbone: Bidirectional) -> None:
    condition, tokens, known = inputs(5)
    whole = backbone.z(condition, tokens, known, ~known)
    sizes: list[int] = []
    backbone.blocks[0].register_forward_pre_hook(lambda _, a: sizes.append(len(a[0])))
    backbone.row_cap = 2 * (L + 4)
    assert torch.allclose(backbone.z(condition, tokens, known, ~known), whole, atol=1e-5)
    assert sizes == [2, 2, 1]


def test_initial_positions_and_another_grid() -> None:
    made = Bidirectional(16, D, width=C, depth=1, heads=3, buffer=4, positions="sincos")
    assert torch.equal(made.positions[4:].detach(), sincos_positions((4, 4), C))
    other = Bidirectional.resized(made.state_dict(), (4, 4), (8, 8))
    larger = Bidirectional(64, D, width=C, depth=1, heads=3, buffer=4)
    larger.load_state_dict(other)
    assert torch.equal(larger.positions[:4], made.positions[:4]), "the buffer's positions are on no grid"


def test_gradients_flow_through_one_chunk_and_buckets_only_pad(backbone: Bidirectional) -> None:
    """Training keeps a batch whole, because it needs every activation anyway; its lengths may be padded."""
    condition, tokens, known = inputs(5)
    known[:, :2] = True  # at most 10 tokens are asked for, so that the largest number is padded to 12
    sizes: list[tuple[int, int]] = []
    backbone.blocks[0].register_forward_pre_hook(lambda _, a: sizes.append(tuple(a[0].shape[:2])))
    asked: list[int] = []
    backbone.blocks[1].register_forward_hook(lambda *a: asked.append(a[-1].shape[1]))
    backbone.row_cap = 2 * (L + 4)
    plain = backbone.z(condition, tokens, known, ~known)
    backbone.buckets = 1
    padded = backbone.z(condition, tokens, known, ~known)
    assert sizes == [(5, L + 4)] * 2 and asked == [int((~known).sum(dim=1).max()), L]
    assert torch.allclose(padded, plain, atol=1e-5)
    with torch.no_grad():
        backbone.z(condition, tokens, known, ~known)
    assert asked[2:] == [int(part.sum(dim=1).max()) for part in (~known).split(2)], "sampling pads nothing"


def test_dropout_acts_in_training_alone() -> None:
    made = Bidirectional(L, D, width=C, depth=2, heads=3, buffer=4, dropout=0.5)
    randomise(made)
    condition, tokens, known = inputs(2)
    with torch.no_grad():
        first, second = (made.z(condition, tokens, known, ~known) for _ in range(2))
        assert not torch.allclose(first, second, atol=1e-3)
        made.eval()
        assert torch.equal(*(made.z(condition, tokens, known, ~known) for _ in range(2)))


def test_a_config_makes_the_same_backbone() -> None:
    made = Bidirectional(12, D, width=C, depth=1, heads=3, buffer=4, positions="sincos", grid=(3, 4), mlp_ratio=2.0)
    again = Bidirectional(**made.config)
    assert again.config == made.config and again.spec == made.spec and made.spec.grid == (3, 4)
    assert torch.equal(again.positions[4:], made.positions[4:])
    assert Bidirectional(12, vocab=5, width=C, depth=1).config["heads"] == Bidirectional(12, D, width=C).config["heads"]


def test_initial_weights_are_small() -> None:
    """Codes and mask tokens begin at 0.02, since xavier's range would be that of a matrix with V inputs."""
    with seeded(0):
        made = Bidirectional(64, vocab=400, width=96, depth=1, heads=3, buffer=4)
    for tensor in (made.token_embed.get_parameter("weight"), made.positions, made.mask_token):
        assert float(tensor.detach().std()) == pytest.approx(0.02, rel=0.25)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"heads": 5}, "heads: 5 does not divide the width 24"),
        ({"heads": 0}, "heads: 0"),
        ({"depth": 0}, "depth: 0"),
        ({"buffer": 0}, "buffer: 0"),
        ({"dropout": 1.0}, r"dropout: 1.0 is not allowed; it must be in \[0, 1\)"),
        ({"positions": "sincos", "tokens": 12}, "grid: 12 tokens do not form a square"),
        ({"positions": "rotary"}, "positions: 'rotary'"),
    ],
)
def test_bad_sizes_are_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Bidirectional(**{"tokens": 16, "dim": D, "width": C, **config})
