"""How long a data set of many small files takes to be opened: the first time, when all files are read, and again.

    python benchmarks/folder_start.py

Each start is a process of its own. The times are those of opening the folder alone: listing it, comparing the size and
the time of change of every file with what is known, and the fingerprint of all contents. The import of the package is
not in them. Files with random pixels are written first, into a folder that is deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

OPEN = """
import json, sys, time
from seriatim.data.folder import Folder
began, cpu = time.perf_counter(), time.process_time()
fingerprint = Folder(sys.argv[1], 32).fingerprint()
print(json.dumps([fingerprint, time.perf_counter() - began, time.process_time() - cpu]))
"""


def write(folder: Path, files: int, classes: int, side: int) -> None:
    """Write PNG files with random pixels, spread evenly over the classes."""
    random = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label:03d}").mkdir(parents=True)
    for i in range(files):
        pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"class{i % classes:03d}" / f"{i:07d}.png", compress_level=1)


def opened(folder: Path, cache: Path) -> tuple[str, float, float]:
    """The fingerprint that a new process finds, and the seconds and seconds of CPU that it takes."""
    command = [sys.executable, "-c", OPEN, str(folder)]
    environment = {**os.environ, "SERIATIM_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    fingerprint, seconds, cpu = json.loads(done.stdout)
    return fingerprint, seconds, cpu


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--side", type=int, default=32, help="pixels of a side")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder, cache = Path(place, "images"), Path(place, "cache")
        write(folder, options.files, options.classes, options.side)
        fingerprint, *first = opened(folder, cache)
        same, *again = opened(folder, cache)
    assert same == fingerprint, "a second start finds the same data"
    for start, (seconds, cpu) in (("first", first), ("second", again)):
        sys.stdout.write(f"{options.files:,} files, {start} start: {seconds:.2f} s ({cpu:.2f} s of CPU)\n")


if __name__ == "__main__":
    main()
