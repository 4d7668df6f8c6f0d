"""Chooses the device and the dtype, and runs code in plain torch settings or in full float32 precision."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from seriatim.core.errors import UsageError, check_known, one_line
from seriatim.core.processes import place

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(device: str | torch.device) -> torch.device:
    """The torch device; "auto" means the accelerator if there is one, else the CPU. Raises UsageError.

    Of several processes on a machine each gets an accelerator of its own, unless `device` has a number.
    """
    if isinstance(device, str) and device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return own_device(accelerator or torch.device("cpu"))
    try:
        picked = own_device(torch.device(device))
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device: {device!r} is not there ({one_line(error)[:100]}); use 'auto' or 'cpu'") from error
    return picked


def own_device(device: torch.device) -> torch.device:
    """The device of this process among several on its machine; a device with a number, or the CPU, is for all."""
    where = place()
    if where.size == 1 or device.type in ("cpu", "meta") or ":" in str(device):
        return device
    count = torch.accelerator.device_count()
    if where.local_size > count:
        raise UsageError(
            f"device: {where.local_size} processes on a machine with {count} {device.type} devices; start at most "
            f"{count} with torchrun --nproc-per-node, or give --device cpu"
        )
    return torch.device(device.type, where.local_rank)


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The backbone's dtype; "auto" means bfloat16 on a CUDA device that supports it, and float32 elsewhere.

    CUDA devices older than Ampere only emulate bfloat16, which is slower than float32. Raises UsageError.
    """
    if dtype == "auto":
        capable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if capable else torch.float32
    if isinstance(dtype, str):
        check_known(["auto", *DTYPES], dtype=dtype)
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise UsageError(f"dtype: {dtype} is not allowed; use float32 or bfloat16")
    return dtype


def synchronise(device: torch.device) -> None:
    """Wait until an accelerator has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def slow_in_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are emulated: on a CPU for which oneDNN has none."""
    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextlib.contextmanager
def plain_torch(*, grad: bool = False) -> Iterator[None]:
    """Run code under the torch settings that this package expects, whatever the caller has set.

    Inside, new tensors are float32 on the CPU by default, autocast and inference mode are off, and gradients are
    recorded only if `grad` is True. The caller's settings are restored at the end. This is also a decorator.
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


@contextlib.contextmanager
def tf32(device: torch.device, *, enabled: bool) -> Iterator[None]:
    """Run code in which float32 matrix products on CUDA are computed in TF32 if `enabled`, else in full float32.

    Nothing changes on other devices. `full_float32` inside this context still means full float32. The former settings
    are restored at the end.
    """
    if device.type != "cuda":
        yield
        return
    mkldnn: Any = torch.backends.mkldnn
    before = [(setting, setting.fp32_precision) for setting in (torch.backends.cuda.matmul, mkldnn.matmul)]
    lowered = any(value in ("tf32", "bf16") for _, value in before)
    usual = torch.get_float32_matmul_precision() if lowered else "highest"
    # This function is needed, because PyTorch fails where it disagrees with `fp32_precision`.
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(usual)
        for setting, value in before:
            setting.fp32_precision = value


class _Precision:
    """PyTorch's precision of float32 products and convolutions for the whole process, while someone needs all of it.

    Several threads may need full precision at the same time. The first one saves the settings, and the last one
    restores them.
    """

    lock = threading.Lock()
    holders = 0
    before: tuple[tuple[Any, str], ...] = ()  # (setting, value)
    products: str | None = None  # the precision of matrix products; None if it was not lowered


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Run code in which float32 tensors are computed in full float32: without autocast, TF32 or bfloat16 products.

    By default PyTorch uses TF32 for convolutions on CUDA, and `torch.set_float32_matmul_precision` may enable it for
    matrix products.
    """
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    products, convolutions = (torch.backends.cuda.matmul, mkldnn.matmul), (cudnn.conv, mkldnn.conv)
    now = _Precision
    with now.lock:
        now.holders += 1
        if now.holders == 1:
            now.before = tuple((setting, setting.fp32_precision) for setting in (*products, *convolutions))
            lowered = any(setting.fp32_precision in ("tf32", "bf16") for setting in products)
            now.products = torch.get_float32_matmul_precision() if lowered else None
            if lowered:  # this function is needed, because PyTorch fails where it disagrees with `fp32_precision`
                torch.set_float32_matmul_precision("highest")
            for setting in convolutions:
                setting.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with now.lock:
            now.holders -= 1
            if not now.holders:
                if now.products is not None:
                    torch.set_float32_matmul_precision(now.products)
                for setting, value in now.before:
                    setting.fp32_precision = value
