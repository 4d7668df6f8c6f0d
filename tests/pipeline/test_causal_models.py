"""Causal models from a recipe to pictures: training, requests, the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fast, one_line
from torch import Tensor
from typing_extensions import override

import seriatim
from seriatim.checkpoints.native import Bundle, save_bundle
from seriatim.core.errors import ConfigError, UsageError
from seriatim.core.keys import Keys
from seriatim.models.build import build_model, seeded
from seriatim.nn.patch import patchify, unpatchify
from seriatim.pipeline.metadata import read_recorded
from seriatim.pipeline.pipeline import Pipeline
from seriatim.pipeline.request import SampleRequest
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.kinds import TOKENIZERS
from seriatim.tokenizers.pixels import Pixels
from seriatim.training.config import Recipe, read_recipe
from seriatim.training.loop import train

CAUSAL = [
    "model={kind: causal, width: 32, depth: 1, heads: 2, head: {kind: diffusion, width: 32, depth: 1}}",
    "training.images=640", "training.log_images=640", "training.dtype=float32", "training.threads=1",
    "sampling={guidance_scale: 2.0, num_diffusion_steps: 4}",
]  # fmt: skip
LEVELS = [*CAUSAL, "tokenizer={kind: levels, patch: 2}", "model.head={kind: categorical}",
          "sampling={guidance_scale: 2.0, guidance_schedule: constant}"]  # fmt: skip


class Levels(Tokenizer):
    """A patch is the code of its mean brightness."""

    def __init__(self, size: Any, patch: int = 2, channels: int = 1, vocab: int = 8) -> None:
        super().__init__()
        self.size, self.channels, self.levels, self.dim, self.vocab = (size[0], size[1]), channels, 256, 1, vocab
        self.grid, self.patch, self.shades = (size[0] // patch, size[1] // patch), patch, vocab
        self.config = {"size": list(size), "patch": patch, "channels": channels, "vocab": vocab}

    def moments(self, images: Tensor) -> Tensor:
        return patchify(images, self.patch).mean(dim=-1, keepdim=True)

    @override
    def tokens(self, moments: Tensor, keys: Keys | None = None) -> Tensor:
        return ((moments[..., 0] + 1) / 2 * self.shades).long().clamp(0, self.shades - 1)

    def embeddings(self, codes: Tensor) -> Tensor:
        return ((codes + 0.5) / self.shades * 2 - 1)[..., None]

    def decode_embeddings(self, embeddings: Tensor) -> Tensor:
        return unpatchify(embeddings.expand(-1, -1, self.patch**2 * self.channels), self.patch, *self.grid)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.decode_embeddings(self.embeddings(self.check_codes(tokens)))


@pytest.fixture(autouse=True)
def levels() -> Iterator[None]:
    TOKENIZERS["levels"] = Levels
    yield
    del TOKENIZERS["levels"]


def recipe(*overrides: str) -> Recipe:
    return read_recipe("mar-digits", list(overrides))


def pipe_of(**options: Any) -> Pipeline:
    with seeded(0):
        model = build_model(
            {
                "kind": "causal", "tokens": 16, "dim": 4, "width": 32, "depth": 1, "heads": 2, "classes": 3,
                "head": {"kind": "diffusion", "width": 16, "depth": 1}, **options,
            }
        )  # fmt: skip
    return Pipeline(Bundle(model.eval(), Pixels(size=8, patch=2, channels=1), [], {"num_diffusion_steps": 4}))


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [CAUSAL, [*CAUSAL, "model.order=random"], LEVELS], ids=["raster", "any", "codes"])
def test_ten_steps_on_digits_and_pictures(overrides: list[str], tmp_path: Path) -> None:
    train(recipe(*overrides), tmp_path / "run", quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["images"] == 640 and rows[-1]["loss"] < 3
    pipe = seriatim.load(tmp_path / "run", device="cpu")
    assert pipe.model.backbone.config["grid"] == [4, 4]
    result = pipe(class_labels=[3, 5], seed=1)
    assert result.images[0].size == (8, 8) and result.request.num_inference_steps == 16
    again = pipe(request=result.request)
    assert torch.equal(again.tokens, result.tokens)
    plain = seriatim.load(tmp_path / "run", device="cpu", prepare=False)(request=result.request)
    assert torch.allclose(plain.tokens.float(), result.tokens.float(), atol=1e-3), "packed weights draw the same"
    files = result.save(tmp_path / "out")
    _, says = read_recorded(files[1])
    assert torch.allclose(pipe(request=says.sample_request()).tokens[0].float(), result.tokens[1].float(), atol=1e-4)
    steps = list(pipe.stream(class_labels=[3], seed=1))
    assert [step.total for step in steps] == [16] * 16 and steps[4].preview()[0].size == (8, 8)


def test_sampling_that_makes_no_sense_is_refused_before_training() -> None:
    from seriatim.training.setup import build

    with pytest.raises(ConfigError, match="sampling: num_inference_steps: 8 steps asked of a causal model of 16"):
        build(recipe(*CAUSAL, "sampling.num_inference_steps=8"))


# --- requests -----------------------------------------------------------------------------------------------------


def test_a_request_is_filled_in_for_the_model() -> None:
    request = pipe_of().request()
    assert (request.num_inference_steps, request.order) == (16, "raster")
    request = pipe_of(order="random").request()
    assert (request.num_inference_steps, request.order) == (16, "random")
    assert pipe_of().request(SampleRequest()).num_inference_steps == 16
    again = SampleRequest.model_validate_json(request.model_dump_json())
    assert pipe_of(order="random").request(again) == request
    assert pipe_of().request(order=list(range(16))).order == tuple(range(16))
    assert pipe_of(order="random").request(order="halton", num_inference_steps=16).order == "halton"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_inference_steps": 32}, "num_inference_steps: 32 steps asked of a causal model of 16 tokens, which"),
        ({"order": "random"}, "order: a causal model of raster order draws in no other"),
        ({"order": "halton"}, "order: a causal model of raster order draws in no other"),
        ({"order": list(range(16))[::-1]}, "order: a causal model of raster order draws in no other"),
        ({"order": "confidence"}, "order: 'confidence' asked of a causal model"),
        ({"token_schedule": "linear"}, "token_schedule: 'linear' asked of a causal model"),
        ({"min_tokens": 2}, "min_tokens: 2 asked of a causal model"),
    ],
)
def test_what_a_causal_model_cannot_do_is_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        pipe_of().request(**settings)
    assert "\n" not in str(caught.value)


def test_editing_needs_any_order() -> None:
    image = pipe_of()(class_labels=[0], seed=0).images[0]
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, 4:] = True
    with pytest.raises(UsageError, match="to repaint, use a masked model, or a causal one trained with order=random"):
        pipe_of().edit(image, mask=mask, class_labels=1)
    pipe = pipe_of(order="random")
    edited = pipe.edit(image, mask=mask, class_labels=1, seed=3)
    before = pipe.tokenizer.tokens(pipe.tokenizer.moments(torch.zeros(1, 1, 8, 8)))
    assert edited.tokens.shape == before.shape and edited.images[0].crop((0, 0, 4, 8)) == image.crop((0, 0, 4, 8))
    redrawn = pipe.regenerate(edited, [0, 5], seed=4)
    assert torch.equal(redrawn.tokens[:, 6:], edited.tokens[:, 6:])


def test_codes_are_redrawn_too() -> None:
    with seeded(0):
        model = build_model(
            {
                "kind": "causal", "tokens": 16, "vocab": 8, "width": 32, "depth": 1, "heads": 2, "order": "random",
                "head": {"kind": "categorical"},
            }
        )  # fmt: skip
    pipe = Pipeline(Bundle(model.eval(), Levels((8, 8)), [], {}))
    result = pipe(seed=1, num_images_per_label=2)
    redrawn = pipe.regenerate(result, [3], seed=2)
    kept = torch.arange(16) != 3
    assert torch.equal(redrawn.tokens[:, kept], result.tokens[:, kept])


def test_an_image_of_which_nothing_is_redrawn_stays_in_its_place() -> None:
    pipe = pipe_of(order="random")
    result = pipe(class_labels=[0, 1, 0], seed=1)
    redraw = torch.zeros(3, 16, dtype=torch.bool)
    redraw[1, 3] = True
    for batch_size in (1, 3):
        again = pipe.regenerate(result, redraw, batch_size=batch_size, seed=2)
        assert len(again.images) == 3 and torch.equal(again.tokens[~redraw], result.tokens[~redraw])
        assert not torch.equal(again.tokens, result.tokens)


# --- the command line ---------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path: Path, seriatim: Any) -> None:
    save_bundle(pipe_of().bundle, tmp_path / "model")
    done = seriatim("sample", "model", "--label", "1", "--seed", "3", "--animate", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["request"]["num_inference_steps"] == 16 and report["request"]["order"] == "raster"
    one_line(seriatim("sample", "model", "--num-inference-steps", "8", "--out", "x"), 2, "8 steps asked", "16 tokens")


def test_a_stream_tells_the_entropy_of_codes() -> None:
    with seeded(0):
        model = build_model({"kind": "causal", "width": 16, "depth": 1, "heads": 2, "head": {"kind": "categorical"}},
                            tokens=4, vocab=8, classes=2).eval()  # fmt: skip
    found = [step.entropy() for step in fast(model, torch.tensor([0, 1]), Keys.of_seeds([0, 1]))]
    assert all(entropy.shape == (2, 4, 1) for entropy in found)
    for i, entropy in enumerate(found):  # raster order; a head that has learnt nothing knows nothing
        assert torch.equal(entropy[..., 0].isfinite(), torch.arange(4).expand(2, -1) == i)
        assert torch.allclose(entropy[:, i], torch.tensor(8.0).log())
