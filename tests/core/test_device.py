"""Which dtype "auto" is, and float32 that stays float32."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from seriatim.core.device import full_float32, pick_dtype, tf32

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_emulated_bfloat16_is_not_auto(native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A V100 says that it supports bfloat16, because PyTorch can emulate it there."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert pick_dtype("auto", CUDA) == dtype
    assert pick_dtype("bfloat16", CUDA) == torch.bfloat16, "what is asked for by name is done"
    assert pick_dtype("auto", CPU) == pick_dtype("auto", torch.device("mps")) == torch.float32


BACKENDS: Any = torch.backends
PRODUCTS = (BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul)
CONVOLUTIONS = (BACKENDS.cudnn.conv, BACKENDS.mkldnn.conv)


def precisions() -> list[str]:
    return [part.fp32_precision for part in (*PRODUCTS, *CONVOLUTIONS)]


def settings() -> list[Any]:
    return [torch.get_float32_matmul_precision(), BACKENDS.cudnn.allow_tf32, *precisions()]


def lowered() -> list[str]:
    return [value for value in precisions() if value not in ("ieee", "none")]


CHOICES: dict[str, Callable[[], None]] = {
    "as PyTorch has it": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "no TF32": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
}


@pytest.fixture(params=CHOICES)
def chosen(request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    """The settings that somebody has chosen for the process."""
    CHOICES[request.param]()
    yield settings()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for part in PRODUCTS:  # as PyTorch starts
        part.fp32_precision = "none"


def test_settings_of_the_process_are_raised_and_put_back(chosen: list[Any]) -> None:
    with full_float32(CPU):
        assert not lowered() and torch.get_float32_matmul_precision() == "highest"
        with full_float32(CPU):
            assert not lowered()
        assert not lowered()
    assert settings() == chosen
    with pytest.raises(ZeroDivisionError), full_float32(CPU):
        _ = 1 / 0
    assert settings() == chosen


@pytest.mark.parametrize("enabled", [True, False])
def test_tf32_holds_on_cuda_and_not_inside_full_float32(chosen: list[Any], enabled: bool) -> None:
    with tf32(CPU, enabled=enabled):
        assert settings() == chosen, "nothing changes on a CPU"
    with tf32(CUDA, enabled=enabled):
        assert (BACKENDS.cuda.matmul.fp32_precision == "tf32") == enabled
        with full_float32(CUDA):
            assert not lowered()
        assert (BACKENDS.cuda.matmul.fp32_precision == "tf32") == enabled
    assert settings() == chosen
    with pytest.raises(ZeroDivisionError), tf32(CUDA, enabled=enabled):
        _ = 1 / 0
    assert settings() == chosen


def test_two_threads_put_back_what_was_there(chosen: list[Any]) -> None:
    """The first thread to leave must not lower the precision of the other."""
    entered, leave, found = threading.Event(), threading.Event(), list[str]()

    def other() -> None:
        with full_float32(CPU):
            entered.set()
            leave.wait(10)
            found.extend(lowered())

    thread = threading.Thread(target=other)
    with full_float32(CPU):
        thread.start()
        assert entered.wait(10)
    leave.set()
    thread.join()
    assert found == [] and settings() == chosen


def test_products_inside_are_float32() -> None:
    x = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    expected = x @ x
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16), full_float32(CPU):
            product = x @ x
            image = torch.nn.functional.conv2d(x[None, None], x[None, None, :3, :3])
        assert product.dtype == image.dtype == torch.float32
        assert torch.equal(product, expected)
    finally:
        torch.set_float32_matmul_precision("highest")
