"""`seriatim bench` of a model of codes, beside a double of LlamaGen's code (`llamagen/`).

SERIATIM_LLAMAGEN names a checkout of the original, for the test that runs it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from seriatim.backbones.causal_transformer import Causal
from seriatim.bench import race as bench_run
from seriatim.bench.official_llamagen import OfficialLlamaGen
from seriatim.bench.opponent import Draws, Workload
from seriatim.bench.ours import Ours, prepared
from seriatim.bench.race import DECODERS, bench, compared
from seriatim.cli.main import run as command
from seriatim.core.errors import UsageError
from seriatim.core.progress import Progress
from seriatim.heads.categorical import Categorical
from seriatim.models.build import seeded
from seriatim.models.causal_model import CausalModel
from seriatim.tokenizers.vq import VQ
from seriatim.zoo import PRESETS, Preset

CPU = torch.device("cpu")
DOUBLE = Path(__file__).parent / "llamagen"
TINY: dict[str, Any] = {
    "kind": "causal", "tokens": 16, "vocab": 40, "width": 64, "depth": 2, "heads": 2, "rotate_prefix": False,
    "classes": 5, "head": {"kind": "categorical", "bias": False},
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny preset of LlamaGen's form; no large product is timed; torchvision can't be imported."""
    tiny = Preset("tiny", "", TINY, 0, 16, "", sampling={"guidance_scale": 2.0, "guidance_schedule": "constant"})
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    monkeypatch.setattr(bench_run, "matrix_peak", lambda _dtype, _device: 1e11)
    monkeypatch.setitem(sys.modules, "torchvision", None)


def quick(**options: Any) -> dict[str, Any]:
    return bench("tiny", **{"repetitions": 1, "threads": 1, "memory": False, "decode": False, "quiet": True, **options})


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_greedy_codes_are_equal(batch: int, guidance: float) -> None:
    found = quick(official=str(DOUBLE), batch=batch, guidance_scale=guidance)
    assert found["equal_codes"] == 1.0 and "max_rel_difference" not in found
    assert found["num_inference_steps"] == 16 and found["guidance_scale"] == guidance
    assert found["ratio"] == found["official_seconds"] / found["seconds"] > 0
    assert found["official_stages"].keys() == found["stages"].keys() == {"backbone", "head", "other"}
    assert found["official_tried"].keys() == {"float32", "bfloat16"}


def make() -> CausalModel:
    with seeded(0):
        backbone = Causal(16, vocab=40, width=64, depth=2, heads=2, rotate_prefix=False)
        model = CausalModel(backbone, Categorical(40, bias=False), classes=5).eval()
        nn.init.normal_(model.head.get_parameter("logits.weight"))
        nn.init.normal_(model.conditioner.get_parameter("class_embedding"))
        for i in range(2):
            nn.init.normal_(model.backbone.get_parameter(f"blocks.{i}.attention.qkv.weight"), std=0.3)
    return model


@pytest.mark.parametrize("fault", [None, "block", "guidance", "rotation"])
def test_a_sampler_that_skips_work_is_found_out(fault: str | None) -> None:
    model = make()
    theirs = OfficialLlamaGen(DOUBLE, model, CPU)
    if fault == "block":
        with torch.no_grad():
            model.backbone.get_parameter("blocks.1.attention.proj.weight").zero_()
    elif fault == "guidance":
        with torch.no_grad():
            no_class, table = (model.conditioner.get_parameter(name) for name in ("no_class", "class_embedding"))
            no_class.copy_(table[0])
    elif fault == "rotation":
        angles: torch.Tensor = model.backbone.table  # type: ignore[assignment]
        angles[1:] = angles[2:3]
    work = Workload((0, 1, 2, 3), 16, 2.5, "constant")
    found = compared(Ours(prepared(model), torch.float32, CPU), theirs, work, Progress(2, "", quiet=True))
    assert (found["equal_codes"] == 1.0) == (fault is None)


def test_sampled_codes_have_no_likeness_to_compare() -> None:
    """At a temperature, each draws from its own generator; the original is left as it was."""
    theirs = OfficialLlamaGen(DOUBLE, make(), CPU)
    before = torch.get_rng_state()
    codes, seconds = theirs.sample(Workload((0, 1), 16, 2.5, "constant"), Draws())
    assert codes.shape == (2, 16) and codes.dtype == torch.long and seconds > 0
    assert torch.equal(before, torch.get_rng_state())
    short, _ = theirs.sample(theirs.few(Workload((0, 1), 16, 1.0)), Draws())
    assert short.shape == (2, 16)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tiny", "--official", "nosuch"), "nosuch holds no autoregressive/models/gpt.py; give a checkout of the orig"),
        (("tiny", "--every", "2"), "every: a step of a causal model needs all steps before it; leave it at 1"),
        (("tiny", "--num-inference-steps", "3"), "num_inference_steps"),
        (("tiny", "--official", str(DOUBLE), "--guidance-schedule", "linear"), "LlamaGen guides every token alike"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["bench", *arguments, "--repetitions", "1", "--threads", "1"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0], lines


def test_features_are_not_for_it() -> None:
    with seeded(0):
        from seriatim.heads.diffusion import Diffusion

        model = CausalModel(Causal(16, 4, width=32, depth=1, heads=2), Diffusion(4, 16, 1), classes=2)
    with pytest.raises(UsageError, match="official: LlamaGen draws codes, of a square of tokens"):
        OfficialLlamaGen(DOUBLE, model, CPU)


def test_decoding_is_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = next(name for name, kind in DECODERS.items() if kind is VQ)
    assert PRESETS["llamagen-b"].image.endswith(tokens)
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], image=f"4x4 {tokens}"))
    small = partial(VQ, 8, vocab=40, code_dim=4, latent_channels=8, block_out_channels=(32, 32), layers_per_block=1)
    monkeypatch.setitem(DECODERS, tokens, small)
    found = quick(decode=True)
    assert found["stages"]["decoding"] > 0
    assert "decoding" not in quick(decode=False)["stages"]


@pytest.mark.skipif(not os.environ.get("SERIATIM_LLAMAGEN"), reason="SERIATIM_LLAMAGEN names no checkout")
@pytest.mark.filterwarnings("ignore")  # of what it imports
def test_the_original() -> None:
    for options in ({"guidance_scale": 1.0}, {"batch": 3}):
        found = quick(official=os.environ["SERIATIM_LLAMAGEN"], **options)
        assert found["equal_codes"] == 1.0 and found["official_seconds"] > 0, options
