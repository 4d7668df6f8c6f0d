"""Memory of a long training on a CPU: what oneDNN and the C library keep for later is bounded.

A masked model asks for another number of tokens in each batch. Every new shape of a product is compiled by oneDNN and
kept, and it leaves gaps in the heap that the C library does not return by itself (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import lru_cache

# Of oneDNN's 1,024, about half a megabyte each. A step needs fewer, the encoder of an autoencoder included.
COMPILED = 256


def bound_compiled_products() -> None:
    """Let oneDNN keep this many compiled products; it reads the variable when a process multiplies the first time.

    What is set already stays as it is.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(COMPILED))


def return_heap() -> None:
    """Give memory that is free back to the system, where the C library can be asked to."""
    trim = heap_trimmer()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def heap_trimmer() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None where there is none (musl, macOS, Windows)."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    return found
