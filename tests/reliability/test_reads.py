"""Damaged, foreign and hostile files are refused, and nothing is half loaded (rows 5 to 8, 10 and 11 of the page)."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import VERBS, begin, command, content, inside
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from seriatim.checkpoints.native import CONFIG, MODEL, TOKENIZER, load_bundle
from seriatim.checkpoints.official import read_official
from seriatim.checkpoints.shared_tokenizer import REFERENCE, tokenizer_file
from seriatim.core.errors import CheckpointError, ConfigError, DataError, SeriatimError
from seriatim.core.files import MANIFEST, _render, sha256, write_json, write_manifest
from seriatim.data.latents import Latents
from seriatim.training import setup, state
from seriatim.training.config import read_recipe
from seriatim.training.optim import adamw, averaged
from seriatim.training.state import RunState, Trainables

FILES = (CONFIG, MODEL, TOKENIZER)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, a checkpoint and a cache."""
    folder = tmp_path_factory.mktemp("source")
    begin(folder)
    state.save(folder / "checkpoints", parts(), RunState(seen=5))
    return folder


@pytest.fixture
def work(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    shutil.copytree(source, tmp_path / "work")
    with inside(tmp_path / "work"):
        assert command(VERBS["cache"], capsys)[0] == 0
    return tmp_path / "work"


def parts(width: int = 16) -> Trainables:
    """A model, its average, its optimiser after one step, and its tokenizer."""
    sizes = [f"model.width={width}", "model.depth=1", "model.heads=2", "model.head.width=16", "model.head.depth=1"]
    _, tokenizer, model = setup.build(read_recipe("mar-digits", sizes))
    made = Trainables(model, averaged(model, 0.9), adamw(model, 1e-3, (0.9, 0.95), 0.0), tokenizer)
    loss: torch.Tensor = model(torch.zeros(2, 16, 4), torch.tensor([0, 1])).mean
    loss.backward()
    made.optimiser.step()
    return made


def load_checkpoint(folder: Path) -> object:
    return state.load(folder, parts())


def load_cache(folder: Path) -> object:
    return Latents(str(folder), flip=False)


LOADED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "model": ("model", load_bundle),
    "checkpoint": ("checkpoints/000000000005", load_checkpoint),
    "cache": ("out/cache", load_cache),
}


def flip_bits(work: Path, kind: str, count: int) -> int:
    """Flip one bit of a file at a time, `count` in each file; each must be refused in a line that names the file."""
    name, load = LOADED[kind]
    chance, tried = random.Random(kind), 0
    for path in sorted((work / name).iterdir()):
        if path.name.startswith("."):
            continue
        whole = path.read_bytes()
        for _ in range(count):
            broken = bytearray(whole)
            place, bit = chance.randrange(len(whole)), chance.randrange(8)
            broken[place] ^= 1 << bit
            path.write_bytes(broken)
            with pytest.raises((CheckpointError, DataError)) as caught:
                load(work / name)
            assert path.name in str(caught.value) and "\n" not in str(caught.value), (path, place, bit)
            tried += 1
        path.write_bytes(whole)
    load(work / name)
    return tried


@pytest.mark.parametrize("kind", LOADED)
def test_no_flipped_bit_is_loaded(kind: str, work: Path) -> None:
    assert flip_bits(work, kind, 6) >= 24


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOADED)
def test_no_flipped_bit_of_fifty_in_each_file_is_loaded(kind: str, work: Path) -> None:
    assert flip_bits(work, kind, 50) >= 200


@pytest.mark.parametrize("kind", LOADED)
def test_no_file_that_is_cut_off_is_loaded(kind: str, work: Path) -> None:
    """Each file is cut at six places; the line names it, the bytes it has and the bytes it should have (row 5)."""
    name, load = LOADED[kind]
    for path in sorted(path for path in (work / name).iterdir() if not path.name.startswith(".")):
        whole = path.read_bytes()
        for size in (0, 7, 8, min(100, len(whole) // 3), len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises((CheckpointError, DataError)) as caught:
                load(work / name)
            said = str(caught.value)
            assert path.name in said and "\n" not in said, (path, size)
            told = said.replace(",", "")
            plain = path.name == MANIFEST or (kind == "cache" and path.suffix == ".json")  # they are just no JSON then
            assert plain or (str(size) in told and str(len(whole)) in told), said
        path.write_bytes(whole)
    load(work / name)


# --- row 7: what does not fit -----------------------------------------------------------------------------------------


def everything(of: Trainables) -> list[torch.Tensor]:
    """All numbers that a checkpoint could change."""
    modules = [*of.model.state_dict().values(), *of.average.state_dict().values(), *of.tokenizer.state_dict().values()]
    return [tensor.detach().clone() for tensor in (*modules, *state.moments(of).values())]


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[-1]]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["surplus"] = torch.ones(2)


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["renamed"] = tensors.pop(sorted(tensors)[-1])


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    name = sorted(tensors)[-1]
    tensors[name] = torch.ones(*tensors[name].shape, 2)


def poison(tensors: dict[str, torch.Tensor]) -> None:
    name = sorted(tensors)[-1]
    tensors[name] = torch.full_like(tensors[name], float("nan"))


CHANGES = [drop, add, rename, reshape, poison]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("file", ["model", "average", "tokenizer"])
def test_a_load_that_fails_changes_nothing(file: str, change: Callable[[dict[str, Any]], None], work: Path) -> None:
    """Whichever file does not fit, the last one too: model, average, optimiser and tokenizer stay bitwise."""
    folder = work / LOADED["checkpoint"][0]
    path = tokenizer_file(folder) if file == "tokenizer" else folder / f"{file}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    if file == "tokenizer":  # the hashes are right, and the tensors are what is wrong
        write_json(folder / REFERENCE, {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)})
    write_manifest(folder, state.FILES)
    made = parts()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in (*made.model.parameters(), *made.average.parameters()):
            parameter.normal_()
    before = everything(made)
    with pytest.raises(CheckpointError) as caught:
        state.load(folder, made)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(made), strict=True))


def test_a_checkpoint_of_another_width_changes_nothing(work: Path) -> None:
    made = parts(width=32)
    before = everything(made)
    with pytest.raises(CheckpointError, match="has shape"):
        state.load(work / LOADED["checkpoint"][0], made)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(made), strict=True))


def test_the_checkpoint_that_fits_is_loaded(work: Path) -> None:
    """The comparison above can fail: a load that succeeds does change the numbers."""
    made = parts()
    with torch.no_grad():
        made.model.get_parameter("conditioner.no_class").add_(1.0)
    before = everything(made)
    assert state.load(work / LOADED["checkpoint"][0], made).seen == 5
    assert not all(torch.equal(a, b) for a, b in zip(before, everything(made), strict=True))


# --- rows 10 and 11: hostile headers, names that are paths ------------------------------------------------------------

DTYPES = st.sampled_from(["F32", "F64", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "Q4", "", "\x00"])
NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.sampled_from([0, 1, 2**31, 2**63 - 1, 2**63, 2**64]))
NAMES = st.one_of(
    st.text(max_size=12), st.sampled_from(["conditioner.no_class", "../../x", "/etc/x", "a\x00b", "x" * 10_000])
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(DTYPES, NUMBERS),
        "shape": st.one_of(st.lists(NUMBERS, max_size=4), NUMBERS, st.text(max_size=3)),
        "data_offsets": st.one_of(st.lists(NUMBERS, max_size=3), st.text(max_size=3)),
        "more": st.integers(),
    },
)
HEADERS = st.one_of(
    st.dictionaries(NAMES, st.one_of(ENTRIES, st.none(), NUMBERS), max_size=4).map(lambda d: json.dumps(d).encode()),
    st.binary(max_size=200),
    st.integers(1, 5000).map(lambda n: b'{"a":' * n + b"1" + b"}" * n),
)
LENGTHS = st.one_of(st.none(), st.integers(0, 2**64 - 1), st.sampled_from([0, 7, 2**31, 2**63, 2**64 - 1]))


def hostile(folder: Path, header: bytes, length: int | None, data: bytes) -> None:
    """Such a file is refused by both readers in one line that names it, wherever it stands."""
    said = len(header) if length is None else length
    weights = said.to_bytes(8, "little") + header + data
    (folder / MODEL).write_bytes(weights)
    write_manifest(folder, FILES)
    with pytest.raises(CheckpointError) as caught:
        load_bundle(folder)
    assert MODEL in str(caught.value) and len(str(caught.value)) < 2000 and str(caught.value).isprintable()
    try:
        read_official(folder / MODEL)
    except SeriatimError as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def victim(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(source / "model", tmp_path_factory.mktemp("victim") / "model"))


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "derandomize": True}


@settings(max_examples=100, **QUIET)  # type: ignore[arg-type]
@given(header=HEADERS, length=LENGTHS, data=st.binary(max_size=64))
def test_hostile_headers(victim: Path, header: bytes, length: int | None, data: bytes) -> None:
    hostile(victim, header, length, data)


@pytest.mark.slow
@settings(max_examples=2000, **QUIET)  # type: ignore[arg-type]
@given(header=HEADERS, length=LENGTHS, data=st.binary(max_size=64))
def test_two_thousand_hostile_headers(victim: Path, header: bytes, length: int | None, data: bytes) -> None:
    hostile(victim, header, length, data)


@pytest.mark.fresh_process
def test_a_hostile_header_takes_no_memory(victim: Path) -> None:
    """A header that claims 4 TB, in a process that may grow by 300 MB."""
    claim = {"no_class": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    header = json.dumps(claim).encode()
    (victim / MODEL).write_bytes(len(header).to_bytes(8, "little") + header)
    write_manifest(victim, FILES)
    child = os.fork()
    if child == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2)
        try:
            load_bundle(victim)
        except CheckpointError:
            os._exit(0)
        except BaseException:
            os._exit(2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a\x00b", "x" * 10_000, "..", "con", "\u202e"])
def test_names_of_tensors_are_never_paths(name: str, work: Path) -> None:
    tensors = load_file(work / "model" / MODEL)
    tensors[name] = torch.ones(1)
    save_file(tensors, work / "model" / MODEL)
    write_manifest(work / "model", FILES)
    before = content(work)
    opened: list[str] = []
    sys.addaudithook(
        lambda event, given: opened.append(str(given[0])) if event == "open" and opened is not None else None
    )
    with pytest.raises(CheckpointError, match="unknown tensor"):
        load_bundle(work / "model")
    touched = list(opened)
    assert content(work) == before
    assert all("model" in path or path.startswith(("/proc", "/sys")) or path.endswith(".py") for path in touched), (
        touched
    )


def test_names_of_a_manifest_are_never_paths(work: Path) -> None:
    (work / "secret").write_text("x")
    for name in ("../secret", str(work / "secret"), "model/../../secret", ".."):
        manifest = work / "model" / MANIFEST
        files = json.loads(manifest.read_text())["files"]
        digest = hashlib.sha256(b"x").hexdigest()
        whole = _render({**files, name: {"bytes": 1, "sha256": digest}})  # with a digest of its own that fits
        manifest.write_text(whole)
        with pytest.raises(CheckpointError, match="which is not a plain file name"):
            load_bundle(work / "model")
        manifest.write_text(_render(files))
    assert load_bundle(work / "model").class_names


def test_a_recipe_is_data_alone(tmp_path: Path) -> None:
    """No tag of YAML makes an object, whichever is tried."""
    tags = [
        "!!python/object/apply:os.mkdir [ran]",
        "!!python/name:os.system",
        "!!python/object/new:os.mkdir {args: [ran]}",
    ]
    for tag in tags:
        (tmp_path / "r.yaml").write_text(f"name: x\ndata: {tag}\n")
        with inside(tmp_path), pytest.raises(ConfigError):
            read_recipe("r.yaml")
        assert not (tmp_path / "ran").exists()
