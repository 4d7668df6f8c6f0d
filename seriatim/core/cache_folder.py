"""The folder for files that can be made again at any time, such as the hashes of images and downloaded weights."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "SERIATIM_CACHE"  # this environment variable names another folder


def cache_folder() -> Path:
    """`$SERIATIM_CACHE`, or else `seriatim` in the user's folder of caches (`$XDG_CACHE_HOME`, usually `~/.cache`)."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "seriatim"
