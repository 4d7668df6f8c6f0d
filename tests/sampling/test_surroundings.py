"""Sampling is the same whatever the caller has told torch, and what is wrong in a call is one line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_bundle

import seriatim
from seriatim.checkpoints.native import Bundle, save_bundle
from seriatim.cli.main import run
from seriatim.core.device import plain_torch
from seriatim.core.errors import NumericsError, UsageError
from seriatim.pipeline.pipeline import Pipeline


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "gradients": torch.enable_grad,
}


def drawn(pipe: Pipeline) -> Any:
    return pipe(class_labels=[0, 1], seed=1, output_type="np").images


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("prepare", [True, False])
def test_sampling_does_not_depend_on_what_torch_was_told(model_folder: Path, around: str, prepare: bool) -> None:
    before = seriatim.load(model_folder, device="cpu", prepare=prepare)
    wanted = drawn(before)
    with AROUND[around]():
        inside = seriatim.load(model_folder, device="cpu", prepare=prepare)
        assert np.array_equal(drawn(inside), wanted) and np.array_equal(drawn(before), wanted)
    assert np.array_equal(drawn(inside), wanted)


def test_a_stream_gives_torch_back_between_its_steps(bundle: Bundle) -> None:
    pipe = Pipeline(bundle)
    with default_dtype(torch.float64):
        for step in pipe.stream(class_labels=[0], seed=1):
            assert torch.get_default_dtype() == torch.float64 and torch.is_grad_enabled()
            step.preview()
        stopped = pipe.stream(class_labels=[0], seed=1)
        next(stopped)
        stopped.close()  # type: ignore[attr-defined]
        assert torch.get_default_dtype() == torch.float64


def test_torch_is_given_back_after_an_error() -> None:
    with default_dtype(torch.float64), torch.inference_mode():
        with pytest.raises(KeyError), plain_torch(grad=True):
            assert torch.ones(1, requires_grad=True).mul(2).requires_grad
            assert torch.get_default_dtype() == torch.float32
            raise KeyError
        assert torch.get_default_dtype() == torch.float64 and torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"output_type": 5}, "output_type: 5 is not known; allowed: pil, np, pt, tokens"),
        ({"output_type": ["pil"]}, r"output_type: \['pil'\] is not known"),
        ({"callback_on_step_end": 5}, "callback_on_step_end: 5 is not allowed; give a function"),
        ({"generator": 5}, "generator: 5 is not allowed"),
        ({"generator": [1]}, r"generator: \[1\] is not allowed"),
    ],
)
def test_an_argument_of_a_wrong_type_is_one_line(bundle: Bundle, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Pipeline(bundle)(class_labels=[0], **settings)


@pytest.mark.parametrize(
    ("returned", "match"),
    [
        (5, "returned 5, which is not allowed; return None, or {'tokens': ...}"),
        ({"token": 1}, r"returned \['token'\], which is not allowed"),
        ({"tokens": None}, "returned tokens of type NoneType; they must be a tensor"),
        ({"tokens": torch.zeros(2)}, r"tokens: shape \(2,\) is not \(1, 16, 4\)"),
        ({"tokens": torch.zeros(1, 16, 4, dtype=torch.long)}, "torch.int64 is not allowed"),
        ({"tokens": torch.full((1, 16, 4), torch.nan)}, "tokens that are not finite"),
    ],
)
def test_what_a_callback_may_not_return_is_one_line(bundle: Bundle, returned: Any, match: str) -> None:
    with pytest.raises(UsageError, match=f"callback_on_step_end: .*{match}"):
        Pipeline(bundle)(class_labels=[0], callback_on_step_end=lambda *_: returned)


def test_a_decoder_that_is_not_finite_gives_no_picture(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = bundle.tokenizer.decode
    monkeypatch.setattr(bundle.tokenizer, "decode", lambda tokens: decode(tokens) * torch.inf)
    pipe = Pipeline(bundle)
    for output_type in ("pil", "np", "pt"):
        with pytest.raises(NumericsError, match="the decoded images are not finite, though their tokens are"):
            pipe(class_labels=[0], output_type=output_type)
    assert pipe(class_labels=[0], output_type="tokens").images.isfinite().all()
    with pytest.raises(NumericsError):
        [step.preview() for step in pipe.stream(class_labels=[0])]


@pytest.mark.parametrize("first", [False, True])
def test_what_is_not_finite_leaves_nothing_behind(
    tmp_path: Path, first: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither pictures nor the folder, unless it was there before."""
    bundle = make_bundle()
    with torch.no_grad():
        bundle.model.backbone.get_parameter("output_positions").fill_(1e38)  # finite, until a head multiplies it
    save_bundle(bundle, tmp_path / "m")
    out = tmp_path / "out"
    if first:
        out.mkdir()
    words = ["--label", "cat", "--num-inference-steps", "2", "--num-diffusion-steps", "2"]
    assert run(["sample", str(tmp_path / "m"), *words, "--out", str(out)]) == 5
    assert "the sampled tokens are not finite" in capsys.readouterr().err
    assert (list(out.iterdir()) if first else out.exists()) in ([], False)


def test_pictures_of_earlier_batches_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was drawn before the batch that fails is good, and is kept."""
    save_bundle(make_bundle(), tmp_path / "m")
    true, calls = Pipeline._decode, [0]

    def decode(self: Pipeline, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise NumericsError("not finite")
        return true(self, *arguments)

    monkeypatch.setattr(Pipeline, "_decode", decode)
    words = ["--label", "cat", "--num-images-per-label", "2", "--batch-size", "1", "--out", str(tmp_path / "out")]
    assert run(["sample", str(tmp_path / "m"), *words]) == 5
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0000-cat.png"]
