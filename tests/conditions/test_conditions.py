"""Conditions: one type for every backbone, and the modules that make it from classes, captions and vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import many
from torch import Tensor

from seriatim.conditions.base import Condition
from seriatim.conditions.captions import CaptionEmbedder, Captions
from seriatim.conditions.classes import Classes
from seriatim.conditions.vectors import Vectors
from seriatim.core.errors import UsageError
from seriatim.models.build import seeded

A, T, F = 8, 3, 5


def condition(rows: int, *, padded: bool = False, named: bool = False) -> Condition:
    valid = torch.arange(T) >= torch.arange(rows)[:, None] % T
    names = [f"image {i}" for i in range(rows)]
    return Condition(many(rows, rows).normal(T, A), valid if padded else None, names if named else None)


def captions(rows: int) -> Captions:
    return Captions(many(1, rows).normal(T, F), torch.arange(T) >= torch.arange(rows)[:, None] % T)


# --- Condition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [slice(1, 4), torch.tensor([3, 0, 3])])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_some_images(rows: Tensor | slice, padded: bool, named: bool) -> None:
    whole = condition(5, padded=padded, named=named)
    some = whole.select(rows)
    index = list(range(5))[rows] if isinstance(rows, slice) else rows.tolist()
    assert len(some) == len(index) and torch.equal(some.vectors, whole.vectors[index])
    assert (some.valid is None) == (not padded) and (some.names is None) == (not named)
    if whole.valid is not None and some.valid is not None:
        assert torch.equal(some.valid, whole.valid[index])
    if whole.names is not None:
        assert list(some.names or ()) == [whole.names[i] for i in index]


def test_a_slice_shares_memory() -> None:
    whole = condition(4)
    assert whole.select(slice(0, 2)).vectors.data_ptr() == whole.vectors.data_ptr()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_images_of_two(first: bool, second: bool) -> None:
    """Where one has padding, the other's vectors all count; names stay where both have them."""
    a, b = condition(2, padded=first, named=first), condition(3, padded=second, named=second)
    both = a.join(b)
    assert len(both) == 5 and torch.equal(both.vectors, torch.cat([a.vectors, b.vectors]))
    assert (both.valid is None) == (not (first or second)) and (both.names is None) == (not (first and second))
    for part, rows in ((a, slice(0, 2)), (b, slice(2, 5))):
        back = both.select(rows)
        assert torch.equal(back.vectors, part.vectors)
        if back.valid is not None:
            assert torch.equal(back.valid, part.valid if part.valid is not None else torch.ones_like(back.valid))


# --- classes ------------------------------------------------------------------------------------------------------


def test_a_class_is_a_vector_and_minus_one_is_none() -> None:
    made = Classes(4, A)
    found = made(torch.tensor([2, -1, 2, 0]), 4)
    assert found.vectors.shape == (4, 1, A) and found.valid is None and list(found.names or ()) == [2, -1, 2, 0]
    assert torch.equal(found.vectors[[0, 2, 3], 0], made.class_embedding[[2, 2, 0]])
    null = made.null(2)
    assert torch.equal(null.vectors, found.vectors[[1, 1]]) and torch.equal(made(None, 2).vectors, null.vectors)
    assert torch.equal(found.vectors[1, 0], made.no_class[0])


@pytest.mark.parametrize(
    ("classes", "labels", "says"),
    [
        (4, torch.tensor([4, 0]), "labels: 4 is not allowed; they must be from 0 to 3, or -1"),
        (4, torch.tensor([0, -2]), "labels: -2 is not allowed"),
        (4, torch.tensor([0.0, 1.0]), r"labels: shape \(2,\) is not \(2,\), one integer"),
        (4, torch.tensor([0]), r"labels: shape \(1,\) is not \(2,\)"),
        (4, [0, 1], "labels: shape"),
        (0, torch.tensor([0, -1]), "labels: got 0, but this model is unconditional"),
    ],
)
def test_labels_are_refused_by_name(classes: int, labels: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Classes(classes, A).check(labels, 2)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_is_dropped_image_by_image(share: float) -> None:
    """Whether an image is dropped depends on its own key alone."""
    made, rows, keys = Classes(4, A), 4000, many(3, 4000)
    labels = torch.arange(rows) % 4
    dropped = made.drop(labels, share, keys)
    assert dropped is not None and abs(float((dropped == -1).float().mean()) - share) < 0.03
    assert torch.equal(dropped[dropped != -1], labels[dropped != -1])
    some = torch.tensor([7, 1, 2000])
    again = made.drop(labels[some], share, keys.select(some))
    assert again is not None and torch.equal(again, dropped[some])
    assert made.drop(None, share, keys) is None


# --- captions -----------------------------------------------------------------------------------------------------


def embedder() -> CaptionEmbedder:
    with seeded(0):
        return CaptionEmbedder(F, T, A)


def test_captions_keep_their_padding_and_the_null_takes_it() -> None:
    made, given = embedder(), captions(4)
    found = made(given, 4)
    assert found.vectors.shape == (4, T, A) and found.valid is not None and torch.equal(found.valid, given.valid)
    null, like = made.null(4), made.null(4, found)
    assert null.valid is not None and null.valid.all() and like.valid is not None
    assert torch.equal(like.valid, given.valid) and torch.equal(null.vectors, like.vectors)
    assert torch.equal(made(None, 4).vectors, null.vectors) and not made.no_caption.requires_grad
    assert torch.equal(given.select(slice(1, 3)).features, given.features[1:3])


def test_a_dropped_caption_is_no_caption() -> None:
    made, given, keys = embedder(), captions(400), many(3, 400)
    dropped = made.drop(given, 0.25, keys)
    assert dropped is not None and torch.equal(dropped.valid, given.valid)
    gone = (dropped.features == made.no_caption).all(dim=2).all(dim=1)
    assert 0.15 < float(gone.float().mean()) < 0.35 and torch.equal(dropped.features[~gone], given.features[~gone])
    torch.testing.assert_close(made(dropped, 400).vectors[gone], made.null(int(gone.sum())).vectors)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (torch.zeros(2, dtype=torch.long), "labels: Tensor is not allowed; this model takes Captions"),
        (captions(3), r"features: torch.float32 of shape \(3, 3, 5\) is not \(2, 3, 5\) floats"),
        (Captions(torch.zeros(2, T, F, dtype=torch.long), torch.ones(2, T, dtype=torch.bool)), "features: torch.int64"),
        (Captions(torch.zeros(2, T, F), torch.ones(2, T)), "valid: torch.float32"),
        (Captions(torch.zeros(2, T, F), torch.tensor([[True, True, False]] * 2)), "valid: the last position"),
    ],
)
def test_captions_are_refused_by_name(given: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        embedder().check(given, 2)


# --- vectors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "width"), [(1, None), (5, None), (1, 12), (5, 12)])
def test_vectors_are_their_own_condition_or_are_projected(count: int, width: int | None) -> None:
    made = Vectors(A, count, width)
    given = many(1, 4).normal(count, A)
    made.check(given, 4)
    found = made(given, 4)
    assert found.vectors.shape == (4, count, width or A) and found.valid is None
    assert torch.equal(found.vectors, given) == (width is None)
    assert made.drop(given, 1.0, many(1, 4)) is given
    if count == 1:
        assert torch.equal(made(given[:, 0], 4).vectors, found.vectors)


def test_vectors_are_refused_by_name_and_have_no_null() -> None:
    with pytest.raises(UsageError, match=r"vectors: shape \(4, 2, 8\) is not \(4, 5, 8\)"):
        Vectors(A, 5).check(torch.zeros(4, 2, A), 4)
    with pytest.raises(UsageError, match="condition: vectors have no null condition"):
        Vectors(A).null(2)
