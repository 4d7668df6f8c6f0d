"""Leaves the tables of parts, and the record of plug-ins, as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from seriatim.core.plugins import LOADED, TABLES


@contextmanager
def kept_tables() -> Iterator[None]:
    """What is registered and loaded inside is forgotten afterwards."""
    tables = [LOADED, *(table.content() for table in TABLES)]
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, old in zip(tables, before, strict=True):
            table.clear()
            table.update(old)
