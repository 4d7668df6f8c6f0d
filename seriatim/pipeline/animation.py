"""Tokens appearing, as one moving picture.

B images, S steps.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from seriatim.core.errors import UsageError
from seriatim.core.files import atomic_write

LONGEST = 6.0  # seconds
SLOWEST, QUICKEST = 200, 40  # milliseconds of a frame
HOLD = 2000  # milliseconds of the last one


def save_animation(frames: Sequence[Image.Image], path: Path | str, *, overwrite: bool = False) -> Path:
    """Frames of one size as .gif, or as .png (which keeps all colours); the last is held, then it begins again.

    A file that is there is refused, unless it is to be replaced.
    """
    path = Path(path)
    if os.path.lexists(path) and not overwrite:
        raise UsageError(f"path: {path} exists already; name another file or pass overwrite=True")
    if path.suffix not in (".gif", ".png"):
        raise UsageError(f"animate: {path.name} must end in .gif or .png")
    if not frames:
        raise UsageError("animate: there are no steps to show")
    each = int(min(SLOWEST, max(QUICKEST, 1000 * LONGEST / len(frames))))
    durations = [each] * (len(frames) - 1) + [HOLD]
    first, *rest = [frame.convert("RGB") for frame in frames]
    kind = "GIF" if path.suffix == ".gif" else "PNG"

    def write(file: Path) -> None:
        first.save(file, format=kind, save_all=True, append_images=rest, duration=durations, loop=0)

    return atomic_write(path, write)
