"""A CUDA device that isn't there: tensors that say they are on cuda:0 and compute on the CPU.

    with pretend_cuda() as device:
        model = pretend(model)                      # parameters and buffers, in place
        loss = model(pretend(images), labels)       # raises DeviceError where CUDA would refuse mixed devices
        loss.backward()
    assert device.reads == {"seriatim/models/masked.py:84 nonzero": 1}

`reads` counts what makes the host wait for the device (`.item()`, `.tolist()`, `nonzero`, boolean indexing, copies to
the CPU), `copies` what is sent to the device, and `reduced` the products that the device would not compute in float32
(TF32, autocast), each by file, line and kind. `pretend_cuda(float64=False)` refuses float64, as Apple's GPU does.

What this can't show: kernels that a device lacks, its rounding, its speed, and what autocast changes. PyTorch itself
sees tensors on the device "meta", because it will not make a tensor of a device that it was built without.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, overload
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import seriatim

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
HERE, TORCH = Path(__file__), str(Path(torch.__file__).parent)
ROOT = HERE.resolve().parent.parent
PACKAGE = Path(seriatim.__file__).resolve().parent
aten = torch.ops.aten
Module = TypeVar("Module", bound=nn.Module)

# Operations whose result the host must know before it can go on.
READS = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.nonzero_numpy.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.equal.default: "equal",
    aten.allclose.default: "allclose",
    aten.is_nonzero.default: "item",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.bincount.default: "bincount",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}
INDEXING = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor, aten._unsafe_index_put.default,
}  # fmt: skip
# Elementwise operations take a number that is a tensor of the CPU; these take none.
STRICT = {
    "mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot", "matmul", "linear", "einsum", "convolution", "embedding",
    "index_select", "gather", "scatter", "scatter_add", "index_add", "index_copy", "index_fill", "take", "cat", "stack",
    "searchsorted", "bucketize", "native_layer_norm", "native_group_norm", "multinomial",
    "scaled_dot_product_attention", "_scaled_dot_product_fused_attention_overrideable",
}  # fmt: skip
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot"}
CONVOLUTIONS = {"convolution", "convolution_backward"}


class DeviceError(RuntimeError):
    """What CUDA would have refused."""


class Pretend(Tensor):
    """A tensor that says it is on cuda:0; `inner` holds its numbers on the CPU."""

    inner: Tensor  # type: ignore[assignment]  # torch.Tensor.inner is a product that nothing here asks for

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> Pretend:
        made: Pretend = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=torch.device("meta"), requires_grad=requires_grad,
        )  # fmt: skip
        made.inner = inner
        return made

    device = CUDA
    is_cuda, is_cpu, is_meta = True, False, False

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pretend({self.inner!r})"

    def tolist(self) -> Any:
        running().read("tolist")
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def new_tensor(  # type: ignore[override]
        self, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
    ) -> Tensor:
        where = self.device if device is None else device
        return torch.tensor(data, dtype=dtype or self.dtype, device=where, requires_grad=requires_grad)

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(sent(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        value = value if isinstance(value, Tensor) else Pretend(torch.tensor(value, dtype=self.dtype))
        super().__setitem__(sent(index), value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = pretend(self)
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return running().__torch_dispatch__(func, types, args, kwargs)


def sent(index: Any) -> Any:
    """An index in which lists have become tensors on the device, as CUDA has it."""
    if isinstance(index, tuple):
        return tuple(sent(part) for part in index)
    return torch.tensor(index, device=CUDA) if isinstance(index, list) else index


class Calls(TorchFunctionMode):
    """What Python asks of PyTorch, and PyTorch would do where `PretendCUDA` does not see it."""

    def __init__(self, device: PretendCUDA) -> None:
        super().__init__()
        self.pretended = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], CUDA)
        elif func is Tensor.cpu:
            func, args = Tensor.to, (args[0], CPU)
        if func is Tensor.to:
            return self._to(*args, **named)
        device = None if named.get("device") is None else torch.device(named["device"])
        if device is not None and device.type == "cuda":
            named["device"] = CUDA  # PyTorch would ask a driver which one is meant
            if func in (torch.tensor, torch.as_tensor, torch.asarray):
                wants = named.pop("requires_grad", False)
                made: Tensor = func(*args, **{**named, "device": CPU})
                return self._to(made, CUDA).requires_grad_(wants)
        with self.pretended.told(device):
            return func(*args, **named)

    def _to(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        """`x.to(...)`: x itself, where nothing changes."""
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        copied = named.pop("copy", False)
        parsed: tuple[Any, ...] = torch._C._nn._parse_to(*args, **named)
        device, dtype, later, layout = parsed
        if device is None:
            device = x.device
        elif device.type == "cuda" or (device.type == "meta" and isinstance(x, Pretend)):  # which PyTorch takes it for
            device = CUDA
        if device == x.device and dtype in (None, x.dtype) and layout is None and not copied:
            return x
        keywords = {} if layout is None else {"memory_format": layout}
        with self.pretended.told(device):
            made: Tensor = aten._to_copy(x, device=device, dtype=dtype, non_blocking=later, **keywords)
        return made


class PretendCUDA(TorchDispatchMode):
    """Runs what is asked of pretended tensors, refuses what CUDA would, and counts."""

    def __init__(self, float64: bool) -> None:
        super().__init__()
        self.float64 = float64
        self.reads: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.reduced: Counter[str] = Counter()
        self.meta = False  # whether Python asked for the device "meta", which is then meant
        self.half = False  # whether autocast is on, which is hidden from what a dispatch mode sees

    @contextlib.contextmanager
    def told(self, device: torch.device | None) -> Iterator[None]:
        before = self.meta, self.half
        self.meta = device is not None and device.type == "meta"
        self.half = torch.is_autocast_enabled("cuda")
        try:
            yield
        finally:
            self.meta, self.half = before

    def _is_here(self, device: torch.device) -> bool:
        return device.type == "cuda" or (device.type == "meta" and not self.meta)

    def reset(self) -> None:
        for counter in (self.reads, self.copies, self.reduced):
            counter.clear()

    def read(self, kind: str) -> None:
        self.reads[f"{caller()} {kind}"] += 1

    def copy(self, kind: str) -> None:
        self.copies[f"{caller()} {kind}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        leaves = tree_leaves((args, named))
        ours = [leaf for leaf in leaves if isinstance(leaf, Pretend)]
        others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, Pretend)]
        device = named.get("device")
        name = func._overloadpacket.__name__.removesuffix("_")
        if func is aten._to_copy.default:
            here = self._moves(args[0], device)
        elif func is aten.copy_.default:
            here = self._copies(*args[:2])
        else:
            here = bool(ours) if device is None else self._is_here(device)
            if ours:
                self._refuse(func, name, args, ours, others)
                self._count(func, name, args, ours)
        if here:
            named = self._on_the_cpu(func, named)
        made = func(*tree_map(real, args), **tree_map(real, named))
        if func is aten._conj.default:  # a wrapper has no bit that says so: the numbers are conjugated now
            return self.place(made.resolve_conj()) if here else made
        if not here:
            return made if func is not aten.copy_.default else args[0]
        made = tree_map(self.place, made)
        return return_and_correct_aliasing(func, args, kwargs or {}, made)

    def _moves(self, source: Tensor, device: torch.device | None) -> bool:
        """Whether a copy of `source` is on the device; counts those between host and device."""
        here = isinstance(source, Pretend) if device is None else self._is_here(device)
        if isinstance(source, Pretend) and not here:
            self.read("copy to the CPU")
        if here and not isinstance(source, Pretend):
            self.copy("copy to the device")
        return here

    def _copies(self, target: Tensor, source: Tensor) -> bool:
        if isinstance(source, Pretend) and not isinstance(target, Pretend):
            self.read("copy to the CPU")
        if isinstance(target, Pretend) and not isinstance(source, Pretend) and source.numel() and source.ndim:
            self.copy("copy to the device")
        return isinstance(target, Pretend)

    def _refuse(self, func: Any, name: str, args: Any, ours: list[Any], others: list[Tensor]) -> None:
        if not others:
            return
        shapes = f"{name}: cuda:0 {[tuple(t.shape) for t in ours]} with cpu {[tuple(t.shape) for t in others]}"
        if func in INDEXING:
            if not isinstance(args[0], Pretend):
                raise DeviceError(
                    f"{shapes} at {caller()}: indices should be either on cpu or on the same device as the indexed "
                    "tensor (cpu)"
                )
            for index in args[1]:
                if index is not None and not isinstance(index, Pretend):
                    self.copy("index")
            others = [t for t in others if all(t is not index for index in args[1])]
        writes = func._schema.is_mutable and any(t is args[0] for t in others)
        if others and (writes or name in STRICT or any(t.ndim or t.is_meta for t in others)):
            raise DeviceError(f"{shapes} at {caller()}: expected all tensors to be on the same device")

    def _count(self, func: Any, name: str, args: Any, ours: list[Any]) -> None:
        if func in READS:
            self.read(READS[func])
        if func in INDEXING:
            masks = [t for t in args[1] if isinstance(t, Pretend) and t.dtype in (torch.bool, torch.uint8)]
            # One mask and one number become masked_fill, for which nobody waits.
            fills = (
                len(args) > 2 and len(masks) == 1 and args[2].numel() == 1 and sum(t is not None for t in args[1]) == 1
            )
            if masks and not fills:
                self.read("boolean index")
        if ours[0].dtype == torch.float32:
            if name in PRODUCTS and (self.half or torch.backends.cuda.matmul.fp32_precision == "tf32"):
                self.reduced[f"{caller()} {name}"] += 1
            cudnn: Any = torch.backends.cudnn  # `conv` is not in its types
            if name in CONVOLUTIONS and (self.half or cudnn.conv.fp32_precision == "tf32"):
                self.reduced[f"{caller()} {name}"] += 1

    def _on_the_cpu(self, func: Any, named: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments with which the CPU computes what the device is asked for."""
        generator = named.get("generator")
        if generator is not None and generator.device.type == "cpu":
            raise DeviceError(f"{func} at {caller()}: expected a 'cuda' generator, found one of the CPU")
        return {**named, **({"device": CPU} if named.get("device") is not None else {})}

    def place(self, made: Any) -> Any:
        """What was computed, on the device."""
        if not isinstance(made, Tensor) or isinstance(made, Pretend):
            return made
        if made.dtype == torch.float64 and not self.float64:
            raise DeviceError(f"{caller()}: this device has no float64")
        return Pretend(made)


def caller() -> str:
    """File and line of the package, or of the test, that asked for what is being done."""
    frame: FrameType | None = sys._getframe(1)
    outside = "?"
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith((TORCH, str(HERE))):
            where = Path(path)
            if where.is_relative_to(PACKAGE):  # wherever it is installed
                return f"seriatim/{where.relative_to(PACKAGE)}:{frame.f_lineno}"
            if where.is_relative_to(ROOT) and "site-packages" not in where.parts:
                return f"{where.relative_to(ROOT)}:{frame.f_lineno}"
            outside = f"{where.name}:{frame.f_lineno}" if outside == "?" else outside
        frame = frame.f_back
    return outside


def running() -> PretendCUDA:
    """The device that is pretended now."""
    assert _running, "a pretended tensor can be used inside `with pretend_cuda():` only"
    return _running[-1]


_running: list[PretendCUDA] = []


@contextlib.contextmanager
def pretend_cuda(*, float64: bool = True) -> Iterator[PretendCUDA]:
    """Inside, the device "cuda" takes what is made on it or moved to it."""
    mode = PretendCUDA(float64)
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with (
        mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda **_: True),
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mode,
        Calls(mode),
    ):
        torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay themselves when they are moved
        _running.append(mode)
        try:
            yield mode
        finally:
            _running.pop()
            torch.__future__.set_swap_module_params_on_conversion(swaps)


@overload
def pretend(x: Tensor) -> Pretend: ...
@overload
def pretend(x: Module) -> Module: ...
def pretend(x: Any) -> Any:
    """A tensor on the device, which counts as no copy; or a module, whose tensors are put there in place."""
    if isinstance(x, Tensor):
        made = running().place(real(x).detach().clone())
        return (
            nn.Parameter(made, x.requires_grad) if isinstance(x, nn.Parameter) else made.requires_grad_(x.requires_grad)
        )
    moved: dict[int, Tensor] = {}  # a tensor that two modules share stays one
    for part in x.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = moved.setdefault(id(tensor), pretend(tensor))
    return x


def real(x: Any) -> Any:
    """The numbers of a tensor, on the CPU, which counts as no read."""
    return x.inner if isinstance(x, Pretend) else x
