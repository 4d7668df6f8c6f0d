"""What training does on CUDA alone: with spies where there is no GPU, and on a real one with `pytest -m gpu`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import TINY_RUN
from torch import Tensor, nn

from seriatim.core.errors import ConfigError
from seriatim.data import loader
from seriatim.data.base import Digits
from seriatim.data.loader import Batches, Loader
from seriatim.tokenizers.latent import Latent, check_encoder_dtype, encoding_in
from seriatim.tokenizers.pixels import Pixels
from seriatim.training.config import read_recipe
from seriatim.training.distributed import ALONE
from seriatim.training.loop import GeneratorTask, train
from seriatim.training.state import RunState

CUDA = torch.device("cuda", 0)
TINY = [*TINY_RUN, "model.heads=2", "model.dropout=0", "training.images=64"]


def digits() -> Batches:
    return Batches(Digits(), 0, 0, 32, 16)


def test_the_loader_pins_what_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    true, given = loader.DataLoader, list[Any]()

    def spy(*arguments: Any, pin_memory: bool, **options: Any) -> Any:
        given.append(pin_memory)
        return true(*arguments, **options)

    monkeypatch.setattr(loader, "DataLoader", spy)
    for pin in (False, True):
        assert len(list(Loader(digits(), 0, pin=pin))) == 2
    assert given == [False, True]


def test_a_batch_pins_its_images_and_keeps_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []

    def pin(self: Tensor) -> Tensor:
        pinned.append(self)
        return self.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    batch = digits()[1]
    made = batch.pin_memory()
    assert len(pinned) == 1 and pinned[0] is batch.images
    assert torch.equal(made.images, batch.images) and made.images is not batch.images
    assert made.index is batch.index and made.labels is batch.labels and made.first == batch.first


@pytest.mark.parametrize(
    ("device", "there", "wanted"), [(CUDA, True, True), (CUDA, False, False), ("cpu", True, False)]
)
def test_images_are_pinned_for_cuda_alone(
    monkeypatch: pytest.MonkeyPatch, device: Any, there: bool, wanted: bool
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)

    def loader(*_: Any, pin: bool) -> list[Any]:
        asked.append(pin)
        return []

    monkeypatch.setattr("seriatim.training.batched_task.Loader", loader)
    task: Any = SimpleNamespace(
        recipe=read_recipe("mar-digits", TINY), data=Digits(), total=64, where=torch.device(device), world=ALONE
    )
    GeneratorTask.batches(task, RunState())
    assert asked == [wanted]


class Encoder(nn.Module):
    """An autoencoder that tells in which dtype its products are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 2, stride=2)
        self.dtypes: list[torch.dtype] = []

    def encode(self, images: Tensor, return_dict: bool) -> tuple[Any]:  # noqa: ARG002
        moments = self.layer(images)
        self.dtypes.append(moments.dtype)
        return (SimpleNamespace(parameters=moments),)


def latent() -> Latent:
    return Latent(
        Encoder(), 8, 1, 1, stride=2, latent_channels=2, gaussian=True, statistics="fixed", given=([0, 0], [1, 1])
    )


def test_latents_are_encoded_in_bfloat16_only_where_a_recipe_says_so() -> None:
    tokenizer, images = latent(), torch.rand(2, 1, 8, 8)
    plain = tokenizer.moments(images)
    with encoding_in(tokenizer, torch.bfloat16):
        half = tokenizer.moments(images)
    after = tokenizer.moments(images)
    assert tokenizer.autoencoder.dtypes == [torch.float32, torch.bfloat16, torch.float32]
    assert plain.dtype == half.dtype == torch.float32 and torch.equal(plain, after)
    assert not torch.equal(plain, half) and torch.allclose(plain, half, atol=0.05)
    check_encoder_dtype(tokenizer, torch.bfloat16)


def test_other_tokenizers_refuse_bfloat16_before_a_run_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.encoder_dtype: Pixels has no encoder of continuous latents"):
        train(read_recipe("mar-digits", [*TINY, "training.encoder_dtype=bfloat16"]), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    with encoding_in(Pixels(8, 2, 1), torch.float32):
        pass


def losses(folder: Path, device: str, *words: str) -> list[float]:
    train(read_recipe("mar-digits", [*TINY, *words]), folder, device=device, quiet=True)
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "words",
    [
        ["training.tf32=false"],
        ["training.tf32=true"],
        ["training.compile=true"],
        ["training.checkpoint_activations=true"],
        ["training.optimiser=muon"],
        ["training.workers=1"],
    ],
)
def test_a_gpu_trains_as_a_cpu_does(tmp_path: Path, words: list[str]) -> None:
    here, there = losses(tmp_path / "cpu", "cpu", *words), losses(tmp_path / "cuda", "cuda", *words)
    assert all(math.isclose(a, b, rel_tol=0.02) for a, b in zip(here, there, strict=True))


@pytest.mark.gpu
def test_batches_for_a_gpu_are_pinned(tmp_path: Path) -> None:
    task = GeneratorTask(read_recipe("mar-digits", TINY), tmp_path, CUDA, quiet=True)
    assert next(task.batches(RunState())).images.is_pinned()
    assert all(group["fused"] for group in task.parts.optimiser.param_groups)
