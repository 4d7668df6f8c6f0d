"""The categorical head: its loss, its filters, how a code is drawn, guidance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import drawn, many

from seriatim.core.errors import ConfigError, UsageError
from seriatim.heads.base import Guidance, Head
from seriatim.heads.categorical import Categorical, draw_code, filtered
from seriatim.models.build import build_head
from seriatim.testing import check_head

INF = math.inf


def head(vocab: int = 5, width: int = 3) -> Categorical:
    made = Categorical(vocab, z_dim=width)
    torch.nn.init.normal_(made.logits.weight, generator=torch.Generator().manual_seed(0))
    return made


def test_it_keeps_the_contract() -> None:
    check_head(Categorical)
    check_head(Categorical, dim=7, bias=False, label_smoothing=0.1, learn=False)


def test_fresh_it_finds_every_code_as_likely() -> None:
    fresh = Categorical(8, z_dim=4)
    loss = fresh.loss(torch.randn(6, 4), torch.arange(6), many(0, 6))
    assert torch.allclose(loss.sum, torch.full((6,), math.log(8)))


def test_the_loss_is_the_negative_log_probability() -> None:
    made, z = head(), torch.randn(5, 3)
    codes = torch.arange(5)
    assert torch.allclose(made.loss(z, codes, many(0, 5)).sum, -made.log_prob(z, codes))
    every = torch.stack([made.log_prob(z, torch.full((5,), code)) for code in range(5)]).exp().sum(dim=0)
    assert torch.allclose(every, torch.ones(5)), "a probability"


def test_inverse_cdf() -> None:
    logits = torch.tensor([[0.1, 0.0, 0.6, 0.3]]).log().expand(6, -1)
    u = torch.tensor([0.0, 0.0999, 0.1001, 0.69, 0.71, 0.99999994])
    assert draw_code(logits, u).tolist() == [0, 0, 2, 2, 3, 3], "code 1 is impossible, and never drawn"
    assert draw_code(torch.tensor([[0.0, -INF]]), torch.tensor([0.99999994])).tolist() == [0]


def test_codes_come_with_their_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.2, 0.05])
    u = (torch.arange(10_000) + 0.5) / 10_000
    codes = draw_code(probabilities.log().expand(10_000, -1), u)
    assert torch.allclose(codes.bincount(minlength=4) / 10_000, probabilities, atol=2e-4)


@pytest.mark.parametrize(
    ("settings", "stay"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [0, 1, 3]),  # 0 and 3 tie
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.4}, [1]),  # which alone has 0.5
        ({"top_p": 0.6}, [0, 1]),  # the one that crosses stays, the first of equals
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"temperature": 0.0}, [1]),
    ],
    ids=str,
)
def test_what_is_left_out(settings: dict[str, float], stay: list[int]) -> None:
    logits = torch.tensor([[0.2, 0.5, 0.1, 0.2]]).log()
    left = filtered(logits, **settings)  # type: ignore[arg-type]
    assert left.isfinite().nonzero()[:, 1].tolist() == stay


def test_temperature_sharpens_below_one() -> None:
    logits = torch.tensor([[0.2, 0.8]]).log()
    assert torch.allclose(filtered(logits, 0.5).softmax(dim=-1), torch.tensor([[0.04, 0.64]]) / 0.68)


def test_guidance_mixes_logits() -> None:
    made, z, null = head(), torch.randn(4, 3), torch.randn(4, 3)
    scale = torch.tensor([[0.0], [1.0], [2.5], [-1.0]])
    guidance = Guidance.of(scale[:, 0], 4, "cpu")
    mixed = made.guided(z, null, guidance)
    c, u = made.logits(z), made.logits(null)
    assert torch.allclose(mixed, c * scale + u * (1 - scale), atol=1e-6)
    codes = torch.tensor([0, 1, 2, 3])
    sure = made.confidence(z, codes, null, guidance)
    assert torch.allclose(sure, mixed.log_softmax(dim=1)[torch.arange(4), codes], atol=1e-6)
    greedy = made.sample(z, many(0, 4), None, null, guidance, temperature=0.0)
    assert torch.equal(greedy, mixed.argmax(dim=1))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 0}, "top_k: 0 is not allowed"),
        ({"top_p": 0.0}, "top_p: 0.0 is not allowed"),
        ({"top_p": 1.5}, "top_p: 1.5 is not allowed"),
        ({"solver": "ddim"}, "solver: the Categorical head has no such"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        drawn(head(), torch.randn(2, 3), many(0, 2), **settings)


@pytest.mark.parametrize("options", [{"vocab": 1}, {"vocab": 4, "label_smoothing": 1.0}])
def test_bad_arguments_are_named(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=list(options)[-1]):
        Categorical(**options)  # type: ignore[arg-type]


def test_a_head_must_fit_the_tokens() -> None:
    with pytest.raises(
        ConfigError, match=r"head.kind: 'categorical' draws codes, the tokens are 4 real features.*diffusion"
    ):
        build_head({"kind": "categorical"}, dim=4, vocab=None)
    with pytest.raises(ConfigError, match=r"head.kind: 'diffusion' draws real features, the tokens are codes of 9"):
        build_head({"kind": "diffusion"}, dim=None, vocab=9)
    with pytest.raises(ConfigError, match=r"model.head.vocab: 8 does not fit the backbone's tokens \(9\)"):
        build_head({"kind": "categorical", "vocab": 8}, dim=None, vocab=9)


def test_features_have_no_confidence() -> None:
    with pytest.raises(UsageError, match="needs a head of codes; Head draws features"):
        Head().confidence(torch.zeros(1, 1), torch.zeros(1), None, None)


def test_the_entropy_of_a_code() -> None:
    z, codes = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    expected = torch.distributions.Categorical(logits=head().logits(z)).entropy()
    assert torch.allclose(head().entropy(z, codes), expected[:, None], atol=1e-5)
    assert torch.allclose(Categorical(5, z_dim=3).entropy(z, codes), torch.full((4, 1), math.log(5)))


def test_a_temperature_of_each_row() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(3, -1)
    each = filtered(logits, torch.tensor([[0.0], [1.0], [0.5]]))
    for row, temperature in enumerate((0.0, 1.0, 0.5)):
        assert torch.allclose(each[row], filtered(logits[:1], temperature)[0])


def test_of_logits_that_are_not_finite_comes_no_code() -> None:
    logits = torch.tensor([[0.0, math.nan, 0.0], [0.0, math.inf, 0.0], [0.0, -INF, 0.0]])
    assert draw_code(logits, torch.tensor([0.1, 0.1, 0.9])).tolist() == [3, 3, 2]
