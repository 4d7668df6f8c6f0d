"""A checkout of somebody's research code, imported and run as it is: nothing of it stays behind, nothing is changed.

Such code calls `.cuda()` everywhere, and imports torchvision without need. On another device the first does nothing;
where torchvision can't be imported, an empty stand-in takes its place.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from seriatim.bench.opponent import Draws, Opponent, Pair, Workload, replaced
from seriatim.core.errors import ConfigError, SeriatimError, UsageError, one_line

DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}


def dtypes(device: torch.device) -> tuple[str, ...]:
    """What an original may be run in."""
    return DTYPES.get(device.type, ("float32",))


class Official(Opponent):
    """An original, in the dtype that is its fastest here."""

    name = "official"

    def __init__(self, device: torch.device) -> None:
        self.device, self.dtype = device, "float32"
        self.tried: dict[str, float] = {}  # seconds by dtype, from a few steps

    def few(self, workload: Workload) -> Workload:
        """A workload of the same kind that takes less time."""
        raise NotImplementedError(f"{type(self).__name__} lacks few()")

    def replay(self, ours: Opponent, workload: Workload) -> tuple[list[Pair], float, float]:
        """What must be alike where both run with the same random numbers, and the seconds of ours and of the original.

        Here it is the tokens.
        """
        draws = Draws()
        tokens, seconds = ours.sample(workload, draws)
        expected, official = self.sample(workload, draws)
        return [(tokens, expected)], seconds, official

    def choose(self, dtype: str | None, workload: Workload) -> str:
        """The dtype to be timed in: the one named, or that in which it is fastest, from a few steps of each."""
        if dtype is not None:
            self.dtype = dtype
            return dtype
        for candidate in dtypes(self.device):
            self.dtype = candidate
            self.tried[candidate] = min(self.sample(self.few(workload), Draws())[1] for _ in range(2))
        self.dtype = min(self.tried, key=lambda name: self.tried[name])
        return self.dtype


def load_checkout(
    path: Path, names: Sequence[str], *, inside: Sequence[str], has: tuple[str, str], source: str, hint: str = ""
) -> dict[str, types.ModuleType]:
    """The modules `names` of a checkout, under no name of Python's own: nothing of it stays on the path.

    `inside` are its top-level packages, `has` a module of `names` and what that must define; `source` says where to get
    it, `hint` what may be missing, a package and how to install it.
    """
    main, wanted = has
    file = main.replace(".", "/") + ".py"
    if not (path / file).is_file():
        raise UsageError(f"official: {path} holds no {file}; give a checkout of the original ({source})")
    with set_aside(*inside):
        sys.path.insert(0, str(path.resolve()))
        for name in inside:  # folders without __init__.py: one of that name elsewhere on the path would be preferred
            if (path / name).is_dir() and not (path / name / "__init__.py").exists():
                sys.modules[name] = types.ModuleType(name)
                sys.modules[name].__path__ = [str(path.resolve() / name)]
        try:
            with stand_ins():
                code = {name: importlib.import_module(name) for name in names}
        except Exception as error:  # whatever importing a stranger's code may raise
            package = hint.partition("==")[0].rpartition('"')[2] if hint else ""
            more = f"; {hint}" if package and package in str(error) else ""
            raise ConfigError(f"official: {path} can't be imported ({one_line(error)}){more}") from error
        finally:
            sys.path.remove(str(path.resolve()))
    if not hasattr(code[main], wanted):
        raise UsageError(f"official: {path}/{file} has no {wanted}; give a checkout of the original ({source})")
    return code


@contextlib.contextmanager
def explained(source: str) -> Iterator[None]:
    """Inside, what the checkout raises is one line that says where it comes from."""
    try:
        yield
    except (SeriatimError, MemoryError, AssertionError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):
            raise
        raise ConfigError(
            f"official: the checkout fails ({type(error).__name__}: {one_line(error)[:200]}); use {source}"
        ) from error


def here(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Inside, `.cuda()` stays on this device."""
    if device.type == "cuda":
        return contextlib.nullcontext()
    stay = lambda tensor, *_, **__: tensor  # noqa: E731
    return replaced((torch.Tensor, "cuda", stay), (nn.Module, "cuda", stay))


@contextlib.contextmanager
def numpy_left_alone() -> Iterator[None]:
    """NumPy's own generator, which an original may draw from, is afterwards as it was."""
    before = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(before)


@contextlib.contextmanager
def set_aside(*names: str) -> Iterator[None]:
    """Inside, these modules and all in them are not imported yet; outside, they are what they were."""

    def take() -> dict[str, types.ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in names}

    before = take()
    try:
        yield
    finally:
        take()
        sys.modules.update(before)


class Anything(type):
    """A class that has every attribute: what is looked up at import, and never used."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class Hollow(types.ModuleType):
    """A module in which every name is a class that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name == "__path__":  # a package: what is inside it can be imported too
            return []
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {"__module__": self.__name__})


class HollowFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `torchvision` and all inside it, hollow."""

    @override
    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Hollow(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Inside, `torchvision` can be imported: itself, or a hollow one where it is missing or broken."""
    try:
        importlib.import_module("torchvision")
    except Exception:  # a broken one raises anything
        finder = HollowFinder()
        with set_aside("torchvision"):
            sys.meta_path.insert(0, finder)
            try:
                yield
            finally:
                sys.meta_path.remove(finder)
    else:
        yield
