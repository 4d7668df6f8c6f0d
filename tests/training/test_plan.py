"""A dry run measures a few steps of what a recipe would train, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seriatim.cli.main import run
from seriatim.training import plan

TINY = [
    "model.width=16",
    "model.depth=1",
    "model.heads=1",
    "training.batch_size=16",
    "training.dtype=float32",
    "training.threads=1",
    "training.images=3200",
]
HEAD = ["model.head.width=16", "model.head.depth=1"]


def dry(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert run(["train", *words, "--dry-run", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_plan_has_measured_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = dry(capsys, "mar-digits", *TINY, *HEAD)
    assert not list(tmp_path.iterdir()), "nothing is written"
    assert found["measured_steps"] == plan.STEPS and found["images_per_second"] > 0
    assert found["seconds_to_the_end"] == pytest.approx(3200 / found["images_per_second"])
    assert found["peak_memory_bytes"] > 1 << 20 and (found["dtype"], found["threads"]) == ("float32", 1)


def test_the_plan_of_a_run_that_goes_on_is_that_of_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["mar-digits", *TINY, *HEAD, "--out", str(tmp_path / "run")]
    assert run(["train", *words, "training.images=64", "training.save_images=64", "--json"]) == 0
    capsys.readouterr()
    found = dry(capsys, *words, "training.images=640", "--resume")
    assert found["seconds_to_the_end"] == pytest.approx((640 - 64) / found["images_per_second"])
    found = dry(capsys, *words, "training.images=640", "training.micro_batch=auto", "--resume=auto")
    assert found["micro_batch"] >= 1


def test_flops_are_those_of_the_products(capsys: pytest.CaptureFixture[str]) -> None:
    """A causal model computes each weight of its products once for each of 16 tokens, forward and twice backward."""
    one, two = (dry(capsys, "gpt-digits", *TINY, f"model.depth={depth}") for depth in (1, 2))
    block = two["parameters"] - one["parameters"] - 2 * 16  # but for the norms
    attention = 3 * 2 * (2 * 16 * 16 * 16)  # scores and sums over the values of 16 positions of width 16
    assert two["flops_per_image"] - one["flops_per_image"] == pytest.approx(6 * 16 * block + attention, rel=0.01)


def test_a_step_that_would_take_long_is_not_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "PATIENCE", 0.0)
    monkeypatch.setattr(plan, "timed_steps", lambda *_, **__: pytest.fail("whole steps are too slow"))
    found = dry(capsys, "mar-digits", *TINY, *HEAD)
    assert found["measured_steps"] == 0 and found["images_per_second"] > 0


def test_a_run_of_one_batch_is_timed_in_its_only_step(capsys: pytest.CaptureFixture[str]) -> None:
    found = dry(capsys, "mar-digits", *TINY, *HEAD, "training.images=16")
    assert found["measured_steps"] == 1 and found["images_per_second"] > 0


def test_a_table_has_units(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "mar-digits", *TINY, *HEAD, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("GFLOP", "GiB", "images_per_second", "to_the_end"))
