"""A tokenizer of codes, evaluated: what it loses, and how its codes are used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typing_extensions import override

from seriatim.checkpoints.tokenizer import save_tokenizer
from seriatim.cli.main import run
from seriatim.core.errors import UsageError
from seriatim.data.base import Digits, ImageData
from seriatim.evaluation.features import open_features
from seriatim.evaluation.tokenizers import evaluate_tokenizer
from seriatim.tokenizers.kmeans import KMeans


class Tiles(ImageData):
    """Images of 8 x 8 whose four corners are each black, grey or white."""

    def __init__(self) -> None:
        self.count, self.size, self.channels, self.class_names = 162, (8, 8), 1, []
        corners = torch.cartesian_prod(*[torch.tensor([0, 128, 255], dtype=torch.uint8)] * 4).repeat(2, 1)  # (162, 4)
        self.pixels = corners.view(-1, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)

    def images(self, index: torch.Tensor) -> torch.Tensor:
        return self.pixels[index]

    @override
    def labels(self, index: torch.Tensor) -> None:
        return None


def test_codes_that_lose_nothing_are_used_alike(tmp_path: Path) -> None:
    tokenizer, data = KMeans(8, 4, 1, vocab=3), Tiles()
    tokenizer.fit([data.images(torch.arange(162)).float() / 127.5 - 1])
    found = evaluate_tokenizer(tokenizer, data, tmp_path, num=81, quiet=True)
    assert found.figures["PSNR"].value == 100 and found.figures["SSIM"].value == pytest.approx(1, abs=1e-6)
    assert found.noise == {}
    assert found.latents["codes"] == 3 and found.latents["used"] == 1
    assert found.latents["perplexity"] == pytest.approx(3, abs=0.05)
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["codes"] == found.latents and "latents" not in report
    assert "perplexity of 3 codes" in report["markdown"] and "100.0%" in report["markdown"]
    with pytest.raises(UsageError, match="noise: is for continuous tokens"):
        evaluate_tokenizer(tokenizer, data, tmp_path, num=81, noise=(0.1,), quiet=True)


def test_more_codes_lose_less(tmp_path: Path) -> None:
    features, psnr, distance = open_features("pixels", size=(8, 8), channels=1), [], []
    for vocab in (4, 64):
        tokenizer = KMeans(8, 2, 1, vocab=vocab)
        tokenizer.fit(Digits().some(1000, 500))
        found = evaluate_tokenizer(
            tokenizer, Digits(True), tmp_path / str(vocab), num=100, features=features, quiet=True
        )
        psnr.append(found.figures["PSNR"].value)
        distance.append(found.figures["rFD[pixels]"].value)
        assert 0 < found.latents["used"] <= 1 < found.latents["perplexity"] <= vocab
    assert psnr[1] > psnr[0] + 3 and distance[1] < distance[0]


def test_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = KMeans(8, 2, 1, vocab=16)
    tokenizer.fit(Digits().some(1000, 500))
    save_tokenizer(tokenizer, tmp_path / "codes")
    words = ["evaluate", "codes", "--data", "digits", "--num", "64", "--features", "none", "--tokenizer"]
    assert run(words) == 0
    out = capsys.readouterr().out
    for word in ("PSNR", "SSIM", "codes: used", "codes: perplexity"):
        assert word in out
    assert run([*words, "--noise", "0.1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "noise: is for continuous tokens" in lines[0]
