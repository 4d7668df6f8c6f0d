"""The folder for files that can be made again at any time, such as the hashes of images and downloaded weights."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from seriatim.core.errors import ResourceError
from seriatim.core.files import expanded, explained

VARIABLE = "SERIATIM_CACHE"  # this environment variable names another folder


def cache_folder() -> Path:
    """`$SERIATIM_CACHE`, or else `seriatim` in the user's folder of caches (`$XDG_CACHE_HOME`, usually `~/.cache`).

    A user without a home has a folder among temporary files. Raises ResourceError if somebody else made it.
    """
    given = os.environ.get(VARIABLE)
    if given:
        return expanded(given)
    usual = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if usual.startswith("~"):  # this user has no home, as in a container
        folder = Path(tempfile.gettempdir()) / f"seriatim-{os.getuid()}"
        with explained(folder):
            folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise ResourceError(f"{folder} belongs to somebody else; set {VARIABLE} to a folder of your own")
        return folder
    return expanded(usual) / "seriatim"
