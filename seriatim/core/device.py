"""Which device and which dtype: what "auto" stands for, and what is there."""

from __future__ import annotations

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
