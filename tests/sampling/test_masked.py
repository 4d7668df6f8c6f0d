"""The fast loop against the specification, and the promise: same request, same image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import make_masked

from seriatim.core.errors import NumericsError, UsageError
from seriatim.core.random import Noise
from seriatim.core.schedules import tokens_per_step
from seriatim.heads.solvers import SOLVERS
from seriatim.sampling.parallel import FirstStep, masked_steps

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
    naive = model.sample(labels, Noise.per_image([1, 2, 3]), num_diffusion_steps=6, **settings)
    *_, last = masked_steps(model, labels, Noise.per_image([1, 2, 3]), num_diffusion_steps=6, **settings)
    assert torch.allclose(last.tokens, naive, atol=1e-4, rtol=1e-4)
    assert last.known.all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_fast_loop_anneals_and_solves_as_the_naive_sampler(solver: str) -> None:
    model = make_masked()
    labels = torch.tensor([0, 2, -1])
    options: dict[str, Any] = {"steps": 6, "guidance_scale": 2.0, "solver": solver}
    options |= {"num_diffusion_steps": 12, "num_diffusion_steps_last": 3}
    naive = model.sample(labels, Noise.per_image([1, 2, 3]), **options)
    *_, last = masked_steps(model, labels, Noise.per_image([1, 2, 3]), **options)
    assert torch.allclose(last.tokens, naive, atol=1e-4, rtol=1e-4)


def test_annealing_follows_what_each_image_of_a_batch_knows() -> None:
    model, labels, seeds = make_masked(), torch.tensor([0, 1, 2]), [1, 2, 3]
    known = torch.arange(16) < torch.tensor([0, 8, 13])[:, None]
    tokens = torch.randn(3, 16, 4)
    options: dict[str, Any] = {"steps": 4, "num_diffusion_steps": 12, "num_diffusion_steps_last": 3}
    options |= {"solver": "dpm++", "guidance_scale": 2.0}
    *_, together = masked_steps(model, labels, Noise.per_image(seeds), tokens=tokens, known=known, **options)
    naive = model.sample(labels, Noise.per_image(seeds), tokens=tokens, known=known, **options)
    assert torch.allclose(together.tokens, naive, atol=1e-4, rtol=1e-4)
    for i in range(3):
        one = slice(i, i + 1)
        begin: dict[str, Any] = {"tokens": tokens[one], "known": known[one]}
        *_, alone = masked_steps(model, labels[one], Noise.per_image(seeds[one]), **begin, **options)
        assert torch.allclose(together.tokens[one], alone.tokens, atol=1e-4), i


def test_steps_inside_the_head_fall_with_the_known_share(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = make_masked(), []
    sample = model.head.sample

    def counting(*arguments: Any, num_diffusion_steps: int, **options: Any) -> torch.Tensor:
        asked.append(num_diffusion_steps)
        return sample(*arguments, num_diffusion_steps=num_diffusion_steps, **options)

    monkeypatch.setattr(model.head, "sample", counting)
    options: dict[str, Any] = {"steps": 16, "num_diffusion_steps": 16, "token_schedule": "linear"}
    list(masked_steps(model, torch.tensor([0]), Noise.per_image([1]), num_diffusion_steps_last=4, **options))
    assert asked == [round(16 - 12 * known / 16) for known in range(16)], "a token a step: none known, one known, ..."
    asked.clear()
    list(masked_steps(model, torch.tensor([0]), Noise.per_image([1]), **options))
    assert set(asked) == {16}
    with pytest.raises(UsageError, match="num_diffusion_steps_last: needs num_diffusion_steps"):
        model.sample(torch.tensor([0]), Noise.per_image([1]), steps=2, num_diffusion_steps_last=4)


def test_an_image_is_the_same_in_any_batch() -> None:
    model = make_masked()
    labels, seeds = torch.tensor([0, 1, 2, 0]), [5, 6, 7, 8]
    options: dict[str, Any] = {"steps": 6, "guidance_scale": 2.0, "num_diffusion_steps": 8}
    *_, together = masked_steps(model, labels, Noise.per_image(seeds), **options)
    for i in range(4):
        *_, alone = masked_steps(model, labels[i : i + 1], Noise.per_image(seeds[i : i + 1]), **options)
        assert torch.allclose(together.tokens[i], alone.tokens[0], atol=1e-4), i
    *_, again = masked_steps(model, labels, Noise.per_image(seeds), **options)
    assert torch.equal(again.tokens, together.tokens), "bitwise at an equal batch"
    *_, other = masked_steps(model, labels, Noise.per_image([9, 6, 7, 8]), **options)
    assert not torch.allclose(other.tokens[0], together.tokens[0], atol=1e-2)


def test_the_stream_shows_tokens_becoming_known() -> None:
    model = make_masked()
    steps = list(masked_steps(model, torch.tensor([0, 1]), Noise.per_image([1, 2]), steps=5, num_diffusion_steps=3))
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
    list(masked_steps(model, torch.tensor([0, 1]), Noise.per_image([1, 2]), steps=3, num_diffusion_steps=3))
    assert rows == [1, 1, 2, 2], "the first step is made class by class"
    rows.clear()
    options: dict[str, Any] = {"steps": 3, "num_diffusion_steps": 3, "guidance_scale": 2.0}
    list(masked_steps(model, torch.tensor([0, 1]), Noise.per_image([1, 2]), **options))
    assert rows == [1, 1, 1, 4, 4]


def test_bf16_is_near_float32() -> None:
    model = make_masked()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        options: dict[str, Any] = {"steps": 4, "num_diffusion_steps": 10, "dtype": dtype}
        *_, last = masked_steps(model, torch.tensor([0, 1]), Noise.per_image([1, 2]), **options)
        assert last.tokens.dtype == torch.float32
        results.append(last.tokens)
    assert 0 < float((results[0] - results[1]).abs().mean()) < 0.1


def test_tokens_that_are_not_finite_stop_with_a_reason() -> None:
    model = make_masked()
    with torch.no_grad():
        model.head.get_parameter("final.linear.bias").fill_(float("nan"))
    with pytest.raises(NumericsError, match="not finite"):
        list(masked_steps(model, torch.tensor([0]), Noise.per_image([1]), steps=2, num_diffusion_steps=3))


def test_the_first_step_is_kept_until_the_weights_change() -> None:
    model = make_masked()
    kept = FirstStep(model, most=2)
    passes: list[int] = []
    model.backbone.get_submodule("decoder.0").register_forward_pre_hook(lambda _, a: passes.append(len(a[0])))

    def draw() -> tuple[torch.Tensor, int]:
        passes.clear()
        options: dict[str, Any] = {"steps": 2, "num_diffusion_steps": 3, "first": kept}
        *_, last = masked_steps(model, torch.tensor([1, 1, 0]), Noise.per_image([1, 2, 3]), **options)
        return last.tokens, len(passes)

    made, again = draw(), draw()
    assert (made[1], again[1]) == (3, 1) and torch.equal(made[0], again[0]), "two classes, then none"
    with torch.no_grad():
        model.backbone.decoder_positions.mul_(1.5)  # type: ignore[operator]
    changed, fresh = (
        draw(),
        model.sample(torch.tensor([1, 1, 0]), Noise.per_image([1, 2, 3]), steps=2, num_diffusion_steps=3),
    )
    assert changed[1] == 3 and torch.allclose(changed[0], fresh, atol=1e-4, rtol=1e-4)
    kept.z(2)
    assert len(kept.kept) == 2, "the class seen longest ago is dropped"


def test_the_first_step_of_another_model_is_not_taken() -> None:
    model, other = make_masked(), make_masked()
    with torch.no_grad():
        other.backbone.output_positions.add_(1.0)  # type: ignore[operator]
    labels = torch.tensor([0, 1])

    def draw(first: FirstStep | None) -> torch.Tensor:
        noise = Noise.per_image([1, 2])
        *_, last = masked_steps(model, labels, noise, steps=3, num_diffusion_steps=3, first=first)
        return last.tokens

    assert torch.equal(draw(FirstStep(other)), draw(None)) and torch.equal(draw(FirstStep(model)), draw(None))


def test_with_many_classes_the_first_step_is_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, labels = make_masked(), torch.tensor([0, 1, 2])
    rows: list[int] = []
    model.backbone.get_submodule("decoder.0").register_forward_pre_hook(lambda _, a: rows.append(len(a[0])))
    monkeypatch.setattr("seriatim.sampling.masked.FEW_CLASSES", 2)
    *_, last = masked_steps(model, labels, Noise.per_image([1, 2, 3]), steps=2, num_diffusion_steps=3)
    assert rows == [3, 3]
    naive = model.sample(labels, Noise.per_image([1, 2, 3]), steps=2, num_diffusion_steps=3)
    assert torch.allclose(last.tokens, naive, atol=1e-4, rtol=1e-4)
