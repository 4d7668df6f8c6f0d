"""`--plugin` as a person meets it: before and after the verb, with every verb, in one process and in several."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run
from helpers import one_line
from PIL import Image

from seriatim.cli.plugin_option import plugins_first
from seriatim.core.errors import UsageError

EXAMPLE = str(Path(__file__).resolve().parents[2] / "examples" / "own_plugin.py")
DIGEST = hashlib.sha256(Path(EXAMPLE).read_bytes()).hexdigest()
TRAIN = (
    "train", "mar-digits", "model.width=32", "model.depth=1", "model.head={kind: laplace}", "training.images=64",
    "training.batch_size=32", "training.sample_images=0", "training.dtype=float32", "training.threads=1",
    "sampling={order: columns, num_inference_steps: 2}",
)  # fmt: skip
DRAW = ("--num-images-per-label", "1", "--num-inference-steps", "2", "--label", "3", "--seed", "1")


@pytest.mark.parametrize(
    "given, wanted",
    [
        (["train", "r", "--plugin", "a.py", "--out", "o"], ["--plugin", "a.py", "train", "r", "--out", "o"]),
        (["--plugin=b.py", "train", "--plugin", "a.py"], ["--plugin=b.py", "--plugin", "a.py", "train"]),
        (["train", "--", "--plugin", "a.py"], ["train", "--", "--plugin", "a.py"]),
        (["train", "r"], ["train", "r"]),
    ],
)
def test_the_option_may_stand_anywhere(given: list[str], wanted: list[str]) -> None:
    assert plugins_first(given) == wanted


@pytest.mark.parametrize("words", [["train", "--plugin"], ["--plugin", "--json", "models"]])
def test_a_missing_file_is_said(words: list[str]) -> None:
    with pytest.raises(UsageError, match=r"plugin: --plugin is followed by no file; write --plugin FILE\.py"):
        plugins_first(words)


def test_help_stays_quick_and_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text("print('LOUD')\n")
    code = "import sys; from seriatim.cli.main import run; run(sys.argv[1:]); sys.exit(str({'torch'} & {*sys.modules}))"
    words = [sys.executable, "-c", code, "--plugin", "loud.py", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stderr.strip() == "set()" and "--plugin" in done.stdout and "LOUD" not in done.stdout


def trained(seriatim: Run) -> None:
    done = seriatim("--plugin", EXAMPLE, *TRAIN, "--out", "run")
    assert done.returncode == 0, done.stderr


def test_a_run_records_plugins_and_samples_with_them(seriatim: Run, tmp_path: Path) -> None:
    trained(seriatim)
    (told,) = json.loads((tmp_path / "run" / "environment.json").read_text())["plugins"]
    registers = ["head laplace", "order columns", "guidance schedule late"]
    assert told == {"path": EXAMPLE, "sha256": DIGEST, "registers": registers}

    # options of the head, and values from the tables, after the verb too
    own = ("--sharpness", "2", "--guidance-scale", "3", "--guidance-schedule", "late")
    done = seriatim("sample", "run", *DRAW, *own, "--out", "s", "--json", "--plugin", EXAMPLE)
    assert done.returncode == 0, done.stderr
    request = json.loads(done.stdout)["request"]
    assert request["order"] == "columns" and request["guidance_schedule"] == "late"
    assert request["head_options"] == {"sharpness": 2.0}
    assert "--sharpness" in seriatim("sample", "--help", "--plugin", EXAMPLE).stdout

    lacks = one_line(seriatim("sample", "run", *DRAW, "--out", "t"), 4, "model.head.kind: 'laplace' is not known")
    assert "load that first (--plugin FILE.py" in lacks
    one_line(seriatim("sample", "run", "--order", "diagonal", "--plugin", EXAMPLE), 2, "order: 'diagonal'", "--plugin")


def test_a_run_that_goes_on_with_another_version_says_so(seriatim: Run, tmp_path: Path) -> None:
    done = seriatim("--plugin", EXAMPLE, *TRAIN, "training.save_images=32", "--out", "run")
    assert done.returncode == 0, done.stderr
    other = tmp_path / "own_plugin.py"
    other.write_text(Path(EXAMPLE).read_text() + "# changed\n")
    more = ("--resume", "--out", "run", "--override", "training.images=96", "--plugin", str(other))
    done = seriatim("train", *more)
    assert done.returncode == 0, done.stderr
    assert f"plug-in own_plugin.py from sha256 {DIGEST[:12]} to sha256 " in done.stderr, done.stderr


def test_other_verbs_know_the_parts_too(seriatim: Run, tmp_path: Path) -> None:
    trained(seriatim)
    Image.new("L", (8, 8), 90).save(tmp_path / "picture.png")
    mask = Image.new("L", (8, 8), 0)
    mask.paste(255, (0, 0, 8, 4))  # the upper half is repainted
    mask.save(tmp_path / "mask.png")
    judged = ("--data", "digits", "--features", "pixels", "--num", "70")
    for words in (
        ("edit", "run", "picture.png", "--mask", "mask.png", "--label", "3", "--out", "edited"),
        ("evaluate", "run", *judged, "--out", "judged"),
        ("sweep", "run", "order=columns,raster", *judged, "--figures", "frechet", "--out", "swept"),
        ("compare", "run", "run", *judged, "--figures", "frechet", "--out", "compared"),
        # Another process, which must load the plug-in as well, measures memory.
        ("bench", "run", "--repetitions", "1", "--threads", "1", "--num-inference-steps", "1", "--no-decode"),
    ):
        done = seriatim(f"--plugin={EXAMPLE}", *words)
        assert done.returncode == 0, (words[0], done.stderr)


def test_what_is_wrong_is_one_line(seriatim: Run, tmp_path: Path) -> None:
    one_line(seriatim("--plugin", "none.py", "models"), 2, "none.py does not exist")
    (tmp_path / "bad.py").write_text("import seriatim\n\nseriatim.HEADS['flow'] = seriatim.HEADS['bins']\n")
    one_line(seriatim("models", "--plugin", "bad.py"), 2, "bad.py replaces the head 'flow', which exists already")
    (tmp_path / "late.py").write_text("import seriatim\n\nseriatim.ORDERS['late'] = lambda h, w: h / 0\n")
    done = seriatim("train", "mar-digits", *TRAIN[2:4], *TRAIN[5:-1], "--out", "run", "--plugin", "late.py")
    assert done.returncode == 0, done.stderr
    words = ("sample", "run", *DRAW, "--order", "late", "--out", "s", "--plugin", "late.py")
    said = one_line(seriatim(*words), 1, "late.py failed in line 3: ZeroDivisionError")
    assert "a bug" not in said, "it is not a fault of Seriatim"


def test_no_recipe_can_name_a_plugin(seriatim: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("open('it-ran', 'w').close()\n")
    for key in ("plugin", "plugins", "training.plugin", "model.plugin"):
        done = seriatim("train", "mar-digits", f"{key}=mine.py", "--dry-run", "--out", "run")
        assert done.returncode == 2 and "unknown" in done.stderr, done.stderr
    assert not (tmp_path / "it-ran").exists()


def test_a_real_process_has_it_too(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "seriatim", "sample", "--help", "--plugin", EXAMPLE]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and "--sharpness" in done.stdout, done.stderr
