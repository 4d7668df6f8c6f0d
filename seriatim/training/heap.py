"""Bound the memory that oneDNN and the C library keep during a long training on a CPU.

A masked model asks for another number of tokens in each batch. OneDNN compiles a matrix product for every new shape and
keeps it, and this leaves gaps in the heap that the C library does not return by itself (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import lru_cache

# OneDNN would keep 1,024 compiled products of about half a megabyte each. A training step, with the encoder of an
# autoencoder, needs fewer than this many.
COMPILED = 256


def bound_compiled_products() -> None:
    """Let oneDNN keep only COMPILED products. It reads this variable at the first matrix product of a process.

    A value that the user has set is kept.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(COMPILED))


def return_heap() -> None:
    """Return free memory to the operating system if the C library can do it."""
    trim = heap_trimmer()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def heap_trimmer() -> Callable[[int], int] | None:
    """The function malloc_trim of glibc; None if there is none (musl, macOS, Windows)."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    return found
