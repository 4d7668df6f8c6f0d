"""The command line as a person meets it: processes, exit codes, one line for what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run
from helpers import one_line, read_picture

from seriatim.checkpoints.native import MODEL
from seriatim.cli.main import explain, run
from seriatim.core.errors import Stopped

TINY = ("model.width=32", "model.depth=1", "model.head.width=32", "model.head.depth=1", "training.images=640")


def test_help_is_quick_and_lists_every_verb(seriatim: Run) -> None:
    """Quick (half a second on an idle machine), since it imports nothing heavy."""
    heavy = {"torch", "numpy", "pydantic", "diffusers", "sklearn", "matplotlib", "PIL"}
    code = f"import sys; from seriatim.cli.main import run; run(['--help']); sys.exit(str({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()", done.stderr
    done = seriatim("--help")
    assert done.returncode == 0
    for verb in "demo train sample evaluate sweep compare measure-latents models doctor recipes".split():
        assert verb in done.stdout
        assert seriatim(verb, "--help").returncode == 0
    assert seriatim("--version").stdout.startswith("seriatim 0.")


def test_train_then_sample(seriatim: Run, tmp_path: Path) -> None:
    done = seriatim("train", "mar-digits", *TINY, "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["images"] == 640 and report["folder"] == "run" and report["images_per_second"] > 0

    arguments = ("run", "--label", "3", "--label", "7", "--num-images-per-label", "2", "--num-inference-steps", "3")
    done = seriatim("sample", *arguments, "--num-diffusion-steps", "4", "--seed", "1", "--out", "s", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [f["label"] for f in report["files"]] == ["3", "3", "7", "7"]
    assert len(report["model_sha256"]) == 64 and report["request"]["head_options"]["num_diffusion_steps"] == 4
    files = sorted(p.name for p in (tmp_path / "s").iterdir())
    assert files == ["0000-3.png", "0001-3.png", "0002-7.png", "0003-7.png", "grid.png"]
    first = read_picture(tmp_path / "s" / "0000-3.png")
    assert first.size == (8, 8) and first.mode == "L"

    again = seriatim(
        "sample", *arguments, "--num-diffusion-steps", "4", "--seed", "1", "--out", "t", "--batch-size", "4"
    )
    assert again.returncode == 0 and "images_per_second" in again.stdout
    assert (tmp_path / "t" / "0003-7.png").read_bytes() == (tmp_path / "s" / "0003-7.png").read_bytes()

    import seriatim as package

    pipe = package.load(tmp_path / "run", device="cpu")
    result = pipe(class_labels=["3", "7"], num_images_per_label=2, num_inference_steps=3, num_diffusion_steps=4, seed=1)
    for file, image in zip(files, result.images, strict=False):
        difference = [
            abs(a - b) for a, b in zip(image.tobytes(), read_picture(tmp_path / "s" / file).tobytes(), strict=True)
        ]
        assert max(difference) <= 1, "the same request gives the same image in Python and at the command line"

    one_line(seriatim("sample", *arguments, "--out", "s"), 2, "0000-3.png exists already", "--overwrite")
    assert seriatim("sample", *arguments, "--num-diffusion-steps", "2", "--out", "s", "--overwrite").returncode == 0
    one_line(seriatim("train", "mar-digits", *TINY, "--out", "run"), 2, "run holds a run already")


def test_dry_run_builds_and_stops(seriatim: Run, tmp_path: Path) -> None:
    done = seriatim("train", "mar-digits", "--dry-run", "--json", "--out", "run")
    assert json.loads(done.stdout)["parameters"] == 1_085_960
    assert not (tmp_path / "run").exists()


def test_recipes(seriatim: Run, tmp_path: Path) -> None:
    names = [row["name"] for row in json.loads(seriatim("recipes", "list", "--json").stdout)]
    assert "mar-digits" in names
    assert "mar-digits" in seriatim("recipes", "list").stdout
    assert json.loads(seriatim("recipes", "show", "mar-digits", "--json").stdout)["training"]["clip"] == 3.0
    assert seriatim("recipes", "copy", "mar-digits", "mine.yaml").returncode == 0
    assert "#" in (tmp_path / "mine.yaml").read_text(), "comments come along"
    assert seriatim("recipes", "show", "mine.yaml").stdout == seriatim("recipes", "show", "mar-digits").stdout
    one_line(seriatim("recipes", "copy", "mar-digits", "mine.yaml"), 2, "mine.yaml exists already")
    one_line(seriatim("recipes", "show", "mar-digit"), 2, "did you mean 'mar-digits'")


def test_models(seriatim: Run) -> None:
    rows = {row["name"]: row for row in json.loads(seriatim("models", "--json").stdout)}
    assert rows["mar-b"]["parameters"] == 207_924_768 and rows["mar-b"]["tokens"] == 256
    assert rows["mar-b"]["published"]["FID"] == 2.31 and "authors" in rows["mar-b"]["published"]["source"]
    assert isinstance(rows["mar-b"]["proven"], list)
    table = seriatim("models").stdout
    assert "207,924,768" in table and "published by the authors" in table


def test_doctor(seriatim: Run, tmp_path: Path) -> None:
    report = json.loads(seriatim("doctor", "--json").stdout)
    assert report["versions"]["torch"].startswith("2.") and report["threads"] >= 1
    assert report["bf16"]["speedup"] > 0 and report["disk"]["writable"] is True and report["disk"]["free_bytes"] > 0
    broken = tmp_path / "broken" / "torchvision"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    path = os.pathsep.join([str(broken.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "seriatim", "doctor"]  # a new interpreter, because paths are read at its start
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0 and "broken: RuntimeError: operator torchvision::nms" in done.stdout
    assert report["versions"]["torch"] in done.stdout, "without --json it is a table"
    assert "pip uninstall torchvision" in done.stderr


BAD = [
    (("sample", "model", "--label", "hrose"), 2, "'hrose' is not a class of this model; did you mean 'horse'"),
    (("sample", "model", "--label", "3"), 2, "3 is out of range; this model has classes 0 to 2"),
    (("sample", "model", "--guidance-scale", "-1"), 2, "guidance_scale"),
    (("sample", "model", "--num-inference-steps", "0"), 2, "num_inference_steps"),
    (("sample", "model", "--num-diffusion-steps", "2000"), 2, "num_diffusion_steps: 2000"),
    (("sample", "model", "--start-timestep", "5000"), 2, "start_timestep: 5000"),
    (("sample", "model", "--solver", "dpm"), 2, "solver: 'dpm' is not known"),
    (("sample", "model", "--num-diffusion-steps-last", "500"), 2, "num_diffusion_steps_last: 500"),
    (("sample", "model", "--order", "sprial"), 2, "order: 'sprial' is not known; did you mean 'spiral'"),
    (("sample", "model", "--order", "2,0,1"), 2, "order: 3 positions given for 16 tokens"),
    (("sample", "model", "--guidance-interval", "0.1", "0.9"), 2, "guidance_interval: only valid with"),
    (("sample", "model", "--min-tokens", "0"), 2, "min_tokens"),
    (("sample", "model", "--seed", "x"), 2, "'--seed'"),
    (("sample", "model", "--nosuch"), 2, "--nosuch"),
    (("sample", "model", "--device", "warp"), 2, "device: 'warp'"),
    (("sample", "model", "--out", "a-file"), 2, "out: a-file is a file"),
    (("sample", "model", "--out", "/proc/x/y"), 6, "/proc/x/y"),
    (("sample", "mar-b"), 4, "mar-b is a preset and has no weights"),
    (("sample", "empty"), 4, "empty is empty"),
    (("sample", "nosuch"), 4, "'nosuch' is no folder, packaged model, preset or hub repository"),
    (("sample", "some/where"), 4, "no folder 'some/where'"),
    (("sample",), 2, "'model'"),
    (("nosuch",), 2, "nosuch"),
    (("train", "nosuch"), 2, "neither a file nor a packaged recipe"),
    (("train", "mar-digits", "training.imagse=5"), 2, "did you mean 'images'"),
    (("train", "mar-digits", "model.widht=5"), 2, "did you mean 'width'"),
    (("train", "mar-digits", "--out", "a-file"), 2, "out: a-file is a file"),
    (("train", "mar-digits", "--out", "/proc/x/y"), 6, "/proc/x/y"),
    (("train", "typo.yaml"), 2, "typo.yaml: unknown key 'trainign'; did you mean 'training'"),
    (("demo", "--out", "full"), 2, "full holds 'thesis.txt', which is not the demo's"),
    (("demo", "--images", "0"), 2, "training.images"),
    (("demo", "--out", "/proc/x/y", "--images", "64"), 6, "/proc/x/y"),
]


@pytest.mark.usefixtures("model_folder")
@pytest.mark.parametrize(
    ("arguments", "code", "words"), BAD, ids=lambda v: " ".join(v) if isinstance(v, tuple) else None
)
def test_bad_input_is_one_line_and_an_exit_code(
    arguments: tuple[str, ...],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "a-file").write_text("x")
    (tmp_path / "typo.yaml").write_text(
        "name: x\ntrainign: {}\ndata: {}\ntokenizer: {}\nmodel: {}\ntraining: {images: 1}"
    )
    monkeypatch.chdir(tmp_path)
    done = subprocess.CompletedProcess(arguments, run(arguments), *capsys.readouterr())
    one_line(done, code, words)
    assert done.stdout == ""
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine" and (tmp_path / "a-file").read_text() == "x"


def test_a_damaged_model_in_a_process(seriatim: Run, model_folder: Path) -> None:
    path = model_folder / MODEL
    path.write_bytes(path.read_bytes()[:-1])
    one_line(seriatim("sample", "model"), 4, str(Path("model") / MODEL), "truncated")


@pytest.mark.usefixtures("model_folder")
def test_a_read_only_folder(seriatim: Run, tmp_path: Path) -> None:
    """As anybody but root, by permission; as root, on a file system that refuses."""
    if os.geteuid() == 0:
        one_line(seriatim("sample", "model", "--out", "/sys/kernel/x"), 6, "/sys/kernel/x")
    else:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o555)
        one_line(seriatim("sample", "model", "--out", "locked"), 6, "locked", "choose a folder")


def test_orders_and_schedules(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sample", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for word in ("--order", "halton", "--guidance-interval", "--guidance-power", "power-cosine", "--min-tokens"):
        assert word in printed, word
    common = ["sample", str(model_folder), "--label", "cat", "--seed", "1", "--num-diffusion-steps", "2", "--json"]
    options = ["--min-tokens", "3", "--guidance-schedule", "interval", "--guidance-interval", "0.2", "0.9"]
    assert run([*common, *options, "--order", "raster", "--out", str(tmp_path / "a")]) == 0
    request = json.loads(capsys.readouterr().out)["request"]
    assert (request["order"], request["min_tokens"], request["guidance_interval"]) == ("raster", 3, [0.2, 0.9])
    positions = ", ".join(map(str, range(16)))
    assert run([*common, *options, "--order", positions, "--out", str(tmp_path / "b")]) == 0
    assert json.loads(capsys.readouterr().out)["request"]["order"] == list(range(16))
    pictures = [read_picture(tmp_path / folder / "0000-cat.png").tobytes() for folder in "ab"]
    assert pictures[0] == pictures[1]
    power = ["--guidance-schedule", "power-cosine", "--guidance-power", "2", "--out", str(tmp_path / "c")]
    assert run([*common, *power]) == 0
    assert json.loads(capsys.readouterr().out)["request"]["guidance_power"] == 2.0


@pytest.mark.usefixtures("model_folder")
def test_more_steps_than_tokens_is_a_warning(seriatim: Run) -> None:
    done = seriatim("sample", "model", "--num-inference-steps", "64", "--num-diffusion-steps", "2", "--seed", "0")
    assert done.returncode == 0
    assert (
        done.stderr.splitlines()[0] == "warning: num_inference_steps: 64 is more than the model's 16 tokens; using 16"
    )


def test_a_loss_that_is_not_finite(seriatim: Run) -> None:
    fixed = ("training.dtype=float32", "training.threads=1")  # nothing is measured, so nothing else is said
    done = seriatim("train", "mar-digits", *TINY, *fixed, "training.learning_rate=1.0e+30", "--out", "run")
    one_line(done, 5, "is not finite", "nothing was updated")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError("x"), 6, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), 6, "out of memory"),
        (OSError(28, "No space left on device"), 6, "No space left"),
        (Stopped("stopped at 5 images; saved"), 143, "saved"),
        (KeyboardInterrupt(), 130, "stopped"),
        (ZeroDivisionError("division by zero"), 1, "a bug"),
        (SystemExit(7), 7, ""),
    ],
)
def test_every_error_becomes_one_line(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(error) == code
    printed = capsys.readouterr().err
    assert words in printed and printed.count("\n") <= 1


def test_ctrl_c_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("seriatim.training.config.read_any", interrupted)
    assert run(["recipes", "show", "mar-digits"]) == 130
    assert capsys.readouterr().err.strip() == "stopped"


def test_a_refused_request_makes_no_folder(model_folder: Path, tmp_path: Path) -> None:
    for arguments in (("--num-diffusion-steps", "2000"), ("--batch-size", "0"), ("--label", "9")):
        assert run(["sample", str(model_folder), *arguments, "--out", str(tmp_path / "refused")]) == 2
    assert run(["doctor", "--json", "--path", str(tmp_path / "nowhere" / "x")]) == 0
    assert not (tmp_path / "refused").exists() and not (tmp_path / "nowhere").exists()


def test_debug_shows_the_traceback(seriatim: Run) -> None:
    assert "Traceback" in seriatim("sample", "nosuch", SERIATIM_DEBUG="1").stderr


def test_it_runs_as_a_module_and_without_arguments() -> None:
    done = subprocess.run([sys.executable, "-m", "seriatim"], capture_output=True, text=True)
    assert "demo" in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", [(), ("recipes",), ("convert",), ("export",)])
def test_without_a_verb_help_is_all_it_says(verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb) == 2
    found = capsys.readouterr()
    assert "--help" in found.out and "error" not in found.out + found.err


def test_torch_is_told_of_large_pages_before_it_is_imported() -> None:
    """It reads the variable once, when it first allocates memory."""
    look = (
        "import os, sys; from seriatim.cli import main; main.run = lambda _: print(os.environ['THP_MEM_ALLOC_ENABLE'], "
        "'torch' in sys.modules) or 0; main.main()"
    )
    for given, found in ((None, "1 False"), ("0", "0 False")):
        environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
        environment |= {} if given is None else {"THP_MEM_ALLOC_ENABLE": given}
        done = subprocess.run([sys.executable, "-c", look], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == found
