"""A run that went wrong says what helps, and it does."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import metrics, tiny_run
from safetensors.torch import load_file

from seriatim.checkpoints.unfinished import all_checkpoints
from seriatim.core.errors import ConfigError, NumericsError
from seriatim.data.loader import Batch
from seriatim.training.blow_up import BlowUpGuard, growth
from seriatim.training.config import read_recipe
from seriatim.training.loop import train
from seriatim.training.not_finite import FiniteGuard
from seriatim.training.state import RunState

tiny = partial(tiny_run, "training.images=160", "training.save_images=16")


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run in bfloat16 whose loss is not finite after 96 images; what was wrong is over afterwards."""
    true, folder = FiniteGuard.skips, tmp_path / "bad"

    def check(guard: FiniteGuard, run: RunState, batch: Batch, loss: float, norm: float) -> bool:
        return true(guard, run, batch, loss * float("nan") if run.seen == 96 else loss, norm)

    with monkeypatch.context() as patched:
        patched.setattr(FiniteGuard, "skips", check)
        for resume in (False, True):  # the same batch and the same loss, again and again
            with pytest.raises(NumericsError) as caught:
                train(tiny("training.dtype=bfloat16"), folder, resume=resume, quiet=True)
            message = str(caught.value)
            assert "the loss is not finite (nan) after 96 images" in message and "\n" not in message
            assert "go on with --resume and a lower training.learning_rate (now 0.002) or training.clip" in message
            assert f"training.dtype=float32; or begin another run with training.init_from={folder}" in message
    yield folder


# --- not finite ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("learning_rate", "0.0005", "training.learning_rate from 0.002 to 0.0005"),
        ("clip", "0.5", "training.clip from 3.0 to 0.5"),
        ("dtype", "float32", "training.dtype from bfloat16 to float32"),
    ],
)
def test_a_resumed_run_may_change_what_helps(bad: Path, setting: str, value: str, says: str) -> None:
    cured = tiny("training.dtype=bfloat16", f"training.{setting}={value}")
    result = train(cured, bad, resume=True, quiet=True)
    assert result.images == 160 and (bad / "model").is_dir()
    written = read_recipe(str(bad / "recipe.yaml"))
    assert written.changes == [f"after 96 images: {says}"]
    assert str(getattr(written.training, setting)) == value and result.dtype == written.training.dtype
    kept = read_recipe(str(bad / "recipe.yaml"), ["training.images=176", "training.dtype=auto"])
    again = train(kept, bad, resume=True, quiet=True)
    assert again.dtype == result.dtype, "what was chosen stays"
    longer = ["after 160 images: training.images from 160 to 176"]
    assert read_recipe(str(bad / "recipe.yaml")).changes == written.changes + longer, "and nothing more was changed"


def test_another_run_of_a_changed_recipe_has_its_own_history(bad: Path) -> None:
    train(tiny("training.images=112"), bad, resume=True, quiet=True)
    assert "changes:" in (bad / "recipe.yaml").read_text()
    train(read_recipe(str(bad / "recipe.yaml")), bad.parent / "new", quiet=True)
    assert "changes" not in (bad.parent / "new" / "recipe.yaml").read_text()


def test_a_cured_run_trains_with_its_new_settings(bad: Path) -> None:
    train(tiny("training.learning_rate=0.0005"), bad, resume=True, quiet=True)
    before, after = (metrics(bad)[i]["learning_rate"] for i in (5, 6))
    assert after < before / 2


def test_other_settings_are_still_refused(bad: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.ema: .*keeps its settings, except for training\.clip, "):
        train(tiny("training.dtype=bfloat16", "training.ema=0.5"), bad, resume=True, quiet=True)


@pytest.mark.parametrize("what", ["run", "checkpoint"])
def test_another_run_begins_from_a_run_that_is_not_finished(bad: Path, what: str) -> None:
    older, newest = (all_checkpoints(bad / "checkpoints")[i] for i in (0, -1))
    source = bad if what == "run" else older
    still = ["training.images=1", "training.learning_rate=1.0e-12", f"training.init_from={source}"]
    train(tiny(*still), bad.parent / "new", quiet=True)
    wanted = load_file((newest if what == "run" else older) / "average.safetensors")
    for name, tensor in load_file(bad.parent / "new" / "model" / "model.safetensors").items():
        assert torch.allclose(tensor, wanted[name], atol=1e-6), name


# --- a loss that blows up -----------------------------------------------------------------------------------------


def test_growth_is_that_over_the_recent_mean() -> None:
    run = RunState()
    assert [round(growth(run, loss)) for loss in (2.0, 2.0, 2000.0)] == [1, 1, 1000]
    run = RunState(loss=-4.0)  # of a checkpoint that did not keep its recent mean
    assert growth(run, -400.0) == 0.0 and growth(run, 40.0) == pytest.approx(10.0, rel=0.1)
    run, grown = RunState(), [0.0]
    for step in range(200):  # 15 % more each step: no two steps differ by much, and it is seen all the same
        grown.append(growth(run, 1.15**step))
    assert max(grown) > 1000


def test_a_healthy_loss_never_warns(tmp_path: Path) -> None:
    """Noise of a factor of a hundred, falling by a factor of ten thousand."""
    generator = torch.Generator().manual_seed(0)
    guard, run = BlowUpGuard(tiny().training, tmp_path), RunState()
    for step in range(2000):
        noise = 10.0 ** float(torch.rand((), generator=generator) * 2 - 1)
        guard.check(run, noise * 10.0 ** (-step / 500))


def test_it_warns_once_until_the_loss_has_come_down(tmp_path: Path) -> None:
    guard, run = BlowUpGuard(tiny().training, tmp_path), RunState(seen=320)
    guard.check(run, 1.0)
    with pytest.warns(UserWarning, match=r"grown 1e\+05 times over its recent mean, to 1e\+05 after 320 images"):
        guard.check(run, 1e5)
    guard.check(run, 1e5)
    guard.check(run, 1.0)
    with pytest.warns(UserWarning, match=r"training\.on_blow_up=stop"):
        guard.check(run, 1e5)


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_resuming_with_a_learning_rate_that_is_a_thousand_times_larger(tmp_path: Path, action: str) -> None:
    """Row 16 of the fault table. With `stop` the last checkpoint is from before the last update."""
    train(tiny("training.images=80", "training.learning_rate=0.02"), tmp_path, quiet=True)
    worse = tiny("training.learning_rate=20", f"training.on_blow_up={action}")
    if action == "warn":
        with pytest.warns(UserWarning, match="the loss has grown .* times over its recent mean"):
            train(worse, tmp_path, resume=True, quiet=True)
        assert (tmp_path / "model").is_dir()
    else:
        with pytest.raises(NumericsError, match=r"the loss has grown .*; stopped before the next update; go on with"):
            train(worse, tmp_path, resume=True, quiet=True)
        assert len(metrics(tmp_path)) < 10
