"""Sampling in a given order, and from tokens that are known already: each image from its own share."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch
from helpers import make_masked
from torch import Tensor

from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys
from seriatim.core.orders import ORDERS
from seriatim.core.schedules import tokens_per_step
from seriatim.core.settings import Settings
from seriatim.heads.base import Guidance
from seriatim.models.masked_model import MaskedModel
from seriatim.sampling.step import Step

L, D = 16, 4
LABELS = torch.tensor([0, 1, 2, -1])
SEEDS = [5, 6, 7, 8]
COUNTS = [0, 5, 15, 16]  # known tokens of each image: none, some, all but one, all
SETTINGS: list[dict[str, Any]] = [
    {"steps": 5, "guidance_scale": 3.0},
    {"steps": 16},
    {"steps": 3, "guidance_scale": 2.0, "token_schedule": "linear", "min_tokens": 3},
    {"steps": 6, "guidance_scale": 3.0, "guidance_schedule": "interval", "guidance_interval": (0.3, 0.8)},
    {"steps": 4, "guidance_scale": 4.0, "guidance_schedule": "power-cosine", "guidance_power": 2.0, "min_tokens": 2},
    {"steps": 6, "guidance_scale": 2.0, "guidance_schedule": "constant", "order": ORDERS["spiral"](4, 4)},
    {"steps": 6, "guidance_scale": 2.0, "num_diffusion_steps": 9, "num_diffusion_steps_last": 3},
    {"steps": 4, "guidance_scale": 2.0, "num_diffusion_steps_last": 2, "solver": "dpm++"},
]


def ragged() -> tuple[Tensor, Tensor]:
    """Tokens (4, L, D), NaN where unknown, which nobody may look at, and known (4, L)."""
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(len(COUNTS), L, generator=generator).argsort(dim=1)
    known = places < torch.tensor(COUNTS)[:, None]
    tokens = torch.randn(len(COUNTS), L, D, generator=generator)
    return tokens.masked_fill(~known[..., None], float("nan")), known


@pytest.fixture(scope="module")
def model() -> MaskedModel:
    return make_masked()


def fast(model: MaskedModel, images: slice = slice(None), **settings: Any) -> list[Step]:
    keys = Keys.of_seeds(SEEDS[images])
    return list(helpers.fast(model, LABELS[images], keys, **{"steps": 5, "num_diffusion_steps": 6, **settings}))


def naive(model: MaskedModel, **settings: Any) -> Tensor:
    return helpers.naive(model, LABELS, Keys.of_seeds(SEEDS), **{"steps": 5, "num_diffusion_steps": 6, **settings})


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_ragged_starts_naive_and_fast(model: MaskedModel, settings: dict[str, Any]) -> None:
    tokens, known = ragged()
    before = tokens.clone()
    specified = naive(model, tokens=tokens, known=known, **settings)
    steps = fast(model, tokens=tokens, known=known, **settings)
    assert torch.allclose(steps[-1].tokens, specified, atol=1e-4, rtol=1e-4)
    assert len(steps) == settings["steps"] and steps[-1].known.all()
    for drawn in (specified, steps[-1].tokens):
        assert torch.equal(drawn[known], tokens[known]), "known tokens stay bitwise equal"
        assert torch.equal(drawn[3], tokens[3]), "with nothing unknown an image is left as it is"
        assert torch.isfinite(drawn).all()
    assert torch.equal(before.nan_to_num(9), tokens.nan_to_num(9)), "what was given is not written to"


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_image_is_the_same_whatever_the_others_know(model: MaskedModel, settings: dict[str, Any]) -> None:
    tokens, known = ragged()
    together = fast(model, tokens=tokens, known=known, **settings)[-1].tokens
    for i in range(len(COUNTS)):
        some = slice(i, i + 1)
        alone = fast(model, some, tokens=tokens[some], known=known[some], **settings)[-1].tokens
        assert torch.allclose(together[i], alone[0], atol=1e-4), i


def test_nothing_known_is_no_start(model: MaskedModel) -> None:
    nothing = torch.zeros(4, L, dtype=torch.bool)
    for settings in SETTINGS:
        plain = fast(model, **settings)
        for step, again in zip(plain, fast(model, tokens=torch.ones(4, L, D), known=nothing, **settings), strict=True):
            assert torch.equal(step.tokens, again.tokens) and torch.equal(step.known, again.known)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("min_tokens", [1, 3])
def test_each_image_has_the_schedule_of_its_own_share(model: MaskedModel, schedule: str, min_tokens: int) -> None:
    tokens, known = ragged()
    before, counts = known, []
    for step in fast(model, tokens=tokens, known=known, token_schedule=schedule, min_tokens=min_tokens):
        counts.append((step.known & ~before).sum(dim=1))
        assert not step.tokens[~step.known].any(), "unknown tokens are zero"
        before = step.known
    for i, drawn in enumerate(torch.stack(counts, dim=1).tolist()):
        assert drawn == tokens_per_step(5, L, L - COUNTS[i], schedule, min_tokens)


@pytest.mark.parametrize("sampler", ["naive", "fast"])
def test_each_image_is_guided_at_its_own_share(
    model: MaskedModel, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, known = ragged()
    seen: list[Tensor] = []
    inner = model.head.sample

    def recorded(z: Tensor, keys: Keys, plan: Any, z_null: Any, guidance: Guidance | None, *more: Any) -> Tensor:
        seen.append(torch.ones(len(z)) if guidance is None else guidance.scale)
        return inner(z, keys, plan, z_null, guidance, *more)

    monkeypatch.setattr(model.head, "sample", recorded)
    settings: dict[str, Any] = {"tokens": tokens, "known": known, "guidance_scale": 3.0, "steps": 5}
    if sampler == "fast":
        fast(model, **settings)
    else:
        naive(model, **settings)
    left = [L - count for count in COUNTS]
    counts = [tokens_per_step(5, L, unknown) for unknown in left]
    for step, guidance in enumerate(seen):
        expected: list[float] = []
        for i in range(4):
            left[i] -= counts[i][step]
            expected += [Settings(guidance_schedule="linear").guidance_at(3.0, left[i], L)] * counts[i][step]
        assert guidance.tolist() == pytest.approx(expected)
    assert left == [0] * 4


def count_rows(model: MaskedModel, **settings: Any) -> list[int]:
    """Images, conditional and unconditional, in each pass of the backbone."""
    rows: list[int] = []
    handle = model.backbone.get_submodule("decoder.0").register_forward_pre_hook(lambda _, a: rows.append(len(a[0])))
    fast(model, **settings)
    handle.remove()
    return rows


def test_outside_the_interval_there_is_no_unconditional_pass(model: MaskedModel) -> None:
    options: dict[str, Any] = {"steps": 8, "guidance_scale": 2.0, "guidance_schedule": "interval"}
    shares = torch.tensor(tokens_per_step(8, L)).cumsum(0) / L
    inside = ((shares >= 0.25) & (shares <= 0.6)).tolist()
    assert 0 < sum(inside) < 8
    once = [1] * len(set(LABELS.tolist()))  # the first step is made class by class
    expected = once + [8 if x else 4 for x in inside[1:]]
    assert not inside[0] and count_rows(model, **options, guidance_interval=(0.25, 0.6)) == expected
    assert sum(count_rows(model, **options, guidance_interval=(0, 1))) == len({*LABELS.tolist(), -1}) + 8 * 7


def test_a_ragged_batch_computes_only_what_is_needed(model: MaskedModel) -> None:
    """Image 3 is finished at first and 2 after one step; the unconditional rows are those of images in the interval."""
    tokens, known = ragged()
    options: dict[str, Any] = {"steps": 5, "tokens": tokens, "known": known}
    assert count_rows(model, **options) == [3, 2, 2, 2, 2]
    left, expected = [L - count for count in COUNTS], []
    counts = [tokens_per_step(5, L, unknown) for unknown in left]
    for step in range(5):
        left = [now - drawn[step] for now, drawn in zip(left, counts, strict=True)]
        asking = [now for now, drawn in zip(left, counts, strict=True) if drawn[step]]
        expected.append(len(asking) + sum(0.5 <= (L - max(1, now)) / L <= 0.9 for now in asking))
    assert len(set(expected)) > 2
    interval: dict[str, Any] = {"guidance_schedule": "interval", "guidance_interval": (0.5, 0.9)}
    assert count_rows(model, **options, guidance_scale=2.0, **interval) == expected


def test_all_known_draws_nothing(model: MaskedModel) -> None:
    tokens, known = torch.randn(4, L, D), torch.ones(4, L, dtype=torch.bool)
    assert count_rows(model, tokens=tokens, known=known) == []
    assert torch.equal(fast(model, tokens=tokens, known=known)[-1].tokens, tokens)
    assert torch.equal(naive(model, tokens=tokens, known=known), tokens)


def test_more_steps_than_tokens_end_early(model: MaskedModel) -> None:
    steps = fast(model, steps=20, num_diffusion_steps=2)
    assert [int(step.known[0].sum()) for step in steps] == [min(i, L) for i in range(1, 21)]
    specified = naive(model, steps=20, num_diffusion_steps=2)
    assert torch.allclose(steps[-1].tokens, specified, atol=1e-4)


# --- orders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ORDERS))
@pytest.mark.parametrize("grid", [(4, 4), (2, 8)])
def test_a_named_order_naive_and_fast(model: MaskedModel, name: str, grid: tuple[int, int]) -> None:
    order = ORDERS[name](*grid)
    steps = fast(model, order=order, steps=7, guidance_scale=2.0)
    specified = naive(model, order=order, steps=7, guidance_scale=2.0)
    assert torch.allclose(steps[-1].tokens, specified, atol=1e-4, rtol=1e-4)
    for step in steps:
        first = set(order[: int(step.known[0].sum())])
        assert step.known.tolist() == [[position in first for position in range(L)]] * 4


def test_an_order_for_each_image(model: MaskedModel) -> None:
    order = Keys.of_seeds([1, 2, 3, 4]).permutation(L)
    steps = fast(model, order=order, steps=L, num_diffusion_steps=2)
    for i, step in enumerate(steps):
        assert step.known.gather(1, order).sum(dim=1).tolist() == [i + 1] * 4
        assert step.known.gather(1, order[:, : i + 1]).all()
    specified = naive(model, order=order, steps=L, num_diffusion_steps=2)
    assert torch.allclose(steps[-1].tokens, specified, atol=1e-4)


def test_an_order_goes_on_around_what_is_known(model: MaskedModel) -> None:
    tokens, known = ragged()
    before = known
    for step in fast(model, tokens=tokens, known=known, order=range(L), steps=L):
        for i in range(4):
            new = (step.known & ~before)[i].nonzero()[:, 0].tolist()
            assert new == (~before[i]).nonzero()[: len(new), 0].tolist(), "the first unknown ones of the raster"
        before = step.known


# --- what is wrong is named -------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"tokens": torch.zeros(4, L, D), "known": torch.ones(4, L, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"known": torch.ones(4, L)}, "known: torch.float32 of shape (4, 16) is not allowed; give bool (4, 16)"),
        ({"known": torch.ones(L, dtype=torch.bool)}, "known: torch.bool of shape (16,) is not allowed"),
        ({"tokens": torch.zeros(4, L, 3)}, "tokens: shape (4, 16, 3) is not (4, 16, 4)"),
        ({"tokens": torch.full((4, L, D), float("inf"))}, "tokens: a known one is not finite"),
        ({"order": [0] * L}, "order: position 0 is given twice"),
        ({"min_tokens": 0}, "min_tokens: "),
        ({"token_schedule": "cosin"}, "token_schedule: 'cosin' is not known"),
        ({"guidance_schedule": "konstant"}, "guidance_schedule: 'konstant' is not known; did you mean 'constant'"),
        ({"guidance_power": 2.0}, "guidance_power: only valid with guidance_schedule='power-cosine' (got 'linear')"),
    ],
)
def test_what_is_wrong_is_named(model: MaskedModel, settings: dict[str, Any], words: str) -> None:
    settings = {**GOOD, **settings}
    for sampler in (fast, naive):
        with pytest.raises(UsageError) as caught:
            sampler(model, **settings)
        assert words in str(caught.value) and "\n" not in str(caught.value)
