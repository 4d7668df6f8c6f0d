"""`seriatim bench` of a nested head, beside a double of ARINAR's code (`arinar/`).

SERIATIM_ARINAR names a checkout of the original, for the test that runs it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import randomise
from torch import nn

from seriatim.bench import race as bench_run
from seriatim.bench.official_arinar import OfficialARINAR
from seriatim.bench.opponent import Draws, Workload
from seriatim.bench.ours import Ours, prepared
from seriatim.bench.race import bench, compared, subject
from seriatim.cli.main import run as command
from seriatim.core.errors import UsageError
from seriatim.core.progress import Progress
from seriatim.models import nested
from seriatim.models.base import SequenceModel
from seriatim.models.build import build_model, seeded
from seriatim.nn.kv_cache import KVCache
from seriatim.zoo import PRESETS, Preset

CPU = torch.device("cpu")
DOUBLE = Path(__file__).parent / "arinar"
SAME = 2e-5  # the largest relative difference of two codes that do the same; 2e-6 is usual
INNER: dict[str, Any] = {
    "kind": "causal", "width": 32, "depth": 1, "heads": 4, "conditioning": "both", "norm": "layer", "mlp": "gelu-tanh",
    "positions": "learned", "start_token": True, "bias": True, "attention_scale": 0.25,
}  # fmt: skip


def config(group: int = 1, inner: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "kind": "masked", "tokens": 16, "dim": 4, "width": 32, "depth": 2, "heads": 2, "buffer": 4, "classes": 5,
        "head": {
            "kind": "nested", "split": {"kind": "features", "group": group, "order": "natural"},
            "model": {**INNER, "head": {"kind": "mixture", "components": 3, "depth": 0}, **(inner or {})},
        },
        **more,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny preset of ARINAR's form; no large product is timed; torchvision can't be imported."""
    settings = {"guidance_scale": 3.0, "guidance_schedule": "linear", "num_inference_steps": 4}
    monkeypatch.setitem(PRESETS, "tiny", Preset("tiny", "", config(), 0, 16, "", sampling=settings))
    monkeypatch.setitem(PRESETS, "grouped", Preset("grouped", "", config(2), 0, 16, "", sampling=settings))
    monkeypatch.setattr(bench_run, "matrix_peak", lambda _dtype, _device: 1e11)
    monkeypatch.setitem(sys.modules, "torchvision", None)


def quick(**options: Any) -> dict[str, Any]:
    options = {"repetitions": 1, "threads": 1, "memory": False, "decode": False, "quiet": True, **options}
    return bench(**{"model": "tiny", "official": str(DOUBLE), **options})


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"batch": 3},
        {"batch": 2, "guidance_schedule": "constant", "every": 2},
        {"guidance_scale": 1.0, "every": 2},
        {"guidance_mode": "resample"},
        {"model": "grouped", "guidance_scale": 1.0},
    ],
    ids=str,
)
def test_parts_are_drawn_from_the_same(options: dict[str, Any]) -> None:
    found = quick(**options)
    assert found["max_rel_difference"] < SAME
    assert found["max_abs_difference"] == pytest.approx(found["max_rel_difference"] * found["largest_value"])
    assert found["guidance_mode"] == options.get("guidance_mode")
    assert found["ratio"] == found["official_seconds"] / found["seconds"] > 0
    assert found["official_stages"].keys() == found["stages"].keys() == {"encoder", "decoder", "head", "other"}
    assert found["official_tried"].keys() == {"float32", "bfloat16"}


def make(**more: Any) -> SequenceModel:
    with seeded(0):
        model = build_model(config(**more)).eval()
    randomise(model, scale=0.1)
    return model


def difference(model: SequenceModel, theirs: OfficialARINAR, work: Workload) -> float:
    found = compared(Ours(prepared(model), torch.float32, CPU), theirs, work, Progress(2, "", quiet=True))
    return float(found["max_rel_difference"])


WORK = Workload((0, 3), 4, 2.5)


@pytest.mark.parametrize("heads", [4, 16])
@pytest.mark.parametrize(
    "work",
    [
        Workload((0, 3), 4, 2.5, temperature=0.7, head_options={"feature_schedule": "cosine"}),
        Workload((0, 3), 4, 1.0, temperature=0.0),
        Workload((-1, -1), 4, 2.5, "constant"),
    ],
    ids=["schedule", "cold", "no class"],
)
def test_settings_of_both(work: Workload, heads: int) -> None:
    classes = 0 if work.labels[0] < 0 else 5
    model = make(inner={"heads": heads}, classes=classes, width=(32, 48), heads=(2, 3), depth=(1, 2))
    theirs = OfficialARINAR(DOUBLE, model, CPU)
    assert difference(model, theirs, work) < SAME
    assert theirs.seen is None, "timed runs draw as the original does"


Patch = pytest.MonkeyPatch


class Skipped(nn.Module):
    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x


def skip_a_block(model: Any, _: Patch) -> None:
    model.backbone.decoder[0] = Skipped()


def skip_the_block_inside(model: Any, patch: Patch) -> None:
    patch.setattr(model.head.model.backbone.blocks[0], "forward", lambda x, *_, **__: x)


def forget_parts(_: Any, patch: Patch) -> None:
    """Attention inside looks at the last part alone."""
    put = KVCache.put
    patch.setattr(KVCache, "put", lambda *arguments: tuple(t[:, :, -1:] for t in put(*arguments)))


def other_heads_inside(model: Any, _: Patch) -> None:
    model.head.model.backbone.blocks[0].attention.heads = 8


def same_modulation_for_all(model: Any, patch: Patch) -> None:
    norm = model.head.model.backbone.norm
    modulate = norm.modulate
    patch.setattr(norm, "modulate", lambda z: tuple(t[:1].expand(len(z), -1, -1) for t in modulate(z)))


def skip_guidance(model: Any, _: Patch) -> None:
    with torch.no_grad():
        model.conditioner.no_class.copy_(model.conditioner.class_embedding[0])


def weaker_guidance(_: Any, patch: Patch) -> None:
    dense = nested.dense

    def weaker(*arguments: Any) -> Any:
        *before, guidance, temperature = arguments
        changed: Any = (*before, lambda i: guidance(i).scheduled(0.98), temperature)
        return dense(*changed)

    patch.setattr(nested, "dense", weaker)


def warmer(_: Any, patch: Patch) -> None:
    dense = nested.dense

    def warmer(*arguments: Any) -> Any:
        *before, temperature = arguments
        changed: Any = (*before, lambda i: temperature(i) * 1.01)
        return dense(*changed)

    patch.setattr(nested, "dense", warmer)


def other_orders(_: Any, patch: Patch) -> None:
    sample = OfficialARINAR.sample
    patch.setattr(OfficialARINAR, "sample", lambda self, work, draws, stages=None: sample(
        self, work, replace(draws, orders=None), stages))  # fmt: skip


FAULTS = (
    skip_a_block, skip_the_block_inside, forget_parts, other_heads_inside, same_modulation_for_all, skip_guidance,
    weaker_guidance, warmer, other_orders,
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_sampler_that_skips_work_is_found_out(fault: Callable[[Any, Patch], None], monkeypatch: Patch) -> None:
    model = make()
    theirs = OfficialARINAR(DOUBLE, model, CPU)
    fault(model, monkeypatch)
    assert difference(model, theirs, WORK) > 2e-3 > 10 * SAME


def test_no_random_weight_does_next_to_nothing() -> None:
    """A fresh block inside is the identity but for 1e-5: left out, it would not show."""
    model: Any = subject("tiny").model
    z, parts = torch.randn(3, 32), torch.randn(3, 4, 1)
    condition = model.head.condition(z, None)
    whole = model.head.model.backbone.sequence(condition, parts)
    model.head.model.backbone.blocks[0].forward = lambda x, *_, **__: x
    assert (model.head.model.backbone.sequence(condition, parts) - whole).abs().max() > 1e-3


def test_timed_the_original_draws_as_it_does() -> None:
    """From torch's own generator, which is left as it was, as is NumPy's."""
    theirs = OfficialARINAR(DOUBLE, make(), CPU)
    before = torch.get_rng_state(), str(np.random.get_state())
    tokens, seconds = theirs.sample(WORK, Draws())
    assert tokens.shape == (2, 16, 4) and bool(torch.isfinite(tokens).all()) and seconds > 0
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == str(np.random.get_state())
    few, _ = theirs.sample(theirs.few(WORK), Draws())
    assert few.shape == tokens.shape
    assert type(theirs.model.arhead).sample_from_gmm is theirs.model.arhead.sample_from_gmm.__func__


def test_in_half_precision_its_mixtures_are_not(monkeypatch: Patch) -> None:
    """Weights rounded to bfloat16 sum to 1 only nearly, which torch's Categorical, that the original has, refuses."""
    theirs = OfficialARINAR(DOUBLE, make(), CPU)
    theirs.dtype, head, given = "bfloat16", theirs.model.arhead, []
    extract = head.extract_gmm

    def watched(prediction: torch.Tensor, rows: int) -> Any:
        given.append(prediction.dtype)
        return extract(prediction, rows)

    monkeypatch.setattr(head, "extract_gmm", watched)
    tokens, _ = theirs.sample(WORK, Draws())
    assert bool(torch.isfinite(tokens).all())
    assert set(given) == {torch.float32}


def test_the_command_prints_json_alone(capfd: pytest.CaptureFixture[str], monkeypatch: Patch) -> None:
    """Memory is measured here, not in a process each: that knows no tiny preset."""
    monkeypatch.setattr(bench_run, "memory_of", bench_run.child)
    options = ("--repetitions", "1", "--threads", "1", "--guidance-mode", "resample", "--json")
    assert command(["bench", "tiny", "--official", str(DOUBLE), *options]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert found["guidance_mode"] == "resample" and found["max_rel_difference"] < SAME
    assert found.keys() >= {"peak_bytes", "official_peak_bytes"}
    assert err.splitlines() == ["a chatty head"] * 2


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (config(dim=6, tokens=8), "official: its images are squares of tokens"),
        (config(inner={"width": 24}), "official: its head has 16 attention heads inside and 4 times its width"),
        (config(inner={"hidden": 96}), "a width of 32 with 96 doesn't fit that"),
        (config(inner={"norm": "rms"}), "model: its head.model.norm has no counterpart in ARINAR's code"),
    ],
)
def test_a_model_that_is_not_its(model: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        OfficialARINAR(DOUBLE, build_model(model), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tiny", "--official", "nosuch"), "nosuch holds no backbone/mar.py; give a checkout of the original (git"),
        (("mar-digits", "--guidance-mode", "exact"), "guidance_mode: the Diffusion head has no such option"),
        (("tiny", "--guidance-mode", "exat"), "guidance_mode: 'exat' is not known"),
        (("grouped", "--official", str(DOUBLE)), "guidance_scale: the original can't guide parts of several features"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["bench", *arguments, "--repetitions", "1", "--threads", "1"]) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line != "a chatty head"]
    assert len(lines) == 1 and words in lines[0], lines


@pytest.mark.skipif(not os.environ.get("SERIATIM_ARINAR"), reason="SERIATIM_ARINAR names no checkout")
@pytest.mark.filterwarnings("ignore")  # of what it imports
def test_the_original() -> None:
    for options in ({"guidance_scale": 1.0}, {"batch": 3}, {"guidance_schedule": "constant", "every": 2},
                    {"model": "grouped", "guidance_scale": 1.0}):  # fmt: skip
        found = quick(**{**options, "official": os.environ["SERIATIM_ARINAR"]})
        assert found["max_rel_difference"] < SAME and found["official_seconds"] > 0, options
