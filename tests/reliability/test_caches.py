"""Caches that several write, that are partly there, and whose pictures change (rows 26, 27 and 29 of the page)."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faults import CACHE, command, content, inside, pets
from PIL import Image

from seriatim.core.errors import SeriatimError
from seriatim.data.caching import write_cache
from seriatim.data.latents import Latents
from seriatim.training import setup
from seriatim.training.config import read_recipe

WORDS = ["cache", "mar-cifar10-tiny", "data.path=pets", *CACHE, "--shard-images", "2", "--out", "cache"]


def forked(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def ended_well(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def write(folder: Path) -> None:
    data, tokenizer = setup.build_inputs(read_recipe("mar-cifar10-tiny", [f"data.path={folder / 'pets'}", *CACHE]))
    write_cache(data, tokenizer, folder / "cache", shard_images=2, quiet=True)


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, str]:
    """What the cache of these pictures holds when one process makes it."""
    pets(tmp_path / "pets")
    write(tmp_path)
    made = content(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    return made


@pytest.mark.fresh_process
def test_two_writers_and_a_reader_at_once(tmp_path: Path, whole: dict[str, str]) -> None:
    """The reader sees no cache or a whole one, never a part; the bytes are those of one writer alone."""
    writers = [forked(lambda: write(tmp_path)) for _ in range(2)]
    refused = seen = 0
    while not seen:
        try:
            data = Latents(str(tmp_path / "cache"))
            assert data.count == 12 and set(content(tmp_path / "cache")) >= set(whole)
            seen += 1
        except SeriatimError as error:
            assert "\n" not in str(error)
            refused += 1
            time.sleep(0.001)
        assert refused < 100_000
    assert all(ended_well(child) for child in writers)
    assert content(tmp_path / "cache") == whole


@pytest.mark.fresh_process
def test_a_writer_that_is_killed_leaves_its_work_to_the_other(tmp_path: Path, whole: dict[str, str]) -> None:
    for delay in (0.0, 0.02, 0.05):
        one, two = (forked(lambda: write(tmp_path)) for _ in range(2))
        time.sleep(delay)
        os.kill(one, signal.SIGKILL)
        os.waitpid(one, 0)
        assert ended_well(two)
        made = content(tmp_path / "cache")
        locks = {name for name in made if name.endswith(".lock")}  # one that it made after the other had finished
        assert {name: digest for name, digest in made.items() if name not in locks} == whole and len(locks) <= 1
        shutil.rmtree(tmp_path / "cache")


@pytest.mark.parametrize("fault", ["deleted", "cut", "foreign shard", "of another cache", "no manifest"])
def test_a_part_of_a_cache_is_refused_and_mended(
    fault: str, tmp_path: Path, whole: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Training never takes a part for the whole, and the same command makes it whole again, byte for byte."""
    with inside(tmp_path):
        assert command(WORDS, capsys)[0] == 0
        shards = sorted(Path("cache").glob("shard-*.safetensors"))
        assert len(shards) == 6
        if fault == "deleted":
            for path in shards[1:4]:
                path.unlink()
        elif fault == "cut":
            for path in shards[2:4]:
                path.write_bytes(path.read_bytes()[:-100])
        elif fault == "foreign shard":
            shutil.copy(shards[0], shards[3])
        elif fault == "of another cache":
            pets(Path("others"), 7)
            other = [w.replace("data.path=pets", "data.path=others").replace("cache", "other") for w in WORDS[1:]]
            assert command(["cache", *other], capsys)[0] == 0
            for end in (".safetensors", ".json"):
                shutil.copy(Path("other/shard-000001").with_suffix(end), Path("cache/shard-000001").with_suffix(end))
        else:
            Path("cache/manifest.json").unlink()
        for check in (True, False):
            if fault in ("foreign shard", "of another cache") and not check:
                continue  # sizes alone do not show it, which `data.check` says
            with pytest.raises(SeriatimError) as caught:
                Latents("cache", check=check)
            assert "\n" not in str(caught.value) and "seriatim cache" in str(caught.value)
        code, lines = command(WORDS, capsys)
        assert code == 0, lines
        Latents("cache")
        assert {k: v for k, v in content(Path("cache")).items() if "shard" in k} == {
            k: v for k, v in whole.items() if "shard" in k
        }


@pytest.mark.parametrize("change", ["another picture", "deleted", "added", "renamed"])
def test_pictures_that_change_after_caching_are_noticed(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pets(tmp_path / "pets")
    with inside(tmp_path):
        assert command(WORDS, capsys)[0] == 0
        before = content(Path("cache"))
        path = Path("pets/cat/0.png")
        if change == "another picture":
            pixels = np.random.default_rng(9).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        elif change == "deleted":
            path.unlink()
        elif change == "added":
            shutil.copy(path, "pets/cat/9.png")
        else:
            path.rename("pets/dog/9.png")
        code, lines = command(WORDS, capsys)
        assert code == 2 and len(lines) == 1 and "was begun with" in lines[0], lines
        assert content(Path("cache")) == before
