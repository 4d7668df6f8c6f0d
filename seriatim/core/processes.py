"""Which of several processes this is, as torchrun or another launcher says in environment variables."""

from __future__ import annotations

import os
from typing import NamedTuple

from seriatim.core.errors import UsageError

RANK, SIZE, LOCAL_RANK, LOCAL_SIZE = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
RESTARTS = "TORCHELASTIC_RESTART_COUNT"


class Place(NamedTuple):
    """The number of this process and of all processes, on all machines together and on this one."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def place() -> Place:
    """The place of this process; the first of one where no launcher says otherwise.

    Raises UsageError if the environment contradicts itself.
    """
    size, rank = _number(SIZE, 1), _number(RANK, 0)
    local_size, local_rank = _number(LOCAL_SIZE, size), _number(LOCAL_RANK, rank)
    for name, value, of, most in ((RANK, rank, SIZE, size), (LOCAL_RANK, local_rank, LOCAL_SIZE, local_size)):
        if not value < most:
            raise UsageError(f"{name}: {value} is not allowed with {of}={most}; start with torchrun, or unset {name}")
    return Place(rank, size, local_rank, local_size)


def restarted() -> bool:
    """Whether torchrun started this process again after a failure."""
    return _number(RESTARTS, 0) > 0


def launch() -> str | None:
    """The name of the start of torchrun that this process belongs to, restarts included; None without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID") or None


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    if not value:
        return default
    if not value.isascii() or not value.isdecimal() or len(value) > 9:
        raise UsageError(f"{name}: {value!r} is not a whole number; start with torchrun, or unset {name}")
    return int(value)
