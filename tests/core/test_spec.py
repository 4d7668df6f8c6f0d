"""What tokens are: the shapes and dtypes that follow, and one line for tokens that are something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seriatim.core.errors import UsageError
from seriatim.core.spec import TokenSpec, grid_of


def test_features_and_codes() -> None:
    features, codes = TokenSpec(6, dim=4), TokenSpec(6, vocab=9)
    assert (features.shape, codes.shape) == ((6, 4), (6,))
    assert (features.discrete, codes.discrete) == (False, True)
    assert features.blank(2).shape == (2, 6, 4) and features.blank(2).dtype == torch.float32
    assert codes.blank(2).shape == (2, 6) and codes.blank(2).dtype == torch.long
    assert not codes.blank(2).any()
    assert features.blank(1, "meta").device.type == "meta"
    assert "4 features" in features.what and "9" in codes.what


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"count": 4}, "dim: None with vocab None is not allowed; give dim (features) or vocab (codes)"),
        ({"count": 4, "dim": 2, "vocab": 3}, "dim: 2 with vocab 3 is not allowed"),
        ({"count": 0, "dim": 2}, "count: 0 is not allowed"),
        ({"count": 4, "dim": 0}, "dim: 0 is not allowed"),
        ({"count": 4, "vocab": -1}, "vocab: -1 is not allowed"),
    ],
)
def test_sizes_that_are_none(sizes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        TokenSpec(**sizes)
    assert words in str(caught.value)


def test_tokens_of_the_spec_are_let_through() -> None:
    TokenSpec(3, dim=2).check(torch.randn(5, 3, 2), 5)
    TokenSpec(3, dim=2).check(torch.randn(0, 3, 2))
    TokenSpec(3, vocab=4).check(torch.tensor([[0, 3, 1]]))
    TokenSpec(3, vocab=4).check(torch.empty(0, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("spec", "tokens", "words"),
    [
        (TokenSpec(3, dim=2), torch.randn(5, 3, 4), "tokens: shape (5, 3, 4) is not (B, 3, 2)"),
        (TokenSpec(3, dim=2), torch.randn(3, 2), "tokens: shape (3, 2) is not (B, 3, 2)"),
        (TokenSpec(3, dim=2), torch.tensor(1.0), "tokens: shape () is not (B, 3, 2)"),
        (TokenSpec(3, dim=2), torch.zeros(5, 3, 2, dtype=torch.long), "tokens: torch.int64 is not allowed"),
        (TokenSpec(3, vocab=4), torch.zeros(5, 3), "tokens: torch.float32 is not allowed"),
        (TokenSpec(3, vocab=4), torch.tensor([[0, 4, 1]]), "tokens: codes from 0 to 4 are not all in the vocabulary"),
        (TokenSpec(3, vocab=4), torch.tensor([[0, -1, 1]]), "tokens: codes from -1 to 1 are not all in the vocabulary"),
    ],
)
def test_other_tokens_are_named(spec: TokenSpec, tokens: torch.Tensor, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        spec.check(tokens)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_number_of_images_is_checked() -> None:
    with pytest.raises(UsageError, match=r"is not \(4, 3, 2\)"):
        TokenSpec(3, dim=2).check(torch.randn(5, 3, 2), 4)


def test_a_grid_is_given_or_a_square_or_a_row() -> None:
    assert grid_of(None, 16) == (4, 4)
    assert grid_of(None, 6) == (1, 6)
    assert grid_of([2, 3], 6) == (2, 3)
    for wrong in ([2, 2], [6], [1, 2, 3]):
        with pytest.raises(UsageError, match="grid: "):
            grid_of(wrong, 6)
