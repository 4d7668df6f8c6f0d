"""Which device and which dtype: what "auto" stands for, and what is there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
    """The backbone's dtype: "auto" is bfloat16 on CUDA that has it, float32 elsewhere."""
    if dtype == "auto":
        capable = device.type == "cuda" and torch.cuda.is_bf16_supported()
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
