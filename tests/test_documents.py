"""Every command line and every Python block of the documents runs, at toy size.

What can't run here is listed with its reason. It is read all the same: its verb, its options and the names of recipes
and presets exist. A listed command that the documents no longer have fails.
"""

from __future__ import annotations

import ast
import functools
import importlib
import logging
import re
import runpy
import shutil
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import documents_world as world
import pytest
import torch
import typer
from documents import DATA, PAGES, PROGRAMS, ROOT, SHELL, commands, fenced, first_word, python
from plugin_tables import kept_tables

from seriatim.bench import race as bench_run
from seriatim.cli.app import app
from seriatim.cli.main import run
from seriatim.core.plugins import load_plugin
from seriatim.training.config import packaged
from seriatim.zoo import PRESETS

# What the documents say -> what is there in the toy folder.
STANDS_FOR = {
    "MODEL": "demo/model",
    "RUN": "runs/classifier",
    "RUN/recipe.yaml": "my.yaml",
    "RECIPE": "my.yaml",
    "NAME": "mar-digits",
    "picture.png": "again/0000-3.png",
    "inception": "runs/classifier",  # the weights of Inception are a download
    "imagenet/train": "cifar10/train",
}
OTHERWISE: dict[str, dict[str, str]] = {  # of a command alone
    "convert arinar": {"checkpoint-last.pth": "arinar-last.pth"},
    "convert mar": {"mar_base.pth": "checkpoint-last.pth"},
    "convert ear": {"checkpoint-last.pth": "ear-last.pth"},
    "evaluate": {"mar-b.model": "runs/cifar10"},
    "sweep": {"mar-b.model": "runs/cifar10"},
    "export half": {"runs/photos": "runs/cifar10"},
    "bench": {"runs/photos": "runs/cifar10"},
    "train": {"runs/classifier": "runs/another-classifier"},
    "export llamagen": {"MODEL": "llamagen-b.model", "OUT.pt": "out.pt"},
}
FOLDERS = ("photos/", "runs/mine/recipe.yaml")  # that stand in the place of a packaged recipe
PLUGINS = dict.fromkeys(("mine.py", "examples/own_plugin.py", "means.py"), str(ROOT / "examples" / "own_plugin.py"))
SMALLER = {
    "--num": "24",
    "--num-images": "24",
    "--num-images-per-label": "1",
    "--size": str(world.SIDE),
    "--batch": "2",
    "--minutes": "0.02",
    "--num-inference-steps": "4",
    "--threads": "1",
}
MORE: dict[str, list[str]] = {  # what makes a command small
    "train": ["training.images=4", "training.batch_size=4", "training.threads=1", "training.dtype=float32"],
    "sample": ["--overwrite"],
    "edit": ["--num-images-per-label", "1"],
    "bench": ["--repetitions", "1", "--no-decode"],
    "convert mar": ["--heads", "2", "--overwrite"],
    "convert arinar": ["--trunk-heads", "2", "--overwrite"],
    "convert ear": ["--heads", "2", "--buffer", "4", "--overwrite"],
    "convert kl16": ["--size", str(world.SIDE), "--overwrite"],
    "convert llamagen": ["--heads", "2", "--overwrite"],
    "convert llamagen-vq": ["--size", str(world.SIDE)],
}  # fmt: skip
ELLIPSIS = "an ellipsis stands for the settings of another line"
OWN_FILE = "the file is the reader's own"
SCRIPT = "tests/benchmarks runs every script at toy size"
CANNOT = {
    "seriatim demo": "tests/test_readme.py runs it, shortened",
    "seriatim train ... model.head={kind: flow, width: 256, depth: 3, draws: 2} --out runs/flow": ELLIPSIS,
    "seriatim train ... model.head={kind: nested, ...} --out runs/arinar": ELLIPSIS,
    "seriatim evaluate MODEL --features RUN": "a part of a command",
    "torchrun --nproc-per-node 8 -m seriatim evaluate ...": "eight GPUs",
    "torchrun --nproc-per-node 2 -m seriatim evaluate ...": "two processes; tests/evaluation runs two shares",
    "seriatim evaluate demo/model --data digits --num 350 --features means --plugin means.py": OWN_FILE,
    "seriatim bench mar-b --official mar --threads 2 --dtype ...": ELLIPSIS,
    "seriatim train mar-cifar10-tiny data.path=photos training.compile=true": "a compiler takes minutes",
    "pytest": "this is the suite",
    "pytest -m slow": "a part of this suite",
    "pytest -m gpu": "a part of this suite",
    "seriatim train RECIPE ... --dry-run": ELLIPSIS,
    "mypy": "types are checked apart",
    "pip install .": "it installs",
    "pip install .[dev]": "it installs",
    "pip install -e .[dev]": "it installs",
    "pip install .[data]": "it installs",
    "pip install .[log]": "it installs",
    "pip install .[docs]": "it installs",
    "mkdocs serve": "it serves until it is stopped",
    "mkdocs build --strict": "CI builds the documents",
    "pip install seriatim[ray]": "it installs",
    "pip install seriatim[eval]": "it installs",
    "pip install --no-deps timm==0.9.12": "it installs",
    "git clone https://github.com/LTH14/mar": "the network",
    "pytest tests/test_golden_arinar.py": "a part of this suite",
    "pytest tests/test_golden_mar.py": "a part of this suite",
    "pytest tests/test_golden_ear.py": "a part of this suite",
    "pytest tests/test_golden_llamagen.py": "a part of this suite",
    "pytest tests/test_golden_detok.py": "a part of this suite",
    "ruff check .": "style is checked apart",
    "ruff format --check .": "style is checked apart",
}
ALL = [(page, words) for page, text in PAGES.items() for words in commands(text)]


@functools.cache
def verbs() -> Any:
    return typer.main.get_command(app)


def parted(words: list[str]) -> tuple[list[str], list[str]]:
    """The words without plug-ins, which may stand anywhere, and the words that name those."""
    named = [i for i, word in enumerate(words) if word == "--plugin"]
    return (
        [word for i, word in enumerate(words) if i not in named and i - 1 not in named],
        [word for i in named for word in ("--plugin", PLUGINS[words[i + 1]])],
    )


def verb_of(words: list[str]) -> tuple[str, Any]:
    """`convert mar` and its command, of `seriatim convert mar FILE ...`; fails where there is no such verb."""
    found: Any = verbs()
    path: list[str] = []
    for word in parted(words)[0][1:]:
        if not hasattr(found, "commands"):
            break
        assert word in found.commands, f"seriatim has no verb {' '.join([*path, word])!r}"
        found = found.commands[word]
        path.append(word)
    return " ".join(path), found


def is_mention(words: list[str]) -> bool:
    """Whether a verb is only named, as in "`seriatim convert kl16` writes such a folder"."""
    if words[0] != "seriatim":
        return False
    verb, command = verb_of(words)
    return len(words) == 1 + len(verb.split()) and bool(command.params)


def translated(words: list[str]) -> list[str]:
    """The words with what the toy folder has in their place, and with small sizes."""
    verb, _ = verb_of(words)
    table = {**STANDS_FOR, **OTHERWISE.get(verb, {})}
    said = [table.get(word, word) for word in words]
    for i, word in enumerate(said[:-1]):
        if word in SMALLER:
            said[i + 1] = SMALLER[word]
    if "--num" in said and "pixels" in said:
        said[said.index("--num") + 1] = "70"  # more than the features of an image of 8 x 8
    if verb == "train" and said[2].startswith("classifier") and "runs/judge" in said:
        said += ["model.widths=[4]", "model.depth=[0]"]  # fewer features than the toy folder has images
    if verb == "train" and not said[2].startswith("classifier"):
        said += ["training.sample_images=0", "training.workers=0"]
        if said[2].startswith(("kl-", "vq-")):  # the recipe of a tokenizer, which has no model
            return [*said, *MORE[verb]]
        if said[2].startswith("mar-") and not any("causal" in word for word in said):
            said.append("sampling.num_inference_steps=2")
        if not any(word.startswith("model") for word in said):
            said += ["model.width=32", "model.depth=1", "model.heads=2"]
            if said[2].startswith("mar-"):
                said += ["model.head.width=32", "model.head.depth=1"]
        if "finetune256" in said[2]:  # the sizes of the official models of the toy folder
            said += ["data.size=8", "model.buffer=4" if said[2].startswith("mar-") else "model.width=64"]
    more = [word for word in MORE.get(verb, []) if "--minutes" not in said or not word.startswith("training.images=")]
    return [*said, *more]


def known_names(words: list[str]) -> None:
    """Recipes and presets that a command names exist."""
    verb, _ = verb_of(words)
    if verb in ("train", "cache", "measure-latents", "recipes show", "recipes copy"):
        assert words[1 + len(verb.split())] in {*packaged(), *FOLDERS}, words
    if verb == "bench" and "/" not in words[2]:
        assert words[2] in PRESETS, words


@pytest.mark.parametrize("words", [words for _, words in ALL if words[0] == "seriatim"], ids=" ".join)
def test_verbs_options_and_names_exist(words: list[str]) -> None:
    _, command = verb_of(words)
    if is_mention(words):
        return
    words, plugins = parted(words)
    with kept_tables():
        for file in plugins[1::2]:
            load_plugin(file)
        check_words(words, command)


def check_words(words: list[str], command: Any) -> None:
    path = verb_of(words)[0].split()
    given = list(words[1 + len(path) :])
    try:
        command.make_context(words[-1], given)  # reads every option; runs nothing
    except Exception as error:
        if type(error).__name__ != "MissingParameter" or " ".join(words) not in CANNOT:
            raise
    own = {"...", "my.yaml", "RECIPE", "NAME", "RUN/recipe.yaml"} & set(words)
    if not own:
        known_names(words)


@pytest.mark.parametrize("words", [w for _, w in ALL if "benchmarks/" in " ".join(w[:2])], ids=" ".join)
def test_options_of_scripts_exist(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """tests/benchmarks runs every script at toy size; here is read what the documents ask of it."""
    script = ROOT / words[1]
    assert script.is_file()
    sys.path.append(str(script.parent))
    with pytest.raises(SystemExit):
        importlib.import_module(script.stem).main(["--help"])
    said = capsys.readouterr().out
    for word in words[2:]:
        if word.startswith("--"):
            assert re.search(rf"{word}\b", said), f"{words[1]} has no option {word}"


def test_the_scripts_exist() -> None:
    for _, words in ALL:
        if words[0] == "python" and " ".join(words) not in CANNOT:
            assert words[1].startswith(("benchmarks/", "examples/")) and (ROOT / words[1]).is_file(), words


def test_every_block_has_a_language_that_is_known() -> None:
    for page, text in PAGES.items():
        for language, body in fenced(text):
            assert language in (*SHELL, *DATA, "python"), f"{page}: ```{language}"
            if language in SHELL:
                for line in re.sub(r"\\\n\s*", "", body).splitlines():
                    word = first_word(line)
                    assert not word or word.startswith("#") or word in PROGRAMS, f"{page}: {line}"


@pytest.mark.parametrize("page", PAGES)
def test_python_is_fenced(page: str) -> None:
    """Indented lines are not run as Python, so none of them may be some that does anything."""
    rest = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    for block in re.findall(r"(?:^    .*\n)+", rest, flags=re.M):
        try:
            parsed = ast.walk(ast.parse(textwrap.dedent(block)))
        except SyntaxError:
            continue
        does = [node for node in parsed if isinstance(node, ast.Call | ast.Assign | ast.Import | ast.ImportFrom)]
        assert not does, f"{page}: begin this with ```python\n{block}"


def test_what_cannot_run_is_still_there() -> None:
    assert CANNOT.keys() <= {" ".join(words) for _, words in ALL}
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("optional-dependencies]")[1], re.M)
    for command in CANNOT:
        for names in re.findall(r"^pip .*\[(.+)\]", command):
            assert set(names.split(",")) <= set(extras), command


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.make(tmp_path_factory.mktemp("documents"))


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the toy folder, the current one; presets are small, and nothing is timed for long."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for name, config in world.PRESETS.items():
        small = replace(PRESETS[name], model=config, theirs={}, tokens=16, sampling=world.PRESETS_DRAW[name], image="")
        monkeypatch.setitem(PRESETS, name, small)
    monkeypatch.setattr(bench_run, "matrix_peak", lambda _dtype, _device: 1e11)
    monkeypatch.setattr(bench_run, "memory_of", lambda _ask: 1)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    return tmp_path / "here"


def execute(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "seriatim":
        lacking = "picture.png" in words and not Path(STANDS_FOR["picture.png"]).exists()
        if lacking or (verb_of(words)[0] == "sample" and "--from" in words):
            assert run(["sample", "demo/model", "--label", "3", "--out", "again"]) == 0
            first = sorted(Path("again").glob("*-3.png"))[0]
            first.rename(STANDS_FOR["picture.png"])
        rest, plugins = parted(words)
        assert run([*translated(rest)[1:], *plugins]) == 0, f"{' '.join(words)} as {translated(rest)}"
    elif words[0] == "python" and words[1].startswith("examples/"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", words[1:])
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    else:
        assert words[:1] == ["python"] and words[1].startswith("benchmarks/"), f"nothing runs {' '.join(words)}"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("page", [page for page in PAGES if commands(PAGES[page])])
def test_the_commands_run(page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One after another in one folder, as a reader types them; a command that is there twice runs once."""
    before = torch.get_num_threads()
    run_already: set[str] = set()
    try:
        for words in commands(PAGES[page]):
            said = " ".join(words)
            if said not in CANNOT and said not in run_already and not (words[0] == "seriatim" and is_mention(words)):
                run_already.add(said)
                with kept_tables():
                    execute(words, monkeypatch)
                capsys.readouterr()
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("page", [page for page in PAGES if python(PAGES[page])])
def test_the_python_runs(page: str) -> None:
    logger = logging.getLogger("seriatim")
    handlers, level = list(logger.handlers), logger.level
    try:
        with kept_tables():
            exec(compile(python(PAGES[page]), page, "exec"), {"__name__": "__main__"})
    finally:
        logger.setLevel(level)
        for handler in set(logger.handlers) - set(handlers):
            logger.removeHandler(handler)
            handler.close()
