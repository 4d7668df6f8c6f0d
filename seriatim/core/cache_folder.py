"""The folder for files that can be made again at any time, such as the hashes of images and downloaded weights."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from seriatim.core.files import expanded

VARIABLE = "SERIATIM_CACHE"  # this environment variable names another folder


def cache_folder() -> Path:
    """`$SERIATIM_CACHE`, or else `seriatim` in the user's folder of caches (`$XDG_CACHE_HOME`, usually `~/.cache`)."""
    given = os.environ.get(VARIABLE)
    if given:
        return expanded(given)
    usual = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if usual.startswith("~"):  # this user has no home, as in a container
        return Path(tempfile.gettempdir()) / f"seriatim-{os.getuid()}"
    return expanded(usual) / "seriatim"
