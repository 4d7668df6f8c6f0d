"""The pipeline: names, seeds, output types, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_bundle
from PIL import Image

import seriatim
from seriatim.checkpoints.native import Bundle
from seriatim.core.errors import CheckpointError, UsageError
from seriatim.core.keys import Keys
from seriatim.core.random import derive_seed
from seriatim.pipeline.loading import load
from seriatim.pipeline.pipeline import Pipeline
from seriatim.pipeline.request import SampleRequest
from seriatim.tokenizers.base import to_uint8
from seriatim.tokenizers.pixels import Pixels


@pytest.fixture
def pipe(bundle: Bundle) -> Pipeline:
    return Pipeline(bundle)


def test_a_call(pipe: Pipeline) -> None:
    result = pipe(class_labels=["horse", 0], num_images_per_label=2, seed=7)
    assert [i.size for i in result.images] == [(8, 8)] * 4 and result.images[0].mode == "L"
    assert result.labels == ["horse", "horse", "cat", "cat"]
    assert result.seeds == [derive_seed(7, i) for i in range(4)]
    assert result.request.guidance_scale == 1.5, "the model's own default"
    assert pipe(class_labels="dog", seed=1).labels == ["dog"]
    assert pipe([2, "cat"], seed=1).labels == ["horse", "cat"], "labels come first, so they need no name"
    assert pipe(seed=1).labels == [None], "without labels one image of no class, not one of each"
    assert pipe(class_labels=[None], seed=1).labels == [None]
    assert pipe(class_labels=np.array([2, 1]), seed=1).labels == ["horse", "dog"]


def test_the_same_request_gives_the_same_images(pipe: Pipeline) -> None:
    one = pipe(class_labels=["horse", "cat"], num_images_per_label=3, seed=7)
    two = pipe(request=one.request)
    assert torch.equal(one.tokens, two.tokens)
    small = pipe(request=one.request, batch_size=2)
    assert torch.allclose(one.tokens, small.tokens, atol=1e-4)
    single = pipe(class_labels=["cat"], seeds=(one.seeds[4],))
    assert torch.allclose(single.tokens[0], one.tokens[4], atol=1e-4), "an image's seed is all it needs"
    assert pipe(class_labels=[0]).request.seed != pipe(class_labels=[0]).request.seed, "no seed: another each time"


def test_an_order_by_name_and_by_position() -> None:
    """On a grid of 2 x 8 tokens, which the tokenizer knows and the model does not."""
    bundle = make_bundle()
    pipe = Pipeline(Bundle(bundle.model, Pixels(size=(4, 16), patch=2, channels=1), [], bundle.sampling))
    assert pipe.tokenizer.grid == (2, 8)
    options: dict[str, Any] = {"class_labels": [0, 1, 2], "seed": 5}
    for name, function in seriatim.ORDERS.items():
        named = pipe(**options, order=name)
        assert named.request.order == name and named.images[0].size == (16, 4)
        orders: list[Any] = [function(2, 8), np.array(function(2, 8)), [function(2, 8)] * 3]
        for given in orders:
            assert torch.equal(pipe(**options, order=given).tokens, named.tokens)
        first = next(iter(pipe.stream(**options, order=name, num_inference_steps=16)))
        assert first.known.nonzero()[:, 1].tolist() == [function(2, 8)[0]] * 3
    assert torch.equal(pipe(**options, order="random").tokens, pipe(**options).tokens)
    assert not torch.allclose(pipe(**options, order="raster").tokens, pipe(**options).tokens)


def test_an_order_for_each_image_follows_it_into_its_batch(pipe: Pipeline) -> None:
    orders = [seriatim.ORDERS[name](4, 4) for name in ("halton", "raster", "spiral")]
    result = pipe(class_labels=[0, 1, 2], seed=5, order=orders, batch_size=2)
    for i, name in enumerate(("halton", "raster", "spiral")):
        alone = pipe(class_labels=[i], seeds=(result.seeds[i],), order=name)
        assert torch.allclose(alone.tokens[0], result.tokens[i], atol=1e-4), name


def test_an_order_of_ones_own(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(seriatim.ORDERS, "backwards", lambda h, w: list(range(h * w))[::-1])
    given = pipe(class_labels=[0], seed=5, order=list(range(16))[::-1])
    assert torch.equal(pipe(class_labels=[0], seed=5, order="backwards").tokens, given.tokens)


def test_a_schedule_of_the_call_replaces_that_of_the_model_with_its_settings(bundle: Bundle) -> None:
    own = {"guidance_schedule": "interval", "guidance_interval": [0.2, 0.9], "min_tokens": 2, "order": "spiral"}
    pipe = Pipeline(Bundle(bundle.model, bundle.tokenizer, bundle.class_names, {**bundle.sampling, **own}))
    request = pipe(class_labels=[0], seed=1).request
    assert (request.guidance_interval, request.min_tokens, request.order) == ((0.2, 0.9), 2, "spiral")
    assert pipe.request(guidance_interval=(0, 0.5)).guidance_interval == (0, 0.5)
    assert pipe.request(guidance_schedule="interval").guidance_interval == (0.2, 0.9)
    assert pipe.request(guidance_schedule="linear").guidance_interval is None
    assert pipe.request(guidance_schedule="power-cosine", guidance_power=2.0).guidance_power == 2.0


def test_output_types(pipe: Pipeline) -> None:
    options: dict[str, Any] = {"class_labels": [0, 1], "seed": 3}
    pil, array = pipe(**options).images, pipe(**options, output_type="np").images
    tensor, tokens = pipe(**options, output_type="pt").images, pipe(**options, output_type="tokens").images
    assert array.shape == (2, 8, 8, 1) and array.dtype == np.float32
    assert 0 <= array.min() <= array.max() <= 1, "diffusers' range"
    assert np.array_equal(np.asarray(pil[1]), np.round(array[1, ..., 0] * 255))
    assert tensor.shape == (2, 1, 8, 8) and 0 <= float(tensor.min()) <= float(tensor.max()) <= 1
    assert torch.equal(to_uint8(tensor * 2 - 1), torch.from_numpy(np.round(array * 255)).to(torch.uint8))
    assert tokens.shape == (2, 16, 4)
    with pytest.raises(UsageError, match="output_type: 'pill' is not known; did you mean 'pil'"):
        pipe(**options, output_type="pill")


def test_stream_and_callback(pipe: Pipeline) -> None:
    steps = list(pipe.stream(class_labels=[0, 1, 2], seed=7, batch_size=2))
    assert [s.index for s in steps] == list(range(10)) and {s.total for s in steps} == {10}
    assert [s.images for s in steps] == [range(0, 2)] * 5 + [range(2, 3)] * 5
    preview = steps[4].preview()
    assert [isinstance(p, Image.Image) for p in preview] == [True, True]
    seen: list[tuple[int, int]] = []
    result = pipe(
        class_labels=[0, 1, 2], seed=7, batch_size=2, callback_on_step_end=lambda _p, i, n, _: seen.append((i, n))
    )
    assert seen == [(i, 10) for i in range(10)]
    assert np.array_equal(np.asarray(preview[1]), np.asarray(result.images[1])), "the last preview is the image"


def test_generators_stand_in_for_seeds(pipe: Pipeline) -> None:
    def tokens(generator: Any) -> torch.Tensor:
        return pipe(class_labels=[0, 1], generator=generator).tokens

    one = tokens(torch.Generator().manual_seed(4))
    assert torch.equal(one, tokens(torch.Generator().manual_seed(4)))
    assert not torch.allclose(one, tokens(torch.Generator().manual_seed(5)))
    many = pipe(class_labels=[0, 1], generator=[torch.Generator().manual_seed(s) for s in (1, 2)])
    again = pipe(class_labels=[0, 1], seeds=tuple(many.seeds))
    assert torch.equal(many.tokens, again.tokens), "the result names the seeds that give it again"
    with pytest.raises(UsageError, match="generator: 1 generators given for 2 images"):
        tokens([torch.Generator()])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"class_labels": ["hrose"]}, "class_labels: 'hrose' is not a class of this model; did you mean 'horse'"),
        ({"class_labels": [3]}, "class_labels: 3 is out of range; this model has classes 0 to 2"),
        ({"class_labels": [-1]}, "class_labels: -1 is out of range"),
        ({"class_labels": ["7"]}, "class_labels: 7 is out of range"),
        ({"class_labels": [1.5]}, "class_labels"),
        ({"class_label": [1]}, "unknown key 'class_label'; did you mean 'class_labels'"),
        ({"batch_size": 0}, "batch_size: 0 is not allowed"),
        ({"batch_size": "2"}, "batch_size: '2' is not allowed"),
        ({"class_labels": 3.5}, "class_labels"),
        ({"num_diffusion_steps": 2000}, "num_diffusion_steps: 2000"),
        ({"start_timestep": 5000}, "start_timestep: 5000"),
        ({"solver": "dmp++"}, "solver: 'dmp++' is not known; did you mean 'dpm++'"),
        ({"solver": "ddim", "temperature": 0.9}, "temperature: 0.9 is not allowed; the ddim solver solves an ODE"),
        ({"num_diffusion_steps_last": 7}, "num_diffusion_steps_last: 7 is more than num_diffusion_steps; give at most"),
        ({"num_diffusion_steps_last": 0}, "num_diffusion_steps_last"),
        ({"order": [0, 1, 2]}, "order: 3 positions given for 16 tokens; name each position from 0 to 15 once"),
        ({"order": [0, *range(15)]}, "order: position 0 is given twice"),
        (
            {"class_labels": [0, 1, 2], "order": [[*range(16)]] * 2 + [[16, *range(15)]]},
            "order[2]: position 16 is out of range",
        ),
    ],
)
def test_what_is_wrong_is_named(pipe: Pipeline, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        pipe(**settings)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_save_and_load(tmp_path: Path, pipe: Pipeline) -> None:
    folder = pipe.save(tmp_path / "m")
    again = seriatim.load(folder, device="cpu")
    options: dict[str, Any] = {"class_labels": [0, 1], "seed": 3}
    tokens = again(**options).tokens
    assert torch.allclose(tokens, pipe(**options).tokens, atol=1e-3), "packed weights: the same but for rounding"
    assert torch.equal(tokens, seriatim.load(folder, device="cpu")(**options).tokens)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mar-b", "mar-b is a preset and has no weights"),
        ("mar-digits", "seriatim train mar-digits"),
        ("nosuch", "model: 'nosuch' is no folder"),
        ("some/repository", "there is no folder 'some/repository', and it could not be fetched"),
    ],
)
def test_what_cannot_be_loaded_is_explained(name: str, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(name)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is empty"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        load(tmp_path / "notes.txt")


def test_devices_and_dtypes(bundle: Bundle) -> None:
    assert Pipeline(bundle, device="cpu").dtype == torch.float32
    assert Pipeline(bundle, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(UsageError, match="dtype: 'float61'"):
        Pipeline(bundle, dtype="float61")
    with pytest.raises(UsageError, match="device: 'warp'"):
        Pipeline(bundle, device="warp")


def test_scalars_of_numpy_and_torch_are_numbers(pipe: Pipeline) -> None:
    expected = pipe(class_labels=[2], seed=3).tokens
    seed: Any = np.int64(3)
    for label in (np.int64(2), torch.tensor(2), np.array([2]), torch.tensor([2]), "horse"):
        assert torch.equal(pipe(class_labels=label, seed=seed).tokens, expected)


def test_a_request_of_ones_own_is_checked_like_a_call(pipe: Pipeline) -> None:
    with pytest.warns(UserWarning, match="64 is more than the model's 16 tokens") as caught:
        options = {"num_diffusion_steps": 2}
        result = pipe(request=SampleRequest(class_labels=(1,), num_inference_steps=64, head_options=options))
    assert result.request.num_inference_steps == 16
    assert pipe(request=SampleRequest(head_options=options)).request.num_inference_steps == 16, "nobody asked for 64"
    assert caught[0].filename == __file__, "the warning points to the caller"
    with pytest.raises(UsageError, match="out of range"):
        pipe(request=SampleRequest(class_labels=(9,), num_inference_steps=2))
    with pytest.raises(UsageError, match="given together"):
        pipe(request=SampleRequest(), seed=1)


def test_solver_and_annealing_reach_the_head(pipe: Pipeline, bundle: Bundle) -> None:
    options: dict[str, Any] = {"class_labels": [0, 1], "seed": 3, "num_inference_steps": 4, "guidance_scale": 2.0}
    for extra in ({"solver": "dpm++"}, {"solver": "ddim", "num_diffusion_steps_last": 2}):
        result = pipe(**options, **extra)
        model, keys = bundle.model, Keys.of_seeds(result.seeds)
        condition = model.condition(torch.tensor([0, 1]), 2)
        expected = model.sample(condition, model.null(2, condition), keys, result.request)
        assert result.request.head_options["num_diffusion_steps"] == 6, "the model's default"
        assert torch.allclose(result.tokens, expected, atol=1e-4, rtol=1e-4)


def test_no_solver_is_the_heads_own(pipe: Pipeline) -> None:
    options: dict[str, Any] = {"class_labels": [0], "seed": 3, "num_inference_steps": 3}
    own = pipe(**options)
    assert "solver" not in own.request.head_options, "another head has another default"
    assert torch.equal(own.tokens, pipe(**options, solver="ddpm").tokens)


def test_a_stream_refuses_before_it_starts(pipe: Pipeline) -> None:
    with pytest.raises(UsageError):
        pipe.stream(class_labels=[0], batch_size=0)


def test_a_callback_may_replace_tokens(pipe: Pipeline) -> None:
    def zeros(_: Pipeline, index: int, total: int, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        return {"tokens": torch.zeros_like(values["tokens"])} if index == total - 1 else None

    assert not pipe(class_labels=[0], seed=1, callback_on_step_end=zeros).tokens.any()
    assert pipe(class_labels=[0], seed=1, callback_on_step_end=lambda *_: None).tokens.any()


def test_pictures_are_decoded_batch_by_batch(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    decode = pipe.tokenizer.look

    def look(*given: torch.Tensor) -> torch.Tensor:
        events.append(f"decode {len(given[0])}")
        return decode(*given)

    monkeypatch.setattr(pipe.tokenizer, "look", look)

    def watch(*_: object) -> None:
        events.append("step")

    options: dict[str, Any] = {"num_images_per_label": 5, "seed": 1, "num_inference_steps": 2}
    result = pipe(["cat"], batch_size=2, callback_on_step_end=watch, **options)
    assert events == ["step", "step", "decode 2"] * 2 + ["step", "step", "decode 1"]
    whole = pipe(["cat"], **options)
    assert [a.tobytes() for a in result.images] == [b.tobytes() for b in whole.images]


def test_a_pipeline_leaves_a_callers_model_as_it_was(bundle: Bundle) -> None:
    """A preview inside a training loop: label dropout and dropout go on, and the weights stay where they are."""
    model = bundle.model.train()
    model.head.eval()
    modes = [part.training for part in model.modules()]
    where = [p.data_ptr() for p in model.parameters()]
    pipe = Pipeline(bundle)
    *_, last = pipe.stream(["cat"], seed=1, num_inference_steps=2)
    for _ in pipe.stream(["cat"], seed=1, num_inference_steps=2):
        assert [part.training for part in model.modules()] == modes, "between steps too"
    last.preview()
    pipe(["cat"], seed=1, num_inference_steps=2)
    picture = pipe(["cat"], seed=1, num_inference_steps=2).images[0]
    mask = np.zeros((8, 8), dtype=bool)
    mask[:4] = True
    pipe.edit(picture, mask=mask, seed=1, num_inference_steps=2)
    with pytest.raises(UsageError):
        pipe(["cat"], guidance_scale=-1.0)
    assert [part.training for part in model.modules()] == modes
    assert [p.data_ptr() for p in model.parameters()] == where
    assert all(p.requires_grad for p in model.parameters())
    model(torch.randn(2, 16, 4), torch.tensor([0, 1])).mean.backward()


def test_weights_written_between_two_calls_are_seen(bundle: Bundle) -> None:
    pipe, options = Pipeline(bundle), {"seed": 1, "num_inference_steps": 2}
    before = pipe(["cat"], **options)  # type: ignore[arg-type]
    for parameter in bundle.model.parameters():
        parameter.data.mul_(1.5)  # which torch does not count as a write
    after = pipe(["cat"], **options)  # type: ignore[arg-type]
    fresh = Pipeline(Bundle(bundle.model, bundle.tokenizer, bundle.class_names, bundle.sampling))
    assert not torch.equal(before.tokens, after.tokens)
    assert torch.equal(after.tokens, fresh(["cat"], **options).tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 5}, "top_k: the Diffusion head has no such option"),
        ({"choice_temperature": 2.0}, "choice_temperature: would have no effect"),
        ({"guidance_power": 2.0}, "guidance_power"),
        ({"head_options": {"churn": 0.5}}, "churn: the Diffusion head has no such option"),
    ],
)
def test_a_given_setting_without_effect_is_refused(pipe: Pipeline, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        pipe(["cat"], **settings)
    assert words in str(caught.value)


def test_an_edit_streams_and_takes_a_callback(pipe: Pipeline) -> None:
    picture = pipe(["cat"], seed=1, num_inference_steps=2).images[0]
    mask = np.zeros((8, 8), dtype=bool)
    mask[:4] = True
    steps = list(pipe.stream_edit(picture, mask=mask, class_labels=["dog"], seed=3, num_inference_steps=3))
    assert len(steps) == 3 and bool(steps[-1].known.all()) and not bool(steps[0].known.all())
    seen: list[int] = []

    def watch(_: Pipeline, index: int, *rest: object) -> None:
        seen.append(index if rest else -1)

    options: dict[str, Any] = {"mask": mask, "class_labels": ["dog"], "seed": 3, "num_inference_steps": 3}
    result = pipe.edit(picture, callback_on_step_end=watch, **options)
    assert seen == [0, 1, 2] and torch.equal(result.tokens, steps[-1].tokens)
