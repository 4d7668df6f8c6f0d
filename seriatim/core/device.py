"""Which device and which dtype: what "auto" stands for, what is there, and float32 that is not rounded to less."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from seriatim.core.errors import UsageError, nearest, one_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(device: str | torch.device) -> torch.device:
    """ "auto" is the accelerator, if there is one, else the CPU."""
    if isinstance(device, str) and device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device: {device!r} is not there ({one_line(error)[:100]}); use 'auto' or 'cpu'") from error
    return picked


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The backbone's dtype: "auto" is bfloat16 on a CUDA device that multiplies in it, and float32 elsewhere.

    A device from before Ampere only emulates bfloat16, which is slower than float32.
    """
    if dtype == "auto":
        capable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if capable else torch.float32
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UsageError(f"dtype: {dtype!r} is not known{nearest(dtype, ['auto', *DTYPES])}")
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise UsageError(f"dtype: {dtype} is not allowed; use float32 or bfloat16")
    return dtype


@contextlib.contextmanager
def plain_torch(*, grad: bool = False) -> Iterator[None]:
    """Inside, torch is as this package's code expects it, whatever the caller has set for work of its own.

    That is: float32 and the CPU are what new tensors get by default, autocast and inference mode are off, and gradients
    are recorded if `grad` says so. All of it is put back at the end. It decorates functions too.
    """
    dtype = torch.get_default_dtype()
    accelerator = torch.accelerator.current_accelerator()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        for kind in {"cpu", accelerator.type if accelerator else "cpu"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


class _Precision:
    """PyTorch's settings of products and convolutions of float32, which belong to the whole process.

    Several threads may ask for full precision at a time: the first one saves the settings, the last one restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0

    def raise_(self) -> None:
        with self._lock:
            self._holders += 1
            if self._holders > 1:
                return
            cudnn: Any = torch.backends.cudnn
            mkldnn: Any = torch.backends.mkldnn
            products, convolutions = (torch.backends.cuda.matmul, mkldnn.matmul), (cudnn.conv, mkldnn.conv)
            self._before = [(setting, setting.fp32_precision) for setting in (*products, *convolutions)]
            lowered = any(setting.fp32_precision in ("tf32", "bf16") for setting in products)
            self._products = torch.get_float32_matmul_precision() if lowered else None
            if lowered:  # by this function, because PyTorch refuses to multiply where it and the settings disagree
                torch.set_float32_matmul_precision("highest")
            for setting in convolutions:
                setting.fp32_precision = "ieee"

    def restore(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders:
                return
            if self._products is not None:
                torch.set_float32_matmul_precision(self._products)
            for setting, value in self._before:
                setting.fp32_precision = value


_precision = _Precision()


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Inside, what is float32 is computed in float32: without autocast, and without TF32 or bfloat16 in its products.

    PyTorch lets convolutions on CUDA use TF32 unless told otherwise, and products where
    `torch.set_float32_matmul_precision` says so.
    """
    _precision.raise_()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _precision.restore()
