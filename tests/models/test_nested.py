"""A head that nests: the contract, its density, the cache against the definition, what does not fit."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import drawn, fast, many, naive, randomise
from torch import Tensor

from seriatim.backbones.causal_transformer import Causal
from seriatim.backbones.masked_transformer import Masked
from seriatim.conditions.vectors import Vectors
from seriatim.core.errors import ConfigError, NumericsError, UsageError
from seriatim.core.keys import Keys
from seriatim.core.spec import TokenSpec
from seriatim.heads.base import Guidance
from seriatim.heads.categorical import Categorical
from seriatim.models.build import build_head, build_model, model_config, seeded
from seriatim.models.causal_model import CausalModel
from seriatim.models.masked_model import MaskedModel
from seriatim.models.nested import FEATURE_SCHEDULES, Nested, scheduled
from seriatim.models.registry import HEADS
from seriatim.models.splits import Split
from seriatim.nn.prepare import packs, prepare
from seriatim.testing import check_head
from seriatim.zoo import VAR_BLOCK

PLAIN = {"kind": "causal", "width": 32, "depth": 1, "heads": 4}
ARINAR = {**PLAIN, **VAR_BLOCK}
LEAF = {"kind": "mixture", "components": 3, "depth": 0}
FEATURES = {"kind": "features"}
C = 6


def nested(dim: int = 4, **changes: Any) -> Nested:
    with seeded(0):
        config = {"kind": "nested", "split": FEATURES, "backbone": ARINAR, "head": LEAF, **changes}
        head = build_head(config, dim=dim, vocab=None, z_dim=C, where="head")
    assert isinstance(head, Nested)
    randomise(head, scale=0.1)
    return head


def vectors(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, C, generator=g), torch.randn(rows, C, generator=g)


def keys(rows: int) -> Keys:
    return Keys.of_seeds(range(rows))


def made(dim: int, **config: Any) -> Any:
    """As `check_head` makes a head: from plain data."""
    return build_head({"kind": "nested", **config}, dim=dim, vocab=None, z_dim=C)


# --- the contract -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        {"backbone": ARINAR, "head": LEAF},
        {"backbone": PLAIN, "head": LEAF, "split": {"kind": "rgb"}},
        {"backbone": PLAIN, "head": {"kind": "diffusion", "width": 24, "depth": 1}},
        {
            "split": {"kind": "features", "group": 3},
            "backbone": PLAIN,
            "head": {"kind": "nested", "split": FEATURES, "backbone": PLAIN, "head": LEAF},
        },
    ],
    ids=["mixture", "rgb", "diffusion", "nested"],
)
def test_it_is_a_head(parts: dict[str, Any]) -> None:
    check_head(made, **{"split": FEATURES, **parts}, learn=False)


def test_it_learns_a_known_density() -> None:
    check_head(made, split=FEATURES, backbone=ARINAR, head=LEAF)


# --- the density --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_log_prob_is_that_of_the_parts() -> None:
    """Each factor by the leaf itself, from the z that the naive sampler would give it."""
    head = nested()
    z, _ = vectors(5)
    x, parts, total = torch.randn(5, 4), torch.zeros(5, 4, 1), torch.zeros(5)
    for i in range(4):
        inner = head.model.backbone.sequence(head.condition(z, None), parts)[:, i]
        total += head.model.head.log_prob(inner, x[:, i : i + 1])
        parts[:, i] = x[:, i : i + 1]
    assert torch.allclose(head.log_prob(z, x), total, atol=1e-5)
    loss = head.loss(z, x, keys(5))
    assert torch.allclose(loss.sum, -total, atol=1e-5) and torch.equal(loss.count, torch.ones(5))


@torch.no_grad()
def test_density_integrates_to_one() -> None:
    """Over a grid of two features; this is what the constant is for."""
    head = nested(2)
    z = vectors(1)[0]
    axis = torch.linspace(-12, 12, 161)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2)
    density = head.log_prob(z.expand(len(grid), -1), grid).double().exp()
    assert abs(float(density.sum()) * 0.15**2 - 1) < 1e-3


@torch.no_grad()
def test_later_features_do_not_change_earlier_factors() -> None:
    for order, changed in (("natural", 3), ("reversed", 0), ([2, 0, 3, 1], 1)):
        head = nested(split={"kind": "features", "order": order})
        z, x = vectors(3)[0], torch.randn(3, 4)
        y = x.clone()
        y[:, changed] += 1  # the last one drawn
        assert torch.equal(head.log_prob_of_parts(z, x)[:, :3], head.log_prob_of_parts(z, y)[:, :3]), order


@torch.no_grad()
def test_entropy_of_parts() -> None:
    """One Gaussian for each part: -log p of what was drawn is its entropy, in the mean."""
    head = nested(2, head={"kind": "mixture", "components": 1, "depth": 0})
    z = vectors(1)[0].expand(4000, -1)
    x = head.sample(z, many(0, 4000))
    surprise = -head.log_prob_of_parts(z, x).mean(dim=0)
    leaf: Any = head.model.head
    inner = head.model.backbone.sequence(head.condition(z[:1], None), torch.zeros(1, 2, 1))[:, 0]
    entropy = leaf.mixture(inner).entropy()[0]
    assert abs(float(surprise[0] - entropy)) < 0.05


# --- sampling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", FEATURE_SCHEDULES)
@pytest.mark.parametrize("guidance", [1.0, 2.5], ids=["free", "guided"])
@pytest.mark.parametrize("split", [FEATURES, {"kind": "features", "group": 2, "order": "reversed"}], ids=["1", "2"])
def test_fast_is_naive(schedule: str, guidance: float, split: dict[str, Any]) -> None:
    head = nested(split=split)
    z, z_null = vectors(6)
    options: dict[str, Any] = {"feature_schedule": schedule}
    if guidance != 1:
        options["guidance_mode"] = "resample"
    plan, w = head.plan(head.options(**options)), Guidance.of(guidance, 6, "cpu")
    null = None if w is None else z_null
    once, anew = (sampler(z, keys(6), plan, null, w, 0.9) for sampler in (head.sample, head.sample_naive))
    assert torch.allclose(once, anew, atol=1e-4)


def test_guidance_of_each_row_and_the_schedule() -> None:
    """A row whose scale is 1 draws as it would alone; cosine leaves the last part as free as a scale of 1."""
    head = nested()
    z, z_null = vectors(4)
    scale = torch.tensor([1.0, 2.0, 1.0, 3.0])
    mixed, free = drawn(head, z, keys(4), z_null, scale), head.sample(z, keys(4))
    assert torch.allclose(mixed[::2], free[::2], atol=1e-5)
    assert not torch.allclose(mixed[1::2], free[1::2], atol=1e-2)
    asked: list[Tensor] = []
    inner = head.model.head.sample

    def watched(z: Tensor, keys: Keys, plan: Any, null: Any, guidance: Guidance | None, *more: Any) -> Tensor:
        asked.append(torch.ones(4) if guidance is None else guidance.host)
        return inner(z, keys, plan, null, guidance, *more)

    head.model.head.sample = watched  # type: ignore[method-assign, assignment]
    drawn(head, z, keys(4), z_null, scale, feature_schedule="cosine")
    assert all(torch.equal(w[::2], torch.ones(2)) for w in asked) and torch.equal(asked[-1], torch.ones(4))
    assert (asked[0][1::2] > asked[1][1::2]).all()


def test_a_cold_token_is_the_likeliest_path() -> None:
    head = nested(head={"kind": "mixture", "components": 1, "depth": 0})
    z = vectors(3)[0]
    assert torch.allclose(drawn(head, z, keys(3), temperature=0.0), drawn(head, z, many(5, 3), temperature=0.0))


@pytest.mark.parametrize("kind", FEATURE_SCHEDULES)
def test_schedules_over_features(kind: str) -> None:
    values = [1 + scheduled(kind, i, 16) * (3.0 - 1) for i in range(1, 17)]
    assert values[-1] == {"constant": 3.0, "linear": 4.0, "cosine": 1.0}[kind]
    steps = [b - a for a, b in pairwise(values)]
    assert all(math.copysign(1, s) == {"linear": 1, "cosine": -1}.get(kind, 1) for s in steps)


def test_packed_for_sampling() -> None:
    if not packs(torch.float32):
        pytest.skip("no packed products in this build")
    head = nested(backbone={**ARINAR, "width": 64})
    z, z_null = vectors(5)
    before = drawn(head, z, keys(5), z_null, 2.0)
    prepare(head)
    assert torch.allclose(drawn(head, z, keys(5), z_null, 2.0), before, atol=1e-4)


def test_in_a_model_fast_loop_is_the_specification() -> None:
    config = {
        "kind": "masked", "tokens": 4, "dim": 4, "width": 32, "depth": 1, "heads": 2, "buffer": 2, "classes": 3,
        "head": {"kind": "nested", "split": FEATURES, "backbone": ARINAR, "head": LEAF},
    }  # fmt: skip
    with seeded(0):
        model = build_model(config)
    assert isinstance(model, MaskedModel)
    complete = model_config(model)
    assert model_config(build_model(complete)) == complete
    model(torch.randn(3, 4, 4), torch.tensor([0, 1, 2])).mean.backward()
    assert all(p.grad is not None for p in model.head.parameters())
    model.eval()
    labels = torch.tensor([0, 2])
    options: dict[str, Any] = {"steps": 3, "guidance_scale": 2.0, "feature_schedule": "linear"}
    *_, last = fast(model, labels, keys(2), **options)
    assert torch.allclose(last.tokens, naive(model, labels, keys(2), **options), atol=1e-4)


# --- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": {"kind": "features", "group": 3}}, r"split\.group: 3 does not divide the 4 features .* 1, 2, 4"),
        ({"split": {"kind": "features", "order": [0, 1, 1, 2]}}, r"split\.order: position 1 is given twice"),
        (
            {"split": {"kind": "features", "order": [0, 1]}},
            r"split\.order: 2 positions given for 4 parts; .* from 0 to 3",
        ),
        ({"split": {"kind": "features", "order": "sideways"}}, r"split\.order: .*'sideways'"),
        ({"split": {"kind": "rgb"}}, r"split\.kind: 'rgb' needs patches of three colours"),
        ({"split": {"kind": "halves"}}, r"split\.kind: 'halves' is not known"),
        ({"head": {"kind": "mixture", "components": 0}}, r"head\.components: 0 is not allowed; it must be at least 1"),
        ({"head": {**LEAF, "dim": 2}}, r"head\.dim: 2 does not fit"),
        ({"head": {"kind": "categorical"}}, r"head\.kind: 'categorical' draws codes"),
        ({"backbone": {**ARINAR, "tokens": 8}}, r"model\.tokens: 8 does not fit the split of the token \(4\)"),
        ({"backbone": {**ARINAR, "dim": 2}}, r"model\.dim: 2 does not fit the split of the token \(1\)"),
        ({"backbone": {**ARINAR, "condition_width": 9}}, r"model\.condition_width: follows from"),
        ({"backbone": {**ARINAR, "order": "random"}}, r"order: 'random' is not allowed inside a token"),
        ({"backbone": {**ARINAR, "heads": 5}}, r"model\.heads: 5 does not divide the width 32"),
        ({"backbone": {"kind": "masked", "width": 32}}, r"backbone: Masked is not sequential"),
        ({"backbone": {**ARINAR, "depht": 1}}, r"unknown key 'head\.model\.depht'; did you mean 'depth'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parts_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as failure:
        nested(**changes)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("shape", [(2, 5), (2, 3), (2, 2, 2)])
def test_tokens_that_do_not_fit_its_parts(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        UsageError, match=r"tokens: shape .* does not fit a head of 4 parts of 1; give \(N, 4\)"
    ) as failure:
        nested().log_prob(vectors(2)[0], torch.zeros(shape))
    assert "\n" not in str(failure.value)


def test_the_path_in_a_config_is_whole() -> None:
    config = {"kind": "nested", "split": FEATURES, "backbone": PLAIN, "head": {"kind": "mixture", "components": 0}}
    with pytest.raises(ConfigError, match=r"^model\.head\.model\.head\.components: 0 is not allowed"):
        build_head(config, dim=4, vocab=None, z_dim=C)
    assert HEADS["nested"] is Nested


def test_options_are_checked() -> None:
    head, z = nested(), vectors(2)[0]
    with pytest.raises(UsageError, match=r"feature_schedule: 'linaer' is not known; did you mean 'linear'"):
        drawn(head, z, keys(2), feature_schedule="linaer")
    with pytest.raises(UsageError, match="top_q: the Nested head has no such"):
        drawn(head, z, keys(2), top_q=1)
    with pytest.raises(UsageError, match="has no density"):
        nested(head={"kind": "diffusion", "width": 24, "depth": 1}).log_prob_of_parts(z, torch.zeros(2, 4))


# --- entropy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", [LEAF, {"kind": "bins", "bins": 16}])
def test_entropies_are_what_draws_are_surprised_by(leaf: dict[str, Any]) -> None:
    """The mean over draws of -log p of a part is the mean of its entropy: the same number in two ways."""
    head = nested(3, head=leaf, split={**FEATURES, "order": [2, 0, 1]})
    z = vectors(1)[0].expand(20_000, -1)
    tokens = head.sample(z, many(0, len(z)))
    surprise = -head.log_prob_of_parts(z, tokens)  # (N, T), as drawn
    entropy = head.entropy(z, tokens)[:, [2, 0, 1]]  # (N, D) by feature
    error = (surprise - entropy).std(dim=0) / math.sqrt(len(z))
    assert (((surprise - entropy).mean(dim=0).abs()) < 5 * error + 1e-3).all()
    assert float(entropy[:, 0].std()) < 1e-5, "the first part is drawn from z alone"
    assert (entropy[:, 1:].std(dim=0) > 1e-4).all(), "the others see what was drawn"


def test_without_a_density_there_is_no_entropy() -> None:
    head = nested(3, head={"kind": "diffusion", "width": 24, "depth": 1})
    with pytest.raises(UsageError, match="the Diffusion head has no density: entropy is not defined for it"):
        head.entropy(vectors(2)[0], torch.zeros(2, 3))
    head = nested(3, head={"kind": "flow", "width": 24, "depth": 1})
    with pytest.raises(UsageError, match="the Flow head can't compute the entropy of each feature"):
        head.entropy(vectors(2)[0], torch.zeros(2, 3))


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_a_stream_tells_the_entropy_of_what_each_step_drew(kind: str) -> None:
    config = {"kind": kind, "width": 16, "depth": 1, "heads": 2, "head": {"kind": "nested", "split": FEATURES,
              "backbone": PLAIN, "head": LEAF}}  # fmt: skip
    with seeded(0):
        model = build_model(config, tokens=4, dim=3, classes=2)
    randomise(model, scale=0.1)
    model.eval()
    before, seen = torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.long)
    told = torch.zeros(2, 4, 3)
    for step in fast(model, torch.tensor([0, 1]), keys(2), steps=4, guidance_scale=2.0):
        entropy = step.entropy()  # (B, L, D)
        assert torch.equal(entropy.isfinite().all(dim=-1), step.known & ~before)
        assert torch.equal(entropy.isfinite().any(dim=-1), step.known & ~before)
        new = step.known & ~before
        condition = model.condition(torch.tensor([0, 1]), 2)
        if kind == "masked" and new.any():
            z = model.backbone.z(condition, step.tokens, before, new)
            assert torch.allclose(entropy[new], model.head.entropy(z, step.tokens[new]), atol=1e-4)
        if kind == "causal":
            told = torch.where(new[..., None], entropy, told)
        before, seen = step.known, seen + new
    assert (seen == 1).all()
    if kind == "causal":  # all tokens in one pass, from the definition
        backbone: Any = model.backbone
        z = backbone.sequence(model.condition(torch.tensor([0, 1]), 2), step.tokens).flatten(0, 1)
        assert torch.allclose(told.flatten(0, 1), model.head.entropy(z, step.tokens.flatten(0, 1)), atol=1e-4)


# --- numbers that are not finite ----------------------------------------------------------------------------------


class Levels(Split):
    """Features in [0, 1) as codes: one of eight levels for each."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, [[i] for i in range(dim)])
        self.spec, self.config = TokenSpec(dim, vocab=8), {}

    def cut(self, tokens: Tensor) -> Tensor:
        return (tokens * 8).long().clamp(0, 7)

    def join(self, parts: Tensor) -> Tensor:
        return parts / 8


def of_levels(kind: str) -> Nested:
    backbone = {"causal": Causal(4, vocab=8, width=16, depth=1, heads=2), "masked": Masked(
        4, vocab=8, width=16, depth=1, heads=2, buffer=1, dropout=0.0)}[kind]  # fmt: skip
    made = {"causal": CausalModel, "masked": MaskedModel}[kind]
    model = made(backbone, Categorical(8), conditioner=Vectors(C, width=16))
    return Nested(Levels(4), model).eval()


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_parts_may_be_codes(kind: str) -> None:
    """A split of the user's own: the inner model is one of codes."""
    with seeded(0):
        head = of_levels(kind)
    randomise(head, scale=0.3)
    z, null = vectors(3)
    x = drawn(head, z, keys(3), null, 2.0)
    assert x.shape == (3, 4) and x.dtype == torch.float32
    assert torch.equal(x * 8, (x * 8).round()) and 0 <= float(x.min()) and float(x.max()) < 1
    assert len(x.unique()) > 2
    loss = head.loss(z, x, keys(3))
    assert torch.isfinite(loss.sum).all() and torch.equal(loss.count > 0, torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize("broken", ["model.backbone", "model.head"])
def test_codes_of_numbers_that_are_not_finite_are_no_tokens(kind: str, broken: str) -> None:
    """The head waits for no device, so it says nothing; the sampler over the image finds it at the end."""
    with seeded(0):
        head = of_levels(kind)
        model = MaskedModel(Masked(3, dim=4, width=C, depth=1, heads=1, buffer=1, dropout=0.0), head)
    with torch.no_grad():
        for parameter in head.get_submodule(broken).parameters():
            parameter.fill_(math.nan)
    assert not torch.isfinite(head.sample(vectors(2)[0], keys(2))).any()
    for sampler in (naive, lambda *given, **more: list(fast(*given, **more))):
        with pytest.raises(NumericsError, match="the sampled tokens are not finite"):
            sampler(model.eval(), None, keys(2), steps=2)
