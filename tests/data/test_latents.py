"""A latent cache: the same numbers as encoding directly; killed, shared, damaged or unfit, it ends whole or refuses."""

from __future__ import annotations

import fcntl
import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import die_at_call, untimed_metrics
from PIL import Image
from torch import Tensor
from training.test_resume import flip, stop_after, weights

from seriatim.cli.main import run
from seriatim.core import stopping
from seriatim.core.errors import ConfigError, DataError, NumericsError, ResourceError, Stopped, UsageError
from seriatim.core.keys import Keys
from seriatim.core.stopping import claimed
from seriatim.data import caching
from seriatim.data.base import ImageData, StreamData
from seriatim.data.caching import CacheResult, write_cache
from seriatim.data.latents import Latents
from seriatim.data.loader import to_float
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.kinds import TOKENIZERS
from seriatim.tokenizers.pixels import Pixels
from seriatim.training import setup
from seriatim.training.config import Recipe, read_recipe
from seriatim.training.loop import train

COUNT = 22  # two classes of 11; shards of 5: the last has 2
SETTINGS = ["model.width=32", "model.depth=1", "model.heads=2", "training.batch_size=8", "training.images=56"]
SETTINGS += ["model.dropout=0.1", "model.head.width=32", "model.head.depth=1", "training.save_images=24"]
SETTINGS += ["training.log_images=24", "training.dtype=float32", "training.threads=1"]


class Fuzzy(Tokenizer):
    """A posterior with a width, from weights, of a shape unlike the image's: (B, 2 c, H / 2, W / 2)."""

    def __init__(self, size: list[int], channels: int = 3, gain: float = 1.5, unit: float = 1.0) -> None:
        super().__init__()
        self.size, self.channels, self.levels, self.dim = (size[0], size[1]), channels, 256, channels
        self.grid = (size[0] // 2, size[1] // 2)
        self.config = {"size": list(size), "channels": channels, "gain": gain, "unit": unit}
        self.weight = torch.nn.Parameter(torch.full((2, 2), 0.25 * gain), requires_grad=False)
        self.weight.data[0, 1] += 0.5  # the moments of a mirrored image are not the mirrored moments
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))

    def moments_config(self) -> dict[str, Any]:
        return {k: v for k, v in self.config.items() if k != "unit"}

    def moments_fingerprint(self) -> str:
        return f"{self.moments_config()} {self.weight.tolist()}"

    def moments(self, images: Tensor) -> Tensor:
        patches = images.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, c, h, 2, w, 2)
        mean = torch.einsum("bchiwj,ij->bchw", patches, self.weight)
        return torch.cat((mean, mean - 1), dim=1)

    def tokens(self, moments: Tensor, keys: Keys | None = None) -> Tensor:
        mean, deviation = moments.chunk(2, dim=1)
        if keys is not None:
            mean = mean + deviation.exp() * keys.normal(*mean.shape[1:])
        return mean.flatten(2).transpose(1, 2) / self.scale

    def decode(self, tokens: Tensor) -> Tensor:
        images = (tokens * self.scale).transpose(1, 2).unflatten(2, self.grid)
        return images.repeat_interleave(2, 2).repeat_interleave(2, 3).clamp(-1, 1)

    def fit_moments(self, batches: Iterable[Tensor]) -> None:
        self.scale.copy_(torch.cat([batch.chunk(2, dim=1)[0].flatten() for batch in batches]).std())


@pytest.fixture(autouse=True)
def fuzzy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOKENIZERS, "fuzzy", Fuzzy)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    chance = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(COUNT // 2):
            image = Image.fromarray(chance.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            image.save(tmp_path / "pets" / name / f"{i:02d}.png")
    return tmp_path / "pets"


def recipe_of(data: Path | dict[str, Any], *overrides: str, kind: str = "pixels") -> Recipe:
    source = {"kind": "folder", "path": str(data), "size": 8} if isinstance(data, Path) else data
    tokenizer = {"kind": kind, **({"patch": 2} if kind == "pixels" else {})}
    words = [f"data={json.dumps(source)}", f"tokenizer={json.dumps(tokenizer)}", *SETTINGS, *overrides]
    return read_recipe("mar-cifar10-tiny", words)


def make(pets: Path, out: Path, *overrides: str, kind: str = "pixels", **options: Any) -> CacheResult:
    data, tokenizer = setup.build_inputs(recipe_of(pets, *overrides, kind=kind))
    return write_cache(data, tokenizer, out, **{"shard_images": 5, "batch_size": 2, "quiet": True, **options})


def cached(path: Path, **more: Any) -> dict[str, Any]:
    return {"kind": "latents", "path": str(path), **more}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- the same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pixels", "fuzzy"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_contents_are_those_of_encoding_directly(tmp_path: Path, pets: Path, kind: str, dtype: str) -> None:
    result = make(pets, tmp_path / "c", kind=kind, dtype=dtype, workers=1 if kind == "fuzzy" else 0)
    assert (result.images, result.encoded, result.shards) == (COUNT, COUNT, 5)
    assert result.bytes == sum(len(b) for name, b in contents(tmp_path / "c").items() if name != "manifest.json")
    images, tokenizer = setup.build_inputs(recipe_of(pets, kind=kind))
    data = Latents(str(tmp_path / "c"))
    index = torch.tensor([21, 0, 4, 5, 13, 5])
    pixels = to_float(images.images(index))
    plain, other = (tokenizer.moments(x).to(getattr(torch, dtype)).float() for x in (pixels, pixels.flip(-1)))
    assert torch.equal(data.images(index), plain) and data.images(index).dtype == torch.float32
    chosen = torch.tensor([True, False, False, True, True, False])
    assert torch.equal(data.mirrored(index, chosen), torch.where(chosen.view(-1, 1, 1, 1), other, plain))
    assert kind == "pixels" or not torch.equal(other, plain.flip(-1))
    labels, same = data.labels(index), images.labels(index)
    assert labels is not None and same is not None and torch.equal(labels, same)
    assert [data.name(i) for i in range(COUNT)] == [images.name(i) for i in range(COUNT)]
    assert (data.count, data.size, data.channels, data.class_names) == (COUNT, (8, 8), 3, ["cat", "dog"])


def test_without_mirrored_images_and_without_classes(tmp_path: Path, pets: Path) -> None:
    make(pets / "cat", tmp_path / "c", "data.flip=false")
    data = Latents(str(tmp_path / "c"), flip=False)
    assert data.labels(torch.tensor([0])) is None and data.class_names == []
    with pytest.raises(ConfigError, match=r"flip: .* holds no mirrored images; set it to false"):
        Latents(str(tmp_path / "c"))


@pytest.mark.parametrize(
    ("kind", "made", "now"),
    [
        ("pixels", [], []),
        ("pixels", ["tokenizer.patch=4"], []),
        ("pixels", [], ["training.workers=2"]),
        ("fuzzy", ["tokenizer.unit=2.0"], []),
    ],
)
def test_training_from_a_cache_is_training_from_images(
    tmp_path: Path, pets: Path, kind: str, made: list[str], now: list[str]
) -> None:
    """Bitwise: mirrored images, statistics and draws of a posterior too; the cache made for another patch or not."""
    make(pets, tmp_path / "c", *made, kind=kind)
    train(recipe_of(pets, kind=kind), tmp_path / "images", quiet=True)
    train(recipe_of(cached(tmp_path / "c"), *now, kind=kind), tmp_path / "cache", quiet=True)
    assert weights(tmp_path / "images") == weights(tmp_path / "cache")
    assert untimed_metrics(tmp_path / "images") == untimed_metrics(tmp_path / "cache")
    if not made and not now:
        train(recipe_of(cached(tmp_path / "c", flip=False), kind=kind), tmp_path / "plain", quiet=True)
        assert weights(tmp_path / "images")["final"] != weights(tmp_path / "plain")["final"], "flips do something"


def test_resuming_on_a_cache_is_bitwise(tmp_path: Path, pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(pets, tmp_path / "c", kind="fuzzy")
    recipe = recipe_of(cached(tmp_path / "c"), kind="fuzzy")
    train(recipe, tmp_path / "whole", quiet=True)
    undo = stop_after(monkeypatch, 4)
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "parts", quiet=True)
    undo()
    monkeypatch.setitem(TOKENIZERS, "fuzzy", Fuzzy)
    train(recipe, tmp_path / "parts", resume=True, quiet=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    (pets / "cat" / "00.png").unlink()
    make(pets, tmp_path / "other", kind="fuzzy")
    with pytest.raises(DataError, match="its images are not those that"):
        train(recipe_of(cached(tmp_path / "other"), kind="fuzzy"), tmp_path / "parts", resume=True, quiet=True)


# --- stopped, killed, shared, damaged -------------------------------------------------------------------------------


def child(work: Callable[[], object]) -> int:
    """A process that does `work`; its id. It exits with what `work` returns, 99 where that raises."""
    process = os.fork()
    if process == 0:
        code = 99
        try:
            code = int(work() or 0)  # type: ignore[call-overload]
        finally:
            os._exit(code)
    return process


def test_kill_nine_at_each_write_and_going_on(tmp_path: Path, pets: Path) -> None:
    """Killed at its n-th sync or rename, for every n; the next call ends with the very same folder."""
    data, tokenizer = setup.build_inputs(recipe_of(pets))

    def write(out: Path) -> CacheResult:
        return write_cache(data, tokenizer, out, shard_images=11, quiet=True)

    write(tmp_path / "whole")
    whole, calls, encoded = contents(tmp_path / "whole"), 0, set()
    while True:
        out = tmp_path / str(calls)

        def die(out: Path = out, calls: int = calls) -> None:
            die_at_call(calls, "os.fsync", "os.replace", "shutil.rmtree")
            write(out)

        _, status = os.waitpid(child(die), 0)
        if not os.WIFSIGNALED(status):
            break
        encoded.add(write(out).encoded)
        assert contents(out) == whole, calls
        calls += 1
    assert calls == 3 * 7, "two files, two of each shard and the manifest: synced, renamed, the folder synced"
    assert encoded == {22, 11, 0}, "what was whole is not encoded again"


class Slow(Pixels):
    def moments(self, images: Tensor) -> Tensor:
        time.sleep(0.02)
        return super().moments(images)


def test_two_writers_at_once(tmp_path: Path, pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOKENIZERS, "pixels", Slow)
    make(pets, tmp_path / "one")
    both = [child(lambda: make(pets, tmp_path / "two").encoded) for _ in range(2)]
    encoded = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in both]
    assert sum(encoded) == COUNT and min(encoded) > 0, encoded
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_the_shard_of_a_writer_that_dies_is_taken_over(
    tmp_path: Path, pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(pets, tmp_path / "one")
    ready, tell = os.pipe()

    def hang() -> None:
        def shard(*_: object) -> None:
            os.write(tell, b"x")
            time.sleep(60)

        monkeypatch.setattr(caching.Encoder, "shard", shard)
        make(pets, tmp_path / "two")

    held = child(hang)
    os.read(ready, 1)
    assert (tmp_path / "two" / ".shard-000000.lock").exists()
    calls = []

    def killing(seconds: float) -> None:
        calls.append(seconds)
        os.kill(held, signal.SIGKILL)
        os.waitpid(held, 0)

    monkeypatch.setattr(caching.time, "sleep", killing)
    assert make(pets, tmp_path / "two").encoded == COUNT
    assert len(calls) == 1, "all but the held shard were encoded first"
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    os.close(ready)
    os.close(tell)


def test_a_lock_file_that_its_holder_deletes_is_not_held_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, true, calls = tmp_path / "lock", fcntl.flock, [0]

    def late(file: Any, how: int) -> None:  # the holder lets go, and so deletes, just before the first call
        calls[0] += 1
        if calls[0] == 1:
            path.unlink()
        true(file, how)

    monkeypatch.setattr(stopping.fcntl, "flock", late)
    with claimed(path) as mine:
        assert mine and path.exists() and calls[0] == 2
        with claimed(path) as again:
            assert not again
        assert path.exists(), "one that did not get it deletes nothing"
    assert not path.exists()


def test_a_signal_stops_with_143_and_the_next_call_goes_on(
    tmp_path: Path, pets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(pets, tmp_path / "one", batch_size=64)
    true, calls = caching.encode, [0]

    def signalling(*arguments: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 6:  # one to see the shape, two for each shard
            os.kill(os.getpid(), signal.SIGTERM)
        return true(*arguments)

    monkeypatch.setattr(caching, "encode", signalling)
    words = ["cache", "mar-cifar10-tiny", f"data.path={pets}", "data.size=8", "tokenizer.patch=2", "--json"]
    words += ["--out", str(tmp_path / "two"), "--shard-images", "5"]
    assert run([*words, "--batch-size", "3"]) == 143
    err = capsys.readouterr().err.splitlines()
    assert err[-1] == "SIGTERM: stopped with 1 of 5 shards whole; repeat the command to encode the rest"
    left = {name for name in contents(tmp_path / "two")}
    assert left == {"cache.json", "sources.json", "shard-000000.json", "shard-000000.safetensors"}
    with pytest.raises(ConfigError, match=r"path: .* is an incomplete cache; complete it with `seriatim cache`$"):
        Latents(str(tmp_path / "two"))
    assert run([*words]) == 0
    assert json.loads(capsys.readouterr().out)["encoded_now"] == COUNT - 5
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    assert {k: v for k, v in one.items() if "shard" in k} == {k: v for k, v in two.items() if "shard" in k}


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_found_named_and_mended(
    tmp_path: Path, pets: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(pets, tmp_path / "c")
    whole, chance = contents(tmp_path / "c"), random.Random(0)
    for name in whole:
        path = tmp_path / "c" / name
        if damage == "flip":
            flip(path, chance)
        elif damage == "truncate":
            path.write_bytes(whole[name][: len(whole[name]) // 2])
        else:
            path.unlink()
        with pytest.raises((DataError, ConfigError)) as caught:
            Latents(str(tmp_path / "c"))
        message = str(caught.value)
        assert name in message or (name, damage) == ("manifest.json", "delete"), message
        assert "seriatim cache" in message and "\n" not in message
        if damage != "flip" and name != "manifest.json":
            with pytest.raises(DataError):
                Latents(str(tmp_path / "c"), check=False)
        capsys.readouterr()
        expected = 0 if not name.startswith("shard") else 2 if name.startswith("shard-000004") else 5
        assert make(pets, tmp_path / "c").encoded == expected
        said = capsys.readouterr().err
        assert ("mending: " in said) == (name != "manifest.json" and not (damage == "delete" and name[-5:] == ".json"))
        assert contents(tmp_path / "c") == whole, name


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, pets: Path) -> None:
    """No file may grow beyond 6 kB: a shard fails, with code 6; the next call makes it."""
    make(pets, tmp_path / "one")
    assert max(len(b) for b in contents(tmp_path / "one").values()) > 6_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, hard))
        with pytest.raises(ResourceError, match=r"cannot write .*shard-000000.*File too large"):
            make(pets, tmp_path / "two")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert set(contents(tmp_path / "two")) == {"cache.json", "sources.json"}
    make(pets, tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "options", "words"),
    [
        (["data.size=10"], {}, "data.size: "),
        (["data.channels=1"], {}, "data.channels: "),
        (["tokenizer.patch=3"], {}, "tokenizer.patch: "),
        (["data.flip=false"], {}, "data.flip: "),
        ([], {"dtype": "float16"}, "dtype: "),
        ([], {"shard_images": 7}, "shard_images: "),
        (["tokenizer={kind: fuzzy}"], {}, "tokenizer.kind: "),
    ],
)
def test_a_folder_begun_with_other_settings(
    tmp_path: Path, pets: Path, overrides: list[str], options: dict[str, Any], words: str
) -> None:
    make(pets, tmp_path / "c")
    before = contents(tmp_path / "c")
    with pytest.raises(ConfigError) as caught:
        make(pets, tmp_path / "c", *overrides, **options)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value), str(caught.value)
    assert contents(tmp_path / "c") == before


def test_a_folder_begun_with_other_images(tmp_path: Path, pets: Path) -> None:
    make(pets, tmp_path / "c")
    with open(pets / "cat" / "00.png", "ab") as file:
        file.write(b"more")
    with pytest.raises(ConfigError, match=r"^data \(its images\): .* was begun with others"):
        make(pets, tmp_path / "c")
    (pets / "cat" / "00.png").unlink()
    with pytest.raises(ConfigError, match=r"^data \(its count\): .* was begun with 22, now 21"):
        make(pets, tmp_path / "c")


def test_a_folder_of_something_else(pets: Path) -> None:
    with pytest.raises(UsageError, match=r"out: .* holds 'cat/00.png' and is no cache that Seriatim wrote"):
        make(pets, pets)


@pytest.mark.parametrize(
    ("option", "value"), [("batch_size", 0), ("shard_images", 0), ("workers", -1), ("dtype", "int8")]
)
def test_options_that_are_not_allowed(tmp_path: Path, pets: Path, option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"^{option}: {value!r} is not allowed"):
        make(pets, tmp_path / "c", **{option: value})


def test_streams_and_caches_are_not_cached(tmp_path: Path, pets: Path) -> None:
    data, tokenizer = setup.build_inputs(recipe_of(pets))
    with pytest.raises(ConfigError, match=r"^data\.kind: a stream has no images by number"):
        write_cache(StreamData(), tokenizer, tmp_path / "c")
    write_cache(data, tokenizer, tmp_path / "c", quiet=True)
    with pytest.raises(ConfigError, match=r"^data\.kind: latents are a cache already"):
        write_cache(Latents(str(tmp_path / "c")), tokenizer, tmp_path / "d")


def test_moments_that_are_not_finite(tmp_path: Path, pets: Path) -> None:
    with pytest.raises(NumericsError, match=r"^the moments of images cat/00\.png, \.\.\. are not finite as float16"):
        make(pets, tmp_path / "c", "tokenizer.gain=1.0e+6", kind="fuzzy", dtype="float16")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tokenizer.size=[10, 10]", r"^tokenizer\.size: .* was made with \[8, 8\], but the recipe has \[10, 10\]"),
        ("tokenizer.channels=1", r"^tokenizer\.channels: .* was made with 3, but the recipe has 1"),
        ("tokenizer.gain=2.0", r"^tokenizer\.gain: .* was made with 1\.5, but the recipe has 2\.0"),
        ("tokenizer={kind: pixels, patch: 2}", r"^tokenizer\.kind: .* with 'fuzzy', but the recipe has 'pixels'"),
    ],
)
def test_training_with_another_tokenizer(tmp_path: Path, pets: Path, override: str, words: str) -> None:
    make(pets, tmp_path / "c", kind="fuzzy")
    with pytest.raises(ConfigError, match=words):
        setup.build(recipe_of(cached(tmp_path / "c"), override, kind="fuzzy"))


def test_training_with_another_padding(tmp_path: Path, pets: Path) -> None:
    make(pets, tmp_path / "c")
    with pytest.raises(ConfigError, match=r"^tokenizer\.patch: .* 8 x 8', but the recipe has 'padded to 9 x 9'"):
        setup.build(recipe_of(cached(tmp_path / "c"), "tokenizer.patch=3"))


def test_training_with_other_weights(tmp_path: Path, pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(pets, tmp_path / "c", kind="fuzzy")
    recipe = recipe_of(cached(tmp_path / "c"), kind="fuzzy")
    _, tokenizer, _ = setup.build(recipe)
    tokenizer.get_parameter("weight").data += 1.0
    monkeypatch.setattr(setup, "build_tokenizer", lambda _: tokenizer)
    with pytest.raises(ConfigError, match=r"^tokenizer: .* was made with other weights"):
        setup.build(recipe)


def test_beginning_with_a_model_of_other_tokenizer_weights(
    tmp_path: Path, pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokenizer comes with it, and is not the one that made the cache."""

    class Other(Fuzzy):
        def __init__(self, size: list[int], channels: int = 3, gain: float = 1.5, unit: float = 1.0) -> None:
            super().__init__(size, channels, gain, unit)
            self.weight.data += 1.0

    monkeypatch.setitem(TOKENIZERS, "fuzzy", Other)
    train(recipe_of(pets, "training.images=8", kind="fuzzy"), tmp_path / "other", quiet=True)
    monkeypatch.setitem(TOKENIZERS, "fuzzy", Fuzzy)
    make(pets, tmp_path / "c", kind="fuzzy")
    begin = f"training.init_from={tmp_path / 'other' / 'model'}"
    with pytest.raises(ConfigError, match=r"^tokenizer: .* was made with other weights"):
        train(recipe_of(cached(tmp_path / "c"), begin, kind="fuzzy"), tmp_path / "run", quiet=True)


def test_training_with_a_tokenizer_that_needs_images(
    tmp_path: Path, pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Old(Fuzzy):
        fit_moments = Tokenizer.fit_moments

        def fit(self, batches: Iterable[Tensor]) -> None:
            pass

    make(pets, tmp_path / "c", kind="fuzzy")
    monkeypatch.setitem(TOKENIZERS, "fuzzy", Old)
    with pytest.raises(ConfigError, match=r"^tokenizer: Old measures its statistics in fit\(\), from images"):
        setup.build(recipe_of(cached(tmp_path / "c"), kind="fuzzy"))


@pytest.mark.parametrize("there", [True, False])
def test_training_on_what_is_no_cache(tmp_path: Path, there: bool) -> None:
    path = tmp_path if there else tmp_path / "none"
    with pytest.raises(DataError, match=r"^data\.path: .* is not a latent cache, since it has no cache\.json; make"):
        Latents(str(path))


def test_an_image_data_of_ones_own_needs_nothing_new() -> None:
    assert ImageData.cached is False
    ImageData().check_tokenizer(Pixels(4))  # any will do
