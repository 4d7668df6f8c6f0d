"""The causal model: loss, orders, captions, known tokens, what is refused; and the fast loop against `sample`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import fast, many, naive
from torch import Tensor
from torch.nn import functional as F

from seriatim.conditions.captions import Captions
from seriatim.core.errors import ConfigError, UsageError
from seriatim.core.keys import Keys
from seriatim.core.orders import ORDERS
from seriatim.heads.base import Guidance
from seriatim.models.build import build_model, model_config, parameter_count, seeded
from seriatim.models.causal_model import CausalModel

L, V, D = 9, 12, 3
CODES: dict[str, Any] = {
    "kind": "causal", "tokens": L, "vocab": V, "width": 32, "depth": 2, "heads": 2, "classes": 3,
    "head": {"kind": "categorical"},
}  # fmt: skip
FEATURES: dict[str, Any] = {k: v for k, v in CODES.items() if k != "vocab"} | {
    "dim": D, "head": {"kind": "diffusion", "width": 16, "depth": 1}
}  # fmt: skip
TEXT: dict[str, Any] = {**CODES, "classes": 0, "caption_dim": 6, "caption_tokens": 4, "rotate_prefix": False}
KINDS: dict[str, dict[str, Any]] = {
    "codes": CODES,
    "features": FEATURES,
    "any-codes": {**CODES, "order": "random"},
    "any-features": {**FEATURES, "order": "random", "positions": "learned"},
    "adaln": {**FEATURES, "conditioning": "both", "norm": "layer", "mlp": "gelu-tanh", "condition_width": 8},
    "text": TEXT,
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"guidance_scale": 3.0},
    {"guidance_scale": 2.0, "guidance_schedule": "constant", "temperature": 0.7},
    {"guidance_scale": 3.0, "guidance_schedule": "interval", "guidance_interval": (0.3, 0.7)},
]


def make(kind: str | dict[str, Any], **options: Any) -> CausalModel:
    with seeded(0):
        model = build_model({**(KINDS[kind] if isinstance(kind, str) else kind), **options}).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    assert isinstance(model, CausalModel)
    return model


def labels_for(model: CausalModel, images: int = 3) -> Tensor | Captions:
    if model.classes:
        return torch.arange(images) % 4 - 1
    features = torch.randn(images, 4, 6, generator=torch.Generator().manual_seed(4))
    valid = torch.arange(4) >= torch.tensor([0, 2, 3])[:images, None]
    return Captions(features, valid)


def options_for(model: CausalModel) -> dict[str, Any]:
    return {} if model.head.discrete else {"num_diffusion_steps": 4}


def tokens_for(model: CausalModel, images: int = 3, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(V, (images, L), generator=g) if model.head.discrete else torch.randn(images, L, D, generator=g)


# --- the fast loop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_loop_is_the_naive_sampler(kind: str, settings: dict[str, Any]) -> None:
    model, seeds = make(kind), [1, 2, 3]
    settings = {**settings, **options_for(model)}
    specified = naive(model, labels_for(model), Keys.of_seeds(seeds), **settings)
    steps = list(fast(model, labels_for(model), Keys.of_seeds(seeds), **settings))
    assert len(steps) == L and [int(s.known.sum()) for s in steps] == [3 * (i + 1) for i in range(L)]
    if model.head.discrete:
        assert torch.equal(steps[-1].tokens, specified)
        assert len(specified.unique()) > 2
    else:
        assert torch.allclose(steps[-1].tokens, specified, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["any-codes", "any-features"])
@pytest.mark.parametrize("order", [None, "spiral", "each"])
def test_from_known_tokens_each_image_goes_on_alone(kind: str, order: str | None) -> None:
    model, seeds = make(kind), [1, 2, 3]
    known = torch.arange(L) < torch.tensor([0, 4, 9])[:, None]
    known[1] = known[1].flip(0)
    tokens = tokens_for(model)
    wanted: Any = torch.tensor(ORDERS["spiral"](3, 3)) if order == "spiral" else None
    if order == "each":
        wanted = torch.stack([torch.arange(L).roll(i) for i in range(3)])
    settings: dict[str, Any] = {"guidance_scale": 2.0, "tokens": tokens, "known": known, **options_for(model)}
    specified = naive(model, labels_for(model), Keys.of_seeds(seeds), order=wanted, **settings)
    *_, last = fast(model, labels_for(model), Keys.of_seeds(seeds), order=wanted, **settings)
    assert torch.equal(specified[known], tokens[known]) and last.known.all()
    assert torch.allclose(last.tokens.float(), specified.float(), atol=1e-4, rtol=1e-4)
    one = {**settings, "tokens": tokens[1:2], "known": known[1:2], "order": wanted}
    one["order"] = wanted[1:2] if order == "each" else wanted
    alone = naive(model, labels_for(model)[1:2], Keys.of_seeds([2]), **one)  # type: ignore[index]
    assert torch.allclose(alone[0].float(), specified[1].float(), atol=1e-4, rtol=1e-4)


def test_a_given_order_is_kept() -> None:
    model = make("any-codes")
    order = torch.tensor(ORDERS["spiral"](3, 3))
    steps = list(fast(model, labels_for(model), Keys.of_seeds([1, 2, 3]), order=order))
    for i, step in enumerate(steps):
        assert step.known[:, order[: i + 1]].all() and int(step.known.sum()) == 3 * (i + 1)
    raster = make("codes")
    free = naive(raster, labels_for(raster), Keys.of_seeds([1, 2, 3]))
    assert torch.equal(free, naive(raster, labels_for(raster), Keys.of_seeds([1, 2, 3]), order=range(L)))


def test_rows_without_a_class_are_dropped_when_no_one_is_guided(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make("codes"), []
    advance: Any = model.backbone._advance

    def counting(state: Any, x: Tensor, *arguments: Any) -> Tensor:
        rows.append(len(x))
        return advance(state, x, *arguments)

    monkeypatch.setattr(model.backbone, "_advance", counting)
    labels, seeds = torch.tensor([0, 1]), [1, 2]
    list(fast(model, labels, Keys.of_seeds(seeds)))
    assert rows == [2] * L
    rows.clear()
    options: dict[str, Any] = {"guidance_scale": 2.0, "guidance_schedule": "interval", "guidance_interval": (0.0, 0.5)}
    list(fast(model, labels, Keys.of_seeds(seeds), **options))
    assert rows == [4] * 4 + [2] * 5, "a share of 4 of 9 is the last below 0.5"


def test_tokens_that_a_callback_wrote_are_what_follows() -> None:
    model, labels = make("codes"), torch.tensor([0, 1])
    other, replaced = tokens_for(model, 2, seed=9), None
    for step in fast(model, labels, Keys.of_seeds([1, 2]), guidance_scale=2.0):
        if step.index == 3:
            step.replace(torch.where(step.known, other, step.tokens))
        replaced = step.tokens
    assert replaced is not None and torch.equal(replaced[:, :4], other[:, :4])
    condition, null = model.condition(labels, 2), model.null(2)
    tokens, keys = other.clone(), Keys.of_seeds([1, 2]).fold("token")
    for i in range(4, L):
        z, z_null = (model.backbone.sequence(c, tokens)[:, i] for c in (condition, null))
        scale = 1 + max(1, i + 1) / L if i < L - 1 else 2 - 1 / L
        tokens[:, i] = model.head.sample(z, keys.fold(i), None, z_null, Guidance.of(scale, 2, "cpu"))
    assert torch.equal(tokens, replaced)


def test_bf16_is_near_float32() -> None:
    model = make("features")
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        *_, last = fast(model, torch.tensor([0, 1]), Keys.of_seeds([1, 2]), num_diffusion_steps=6, dtype=dtype)
        results.append(last.tokens)
    assert results[1].dtype == torch.float32 and 0 < float((results[0] - results[1]).abs().mean()) < 0.2


# --- training -----------------------------------------------------------------------------------------------------


def test_fresh_it_finds_every_code_as_likely() -> None:
    with seeded(0):
        model = build_model(CODES)
    loss = model(tokens_for(make("codes")), torch.tensor([0, 1, 2]), many(0, 3))
    assert float(loss.mean.detach()) == pytest.approx(math.log(V), rel=1e-5)


@pytest.mark.parametrize("kind", ["codes", "any-codes"])
@torch.no_grad()
def test_the_loss_is_the_cross_entropy_token_by_token(kind: str) -> None:
    model, labels = make(kind), torch.tensor([0, 2, -1])
    tokens, order = tokens_for(model), None
    if kind == "any-codes":
        order = many(5, 3).fold("order").permutation(L)
    total = 0.0
    state = model.backbone.start(model.condition(labels, 3), order)
    index = torch.arange(L).expand(3, -1) if order is None else order
    for i in range(L):
        z = model.backbone.step(state, tokens.gather(1, index[:, i - 1 : i]) if i else None)[:, 0]
        total += float(F.cross_entropy(model.head.logits(z), tokens.gather(1, index[:, i : i + 1])[:, 0]))  # type: ignore[operator]
    loss = model(tokens, labels, many(5, 3)).mean
    assert float(loss) == pytest.approx(total / L, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_trained(kind: str) -> None:
    model = make(kind).train()
    model.label_dropout = 0.5
    tokens = tokens_for(model)
    for seed in range(4):
        model(tokens, labels_for(model), many(seed, 3)).mean.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_captions_are_dropped_for_guidance() -> None:
    model = make("text").train()
    captions = labels_for(model)
    assert isinstance(captions, Captions)
    dropped = model.conditioner.drop(captions, 1.0, many(0, 3))
    null = dict(model.named_buffers())["conditioner.no_caption"]
    assert torch.equal(dropped.features, null.expand(3, -1, -1))
    assert torch.equal(dropped.valid, captions.valid), "the padding stays"
    kept = model.conditioner.drop(captions, 0.0, many(0, 3))
    assert torch.equal(kept.features, captions.features)
    assert null.shape == (4, 6) and "conditioner.no_caption" in model.state_dict()
    assert parameter_count(model) == sum(p.numel() for p in model.parameters())
    free = naive(model.eval(), None, Keys.of_seeds([1]))
    assert free.shape == (1, L)


def test_padding_of_a_caption_says_nothing() -> None:
    model, captions = make("text"), labels_for(make("text"))
    assert isinstance(captions, Captions)
    other = captions.features + 5 * ~captions.valid[..., None]
    one, two = (
        model(tokens_for(model), Captions(features, captions.valid), many(0, 3)).mean
        for features in (captions.features, other)
    )
    assert torch.equal(one, two)


def test_it_overfits_one_batch_and_draws_it_back() -> None:
    with seeded(0):
        model = build_model({**CODES, "order": "random", "label_dropout": 0.0})
    tokens, labels = tokens_for(make("codes")), torch.arange(3)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(80):
        optimiser.zero_grad()
        loss = model(tokens, labels, many(step, 3)).mean
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.3
    drawn = naive(model.eval(), labels, Keys.of_seeds([4, 5, 6]), temperature=0.0)
    assert float((drawn == tokens).float().mean()) > 0.9


# --- building and refusing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_config_round_trip(kind: str) -> None:
    config = model_config(make(kind))
    assert model_config(build_model(config)) == config
    assert config["kind"] == config["backbone"] == "causal"
    assert config["order"] == ("random" if kind.startswith("any") else "raster")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "masked", "backbone": "causal"}, "model.backbone: Causal is not parallel"),
        ({"backbone": "masked"}, "model.backbone: Masked is not sequential"),
        ({"order": "rastr"}, "model.order: input should be 'raster' or 'random' (got 'rastr')"),
        ({"order": "any"}, "model.order: input should be 'raster' or 'random' (got 'any')"),
        ({"caption_tokens": 4}, "caption_tokens: 4 given without caption_dim"),
        ({"caption_dim": 5}, "classes: 3 given with caption_dim"),
        ({"classes": 0, "caption_dim": 5, "caption_tokens": 4, "prefix": 3}, "caption_tokens: 4 does not fit"),
        ({"conditionning": "adaln"}, "did you mean 'conditioning'"),
    ],
)
def test_what_makes_no_model_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model({**CODES, **change})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_order_needs_its_backbone() -> None:
    model = make("codes")
    with pytest.raises(UsageError, match="order: 'random' needs a backbone of order 'any'"):
        CausalModel(model.backbone, model.head, order="random")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 3}, "num_inference_steps: 3 steps asked of a causal model of 9 tokens"),
        ({"order": [8, 7, 6, 5, 4, 3, 2, 1, 0]}, "draws in no other"),
        ({"known": torch.ones(1, L, dtype=torch.bool), "tokens": torch.zeros(1, L, dtype=torch.long)}, "masked model"),
        ({"token_schedule": "linear"}, "token_schedule: 'linear' asked of a causal model"),
        ({"min_tokens": 2}, "min_tokens: 2 asked of a causal model"),
        ({"guidance_interval": (0.0, 1.0)}, "guidance_interval: only valid with guidance_schedule="),
    ],
)
def test_what_it_cannot_draw_is_refused(settings: dict[str, Any], words: str) -> None:
    model = make("codes")
    with pytest.raises(UsageError, match=words):
        list(fast(model, torch.tensor([0]), Keys.of_seeds([1]), **settings))
    with pytest.raises(UsageError, match=words):
        naive(model, torch.tensor([0]), Keys.of_seeds([1]), **settings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": torch.zeros(1, 4, 5)}, "features: .* is not \\(1, 4, 6\\)"),
        ({"valid": torch.ones(1, 3, dtype=torch.bool)}, "valid: .* is not bool \\(1, 4\\)"),
        ({"valid": torch.tensor([[True, True, True, False]])}, "pad on the left"),
    ],
)
def test_captions_that_do_not_fit_are_refused(change: dict[str, Any], words: str) -> None:
    right = {"features": torch.zeros(1, 4, 6), "valid": torch.ones(1, 4, dtype=torch.bool)}
    with pytest.raises(UsageError, match=words):
        naive(make("text"), Captions(**{**right, **change}), Keys.of_seeds([1]))


def test_labels_and_captions_are_not_mistaken_for_each_other() -> None:
    captions = Captions(torch.zeros(1, 4, 6), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(UsageError, match="labels: shape"):
        naive(make("codes"), captions, Keys.of_seeds([1]))
    with pytest.raises(UsageError, match="this model takes Captions"):
        naive(make("text"), torch.tensor([1]), Keys.of_seeds([1]))
