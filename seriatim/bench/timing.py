"""Seconds, bytes, FLOPs, and the machine's matrix peak."""

from __future__ import annotations

import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from seriatim.nn.prepare import PackedLinear, packs


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Stages:
    """Seconds by stage. A device that works on its own is waited for at each end, so use a run of its own for it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, {}  # type: torch.device, dict[str, float]

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        synchronise(self.device)
        begin = time.perf_counter()
        yield
        synchronise(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


def median(function: Callable[[], object], device: torch.device, least: float = 0.3) -> float:
    """Seconds of one call: the median of several, after two that warm up."""
    function()
    begin = time.perf_counter()
    function()
    synchronise(device)
    calls = max(1, round(least / 5 / max(1e-9, time.perf_counter() - begin)))
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        synchronise(device)
        seconds.append((time.perf_counter() - begin) / calls)
    return statistics.median(seconds)


@torch.no_grad()
def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large product, the best way this machine has."""
    side, rows = (2048, 2048) if device.type == "cpu" else (8192, 8192)
    layer = nn.Linear(side, side, bias=False, device=device)
    x = torch.randn(rows, side, device=device, dtype=dtype)
    product: Callable[[Tensor], Tensor] = layer.to(dtype)
    if device.type == "cpu" and packs(dtype):
        packed = PackedLinear(layer, dtype)
        usual, other = median(lambda: product(x), device), median(lambda: packed(x), device)
        return 2 * rows * side * side / min(usual, other)
    return 2 * rows * side * side / median(lambda: product(x), device)


def linear_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * int(weight[0])  # (..., I), (O, I)


def attention_flops(q: Any, k: Any, *_: Any, **__: Any) -> int:
    return 4 * math.prod(q) * int(k[2])  # (B, h, S, d) each: two products


def counting() -> FlopCounterMode:
    """Counts FLOPs of matrix products, also of those that torch's own counter doesn't know."""
    known: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    if packs(torch.float32):
        known[torch.ops.mkldnn._linear_pointwise] = linear_flops
    return FlopCounterMode(display=False, custom_mapping=known)


def peak_resident_bytes() -> int | None:
    """The most memory that this process has held; None where the system doesn't tell."""
    try:  # not getrusage's on Linux: a child's begins with its parent's
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def processor(device: torch.device) -> str:
    """The name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
