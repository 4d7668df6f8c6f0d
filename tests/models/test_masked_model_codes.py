"""Masked models of codes: training, both samplers, the order "confidence", what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import fast, many, naive

from seriatim.core.errors import ConfigError, UsageError
from seriatim.core.keys import Keys
from seriatim.models.base import SequenceModel
from seriatim.models.build import build_model, model_config, seeded
from seriatim.sampling.parallel import surest

L, V = 9, 12
CONFIG: dict[str, Any] = {
    "kind": "masked", "tokens": L, "vocab": V, "width": 32, "depth": 1, "heads": 2, "buffer": 2, "dropout": 0.0,
    "classes": 2, "min_mask_ratio": 0.1, "mask_ratio_std": 1.0, "head": {"kind": "categorical"},
}  # fmt: skip


def make(**changes: Any) -> SequenceModel:
    with seeded(0):
        model = build_model({**CONFIG, **changes})
        torch.nn.init.normal_(model.head.logits.weight, std=0.5)  # type: ignore[union-attr, arg-type]
    return model.eval()


def test_config_round_trip() -> None:
    model = make()
    assert model_config(build_model(model_config(model))) == model_config(model)
    assert model.backbone.vocab == V and model.backbone.dim is None
    assert "dim" not in model_config(model)


def test_it_learns_codes() -> None:
    """Images of one code each, which of them by class: after training each class draws its own."""
    with seeded(0):
        model = build_model(CONFIG).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        keys = many(step, 32)
        labels = keys.fold("label").integers(2)
        tokens = (labels * 4 + keys.fold("code").integers(3))[:, None].expand(-1, L).contiguous()  # 0..2 or 4..6
        loss = model(tokens, labels, keys)
        optimiser.zero_grad()
        loss.mean.backward()
        optimiser.step()
    model.eval()
    labels = torch.arange(40) % 2
    cases: list[dict[str, Any]] = [{}, {"order": "confidence", "steps": 3}, {"guidance_scale": 2.0}]
    for settings in cases:
        drawn = naive(model, labels, Keys.of_seeds(range(40)), **{"steps": 9, **settings})
        assert drawn.shape == (40, L) and drawn.dtype == torch.long
        assert bool((drawn // 4 == labels[:, None]).float().mean() > 0.95), settings
        assert bool((drawn == drawn.mode(dim=1, keepdim=True).values).float().mean() > 0.85), settings
        assert len(drawn.mode(dim=1).values.unique()) >= 5, "every code of a class"


SETTINGS: list[dict[str, Any]] = [
    {"steps": 4},
    {"steps": 9, "guidance_scale": 2.0, "top_k": 5},
    {"steps": 4, "order": "confidence"},
    {"steps": 5, "order": "confidence", "guidance_scale": 3.0, "top_p": 0.8, "temperature": 0.7},
    {"steps": 3, "order": "confidence", "choice_temperature": 0.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("begun", [False, True])
def test_the_fast_loop_is_the_naive_sampler(settings: dict[str, Any], begun: bool) -> None:
    model, labels = make(), torch.tensor([0, 1, -1])
    start: dict[str, Any] = {}
    if begun:  # each image knows another number of tokens
        known = torch.arange(L) < torch.tensor([0, 3, 8])[:, None]
        start = {"tokens": torch.arange(3 * L).view(3, L) % V, "known": known}
    specified = naive(model, labels, Keys.of_seeds([1, 2, 3]), **start, **settings)
    steps = list(fast(model, labels, Keys.of_seeds([1, 2, 3]), **start, **settings))
    assert torch.equal(steps[-1].tokens, specified) and bool(steps[-1].known.all())
    if begun:
        assert torch.equal(specified[known], start["tokens"][known])
    for i in range(3):  # the same alone
        one = slice(i, i + 1)
        alone = naive(model, labels[one], Keys.of_seeds([i + 1]), **{k: v[one] for k, v in start.items()}, **settings)
        assert torch.equal(alone, specified[one])


def test_confidence_knows_as_many_a_step_as_any_other_order() -> None:
    model = make()
    counts = [
        [int(step.known.sum()) for step in fast(model, None, Keys.of_seeds([1]), steps=4, order=order)]
        for order in (None, "confidence")
    ]
    assert counts[0] == counts[1]


def test_the_surest_stay() -> None:
    rows = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    sure = torch.tensor([-3.0, -1.0, -2.0, -5.0, -4.0, -4.5, -9.0])
    keep = surest(sure, rows, Keys.of_seeds([1, 2]).select(rows).fold(torch.arange(7)).uniform(), [2, 1], 0.0)
    assert keep.tolist() == [False, True, False, True, True, True, False]

    def hot(i: int) -> list[bool]:
        u = Keys.of_seeds([i, i + 50]).select(rows).fold(torch.arange(7)).uniform()
        return surest(sure, rows, u, [2, 1], 100.0).tolist()

    assert len({tuple(k) for k in map(hot, range(40))}) > 3, "noise lets others through"
    assert all(sum(k[:3]) == 1 and sum(k[3:]) == 3 for k in map(hot, range(40)))


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.full((2, L), V), f"codes from {V} to {V} are not all in the vocabulary, 0 to {V - 1}"),
        (torch.full((2, L), -1), "codes from -1 to -1"),
        (torch.zeros(2, L), "torch.float32 is not allowed; this model's tokens are codes, int64"),
        (torch.zeros(2, L + 1, dtype=torch.long), r"shape \(2, 10\) is not \(B, 9\)"),
    ],
)
def test_codes_are_checked(tokens: torch.Tensor, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()(tokens, None)


def test_what_does_not_fit_is_refused_at_configuration() -> None:
    with pytest.raises(ConfigError, match="'diffusion' draws real features, the tokens are codes of 12"):
        build_model({**CONFIG, "head": {"kind": "diffusion", "width": 8, "depth": 1}})
    with pytest.raises(ConfigError, match=r"model.dim: 4 is for tokens that are features; the tokenizer's are codes"):
        build_model({**{k: v for k, v in CONFIG.items() if k != "vocab"}, "dim": 4}, vocab=12)
    with pytest.raises(ConfigError, match="dim: None with vocab None is not allowed"):
        build_model({k: v for k, v in CONFIG.items() if k != "vocab"})


def test_confidence_is_for_codes() -> None:
    features = {**{k: v for k, v in CONFIG.items() if k != "vocab"}, "dim": 4}
    model = build_model({**features, "head": {"kind": "diffusion", "width": 8, "depth": 1}})
    with pytest.raises(UsageError, match="order: 'confidence' needs a head of codes; Diffusion draws features"):
        naive(model, None, Keys.of_seeds([1]), order="confidence")
