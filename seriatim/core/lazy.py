"""Public names that are imported on first use (PEP 562), so that `import seriatim` imports no torch.

A package's `__init__` lists its names twice: as plain imports for type checkers and editors, which never run, and as a
table that is read at run time. `tests/test_public_names.py` shows that the two lists agree.

    if TYPE_CHECKING:
        from seriatim.heads.base import Head as Head
    else:
        __all__, __getattr__, __dir__ = exports(__name__, {"base": "Head"})

`Head as Head` marks the name as public (PEP 484), and type checkers refuse names that are not listed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def exports(package: str, names: Mapping[str, str]) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` for the module `package`.

    `names` maps each module, by its name in the package, to the names that are imported from it, separated by blanks.
    """
    where = {name: f"{package}.{module}" for module, listed in names.items() for name in listed.split()}

    def find(name: str) -> Any:
        if name in where:
            return getattr(importlib.import_module(where[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *where})

    return sorted(where), find, listed
