"""The network of the FID convention against what is known of it; its weights are not here, nor is a network."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seriatim.core.errors import CheckpointError, UsageError
from seriatim.evaluation import inception, weights
from seriatim.evaluation.features import open_features
from seriatim.evaluation.inception import Inception, InceptionPytorchFid, Mixed, pool, stretch
from seriatim.models.build import seeded

# Every convolution of the published file: (out, in, height, width).
A = "1x1 64 1 1|5x5_1 48 1 1|5x5_2 64 5 5|3x3dbl_1 64 1 1|3x3dbl_2 96 3 3|3x3dbl_3 96 3 3"
C = "1x1 192 1 1|7x7_1 c 1 1|7x7_2 c 1 7|7x7_3 192 7 1|7x7dbl_1 c 1 1|7x7dbl_2 c 7 1|7x7dbl_3 c 1 7|7x7dbl_4 c 7 1"
C += "|7x7dbl_5 192 1 7|_pool 192 1 1"
E = "1x1 320 1 1|3x3_1 384 1 1|3x3_2a 384 1 3|3x3_2b 384 3 1|3x3dbl_1 448 1 1|3x3dbl_2 384 3 3|3x3dbl_3a 384 1 3"
E += "|3x3dbl_3b 384 3 1|_pool 192 1 1"
TABLE = {
    "Mixed_5b": (192, A + "|_pool 32 1 1"),
    "Mixed_5c": (256, A + "|_pool 64 1 1"),
    "Mixed_5d": (288, A + "|_pool 64 1 1"),
    "Mixed_6a": (288, "3x3 384 3 3|3x3dbl_1 64 1 1|3x3dbl_2 96 3 3|3x3dbl_3 96 3 3"),
    "Mixed_6b": (768, C.replace("c", "128")),
    "Mixed_6c": (768, C.replace("c", "160")),
    "Mixed_6d": (768, C.replace("c", "160")),
    "Mixed_6e": (768, C.replace("c", "192")),
    "Mixed_7a": (768, "3x3_1 192 1 1|3x3_2 320 3 3|7x7x3_1 192 1 1|7x7x3_2 192 1 7|7x7x3_3 192 7 1|7x7x3_4 192 3 3"),
    "Mixed_7b": (1280, E),
    "Mixed_7c": (2048, E),
}


@pytest.fixture(scope="module")
def network() -> Inception:
    with seeded(0):
        return Inception().eval()


def test_keys_and_shapes_are_those_of_the_published_file() -> None:
    with torch.device("meta"):
        state = Inception().state_dict()
    assert len(state) == 566 and state["fc.weight"].shape == (1008, 2048) and state["fc.bias"].shape == (1008,)
    assert sum(p.numel() for name, p in state.items() if "running" not in name and p.ndim) == 23_850_960
    stem = {"1a_3x3": (32, 3, 3, 3), "2a_3x3": (32, 32, 3, 3), "2b_3x3": (64, 32, 3, 3), "3b_1x1": (80, 64, 1, 1)}
    stem |= {"4a_3x3": (192, 80, 3, 3)}
    wanted: dict[str, tuple[int, ...]] = {f"Conv2d_{name}.conv.weight": shape for name, shape in stem.items()}
    for block, (inside, convolutions) in TABLE.items():
        width: dict[str, int] = {}
        for text in convolutions.split("|"):
            name, out, *kernel = text.split()
            chain = name.split("_")[0]
            wanted[f"{block}.branch{name}.conv.weight"] = (int(out), width.get(chain, inside), *map(int, kernel))
            if name[-1] not in "ab" or "_" not in name:
                width[chain or "pool"] = int(out)
    found = {name: tuple(value.shape) for name, value in state.items() if name.endswith("conv.weight")}
    assert found == wanted and len(found) == 94
    norms = {f"{name.removesuffix('conv.weight')}bn.{part}" for name in found for part in
             ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}  # fmt: skip
    assert set(state) == set(found) | norms | {"fc.weight", "fc.bias"}


def test_what_comes_out(network: Inception) -> None:
    images = torch.rand(1, 1, 8, 8) * 2 - 1
    with torch.no_grad():
        found = network(images)
        assert found.features.shape == (1, 2048) and found.logits.shape == (1, 1008)
        assert found.spatial.shape == (1, 7 * 17 * 17)
        assert torch.allclose(found.logits, found.features @ network.fc.weight.T, atol=1e-5), "no bias"
    assert not network.standard, "not with random weights"
    assert (network.config, network.fc.in_features) == ({"resize": "tensorflow-1"}, 2048)


def test_pools_are_those_of_the_convention() -> None:
    ones = torch.ones(1, 1, 5, 5)
    assert torch.equal(pool(ones, "mean"), ones), "padding is not counted"
    assert not torch.equal(F.avg_pool2d(ones, 3, 1, 1), ones)
    kinds = {name: inception.chains(kind)[1] for name, kind in inception.MIXED.items()}
    assert kinds["Mixed_7c"] == "max" and {kinds[n] for n in ("Mixed_5b", "Mixed_6e", "Mixed_7b")} == {"mean"}
    block = Mixed(4, "B")
    assert block(torch.zeros(1, 4, 9, 9)).shape == (1, 384 + 96 + 4, 4, 4)


def test_resize_of_tensorflow_1() -> None:
    """Output i reads position i H / side; torch's reads (i + 1/2) H / side - 1/2."""
    ramp = torch.arange(8, dtype=torch.float64).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    wide = stretch(ramp, 20)
    at = torch.arange(20, dtype=torch.float64) * 0.4
    assert torch.allclose(wide[0, 0, 3], at.clamp(max=7)) and wide.shape == (1, 1, 20, 20)
    halves = F.interpolate(ramp, size=(20, 20), mode="bilinear", align_corners=False)
    assert torch.allclose(halves[0, 0, 3], ((torch.arange(20) + 0.5) * 0.4 - 0.5).clamp(0, 7).double())
    image = torch.rand(2, 3, 7, 5, dtype=torch.float64)
    tall = stretch(image, 11)
    transposed = stretch(image.transpose(2, 3), 11).transpose(2, 3)
    assert torch.allclose(tall, transposed) and torch.equal(stretch(image[..., :5, :], 5), image[..., :5, :])
    assert torch.equal(tall[..., 0, 0], image[..., 0, 0])
    once = F.interpolate(image, size=(22, 10), mode="bilinear", align_corners=False)
    assert once.mean() == pytest.approx(image.mean().item(), abs=0.05)


def test_values_that_go_in() -> None:
    with torch.device("meta"):
        adm, fid = Inception(), InceptionPytorchFid()
    levels = torch.tensor([0.0, 128.0, 255.0]).view(3, 1, 1, 1)
    images = (levels / 127.5 - 1).expand(3, 3, 4, 4)
    for network, expected in ((adm, (levels - 128) / 128), (fid, levels / 127.5 - 1)):
        x = network.prepare(images)
        assert x.shape == (3, 3, 299, 299) and torch.allclose(x, expected.expand_as(x), atol=1e-6)


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("SERIATIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv(weights.VARIABLE, raising=False)
    return tmp_path


def test_weights_that_are_nowhere(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_features("inception", size=(8, 8), channels=3)
    for word in (weights.FILE, weights.URL, weights.VARIABLE, "--features pixels", "classifier", "HF_HUB_OFFLINE"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(weights, "URL", (nowhere / "gone.pth").as_uri())
    with pytest.raises(CheckpointError, match="could not be fetched"):
        open_features("inception", size=(8, 8), channels=3)
    monkeypatch.setenv(weights.VARIABLE, str(nowhere / "none.pth"))
    with pytest.raises(UsageError, match=r"none\.pth is no file"):
        open_features("inception", size=(8, 8), channels=3)


def test_other_weights_are_refused(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = nowhere / "other.pth"
    other.write_bytes(b"other")
    for which in (str(other), f"inception:{other}"):
        with pytest.raises(CheckpointError, match=r"other.pth: its sha256 begins with d9298a10, .* with 6726825d"):
            open_features(which, size=(8, 8), channels=3)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(weights, "URL", other.as_uri())
    with pytest.raises(CheckpointError, match="gave another file"):
        open_features("inception", size=(8, 8), channels=3)
    assert not list(nowhere.glob("cache/**/*.pth")), "nothing of it is kept"


def test_a_weights_file_is_found_checked_and_loaded(
    nowhere: Path, network: Inception, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = nowhere / "source.pth"
    torch.save(network.state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(weights, "DIGEST", digest)
    monkeypatch.setattr(weights, "URL", file.as_uri())
    monkeypatch.delenv("HF_HUB_OFFLINE")
    loaded = open_features("inception", size=(8, 8), channels=3)  # fetched
    assert (nowhere / "cache" / "seriatim" / weights.FILE).read_bytes() == file.read_bytes()
    assert loaded.standard and loaded.config["weights_sha256"] == digest
    same(loaded, network)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert open_features("inception-pytorch-fid", size=(8, 8), channels=3).standard, "now from the cache"
    (nowhere / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    (nowhere / "cache" / "seriatim" / weights.FILE).rename(nowhere / "torch" / "hub" / "checkpoints" / weights.FIDELITY)
    assert open_features("inception", size=(8, 8), channels=3).standard, "torch-fidelity's copy"


def same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_tensors_that_do_not_fit() -> None:
    with torch.device("meta"):
        network = Inception()
    tensors: dict[str, Tensor] = {
        name: torch.zeros(1).expand(value.shape)
        for name, value in network.state_dict().items()
        if not name.endswith("num_batches_tracked")  # files without them are as good
    }
    network.load_tensors(tensors, "x.pth")
    assert not any(p.is_meta for p in network.parameters())
    lacking = {k: v for k, v in tensors.items() if k != "Mixed_7c.branch1x1.bn.running_var"}
    with pytest.raises(CheckpointError, match=r"x.pth lacks tensor 'Mixed_7c.branch1x1.bn.running_var'"):
        network.load_tensors(lacking, "x.pth")
    with pytest.raises(CheckpointError, match="has shape"):
        network.load_tensors(tensors | {"fc.weight": torch.zeros(1000, 2048)}, "x.pth")
    with pytest.raises(CheckpointError, match="not finite"):
        network.load_tensors(tensors | {"fc.bias": torch.from_numpy(np.full(1008, np.nan))}, "x.pth")
