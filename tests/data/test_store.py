"""Shards are whole or made anew: no flipped bit, no half of a file, and no shard of something else passes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from seriatim.core.errors import CheckpointError
from seriatim.core.files import target_of
from seriatim.data.store import Shards


def shards(folder: Path, key: str = "these") -> Shards:
    return Shards(folder, lambda n: f"part-{n}", lambda _: 3, key)


@pytest.fixture
def store(tmp_path: Path) -> Shards:
    made = shards(tmp_path)
    for number in range(2):
        made.write(number, {"features": torch.arange(12.0).reshape(3, 4) + number})
    return made


def test_what_was_written_is_read(store: Shards) -> None:
    assert store.there(0) and not store.there(2)
    assert torch.equal(store.read(1)["features"], torch.arange(12.0).reshape(3, 4) + 1)
    assert store.whole(0) != store.whole(1)


def test_no_flipped_bit_passes(store: Shards, capsys: pytest.CaptureFixture[str]) -> None:
    path = store.path(0)
    intact = path.read_bytes()
    for place in range(0, len(intact), 7):
        damaged = bytearray(intact)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert store.whole(0) is None
        with pytest.raises(CheckpointError, match=r"part-0.safetensors is damaged; repeat the command to mend it$"):
            store.read(0)
    assert "mending: " in capsys.readouterr().err
    store.write(0, {"features": torch.arange(12.0).reshape(3, 4)})
    assert path.read_bytes() == intact and store.whole(0)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"5", b'{"sha256": 1}', b"\xff"])
def test_a_damaged_sidecar_is_no_proof(store: Shards, content: bytes) -> None:
    store.sidecar(0).write_bytes(content)
    assert store.whole(0) is None and store.whole(1)


def test_shards_of_something_else_do_not_pass(store: Shards) -> None:
    assert shards(store.folder, "others").whole(0) is None
    assert Shards(store.folder, lambda n: f"part-{n}", lambda _: 4, "these").whole(0) is None


def test_a_crash_between_the_two_files_leaves_no_whole_shard(store: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("seriatim.data.store.write_json", crash)
    with pytest.raises(KeyboardInterrupt):
        store.write(0, {"features": torch.zeros(3, 4)})
    assert not store.there(0) and store.whole(0) is None


@pytest.mark.fresh_process
def test_a_kill_leaves_only_what_a_sweep_removes(tmp_path: Path) -> None:
    """Also while a library writes, which may do so under a name of its own."""
    made, tensors = shards(tmp_path), {"features": torch.zeros(3, 100_000)}
    child = os.fork()
    if child == 0:
        while True:
            made.write(0, tensors)
    names: set[str] = set()
    end = time.monotonic() + 0.5
    while time.monotonic() < end or not made.there(0):
        names |= set(os.listdir(tmp_path))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert {name for name in names if target_of(tmp_path / name) is None} == {"part-0.safetensors", "part-0.json"}
    made.sweep(0)
    assert {path.name for path in tmp_path.iterdir()} <= {"part-0.safetensors", "part-0.json"}
