"""Memory that runs out is one line with code 6 and loses nothing; what a long run keeps for later is bounded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import one_line

from seriatim.checkpoints.unfinished import newest_whole
from seriatim.cli.main import explain, run
from seriatim.core.construct import construct
from seriatim.core.errors import ConfigError, ResourceError
from seriatim.models.masked_model import MaskedModel
from seriatim.training import heap
from seriatim.training.config import read_recipe
from seriatim.training.loop import train

TINY = [
    "model.width=16", "model.depth=1", "model.heads=1", "model.head.width=16", "model.head.depth=1",
    "training.batch_size=16", "training.log_images=16", "training.dtype=float32", "training.threads=1",
    "training.images=160", "training.save_images=32",
]  # fmt: skip


def test_memory_that_runs_out_in_a_step_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 17 of the fault table: the allocation is real, and fails in the seventh step."""
    train(read_recipe("mar-digits", TINY), tmp_path / "whole", quiet=True)
    true, calls = MaskedModel.forward, [0]

    def greedy(self: MaskedModel, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 7:
            torch.empty(1 << 60, dtype=torch.uint8)
        return true(self, *arguments)

    words = ["train", "mar-digits", *TINY, "--out", str(tmp_path / "run"), "--json"]
    with monkeypatch.context() as patched:
        patched.setattr(MaskedModel, "forward", greedy)
        assert run(words) == 6
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "out of memory" in error[0] and "use a smaller batch or model" in error[0]
    path, passed_over = newest_whole(tmp_path / "run" / "checkpoints")
    assert path is not None and int(path.name) == 96 and not passed_over
    assert run([*words, "--resume"]) == 0
    one, two = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "run"))
    assert one == two


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 768 TiB for an array"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("can't start new thread"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_every_way_to_say_so_is_code_six(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(error) == 6
    assert "out of memory" in capsys.readouterr().err


LIMITED = """
import resource, sys
import torch  # before the limit, which its libraries alone would exceed
resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
from seriatim.cli.main import run
sys.exit(run(sys.argv[1:]))
"""


def test_a_model_that_is_too_large_is_code_six(tmp_path: Path) -> None:
    used = int(subprocess.run([sys.executable, "-c", USED], capture_output=True, text=True).stdout)
    code = LIMITED.replace("LIMIT,", f"{used + (1 << 30)},").replace("LIMIT)", f"{used + (1 << 30)})")
    words = ["train", "mar-digits", "model.width=65536", "model.heads=64", "--out", "run"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path, env=env)
    one_line(done, 6, "memory", "smaller")
    assert not (tmp_path / "run" / "checkpoints").exists()


USED = """
import torch
print(int(open("/proc/self/statm").read().split()[0]) * 4096)
"""


def test_a_constructor_that_fails_otherwise_is_a_config_that_is_wrong() -> None:
    def build(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    with pytest.raises(ResourceError, match=r"model: does not fit into memory \(.*allocate memory.*make it smaller"):
        construct(build, {"size": 1 << 60}, "model")
    with pytest.raises(ConfigError, match=r"check its values|failed with RuntimeError"):
        construct(build, {"size": -1}, "model")


def test_compiled_products_are_bounded_before_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, true = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", MaskedModel.forward
    seen: list[str | None] = []

    def looking(self: MaskedModel, *arguments: Any) -> Any:
        seen.append(os.environ.get(name))
        return true(self, *arguments)

    monkeypatch.setattr(MaskedModel, "forward", looking)
    monkeypatch.setenv(name, "17")
    train(read_recipe("mar-digits", [*TINY, "training.images=16"]), tmp_path / "a", quiet=True)
    assert seen[0] == "17", "what the user has set stays"
    monkeypatch.delenv(name)
    train(read_recipe("mar-digits", [*TINY, "training.images=16"]), tmp_path / "b", quiet=True)
    assert seen[-1] == str(heap.COMPILED)
    monkeypatch.delenv(name)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(heap.heap_trimmer() is None, reason="the C library can't be asked")
def test_free_memory_goes_back_to_the_system() -> None:
    """100 MB in blocks of 4 kB; the last is kept, above all the others."""
    blocks = [bytearray(4096) for _ in range(25_000)]
    last = blocks[-1]
    blocks.clear()
    before = resident()
    heap.return_heap()
    assert before - resident() > 50_000_000 and len(last) == 4096


def test_without_such_a_library_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    heap.heap_trimmer.cache_clear()
    heap.return_heap()
    assert heap.heap_trimmer() is None
    heap.heap_trimmer.cache_clear()
