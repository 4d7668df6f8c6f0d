"""Editing: what a mask repaints, what stays, and that nothing else of the picture moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_bundle
from PIL import Image

from seriatim.backbones.masked_transformer import Masked
from seriatim.checkpoints.native import Bundle, load_bundle, save_bundle
from seriatim.cli.main import run
from seriatim.core.errors import UsageError
from seriatim.heads.diffusion import Diffusion
from seriatim.models.build import seeded
from seriatim.models.masked_model import MaskedModel
from seriatim.pipeline.editing import chosen_tokens, composite, pixel_mask, token_mask
from seriatim.pipeline.pipeline import Pipeline
from seriatim.pipeline.result import Result
from seriatim.tokenizers.pixels import Pixels

FEW: dict[str, Any] = {"num_inference_steps": 3, "num_diffusion_steps": 4, "guidance_scale": 1.5}


@pytest.fixture
def pipe() -> Pipeline:
    """8x8 pixels, one channel, 4x4 tokens of 2x2 pixels, three classes."""
    return Pipeline(make_bundle(), device="cpu")


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8))


def box(top: int, left: int, bottom: int, right: int) -> Image.Image:
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[top:bottom, left:right] = 255
    return Image.fromarray(mask)


# --- masks --------------------------------------------------------------------------------------------------------


def test_a_token_is_redrawn_when_any_of_its_pixels_is() -> None:
    tokenizer = Pixels(5, 2, 1)  # 3x3 tokens, of which the last ones reach over the edge
    mask = torch.zeros(2, 5, 5, dtype=torch.bool)
    mask[0, 1, 2] = True
    mask[1, 4, 4] = True
    tokens = token_mask(mask, tokenizer).view(2, 3, 3)
    assert tokens.nonzero().tolist() == [[0, 0, 1], [1, 2, 2]]


def test_masks_of_every_kind() -> None:
    white = box(2, 2, 5, 6)
    array = np.asarray(white)
    expected = torch.from_numpy(array > 0)[None]
    for mask in (white, array, array > 0, array / 255.0, torch.from_numpy(array > 0), white.convert("RGB"), [white]):
        assert torch.equal(pixel_mask(mask, (8, 8), 1), expected)
    both = pixel_mask([white, box(0, 0, 1, 1)], (8, 8), 2)
    assert both.shape == (2, 8, 8) and both[1].sum() == 1
    assert torch.equal(pixel_mask(white, (8, 8), 3), expected.expand(3, 8, 8))


@pytest.mark.parametrize(
    ("mask", "images", "words"),
    [
        (Image.new("L", (4, 8), 255), 1, "mask: 8x4 pixels is not the image's 8x8"),
        (Image.new("L", (8, 8), 0), 1, "mask: is all black"),
        (Image.new("L", (8, 8), 255), 1, "mask: is all white"),
        ([box(0, 0, 1, 1), Image.new("L", (8, 8))], 2, "mask of image 1: is all black"),
        ([box(0, 0, 1, 1)] * 2, 3, "mask: 2 masks given for 3 images"),
        (np.zeros(8), 1, "mask: shape (8,) is not"),
    ],
)
def test_masks_that_make_no_sense(mask: Any, images: int, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        pixel_mask(mask, (8, 8), images)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_composite() -> None:
    drawn, kept = torch.full((1, 2, 2, 3), 9, dtype=torch.uint8), torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    result = composite(drawn, kept, torch.tensor([[[True, False], [False, True]]]))
    assert result[0, :, :, 1].tolist() == [[9, 0], [0, 9]]


# --- pictures -----------------------------------------------------------------------------------------------------


def test_black_pixels_and_kept_tokens_stay(pipe: Pipeline) -> None:
    before, mask = picture(), box(2, 3, 5, 6)  # not on the borders of tokens
    result = pipe.edit(before, mask=mask, class_labels=["dog"], seed=1, **FEW)
    old, new, white = np.asarray(before), np.asarray(result.images[0]), np.asarray(mask) > 0
    assert (new[~white] == old[~white]).all() and (new[white] != old[white]).any()
    floats = torch.from_numpy(old.copy())[None, None].float() / 127.5 - 1
    tokens = pipe.tokenizer.tokens(pipe.tokenizer.moments(floats))
    redrawn = token_mask(torch.from_numpy(white)[None], pipe.tokenizer)
    assert redrawn.view(4, 4).nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]  # of 2x2 pixels each
    assert torch.equal(result.tokens[~redrawn], tokens[~redrawn])
    assert not torch.equal(result.tokens[redrawn], tokens[redrawn])
    assert result.labels == ["dog"] and result.edited


def test_another_mask_for_each_image_of_a_batch(pipe: Pipeline) -> None:
    images, masks = [picture(i) for i in range(3)], [box(0, 0, 2, 2), box(0, 0, 8, 6), box(3, 3, 5, 5)]
    together = pipe.edit(images, mask=masks, class_labels=[0, 1, "none"], seed=4, **FEW)
    for i in range(3):
        one = pipe.edit(images[i], mask=masks[i], class_labels=[[0, 1, None][i]], **FEW, seeds=(together.seeds[i],))
        assert torch.allclose(one.tokens[0], together.tokens[i], atol=1e-4)
        difference = np.asarray(one.images[0]).astype(int) - np.asarray(together.images[i])
        assert np.abs(difference).max() <= 1
    assert together.labels == ["cat", "dog", None]


def test_one_picture_many_ways(pipe: Pipeline) -> None:
    result = pipe.edit(picture(), mask=box(2, 2, 6, 6), class_labels=["cat", "dog"], num_images_per_label=2, **FEW)
    assert len(result.images) == 4 and result.labels == ["cat", "cat", "dog", "dog"]
    assert len({image.tobytes() for image in result.images}) == 4
    two = pipe.edit([picture(0), picture(1)], mask=box(2, 2, 6, 6), num_images_per_label=2, seed=0, **FEW)
    corners = [np.asarray(image)[0, 0] for image in two.images]
    assert corners == [np.asarray(picture(i))[0, 0] for i in (0, 0, 1, 1)]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "tokens"])
def test_output_types(pipe: Pipeline, output_type: str) -> None:
    array = np.asarray(picture())[None, ..., None]
    settings: dict[str, Any] = {"mask": box(2, 2, 6, 6), "class_labels": 1, "seed": 3, **FEW}
    result = pipe.edit(array, output_type=output_type, **settings)
    expected = np.asarray(pipe.edit(picture(), **settings).images[0])
    if output_type == "pil":
        assert (np.asarray(result.images[0]) == expected).all()
    elif output_type == "np":
        assert ((result.images[0, ..., 0] * 255).round() == expected).all()
    elif output_type == "pt":
        assert ((result.images[0, 0] * 255).round().numpy() == expected).all()
    else:
        assert torch.equal(result.images, result.tokens)


@pytest.mark.parametrize(
    ("image", "settings", "words"),
    [
        (Image.new("L", (16, 8)), {}, "image: 8x16 pixels (height x width), but the model generates 8x8"),
        (np.zeros((8, 8, 3), np.float32), {}, "image: an array must be (B, H, W, 1) uint8"),
        (torch.zeros(1, 3, 8, 8), {}, "image: a tensor must be (B, 1, H, W)"),
        ([], {}, "image: the list is empty"),
        ([picture()] * 2, {"class_labels": [0, 1, 2]}, "class_labels: 3 labels given for 2 images"),
        (picture(), {"class_labels": ["hors"]}, "'hors' is not a class of this model; did you mean 'horse'"),
        (picture(), {"output_type": "jpg"}, "output_type: 'jpg' is not known"),
    ],
)
def test_what_is_wrong_is_named(pipe: Pipeline, image: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        pipe.edit(image, mask=box(2, 2, 6, 6), **settings)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# --- tokens -------------------------------------------------------------------------------------------------------


def test_regenerate_draws_chosen_tokens_alone(pipe: Pipeline) -> None:
    first = pipe(class_labels=["cat", "dog"], seed=0, **FEW)
    again = pipe.regenerate(first, [5, 6], seed=9)
    same = torch.ones(16, dtype=torch.bool)
    same[[5, 6]] = False
    assert torch.equal(again.tokens[:, same], first.tokens[:, same])
    assert (again.tokens[:, ~same] != first.tokens[:, ~same]).all()
    assert again.request.guidance_scale == 1.5 and again.labels == ["cat", "dog"]
    each = torch.zeros(2, 16, dtype=torch.bool)
    each[0, 3] = each[1, :8] = True
    ragged = pipe.regenerate(first, each, seed=9)
    assert torch.equal(ragged.tokens[~each], first.tokens[~each])
    assert isinstance(again, Result) and len(again.images) == 2


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([16], "tokens: 16 is not allowed; indices are 0 to 15"),
        ([-1, 2], "tokens: -1 is not allowed"),
        ([], "tokens: none are chosen"),
        (torch.zeros(2, 16, dtype=torch.bool), "tokens: none are chosen"),
        (torch.ones(3, 16, dtype=torch.bool), "tokens: shape (3, 16) is not (16,) or (2, 16)"),
        ([0.5], "is not a list of indices"),
    ],
)
def test_tokens_that_make_no_sense(tokens: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        chosen_tokens(tokens, 2, 16)
    assert words in str(caught.value)


def test_regenerate_repeats_the_request_and_not_the_models_defaults() -> None:
    bundle = make_bundle()
    bundle.sampling |= {"temperature": 0.9, "guidance_scale": 3.0, "num_images_per_label": 2}
    pipe = Pipeline(bundle, device="cpu")
    few: dict[str, Any] = {"num_inference_steps": 3, "num_diffusion_steps": 4}
    one = pipe(class_labels=[None], seed=1, guidance_scale=1.0, temperature=1.0, solver="dpm++", **few)
    again = pipe.regenerate(one, [3], seed=2)
    kept = ("class_labels", "guidance_scale", "temperature", "head_options", "num_images_per_label")
    options = {"solver": "dpm++", "num_diffusion_steps": 4}
    assert [getattr(again.request, k) for k in kept] == [(None,), 1.0, 1.0, options, 2]
    assert again.edited and again.request.seed == 2
    edited = pipe.edit(picture(), mask=box(0, 0, 3, 8), **few)  # two pictures: the model's default
    assert len(edited.images) == 2


def test_regenerating_an_edit_keeps_what_was_kept(pipe: Pipeline) -> None:
    edited = pipe.edit(picture(), mask=box(0, 0, 3, 8), class_labels=["cat"], seed=1, **FEW)
    again = pipe.regenerate(edited, [15], seed=2)  # the last 2x2 pixels
    old, new = np.asarray(picture()), np.asarray(again.images[0])
    assert (new[3:6] == old[3:6]).all() and (new[6:, :6] == old[6:, :6]).all()
    assert (new[:3] == np.asarray(edited.images[0])[:3]).all() and (new[6:, 6:] != old[6:, 6:]).any()


def test_a_callback_that_changes_tokens_is_recorded(pipe: Pipeline) -> None:
    def shift(
        _pipeline: Pipeline, _index: int, _total: int, values: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return {"tokens": values["tokens"] + 0.1}

    assert pipe(class_labels=["cat"], seed=0, callback_on_step_end=shift, **FEW).edited
    assert not pipe(class_labels=["cat"], seed=0, **FEW).edited


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (None, "mask: NoneType is not a picture"),
        (np.eye(8, dtype=np.uint8), "mask: holds only 0 and 1 as integers"),
        (np.eye(8, dtype=complex), "mask: torch.complex128 is not allowed"),
    ],
)
def test_masks_of_odd_kinds(mask: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        pixel_mask(mask, (8, 8), 1)
    assert words in str(caught.value)


def test_pictures_of_odd_kinds(pipe: Pipeline) -> None:
    for image in (torch.full((1, 1, 8, 8), float("nan")), torch.full((1, 1, 8, 8), 3.0)):
        with pytest.raises(UsageError, match="image: "):
            pipe.edit(image, mask=box(0, 0, 3, 8))
    with pytest.raises(UsageError, match="tokens: str is not a list"):
        chosen_tokens("a", 1, 16)


# --- pictures as people see them ----------------------------------------------------------------------------------


def colour_pipe(**options: Any) -> Pipeline:
    """8x8 pixels, three channels."""
    with seeded(0):
        backbone = Masked(tokens=16, dim=12, width=32, depth=1, heads=1)
        model = MaskedModel(backbone, Diffusion(dim=12, width=32, depth=1))
    return Pipeline(Bundle(model.eval(), Pixels(8, 2, 3), **options), device="cpu")


def layer() -> Image.Image:
    """White paint in a corner of a transparent layer, of which the hidden colour is white too."""
    painted = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    painted.paste((255, 255, 255, 255), (0, 0, 4, 2))
    return painted


def test_transparent_parts_of_a_mask_are_kept() -> None:
    expected = pixel_mask(box(0, 0, 2, 4), (8, 8), 1)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255] * 6)
    palette.paste(1, (0, 0, 4, 2))
    palette.info["transparency"] = 0
    grey = Image.fromarray(np.where(np.asarray(box(0, 0, 2, 4)) > 0, 65535, 0).astype(np.uint16))
    for mask in (layer(), layer().convert("LA"), layer().convert("RGBa"), palette, grey):
        assert torch.equal(pixel_mask(mask, (8, 8), 1), expected), mask.mode


@pytest.mark.parametrize("background", [(255, 255, 255), (250, 120, 180)])
def test_python_and_the_command_line_edit_the_same_picture(tmp_path: Path, background: tuple[int, int, int]) -> None:
    """A transparent picture and a mask on a transparent layer: kept pixels show the model's background."""
    pipe = colour_pipe(background=background)
    save_bundle(pipe.bundle, tmp_path / "model")
    assert load_bundle(tmp_path / "model").background == background
    shown = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    shown.paste((200, 30, 60, 255), (0, 0, 8, 3))
    shown.save(tmp_path / "shown.png")
    layer().save(tmp_path / "layer.png")
    few: dict[str, Any] = {"num_inference_steps": 1, "num_diffusion_steps": 2, "seed": 1}
    ours = np.asarray(pipe.edit(shown, mask=layer(), **few).images[0])
    options = [word for key, value in few.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    files = [str(tmp_path / name) for name in ("model", "shown.png", "layer.png", "out")]
    assert run(["edit", files[0], files[1], "--mask", files[2], *options, "--out", files[3], "--device", "cpu"]) == 0
    with Image.open(next((tmp_path / "out").glob("0*.png"))) as drawn:
        theirs = np.asarray(drawn)
    kept = np.asarray(box(0, 0, 2, 4)) == 0
    assert (ours[kept] == theirs[kept]).all() and ours[7, 7].tolist() == list(background)
    assert ours[2, 7].tolist() == [200, 30, 60]


def test_a_photograph_taken_sideways_is_edited_upright() -> None:
    shown = Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3))
    turned = shown.rotate(90)
    exif = turned.getexif()
    exif[0x112] = 6
    turned.info["exif"] = exif.tobytes()
    pipe = colour_pipe()
    result = np.asarray(pipe.edit(turned, mask=layer(), seed=1, num_inference_steps=1, num_diffusion_steps=2).images[0])
    assert (result[2:] == np.asarray(shown)[2:]).all()
