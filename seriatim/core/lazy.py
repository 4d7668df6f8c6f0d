"""Public names that are imported on first use (PEP 562), so that `import seriatim` imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def exporter(package: str, where: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for the module `package` that imports each name from the module that `where` gives for it."""

    def find(name: str) -> Any:
        if name in where:
            return getattr(importlib.import_module(where[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
