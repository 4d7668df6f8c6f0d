"""The fast loop against the specification, and the promise: same request, same image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import fast, make_masked, naive

from seriatim.core.errors import NumericsError, UsageError
from seriatim.core.keys import Keys
from seriatim.core.schedules import tokens_per_step
from seriatim.heads.solvers import SOLVERS
from seriatim.models.build import build_head, build_model
from seriatim.models.masked_model import MaskedModel

SETTINGS: list[dict[str, Any]] = [
    {"steps": 5},
    {"steps": 16, "guidance_scale": 2.0},
    {"steps": 4, "guidance_scale": 3.0, "guidance_schedule": "constant", "temperature": 0.8},
    {"steps": 7, "guidance_scale": 0.5, "token_schedule": "linear"},
    {"steps": 1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("classes", [3, 0])
def test_the_fast_loop_is_the_naive_sampler(settings: dict[str, Any], classes: int) -> None:
    model = make_masked(classes=classes)
    labels = torch.tensor([0, 2, -1]) if classes else None
    specified = naive(model, labels, Keys.of_seeds([1, 2, 3]), num_diffusion_steps=6, **settings)
    *_, last = fast(model, labels, Keys.of_seeds([1, 2, 3]), num_diffusion_steps=6, **settings)
    assert torch.allclose(last.tokens, specified, atol=1e-4, rtol=1e-4)
    assert last.known.all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_fast_loop_anneals_and_solves_as_the_naive_sampler(solver: str) -> None:
    model = make_masked()
    labels = torch.tensor([0, 2, -1])
    options: dict[str, Any] = {"steps": 6, "guidance_scale": 2.0, "solver": solver}
    options |= {"num_diffusion_steps": 12, "num_diffusion_steps_last": 3}
    specified = naive(model, labels, Keys.of_seeds([1, 2, 3]), **options)
    *_, last = fast(model, labels, Keys.of_seeds([1, 2, 3]), **options)
    assert torch.allclose(last.tokens, specified, atol=1e-4, rtol=1e-4)


def test_annealing_follows_what_each_image_of_a_batch_knows() -> None:
    model, labels, seeds = make_masked(), torch.tensor([0, 1, 2]), [1, 2, 3]
    known = torch.arange(16) < torch.tensor([0, 8, 13])[:, None]
    tokens = torch.randn(3, 16, 4)
    options: dict[str, Any] = {"steps": 4, "num_diffusion_steps": 12, "num_diffusion_steps_last": 3}
    options |= {"solver": "dpm++", "guidance_scale": 2.0}
    *_, together = fast(model, labels, Keys.of_seeds(seeds), tokens=tokens, known=known, **options)
    specified = naive(model, labels, Keys.of_seeds(seeds), tokens=tokens, known=known, **options)
    assert torch.allclose(together.tokens, specified, atol=1e-4, rtol=1e-4)
    for i in range(3):
        one = slice(i, i + 1)
        begin: dict[str, Any] = {"tokens": tokens[one], "known": known[one]}
        *_, alone = fast(model, labels[one], Keys.of_seeds(seeds[one]), **begin, **options)
        assert torch.allclose(together.tokens[one], alone.tokens, atol=1e-4), i


def test_steps_inside_the_head_fall_with_the_known_share(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = make_masked(), []
    sample = model.head.sample

    def counting(z: torch.Tensor, keys: Keys, plan: Any, *arguments: Any) -> torch.Tensor:
        asked.append(plan.options.num_diffusion_steps)
        return sample(z, keys, plan, *arguments)

    monkeypatch.setattr(model.head, "sample", counting)
    options: dict[str, Any] = {"steps": 16, "num_diffusion_steps": 16, "token_schedule": "linear"}
    list(fast(model, torch.tensor([0]), Keys.of_seeds([1]), num_diffusion_steps_last=4, **options))
    assert asked == [round(16 - 12 * known / 16) for known in range(16)], "a token a step: none known, one known, ..."
    asked.clear()
    list(fast(model, torch.tensor([0]), Keys.of_seeds([1]), **options))
    assert set(asked) == {16}
    model.head = build_head({"kind": "mixture", "width": 8, "depth": 1}, dim=4, vocab=None)
    model.head.bind(model.backbone.z_dim)
    for sampler in (naive, fast):
        with pytest.raises(UsageError, match="num_diffusion_steps_last: the Mixture head has no steps to anneal"):
            list(sampler(model, torch.tensor([0]), Keys.of_seeds([1]), steps=2, num_diffusion_steps_last=4))


def test_an_image_is_the_same_in_any_batch() -> None:
    model = make_masked()
    labels, seeds = torch.tensor([0, 1, 2, 0]), [5, 6, 7, 8]
    options: dict[str, Any] = {"steps": 6, "guidance_scale": 2.0, "num_diffusion_steps": 8}
    *_, together = fast(model, labels, Keys.of_seeds(seeds), **options)
    for i in range(4):
        *_, alone = fast(model, labels[i : i + 1], Keys.of_seeds(seeds[i : i + 1]), **options)
        assert torch.allclose(together.tokens[i], alone.tokens[0], atol=1e-4), i
    *_, again = fast(model, labels, Keys.of_seeds(seeds), **options)
    assert torch.equal(again.tokens, together.tokens), "bitwise at an equal batch"
    *_, other = fast(model, labels, Keys.of_seeds([9, 6, 7, 8]), **options)
    assert not torch.allclose(other.tokens[0], together.tokens[0], atol=1e-2)


def test_the_stream_shows_tokens_becoming_known() -> None:
    model = make_masked()
    steps = list(fast(model, torch.tensor([0, 1]), Keys.of_seeds([1, 2]), steps=5, num_diffusion_steps=3))
    counts = tokens_per_step(5, 16)
    before, earlier = torch.zeros(2, 16, dtype=torch.bool), torch.zeros(2, 16, 4)
    for i, step in enumerate(steps):
        assert (step.index, step.total, step.stage) == (i, 5, "tokens")
        assert (step.known & ~before).sum(dim=1).tolist() == [counts[i]] * 2
        assert torch.equal(step.tokens[before], earlier[before]), "known tokens never change"
        assert not step.tokens[~step.known].any(), "unknown tokens are zero"
        before, earlier = step.known, step.tokens


def test_the_null_pass_is_skipped_where_the_scale_is_one() -> None:
    model = make_masked()
    rows: list[int] = []
    model.backbone.get_submodule("decoder.0").register_forward_pre_hook(lambda _, a: rows.append(len(a[0])))
    list(fast(model, torch.tensor([0, 1]), Keys.of_seeds([1, 2]), steps=3, num_diffusion_steps=3))
    assert rows == [1, 1, 2, 2], "the first step is made class by class"
    rows.clear()
    options: dict[str, Any] = {"steps": 3, "num_diffusion_steps": 3, "guidance_scale": 2.0}
    list(fast(model, torch.tensor([0, 1]), Keys.of_seeds([1, 2]), **options))
    assert rows == [1, 1, 1, 4, 4]


def test_bf16_is_near_float32() -> None:
    model = make_masked()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        options: dict[str, Any] = {"steps": 4, "num_diffusion_steps": 10, "dtype": dtype}
        *_, last = fast(model, torch.tensor([0, 1]), Keys.of_seeds([1, 2]), **options)
        assert last.tokens.dtype == torch.float32
        results.append(last.tokens)
    assert 0 < float((results[0] - results[1]).abs().mean()) < 0.1


def test_tokens_that_are_not_finite_stop_with_a_reason() -> None:
    model = make_masked()
    with torch.no_grad():
        model.head.get_parameter("final.linear.bias").fill_(float("nan"))
    with pytest.raises(NumericsError, match="not finite"):
        list(fast(model, torch.tensor([0]), Keys.of_seeds([1]), steps=2, num_diffusion_steps=3))


def test_with_many_classes_the_first_step_is_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, labels = make_masked(), torch.tensor([0, 1, 2])
    rows: list[int] = []
    model.backbone.get_submodule("decoder.0").register_forward_pre_hook(lambda _, a: rows.append(len(a[0])))
    monkeypatch.setattr("seriatim.sampling.parallel.FEW_CONDITIONS", 2)
    *_, last = fast(model, labels, Keys.of_seeds([1, 2, 3]), steps=2, num_diffusion_steps=3)
    assert rows == [3, 3]
    specified = naive(model, labels, Keys.of_seeds([1, 2, 3]), steps=2, num_diffusion_steps=3)
    assert torch.allclose(last.tokens, specified, atol=1e-4, rtol=1e-4)


def test_weights_written_through_data_are_seen() -> None:
    """Nothing about the weights is kept between two samplings, not even of the first step."""
    model, other = make_masked(), make_masked()
    labels = torch.tensor([1, 1, 0])

    def draw(of: MaskedModel) -> torch.Tensor:
        *_, last = fast(of, labels, Keys.of_seeds([1, 2, 3]), steps=3, num_diffusion_steps=3)
        return last.tokens

    before = draw(model)
    for made in (model, other):
        for parameter in made.parameters():
            parameter.data.mul_(1.2)
    after = draw(model)
    assert not torch.allclose(after, before, atol=1e-3) and torch.equal(after, draw(other))


def test_what_a_caller_gives_to_begin_from_is_not_written_to() -> None:
    model, known, tokens = make_masked(), torch.arange(16)[None] < 5, torch.randn(1, 16, 4)
    for sampler in (fast, naive):
        list(sampler(model, None, Keys.of_seeds([1]), tokens=tokens, known=known, steps=2, num_diffusion_steps=2))
        assert int(known.sum()) == 5


@pytest.mark.parametrize("sampler", [fast, naive])
def test_codes_that_are_none_stop_with_a_reason(sampler: Any) -> None:
    for kind in ("masked", "causal"):
        config = {"kind": kind, "tokens": 4, "vocab": 6, "width": 16, "depth": 1, "head": {"kind": "categorical"}}
        model = build_model(config).eval()
        with torch.no_grad():
            model.head.get_parameter("logits.bias")[2] = float("nan")
        with pytest.raises(NumericsError, match="not finite"):
            list(sampler(model, None, Keys.of_seeds([1, 2])))
