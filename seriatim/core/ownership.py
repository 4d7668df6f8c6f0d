"""Checks that Seriatim writes only into new or empty folders, or into folders that it wrote before.

A folder is recognised by files that its kind holds anyway (a manifest with a digest, the settings of an evaluation, a
recipe beside a fingerprint of its images), so folders of earlier releases are recognised too. The checks only read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from seriatim.core.errors import UsageError
from seriatim.core.files import explained, target_of
from seriatim.core.reading import LISTING_BYTES, Unreadable, read_json

DROPPINGS = {".DS_Store", "Thumbs.db", "desktop.ini"}  # files that file managers create in any folder


def owned(
    folder: Path,
    what: str,
    proof: Callable[[Path], bool],
    *,
    begun: Container[str] = (),
    argument: str = "out",
) -> bool:
    """True if `proof` recognises `folder` as a `what` that Seriatim wrote; False if it is new or empty.

    Any other folder raises UsageError. `begun` holds the names of files that a folder of this kind may hold before it
    can be recognised.
    """
    if not os.path.lexists(folder):
        return False
    if not folder.is_dir():
        raise UsageError(f"{argument}: {folder} is a file; name a folder")
    with explained(folder, argument):
        if proof(folder):
            return True
        kept = first_file(folder, begun)
        if kept is None:
            return False
        if proof(folder):  # another process, which shares the work, has written its first file in between
            return True
    name = str(kept.relative_to(folder))
    raise UsageError(
        f"{argument}: {folder} holds {name!r} and is no {what} that Seriatim wrote; choose a new or empty folder"
    )


def first_file(folder: Path, begun: Container[str] = ()) -> Path | None:
    """The first file in `folder` or below it that matters to the user; None where there is no such file."""
    for path in sorted(folder.iterdir()):
        if path.name in begun or path.name in DROPPINGS or target_of(path) is not None:
            continue
        if not path.is_dir() or path.is_symlink():
            return path
        inner = first_file(path)
        if inner is not None:
            return inner
    return None


def json_of(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; an empty mapping if the file is missing or is not a JSON mapping."""
    try:
        return read_json(path, dict, LISTING_BYTES)
    except Unreadable:
        return {}
