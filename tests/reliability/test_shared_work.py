"""Several processes share one command: the files are those of one process alone, also if some of the processes die."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import FEW, content
from helpers import make_bundle
from PIL import Image, ImageOps, PngImagePlugin
from processes import command, together

from seriatim.checkpoints.native import save_bundle
from seriatim.checkpoints.tokenizer import save_tokenizer
from seriatim.core.processes import place
from seriatim.data.store import Shards
from seriatim.pipeline import pipeline
from seriatim.pipeline.metadata import KEY
from seriatim.pipeline.samples_folder import is_grid, seed_of
from seriatim.tokenizers.kl import KL

pytestmark = pytest.mark.fresh_process

TINY = ["training.images=8", "model.width=16", "model.depth=1", "model.heads=2", "model.head.width=16"]
FREE = ("seconds", "when", "versions", "made_with")  # what may differ between two runs of one command


def files(folder: Path) -> dict[str, Any]:
    """What a folder holds, without what may differ and without hidden files, of which none may be left."""
    assert not [path for path in folder.rglob(".*")]
    found: dict[str, Any] = dict(content(folder))
    for name in found:
        if name.endswith("results.json"):
            values = json.loads((folder / name).read_text())
            found[name] = {key: value for key, value in values.items() if key not in FREE}
    return found


def make(folder: Path) -> None:
    """A model and a tokenizer for the commands."""
    bundle = make_bundle(classes=10)
    bundle.class_names[:] = [str(digit) for digit in range(10)]
    save_bundle(bundle, folder / "model")
    torch.manual_seed(0)
    kl = KL(8, channels=1, block_out_channels=(32, 32), layers_per_block=1, latent_channels=2)
    save_tokenizer(kl, folder / "kl")


def words_of(verb: str, folder: Path, out: str) -> list[str]:
    model, end = str(folder / "model"), ["--out", str(folder / out)]
    return {
        "cache": ["cache", "mar-digits", f"tokenizer={{from: {folder / 'kl'}}}", *TINY, "--shard-images", "200", *end],
        "sample": ["sample", model, "--num-images-per-label", "4", *FEW, "--batch-size", "3", *end],
        "evaluate": ["evaluate", model, "--data", "digits", "--num", "600", "--features", "pixels", *FEW, *end],
        "measure-latents": ["measure-latents", "mar-digits", f"tokenizer={{from: {folder / 'kl'}}}", *TINY, *end],
    }[verb]


VERBS = ("cache", "sample", "evaluate", "measure-latents")


def with_seed(verb: str) -> list[str]:
    """Several processes draw from seed 0 unless they are told otherwise; one process alone draws its own."""
    return ["--seed", "0"] if verb == "sample" else []


def dying(verb: str, words: list[str], mark: Path) -> tuple[int, list[str]]:
    """The command, in which the second process dies as by `kill -9` in its second piece of work.

    The first process waits in its first piece until then; otherwise it might do all the work before the other begins.
    """
    write, stream, done = Shards.write, pipeline.Pipeline.stream, [0]

    def piece() -> None:
        done[0] += 1
        if place().rank and done[0] == 2:
            mark.touch()
            os._exit(9)
        end = time.monotonic() + 120
        while place().rank == 0 and not mark.exists():
            assert time.monotonic() < end, "the second process found no second piece of work"
            time.sleep(0.05)

    def dying_write(self: Shards, *arguments: Any) -> Any:
        piece()
        return write(self, *arguments)

    def dying_stream(self: pipeline.Pipeline, *arguments: Any, **options: Any) -> Any:
        piece()
        return stream(self, *arguments, **options)

    Shards.write = dying_write  # type: ignore[method-assign, assignment]  # this process ends soon
    if verb == "sample":
        pipeline.Pipeline.stream = dying_stream  # type: ignore[method-assign]
    return command(*words)


def late(words: list[str], mark: Path) -> tuple[int, list[str]]:
    """The command, which the second process begins when the first has ended it."""
    while place().rank and not mark.exists():
        time.sleep(0.05)
    found = command(*words)
    mark.touch()
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_the_files_do_not_depend_on_the_processes(verb: str, tmp_path: Path) -> None:
    """One process, two, three; two of which one dies, and its share is taken over; two of which one comes late."""
    make(tmp_path)
    assert command(*words_of(verb, tmp_path, "alone"), *with_seed(verb))[0] == 0
    alone = files(tmp_path / "alone")
    assert alone
    works = {
        name: (size, words_of(verb, tmp_path, name))
        for name, size in (("two", 2), ("three", 3), ("dying", 2), ("late", 2))
    }
    for name, (size, words) in works.items():
        work: Any = partial(command, *words)
        if name == "dying":
            work = partial(dying, verb, words, tmp_path / "died")
        if name == "late":
            work = partial(late, words, tmp_path / "mark")
        found = together(size, work, tmp_path / f"said-{name}")
        ended = [each for each in found if each is not None]
        assert [code for code, _ in ended] == [0] * (1 if name == "dying" else size), found
        assert all(not lines for _, lines in ended[1:]), "the first process speaks for all"
        assert files(tmp_path / name) == alone, name
    assert not list(tmp_path.glob(".*"))


def test_samples_are_resumed(tmp_path: Path) -> None:
    """What is there stays, what is damaged or missing is drawn again, and what was made otherwise is refused."""
    make(tmp_path)
    words = words_of("sample", tmp_path, "out")
    assert command(*words, "--seed", "5")[0] == 0
    out = tmp_path / "out"
    whole, pictures = files(out), sorted(out.glob("0*.png"))
    pictures[1].unlink()
    pictures[7].write_bytes(pictures[7].read_bytes()[:-40])
    pictures[16].write_bytes(b"")
    (out / "grid.png").unlink()
    kept = {path: path.stat().st_mtime_ns for path in pictures if path.exists()}
    code, lines = command(*words)
    assert code == 2 and "exists already" in lines[-1]
    code, lines = command(*words, "--resume")
    assert code == 0 and files(out) == whole
    assert [line for line in lines if line.startswith("mending: ")] == [
        f"mending: {pictures[i]} can't be read; drawing it again" for i in (7, 16)
    ]
    batches = {i // 3 for i in (1, 7, 16)}
    untouched = [path for i, path in enumerate(pictures) if i // 3 not in batches]
    assert untouched and all(path.stat().st_mtime_ns == kept[path] for path in untouched)
    code, lines = command(*words, "--resume", "--seed", "6")
    assert code == 2 and len(lines) == 1 and "seed is 5 there, 6 here" in lines[0] and files(out) == whole
    code, lines = command(*words, "--resume", "--animate")
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: animate:")


def test_a_picture_that_somebody_changed_is_not_drawn_again(tmp_path: Path) -> None:
    """Its request is still inside, but its pixels are readable and others, so they may be somebody's work."""
    make(tmp_path)
    words, out = words_of("sample", tmp_path, "out"), tmp_path / "out"
    assert command(*words, "--seed", "5")[0] == 0
    painted, foreign = out / "0002-0.png", out / "0009-2.png"
    with Image.open(painted) as image:
        says = PngImagePlugin.PngInfo()
        says.add_itxt(KEY, image.info[KEY])
        image.load()
    ImageOps.invert(image).save(painted, pnginfo=says)
    foreign.write_bytes(b"notes that have the name of a picture")
    for path in (painted, foreign):
        before = content(out)
        code, lines = command(*words, "--resume")
        assert code == 2 and len(lines) == 1 and f"{path} exists already" in lines[0] and content(out) == before
        path.unlink()


def test_an_overview_that_somebody_made_is_left_alone(tmp_path: Path) -> None:
    make(tmp_path)
    words, out = words_of("sample", tmp_path, "out"), tmp_path / "out"
    assert command(*words, "--seed", "5")[0] == 0
    sorted(out.glob("0*.png"))[3].unlink()
    Image.new("RGB", (8, 8), "red").save(out / "grid.png")
    before = content(out)
    code, lines = command(*words, "--resume")
    assert code == 2 and len(lines) == 1 and f"{out / 'grid.png'} exists already" in lines[0] and content(out) == before
    (out / "grid.png").unlink()
    assert command(*words, "--resume")[0] == 0 and is_grid(out / "grid.png")


def test_the_seed_is_that_of_the_first_intact_picture(tmp_path: Path) -> None:
    """`sample --resume` without a seed goes on with the seed of the samples, also if their first one is damaged."""
    make(tmp_path)
    words, out = words_of("sample", tmp_path, "out"), tmp_path / "out"
    assert seed_of(out) == 0, "there is no folder yet"
    assert command(*words, "--seed", "271828")[0] == 0
    assert seed_of(out) == 271828
    pictures = sorted(out.glob("0*.png"))
    pictures[0].write_bytes(pictures[0].read_bytes()[:60])
    pictures[1].write_bytes(b"no picture")
    (out / "0000-another.png").write_bytes(b"")
    assert seed_of(out) == 271828
    for path in pictures[2:]:
        path.unlink()
    assert seed_of(out) == 0, "no picture is intact"
