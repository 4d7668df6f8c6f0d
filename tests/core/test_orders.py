"""Orders: each visits every cell once, and does what its name says; what is no permutation is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import seriatim
from seriatim.core import orders as o
from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys

sides = st.integers(1, 20)


@given(h=sides, w=sides, name=st.sampled_from(sorted(o.ORDERS)))
def test_every_position_comes_once(h: int, w: int, name: str) -> None:
    assert sorted(o.ORDERS[name](h, w)) == list(range(h * w))
    o.check_permutation(o.ORDERS[name](h, w), h * w)


def test_raster_is_how_one_reads() -> None:
    assert o.raster(2, 3) == [0, 1, 2, 3, 4, 5]


@given(i=st.integers(1, 10**6), base=st.integers(2, 5))
def test_a_radical_inverse_mirrors_digits(i: int, base: int) -> None:
    numerator, denominator = o.radical_inverse(i, base)
    assert 0 < numerator < denominator
    mirrored = 0.0
    for k in range(denominator.bit_length()):
        mirrored += i // base**k % base * base ** -(k + 1.0)
    assert numerator / denominator == pytest.approx(mirrored, abs=1e-12)


def test_halton_begins_as_published() -> None:
    """(phi_2, phi_3) of 1..5 is (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9), (5/8, 7/9)."""
    cells = [(3, 4), (6, 2), (1, 6), (4, 1), (7, 5)]  # row, column of 9 x 8
    assert o.halton(9, 8)[:5] == [row * 8 + column for row, column in cells]


@pytest.mark.parametrize(("down", "across"), [(1, 2), (3, 1), (3, 4), (9, 8), (9, 16), (27, 16)])
def test_halton_fills_boxes_evenly(down: int, across: int) -> None:
    """Of the first 2^a 3^b cells of a 27 x 16 grid, one is in each of that many equal boxes."""
    first = torch.tensor(o.halton(27, 16)[: down * across])
    rows, columns = first // 16, first % 16
    boxes = rows // (27 // down) * across + columns // (16 // across)
    assert sorted(boxes.tolist()) == list(range(down * across))


def test_halton_is_far_from_what_is_drawn() -> None:
    """The 32 cells that it takes first from 16 x 16 lie farther apart than any of 50 random draws does."""

    def nearest(cells: torch.Tensor) -> float:
        places = torch.stack([cells // 16, cells % 16], dim=1).double()
        return float((torch.cdist(places, places) + 99 * torch.eye(len(cells))).min(dim=1).values.mean())

    spread = nearest(torch.tensor(o.halton(16, 16)[:32]))
    drawn = Keys.of_seeds(range(50)).permutation(256)[:, :32]
    assert spread > max(nearest(cells) for cells in drawn)


@given(h=sides, w=sides)
def test_spiral_goes_outwards(h: int, w: int) -> None:
    order = torch.tensor(o.spiral(h, w))
    rings = torch.maximum((order // w - (h - 1) // 2).abs(), (order % w - (w - 1) // 2).abs())
    assert (rings.diff() >= 0).all() and rings[0] == 0


def test_spiral_goes_from_neighbour_to_neighbour() -> None:
    assert o.spiral(3, 3) == [4, 5, 8, 7, 6, 3, 0, 1, 2]
    for side in (7, 8):
        order = torch.tensor(o.spiral(side, side))
        assert ((order // side).diff().abs() + (order % side).diff().abs() == 1).all()


# --- what the samplers make of them -----------------------------------------------------------------------------


def test_tokens_are_taken_from_the_end_of_a_vector() -> None:
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    noise = Keys.of_seeds([1, 2])
    assert o.order_vectors([2, 0, 3, 1], noise, nothing).tolist() == [[1, 3, 0, 2]] * 2, "2, drawn first, comes last"
    each = torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]])
    assert o.order_vectors(each, noise, nothing).tolist() == [[1, 3, 0, 2], [3, 2, 1, 0]]
    assert torch.equal(o.order_vectors(None, noise, nothing), Keys.of_seeds([1, 2]).permutation(4))


@given(seed=st.integers(0, 99), data=st.data(), tokens=st.integers(1, 30))
def test_known_tokens_come_last(seed: int, data: st.DataObject, tokens: int) -> None:
    known = torch.tensor([data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)) for _ in range(2)])
    vectors = o.order_vectors(None, Keys.of_seeds([seed, 7]), known)
    plain = Keys.of_seeds([seed, 7]).permutation(tokens)
    for vector, before, is_known in zip(vectors, plain, known, strict=True):
        unknown = int((~is_known).sum())
        assert not is_known[vector[:unknown]].any()
        assert vector[:unknown].tolist() == [p for p in before.tolist() if not is_known[p]], "else as they were"


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ([0, 1, 2], "order: 3 positions given for 4 tokens; name each position from 0 to 3 once"),
        ([0, 1, 2, 4], "order: position 4 is out of range"),
        ([0, -1, 2, 3], "order: position -1 is out of range"),
        ([0, 1, 2, 1], "order: position 1 is given twice"),
        ([[0, 1, 2, 3], [0, 1, 2, 2]], "order[1]: position 2 is given twice"),
        ([[0, 1, 2, 3]] * 3, "order: torch.int64 of shape (3, 4) is not allowed; give integers (4,) for all images or"),
        ([0.0, 1.0, 2.0, 3.0], "order: torch.float32 of shape (4,) is not allowed"),
        (3, "order: torch.int64 of shape () is not allowed"),
        ("spiral", "order: 'spiral' needs a grid here; give seriatim.ORDERS['spiral'](h, w)"),
        ("confidence", "order: 'confidence' is not allowed here; give the positions, or leave it out"),
    ],
)
def test_what_is_no_order_is_named(order: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        o.order_vectors(order, Keys.of_seeds([1, 2]), torch.zeros(2, 4, dtype=torch.bool))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_names() -> None:
    assert seriatim.ORDERS is o.ORDERS
    o.check_order_name("random")
    with pytest.raises(UsageError, match="order: 'sprial' is not known; did you mean 'spiral'"):
        o.check_order_name("sprial")
