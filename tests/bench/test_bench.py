"""`seriatim bench`: what it compares, counts and measures, and that it leaves everything as it was.

The opponent is a double (`checkout/`): it has the interface of the original's code, and is told apart from ours by any
fault. SERIATIM_MAR names a checkout of the original, for the test that runs it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_bundle, one_line, randomise
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from seriatim.backbones.masked_transformer import Masked
from seriatim.bench import race as bench_run
from seriatim.bench.checkout import set_aside
from seriatim.bench.official_mar import MODULES, OfficialMAR
from seriatim.bench.official_mar import official_mar as load_checkout
from seriatim.bench.opponent import Draws, Workload
from seriatim.bench.ours import Ours, prepared
from seriatim.bench.race import bench, compared, flops, subject
from seriatim.bench.timing import counting, matrix_peak, peak_resident_bytes
from seriatim.checkpoints.native import Bundle, save_bundle
from seriatim.cli.main import run as command
from seriatim.core.errors import ConfigError, ResourceError, UsageError
from seriatim.core.progress import Progress
from seriatim.core.schedules import tokens_per_step
from seriatim.core.settings import Settings
from seriatim.heads.diffusion import Diffusion
from seriatim.models.base import SequenceModel
from seriatim.models.build import seeded
from seriatim.models.masked_model import MaskedModel
from seriatim.nn import prepare as packed
from seriatim.nn.attention import SHORT, attend
from seriatim.nn.prepare import PackedLinear, packs
from seriatim.tokenizers.pixels import Pixels

CPU = torch.device("cpu")
SAME = 5e-6  # the largest relative difference of two codes that do the same; 5e-7 is usual


@pytest.fixture(autouse=True)
def quick_and_alike_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No large product is timed; torchvision can't be imported, whether it is installed or not."""
    monkeypatch.setattr(bench_run, "matrix_peak", lambda _dtype, _device: 1e11)
    monkeypatch.setitem(sys.modules, "torchvision", None)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the double."""
    source = Path(__file__).parent / "checkout"
    return shutil.copytree(source, tmp_path / "mar", ignore=shutil.ignore_patterns("__pycache__"))


def quick(model: Path | str, **options: Any) -> dict[str, Any]:
    return bench(
        str(model), **{"repetitions": 1, "threads": 1, "memory": False, "decode": False, "quiet": True, **options}
    )


# --- against the double -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guidance", "batch", "every"),  # every pair of values is met
    [
        ((1.0, "linear"), 1, 1), ((1.0, "linear"), 3, 3), ((2.5, "linear"), 1, 3), ((2.5, "linear"), 3, 1),
        ((2.5, "constant"), 1, 1), ((2.5, "constant"), 3, 3),
    ],
    ids=str,
)  # fmt: skip
def test_the_same_draws_give_the_same_tokens(
    guidance: tuple[float, str], batch: int, every: int, model_folder: Path, checkout: Path
) -> None:
    found = quick(model_folder, official=str(checkout), batch=batch, every=every, guidance_scale=guidance[0],
                  guidance_schedule=guidance[1])  # fmt: skip
    assert found["max_rel_difference"] < SAME
    assert found["max_abs_difference"] == pytest.approx(found["max_rel_difference"] * found["largest_value"])
    assert 0.1 < found["largest_value"] < 1e3, "nothing is compared where all is zero"
    assert (found["guidance_scale"], found["guidance_schedule"]) == guidance
    assert found["official_seconds"] > 0 and found["official_float32_seconds"] > 0 < found["replay_seconds"]
    assert found["ratio"] == found["official_seconds"] / found["seconds"] > 0
    assert found["official_stages"].keys() == {"encoder", "decoder", "head", "other"} <= found["stages"].keys()


@pytest.mark.parametrize("classes", [0, 4])
def test_unequal_sides_and_no_classes(classes: int, checkout: Path) -> None:
    with seeded(0):
        backbone = Masked(16, 6, width=(32, 48), depth=(1, 2), heads=(2, 3), buffer=2, mlp_ratio=2.0)
        model = MaskedModel(backbone, Diffusion(6, 24, 3, train_steps=500), classes=classes).eval()
    randomise(model, scale=0.1)
    inside = {"num_diffusion_steps": 5}
    work = Workload((1, 3) if classes else (-1, -1), 4, 2.0, temperature=0.7, head_options=inside)
    theirs = OfficialMAR(checkout, model, CPU, inside)
    found = compared(Ours(prepared(model), torch.float32, CPU), theirs, work, Progress(2, "", quiet=True))
    assert found["max_rel_difference"] < SAME and found["largest_value"] > 0.1


class Skipped(nn.Module):
    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


def skip_a_block(model: MaskedModel) -> None:
    model.backbone.set_submodule("decoder.0", Skipped())


def skip_every_other_head_step(model: MaskedModel) -> None:
    head: Any = model.head
    network = head.network
    kept: list[Tensor] = []

    def sometimes(x: Tensor, modulations: Any) -> Tensor:
        if kept and len(kept[0]) == len(x):
            return kept.pop()
        kept[:] = [network(x, modulations)]
        return kept[0]

    object.__setattr__(head, "network", sometimes)


def skip_guidance(model: MaskedModel) -> None:
    with torch.no_grad():
        model.conditioner.get_parameter("no_class").copy_(model.conditioner.get_parameter("class_embedding")[0])


def skip_positions(model: MaskedModel) -> None:
    model.backbone.get_parameter("output_positions").data.zero_()


@pytest.mark.parametrize("fault", [skip_a_block, skip_every_other_head_step, skip_guidance, skip_positions])
def test_a_sampler_that_skips_work_is_found_out(
    fault: Callable[[MaskedModel], None], model_folder: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(model: MaskedModel, dtype: torch.dtype) -> SequenceModel:  # after the original has its weights
        fault(model)
        return prepared(model, dtype)

    monkeypatch.setattr(bench_run, "prepared", faulty)
    assert quick(model_folder, official=str(checkout))["max_rel_difference"] > 1e-3 > 10 * SAME


def test_other_draws_are_found_out(model_folder: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = OfficialMAR.sample
    monkeypatch.setattr(OfficialMAR, "sample", lambda self, work, _draws, _stages=None: sample(self, work, Draws()))
    assert quick(model_folder, official=str(checkout))["max_rel_difference"] > 0.1


REQUIRED = {
    "seconds": float, "official_seconds": float, "ratio": float, "max_abs_difference": float,
    "max_rel_difference": float, "peak_bytes": int, "official_peak_bytes": int, "batch": int, "dtype": str,
    "official_dtype": str, "threads": int, "repetitions": int, "flops": float, "images_per_second": float,
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak of a process may not be told")
def test_the_command_prints_json_alone(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Packed weights, random ones of a preset; the memory of two processes; an original that talks."""
    module = checkout / "models" / "mar.py"
    module.write_text(module.read_text() + "\nprint('hello')\n")
    (checkout / "torchvision").mkdir()
    (checkout / "torchvision" / "__init__.py").write_text("raise RuntimeError('nms does not exist')")
    steps = ("--num-inference-steps", "4", "--num-diffusion-steps", "6", "--batch", "2", "--repetitions", "1")
    assert command(["bench", "mar-digits", "--official", str(checkout), *steps, "--threads", "1", "--json"]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    for name, kind in REQUIRED.items():
        assert type(found[name]) is kind, name
    assert found["max_rel_difference"] < SAME and found["weights"] == "random"
    assert (found["batch"], found["threads"], found["repetitions"], found["dtype"]) == (2, 1, 1, "float32")
    assert found["official_dtype"] == min(found["official_tried"], key=found["official_tried"].get)
    for name in ("peak_bytes", "official_peak_bytes"):  # of a process that has imported torch, and little more
        assert 100 << 20 < found[name] < 4 << 30, name
    assert err == "hello\n", "that of the process that measures memory is its own"


def test_the_table(model_folder: Path, checkout: Path, capsys: pytest.CaptureFixture[str],
                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(bench_run, "memory_of", lambda ask: (1 if ask["who"] == "ours" else 2) << 30)
    common = ["bench", str(model_folder), "--repetitions", "1", "--threads", "1", "--every", "2"]
    assert command([*common, "--official", str(checkout), "--official-dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    rows = {line[:25].strip(): line[25:].split() for line in out.splitlines()}
    assert "5 steps x 6 inside the head, guidance 1.5 linear, batch 1" in out and "one step of 2" in out
    assert rows["dtype"][-1] == "bfloat16", "that which was asked for"
    assert rows["peak memory, GiB"] == ["1.00", "2.00", "0.50"] and "original" in out
    assert float(rows["largest difference"][-1]) < SAME
    assert command([*common, "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "original" not in out and "seconds of one image" in out and "peak memory, GiB" in out


# --- the model ------------------------------------------------------------------------------------------------------


def test_a_run_is_benched_with_its_own_weights(bundle: Bundle, tmp_path: Path) -> None:
    bundle.sampling["temperature"] = 0.9
    save_bundle(bundle, tmp_path / "run" / "model")
    found = quick(tmp_path / "run", decode=True)
    assert found["weights"] == "the folder's" and found["temperature"] == 0.9
    assert (found["num_inference_steps"], found["num_diffusion_steps"], found["guidance_scale"]) == (5, 6, 1.5)
    assert "official_seconds" not in found and "peak_bytes" not in found and found["stages"]["decoding"] > 0
    loaded = subject(str(tmp_path / "run")).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in bundle.model.state_dict().items())
    assert quick(tmp_path / "run", batch=2)["stages"].keys() == {"encoder", "decoder", "head", "other"}


def test_a_preset_has_random_weights_and_none_does_nothing() -> None:
    one, other = (subject("mar-digits") for _ in range(2))
    assert one.weights == "random"
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b) and (a.ndim == 1 or bool(a.any()))


def test_a_folder_with_settings_that_are_not_benched(bundle: Bundle, tmp_path: Path) -> None:
    """Its own guidance schedule is refused by name; another one in its place is not hindered by what belongs to it."""
    bundle.sampling |= {"guidance_schedule": "interval", "guidance_interval": [0.2, 1.0], "num_diffusion_steps_last": 6}
    del bundle.sampling["num_inference_steps"]
    save_bundle(bundle, tmp_path / "model")
    with pytest.raises(UsageError, match="'interval' is not benched; use linear or constant"):
        quick(tmp_path / "model")
    found = quick(tmp_path / "model", guidance_schedule="constant", num_diffusion_steps=3)
    assert found["num_inference_steps"] == 16, "as many as tokens, and no warning of what nobody asked for"


def test_a_folder_is_benched_as_it_samples(
    bundle: Bundle, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own solver and token schedule; the original has neither, and says so."""
    bundle.sampling |= {"solver": "dpm++", "token_schedule": "linear", "num_diffusion_steps": 6}
    folder = save_bundle(bundle, tmp_path / "model")
    seen: list[Settings] = []
    steps = MaskedModel.steps

    def watch(model: Any, condition: Any, null: Any, keys: Any, settings: Settings, **more: Any) -> Any:
        seen.append(settings)
        return steps(model, condition, null, keys, settings, **more)

    monkeypatch.setattr(MaskedModel, "steps", watch)
    quick(folder)
    assert seen and all((s.head_options["solver"], s.token_schedule) == ("dpm++", "linear") for s in seen)
    with pytest.raises(UsageError, match=r"official: the original has no solver='dpm\+\+', .* leave it out"):
        quick(folder, official=str(checkout))


def test_memory_is_that_of_the_dtype_that_was_timed(
    model_folder: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def memory_of(ask: dict[str, Any]) -> int:
        asked.append(ask)
        return 1

    monkeypatch.setattr(bench_run, "memory_of", memory_of)
    bench(str(model_folder), official=str(checkout), official_dtype="bfloat16", repetitions=1, threads=1, quiet=True)
    assert [(ask["who"], ask["official_dtype"]) for ask in asked] == [("ours", "bfloat16"), ("official", "bfloat16")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_that_of_the_best_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.5, 0.25])
    monkeypatch.setattr("seriatim.bench.timing.median", lambda _function, _device: next(seconds))
    assert matrix_peak(dtype, CPU) == 2 * 2048**3 / (0.25 if packs(dtype) else 0.5)


# --- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(1,), (7,), (2, 33)])
@torch.no_grad()
def test_flops_of_a_linear(rows: tuple[int, ...]) -> None:
    layer, x = nn.Linear(96, 130), torch.randn(*rows, 96)
    expected = 2 * math.prod(rows) * 96 * 130
    layers: list[nn.Module] = [layer, nn.Linear(96, 130, bias=False)]
    layers += [PackedLinear(layer)] if packs(torch.float32) else []
    layers += [PackedLinear(layer, torch.bfloat16)] if packs(torch.float32) and packs(torch.bfloat16) else []
    for each in layers:
        with counting() as counter:
            each(x)
        assert counter.get_total_flops() == expected, each


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("keys", [5, SHORT + 1])  # explicit products, the fused kernel
@pytest.mark.parametrize("asked", [3, None])
@torch.no_grad()
def test_flops_of_attention(asked: int | None, keys: int, mask: bool) -> None:
    q, k = torch.randn(2, 3, asked or keys, 8), torch.randn(2, 3, keys, 8)
    allowed = torch.ones(2, 1, 1, keys, dtype=torch.bool) if mask else None
    with counting() as counter:
        attend(q, k, k, allowed)
    assert counter.get_total_flops() == 2 * (2 * 2 * 3 * (asked or keys) * keys * 8)


def test_flops_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed or not, guided or not: what a hand counts."""
    L, A, D, E, C, W, blocks, T, steps = 16, 3, 4, 32, 32, 24, 2, 6, 5
    inside = {"num_diffusion_steps": T}
    work = Workload((1,), steps, 1.5, head_options=inside)
    plain = flops(Ours(make_bundle().model, torch.float32, CPU), work)

    def block(width: int, all_rows: int, rows: int) -> int:  # keys and values of all, the rest of those asked for
        return 2 * all_rows * 3 * width**2 + 4 * rows * all_rows * width + 2 * rows * 9 * width**2

    def trunk(known: int, asked: int) -> int:
        S = A + known
        encoder = 2 * known * D * E + 2 * block(E, S, S)
        return encoder + 2 * S * E * C + block(C, A + L, A + L) + block(C, A + L, asked)

    def head(asked: int) -> int:
        once = C * W + T * (blocks * 3 + 2) * W**2
        return 2 * 2 * asked * (once + T * (D * W + blocks * 2 * W**2 + 2 * D * W))

    counts = tokens_per_step(steps, L)
    known = [sum(counts[:i]) for i in range(steps)]
    body = 2 * trunk(0, L) + sum(2 * trunk(k, n) for k, n in zip(known[1:], counts[1:], strict=True))
    of_head = sum(head(n) for n in counts) + 2 * T * (256 * W + W**2)  # the timesteps once
    assert plain[0] == body + of_head and plain[1] == of_head

    if packs(torch.float32):
        monkeypatch.setattr(packed, "SMALLEST", 1)
        assert flops(Ours(prepared(make_bundle().model), torch.float32, CPU), work) == plain
    unguided = flops(Ours(make_bundle().model, torch.float32, CPU), Workload((1,), steps, 1.0, head_options=inside))
    assert unguided[0] < 0.55 * plain[0]


@given(steps=st.integers(1, 300), every=st.integers(1, 300), last=st.booleans())
def test_the_steps_that_are_computed(steps: int, every: int, last: bool) -> None:
    computed = Workload((0,), steps, 1.0, every=every, last=last).computed()
    factor = Workload((0,), steps, 1.0, every=every, last=last).factor
    assert computed and computed == sorted(set(computed)) and 0 <= computed[0] <= computed[-1] < steps
    assert math.isclose(factor * len(computed), steps)
    assert not last or computed[-1] == steps - 1
    if every == 1:
        assert computed == list(range(steps))
    elif not last:
        assert {b - a for a, b in pairwise(computed)} <= {every}
        assert abs(len(computed) - steps / every) <= 1
        if steps >= every:  # as far from the ends, so that what grows over the image is counted fairly
            assert computed[0] == every // 2 and steps - 1 - computed[-1] < every


# --- memory -----------------------------------------------------------------------------------------------------------


def answering(monkeypatch: pytest.MonkeyPatch, *answers: tuple[int, str, str]) -> list[Any]:
    """Child processes that end with (exit code, output, errors) in turn; what they were asked."""
    asked: list[Any] = []

    def run(arguments: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(json.loads(arguments[-1]))
        return subprocess.CompletedProcess(arguments, *answers[len(asked) - 1])

    monkeypatch.setattr(bench_run, "subprocess", types.SimpleNamespace(run=run))
    return asked


def test_memory_is_that_of_a_process_each(model_folder: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, (0, "5\n", ""), (0, "chatter\n7\n", "a warning"))
    found = quick(model_folder, official=str(checkout), memory=True)
    assert (found["peak_bytes"], found["official_peak_bytes"]) == (5, 7)
    assert [ask["who"] for ask in asked] == ["ours", "official"]
    answering(monkeypatch, (0, "null\n", ""))
    assert quick(model_folder, memory=True)["peak_bytes"] is None
    before = peak_resident_bytes()
    for ask in asked:  # what such a process does, done here
        peak = bench_run.child(ask)
        assert peak == before if before is None or peak is None else peak >= before > 0


@pytest.mark.parametrize(
    ("errors", "words"), [("Traceback\n  File x\nMemoryError: no room\n", "MemoryError: no room"), ("", "exit code -9")]
)
def test_a_process_that_fails_is_one_line(
    errors: str, words: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, (-9, "", errors))
    with pytest.raises(ResourceError, match=words) as caught:
        quick(model_folder, memory=True)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


# --- nothing is left behind -------------------------------------------------------------------------------------------


def everything() -> dict[str, Any]:
    """What an original is run with, and others use too."""
    return {
        "path": list(sys.path),
        "finders": list(sys.meta_path),
        "modules": {k: v for k, v in sys.modules.items() if k.split(".")[0] in (*MODULES, "torchvision")},
        "torch": (torch.randn, torch.randn_like, nn.Module.cuda, torch.Tensor.cuda, "cuda" in vars(torch.Tensor)),
        "threads": torch.get_num_threads(),
        "random": (torch.get_rng_state().tolist(), str(np.random.get_state())),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
    }


RAISING = {  # what raises: a file of the checkout, and in it what for what
    "at import": ("models/mar.py", "import math\n", "import math\n\nraise OSError('no disk')\n"),
    "at import of another": ("diffusion/respace.py", "import torch\n", "import torch\n\n1 / 0\n"),
    "when built": ("models/mar.py", "assert norm_layer(8).eps == 1e-6,", "raise OSError  #"),
    "when it draws": ("diffusion/respace.py", "eps, v = network", "raise OSError\n            eps, v = network"),
    "": ("models/mar.py", "import math\n", "import math\n"),
}


@pytest.mark.parametrize("when", RAISING)
def test_all_is_as_it_was(when: str, model_folder: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = types.ModuleType("models")
    monkeypatch.setitem(sys.modules, "models", mine)  # of somebody who has one too
    file, before, after = RAISING[when]
    text = (checkout / file).read_text()
    assert text.count(before) == 1
    (checkout / file).write_text(text.replace(before, after))
    options = {"official": str(checkout), "threads": 2 if when == "when built" else 1, "decode": True}
    was = everything()
    if when:
        with pytest.raises(ConfigError):
            quick(model_folder, **options)
    else:
        quick(model_folder, **options)
    assert everything() == was and sys.modules["models"] is mine


@pytest.mark.parametrize("kind", ["whole", "broken"])
def test_torchvision_where_it_is_installed(
    kind: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Itself, or a stand-in for one that can't be imported; another package called models is no obstacle."""
    for name in ("models", "torchvision"):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text("from . import transforms" if name != "models" else "")
    whole = "class Compose:\n    own = True\nclass InterpolationMode:\n    BICUBIC, BILINEAR = 1, 2\n"
    file = tmp_path / "site" / "torchvision" / "transforms.py"
    file.write_text(whole if kind == "whole" else "raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with set_aside("torchvision"):
        before = everything()["modules"]
        code = load_checkout(checkout)
        assert (code["models.mar"].Compose.own is True) == (kind == "whole")
        keys = (1, 2) if kind == "whole" else ("InterpolationMode.BICUBIC", "InterpolationMode.BILINEAR")
        assert code["models.mar"].RESIZE == dict(zip(keys, ("bicubic", "bilinear"), strict=True))
        assert kind == "whole" or everything()["modules"] == before
    assert Path(str(code["models.mar"].__file__)).is_relative_to(checkout)


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = [
    (("nosuch",), 2, "model: 'nosuch' is no folder or preset"),
    (("mar-digit",), 2, "did you mean 'mar-digits'"),
    (("empty",), 4, "manifest.json is missing"),
    (("model", "--batch", "0"), 2, "batch: 0 is not allowed; it must be from 1 to 1,048,576"),
    (("model", "--every", "0"), 2, "every: 0 is not allowed"),
    (("model", "--repetitions", "0"), 2, "repetitions: 0 is not allowed"),
    (("model", "--threads", "0"), 2, "threads: 0 is not allowed"),
    (("model", "--dtype", "float61"), 2, "dtype: 'float61' is not known"),
    (("model", "--official", "nosuch", "--official-dtype", "float61"), 2, "official_dtype: 'float61' is not known"),
    (("model", "--official-dtype", "float32"), 2, "official_dtype: needs official"),
    (("model", "--device", "warp"), 2, "device: 'warp'"),
    (("model", "--guidance-schedule", "interval"), 2, "guidance_schedule: 'interval' is not benched; use linear"),
    (("model", "--guidance-schedule", "lienar"), 2, "guidance_schedule: 'lienar'"),
    (("model", "--guidance-scale", "-1"), 2, "guidance_scale"),
    (("model", "--num-inference-steps", "0"), 2, "num_inference_steps"),
    (("model", "--num-diffusion-steps", "2000"), 2, "num_diffusion_steps: 2000"),
    (("model", "--num-diffusion-steps", "2000", "--official", "mar"), 2, "num_diffusion_steps: 2000"),
    (("model", "--official", "nosuch"), 2, "official: nosuch holds no models/mar.py; give a checkout of the original"),
    (("model", "--official", "empty"), 2, "git clone https://github.com/LTH14/mar"),
    (("model", "--official", "half"), 2, "official: half can't be imported"),
    (("model", "--official", "other"), 2, "models/mar.py has no MAR"),
    (("model", "--official", "fork"), 2, "official: the checkout fails (TypeError: "),
    (("model", "--official", "timmless"), 2, 'pip install --no-deps "timm==0.9.12"'),
    (("oblong", "--official", "mar"), 2, "official: its MAR has a diffusion head and a square of tokens"),
]


@pytest.mark.usefixtures("model_folder")
@pytest.mark.parametrize(("arguments", "code", "words"), BAD, ids=lambda v: " ".join(v) if type(v) is tuple else None)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], code: int, words: str, checkout: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    for name in ("half", "timmless", "other"):
        (tmp_path / name / "models").mkdir(parents=True)
        (tmp_path / name / "models" / "mar.py").write_text(
            "from timm.models.vision_transformer import Block" if name == "timmless" else "import torch"
        )
    shutil.copytree(checkout / "diffusion", tmp_path / "other" / "diffusion")
    (tmp_path / "other" / "models" / "diffloss.py").write_text("")
    shutil.copytree(tmp_path / "other", tmp_path / "fork")
    (tmp_path / "fork" / "models" / "mar.py").write_text("class MAR:\n    def __init__(self, size): ...")
    for name in ("timm", "timm.models", "timm.models.vision_transformer"):
        monkeypatch.setitem(sys.modules, name, None)
    if arguments[0] == "oblong":
        bundle = make_bundle()
        bundle.tokenizer = Pixels((4, 6), patch=2, channels=1)
        with seeded(0):
            bundle.model = MaskedModel(Masked(6, 4, width=32, depth=1, heads=2), Diffusion(4, 24, 1), classes=3)
        save_bundle(bundle, tmp_path / "oblong")
    monkeypatch.chdir(tmp_path)
    done = subprocess.CompletedProcess(arguments, command(["bench", *arguments]), *capsys.readouterr())
    one_line(done, code, words)
    assert done.stdout == ""


@pytest.mark.skipif(not os.environ.get("SERIATIM_MAR"), reason="SERIATIM_MAR names no checkout of the original")
@pytest.mark.filterwarnings("ignore")  # of what it imports
@pytest.mark.parametrize("classes", [0, 3])
def test_the_original(classes: int, tmp_path: Path) -> None:
    folder = save_bundle(make_bundle(classes=classes), tmp_path / "model")
    for options in ({"guidance_scale": 1.0}, {"batch": 3}, {"guidance_schedule": "constant", "every": 2}):
        found = quick(folder, official=os.environ["SERIATIM_MAR"], **options)
        assert found["max_rel_difference"] < SAME and found["official_seconds"] > 0, options
