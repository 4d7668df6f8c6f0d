"""`seriatim train`: resuming what there is, and settings that change when a run is resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import metrics

from seriatim.checkpoints.unfinished import all_checkpoints
from seriatim.cli.main import run as command
from seriatim.core.errors import UsageError
from seriatim.core.schedules import learning_rate
from seriatim.training.config import read_any, read_recipe
from seriatim.training.loop import train

TINY = [
    "model.width=16", "model.depth=1", "model.heads=1", "model.head.width=16", "model.head.depth=1",
    "training.batch_size=16", "training.log_images=16", "training.dtype=float32", "training.threads=1",
    "training.images=64", "training.save_images=32", "training.schedule=constant", "training.warmup_images=0",
]  # fmt: skip
WORDS = ["train", "mar-digits", *TINY]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    train(read_recipe("mar-digits", [*TINY, "training.schedule=cosine"]), out, device="cpu", quiet=True)
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def said(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """What a command says on standard error; it must end with the exit code `code`."""
    capsys.readouterr()
    found = command(words)
    err = capsys.readouterr().err
    assert found == code, err
    return err


# --- resuming what there is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [["--resume=auto"], ["--resume", "auto"]])
def test_auto_begins_and_goes_on(tmp_path: Path, how: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    (tmp_path / "empty").mkdir()
    words = [*WORDS, *how, "--out", str(out)]
    assert f"there is no run in {out} yet; beginning one" in said(words, capsys)
    shutil.rmtree(out / "model")
    again = said(words, capsys)
    assert "resuming after 64 images" in again and "beginning" not in again
    assert (out / "model").is_dir() and len(metrics(out)) == 4
    assert "beginning one" in said([*WORDS, *how, "--out", str(tmp_path / "empty")], capsys)


def test_auto_begins_where_a_start_was_interrupted(tmp_path: Path) -> None:
    """Only the recipe, which is written last, makes a folder a run."""
    (tmp_path / "data.json").write_text('{"fingerprint": "x"}')
    (tmp_path / ".lock").write_text("")
    recipe = read_recipe("mar-digits", [*TINY, "training.images=16"])
    assert train(recipe, tmp_path, resume="auto", quiet=True).images == 16


def test_a_run_without_a_checkpoint_begins_anew_unless_it_is_finished(tmp_path: Path) -> None:
    """Its model is not replaced by that of other settings, nor trained again for nothing."""
    recipe = read_recipe("mar-digits", [*TINY, "training.images=16", "training.save_images=0"])
    train(recipe, tmp_path, quiet=True)
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    made = (tmp_path / "model" / "model.safetensors").read_bytes()
    for how in (True, "auto"):
        with pytest.raises(UsageError, match=r"a finished run without a whole checkpoint.* --overwrite"):
            train(recipe, tmp_path, resume=how, quiet=True)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == made
    shutil.rmtree(tmp_path / "model")
    assert train(recipe, tmp_path, resume="auto", quiet=True).images == 16
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == made


def test_auto_refuses_what_is_no_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("mine")
    assert "holds 'thesis.txt' and is no run" in said(
        [*WORDS, "--resume=auto", "--out", str(tmp_path / "theirs")], capsys, 2
    )
    (run / "data.json").unlink()
    assert "has no data.json" in said([*WORDS, "--resume=auto", "--out", str(run)], capsys, 2)
    assert "overwrite: can't go with resume" in said(
        [*WORDS, "--resume=auto", "--overwrite", "--out", str(run)], capsys, 2
    )


def test_resume_alone_is_as_it_was(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flag before the recipe does not swallow it, and nothing is begun."""
    cosine = [*WORDS[1:], "training.schedule=cosine"]
    assert "resuming after 64" in said(["train", "--resume", *cosine, "--out", str(run)], capsys)
    missing = str(tmp_path / "nowhere")
    assert "no run to resume" in said(["train", *cosine, "--out", missing, "--resume"], capsys, 2)
    assert "resume: 'maybe' is not known; write --resume or --resume=auto" in said(
        [*WORDS, "--resume=maybe", "--out", missing], capsys, 2
    )
    with pytest.raises(UsageError, match="resume: 'always' is not allowed; give True, False or 'auto'"):
        train(read_recipe("mar-digits", TINY), missing, resume="always", quiet=True)  # type: ignore[arg-type]


# --- settings that change -------------------------------------------------------------------------------------------


def test_an_override_needs_nothing_repeated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the recipe nor its settings, and they may even be others."""
    words = ["--resume", "--override", "training.learning_rate=1e-4", "--override", "training.images=96"]
    said(["train", "mar-digits", *words, "--out", str(run)], capsys)
    found = read_any(str(run / "recipe.yaml"))
    assert (found.training.images, found.training.learning_rate, found.training.batch_size) == (96, 1e-4, 16)
    assert found.changes == [
        "after 64 images: training.images from 64 to 96",
        "after 64 images: training.learning_rate from 0.002 to 0.0001",
    ]
    err = said(["train", "--resume", "--out", str(run), "--override", "training.images=112"], capsys)
    assert "after 96 images: training.images from 96 to 112" in err
    assert read_any(str(run / "recipe.yaml")).changes[2:] == ["after 96 images: training.images from 96 to 112"]
    assert ": training." not in said(["train", "--resume", "--out", str(run)], capsys), "nothing changes"
    assert len(read_any(str(run / "recipe.yaml")).changes) == 3 and len(metrics(run)) == 7


def test_settings_may_be_repeated_beside_an_override(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "training.schedule=cosine", "--resume", "--override", "training.clip=1", "--out", str(run)]
    said(words, capsys)
    other = [*WORDS, "training.ema=0.5", "--resume", "--override", "training.clip=1", "--out", str(run)]
    assert "training.ema: 0.999 in" in said(other, capsys, 2)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--override", "training.ema=0.5", "--resume"], "training.ema: 0.999 in"),
        (["--override", "model.width=32", "--resume"], "model.width: 16 in"),
        (["--override", "training.lerning_rate=1", "--resume"], "did you mean 'learning_rate'"),
        (["--override", "training.learning_rate", "--resume"], "is not an override; write section.key=value"),
        (["--override", "training.clip=0", "--resume"], "training.clip"),
        (["--override", "training.images=32", "--resume"], "training.images: 32 is less than the 64 images"),
        (["--override", "training.clip=1"], "override: only valid with --resume"),
        ([], "out: "),
    ],
)
def test_overrides_that_are_refused(run: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "recipe.yaml").read_text()
    err = said(["train", "mar-digits", "--out", str(run), *words], capsys, 2)
    assert line in err and "Traceback" not in err and err.count("\n") <= 2
    assert (run / "recipe.yaml").read_text() == before


def test_a_recipe_can_be_left_out_only_where_a_run_has_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--resume"], ["--out", str(tmp_path / "x")]):
        assert "recipe: name one" in said(["train", *words], capsys, 2)
    nowhere = ["--out", str(tmp_path / "nowhere")]
    assert "so there is no run to resume" in said(["train", "--resume", *nowhere], capsys, 2)
    assert "so name the recipe of the one to begin" in said(["train", "--resume=auto", *nowhere], capsys, 2)


def test_auto_begins_with_what_it_would_resume_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command of a job that is put back into the queue: the same each time."""
    words = [*WORDS, "--resume=auto", "--override", "training.learning_rate=1e-4", "--out", str(tmp_path / "run")]
    for _ in range(2):
        said(words, capsys)
        found = read_any(str(tmp_path / "run" / "recipe.yaml"))
        assert found.training.learning_rate == 1e-4 and not found.changes


def test_what_a_longer_cosine_does_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = all_checkpoints(run / "checkpoints")[-1]
    shutil.rmtree(newest)
    err = said(["train", "--resume", "--out", str(run), "--override", "training.images=128"], capsys)
    now, then = (0.002 * learning_rate(32, images, 0, "cosine") for images in (128, 64))
    assert "the cosine schedule now ends after 128 images, not after 64: after 32 images the learning rate goes" in err
    assert f"goes from {then:.3g} to {now:.3g}\n" in err and then < now
    assert metrics(run)[2]["learning_rate"] == pytest.approx(0.002 * learning_rate(48, 128, 0, "cosine"))


def test_without_a_cosine_nothing_is_said_of_the_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(read_recipe("mar-digits", [*TINY, "training.images=16"]), tmp_path, quiet=True)
    err = said(["train", "--resume", "--out", str(tmp_path), "--override", "training.images=32"], capsys)
    assert "training.images from 16 to 32" in err and "the cosine schedule" not in err
