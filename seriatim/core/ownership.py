"""Whose folder is it? What is written goes into a new or empty folder, or into one that proves to be ours.

The proof is what a folder of that kind holds anyway (a manifest with a digest, the settings of an evaluation, a recipe
beside a fingerprint of its images), so that folders of earlier releases prove themselves too. Looking changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from seriatim.core.errors import UsageError
from seriatim.core.files import explained, target_of
from seriatim.core.reading import LISTING_BYTES, Unreadable, read_json

DROPPINGS = {".DS_Store", "Thumbs.db", "desktop.ini"}  # files that file managers leave everywhere


def owned(
    folder: Path,
    what: str,
    proof: Callable[[Path], bool],
    *,
    begun: Container[str] = (),
    argument: str = "out",
) -> bool:
    """Whether `folder` is a `what` of ours by `proof`; False where it is new or empty. Any other is refused.

    `begun` names the files that may lie in a folder of this kind before there is anything that proves it.
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
    name = str(kept.relative_to(folder))
    raise UsageError(
        f"{argument}: {folder} holds {name!r} and is no {what} that Seriatim wrote; choose a new or empty folder"
    )


def first_file(folder: Path, begun: Container[str] = ()) -> Path | None:
    """A file that somebody keeps in `folder` or below; None where it is as good as empty."""
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
    """The mapping in a JSON file; an empty one where the file is missing or anything else."""
    try:
        return read_json(path, dict, LISTING_BYTES)
    except Unreadable:
        return {}
