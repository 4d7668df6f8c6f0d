"""The request: defaults, expansion, and one line for what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from seriatim.core.errors import UsageError
from seriatim.core.random import derive_seed
from seriatim.models.base import SequenceModel
from seriatim.models.build import build_model
from seriatim.pipeline.request import SampleRequest, resolved


def model_of(head: dict[str, Any], tokens: int) -> SequenceModel:
    size: dict[str, Any] = {"vocab": 5} if head["kind"] == "categorical" else {"dim": 2}
    config = {"kind": "masked", "width": 16, "depth": 1, "heads": 2, "buffer": 2, "head": head}
    return build_model(config, tokens=tokens, classes=4, **size)


def make_request(settings: dict[str, Any], tokens: int) -> SampleRequest:
    """What these settings ask of a model with so many tokens, and a head that has the options among them."""
    head = {"kind": "categorical"} if "top_k" in settings else {"kind": "diffusion", "width": 8, "depth": 1}
    return resolved(settings, {}, model_of(head, tokens))


def test_expansion() -> None:
    request = make_request(
        {"class_labels": ["a", 3], "num_images_per_label": 2, "seed": 9, "num_inference_steps": 4}, 16
    )
    assert request.part(range(4)).class_labels == ("a", "a", 3, 3)
    after = request.part([3, 4, 6, 9])
    assert after.class_labels == (3, "a", 3, "a"), "they begin again after the last"
    assert after.seeds == tuple(derive_seed(9, i) for i in (3, 4, 6, 9))
    assert request.image_seeds() == [derive_seed(9, i) for i in range(4)]
    named = make_request({"class_labels": [1], "seeds": (7,), "num_inference_steps": 4}, 16)
    assert named.image_seeds() == [7]


def test_it_survives_json() -> None:
    request = make_request({"class_labels": ["a", None, 2], "seed": 2**40, "num_inference_steps": 4}, 16)
    assert SampleRequest.model_validate_json(request.model_dump_json()) == request


def test_more_steps_than_tokens_are_clamped_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="num_inference_steps: 64 is more than the model's 16 tokens; using 16"):
        assert make_request({"num_inference_steps": 64}, 16).num_inference_steps == 16


def test_steps_that_nobody_asked_for_are_clamped_without_a_word() -> None:
    assert make_request({}, 16).num_inference_steps == 16  # a warning would be an error here


def test_fewer_steps_are_enough_where_each_draws_more() -> None:
    with pytest.warns(UserWarning, match="7 is more than the model's 16 tokens at 3 a step; using 6"):
        assert make_request({"num_inference_steps": 7, "min_tokens": 3}, 16).num_inference_steps == 6
    assert make_request({"num_inference_steps": 6, "min_tokens": 3}, 16).num_inference_steps == 6


@pytest.mark.parametrize("order", ["halton", [2, 0, 1], [[2, 0, 1], [0, 1, 2]]])
def test_orders_survive_json(order: Any) -> None:
    request = make_request({"class_labels": [1, 2], "order": order, "num_inference_steps": 2}, 3)
    assert SampleRequest.model_validate_json(request.model_dump_json()) == request
    assert hash(request) == hash(request.model_copy())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"guidence_scale": 2}, "unknown key 'guidence_scale'; did you mean 'guidance_scale'"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"temperature": -0.1}, "temperature"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 10**9}, "num_inference_steps"),
        ({"num_diffusion_steps": 10**6}, "num_diffusion_steps"),
        ({"num_images_per_label": 10**12}, "num_images_per_label"),
        ({"class_labels": [1, 2, 3], "num_images_per_label": 1 << 19}, "1,572,864 images in all"),
        ({"min_tokens": 10**9}, "min_tokens"),
        ({"guidance_scale": 1e300}, "guidance_scale"),
        ({"temperature": float("inf")}, "temperature"),
        ({"seed": 10**5000}, "seed: "),
        ({"class_labels": [10**5000]}, "class_labels.0"),
        ({"top_k": 10**5000}, "top_k"),
        ({"num_diffusion_steps": 2.5}, "num_diffusion_steps"),
        ({"num_images_per_label": 0}, "num_images_per_label"),
        ({"class_labels": ()}, "class_labels: is empty"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"seeds": (1, 2)}, "seeds: 2 given for 1 images"),
        ({"guidance_schedule": "linaer"}, "guidance_schedule: 'linaer' is not known; did you mean 'linear'"),
        ({"token_schedule": "cosin"}, "token_schedule: 'cosin' is not known; did you mean 'cosine'"),
        ({"min_tokens": 0}, "min_tokens"),
        ({"order": "sprial"}, "order: 'sprial' is not known; did you mean 'spiral'"),
        (
            {"order": "zzz"},
            "order: 'zzz' is not known; allowed: random, confidence, raster, halton, spiral; or give the positions",
        ),
        ({"order": 3}, "order: must be a name, a list of positions, or such a list for each image (got 3)"),
        ({"order": []}, "order: must be a name"),
        ({"order": [0, 1.5]}, "order: must be a name"),
        ({"order": [[0, 1], 2]}, "order: must be a name"),
        ({"order": [[0, 1], [1, 0]]}, "order: 2 orders given for 1 images; give one, or one for each"),
        ({"guidance_schedule": "interval"}, "guidance_interval: is missing"),
        (
            {"guidance_schedule": "interval", "guidance_interval": (0.9, 0.1)},
            "guidance_interval: (0.9, 0.1) is not allowed",
        ),
        ({"guidance_interval": (0.1, 0.9)}, "guidance_interval: only valid with guidance_schedule='interval'"),
        ({"guidance_schedule": "power-cosine", "guidance_power": -1}, "guidance_power: -1.0 is not allowed"),
        ({"guidance_interval": (0.1,)}, "guidance_interval"),
    ],
)
def test_what_is_wrong_is_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_request({"num_inference_steps": 4, **settings}, 16)
    assert words in str(caught.value) and "\n" not in str(caught.value)
