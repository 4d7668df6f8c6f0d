"""Save the steps of a generation as an animated picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from seriatim.core.errors import UsageError
from seriatim.core.files import atomic_write

LONGEST = 6.0  # seconds that an animation lasts at most, unless QUICKEST frames take longer
SLOWEST, QUICKEST = 200, 40  # milliseconds that a frame is shown, at most and at least
HOLD = 2000  # milliseconds that the last frame is shown


def save_animation(frames: Sequence[Image.Image], path: Path | str, *, overwrite: bool = False) -> Path:
    """Write frames of one size as an animated .gif, or .png (which keeps all colours), and return the path.

    The animation holds its last frame and repeats without end. Raises UsageError if the file exists and `overwrite` is
    False.
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
