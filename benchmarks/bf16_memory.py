"""The memory of a long training by oneDNN on a CPU, with and without what bounds it.

    python benchmarks/bf16_memory.py --steps 5000                        # on a CPU with AVX-512
    python benchmarks/bf16_memory.py --steps 5000 --dtype float32        # on any x86 CPU
    python benchmarks/bf16_memory.py --bounds bounded --log memory.jsonl model.depth=1 model.head.depth=1

torch gives products in bfloat16 to oneDNN only on a CPU with AVX-512. With `--dtype float32` every product of a linear
layer is sent to oneDNN, which Seriatim does by itself only on AMD's CPUs with AVX-512, and only for large products.

Each training runs in a process of its own, since oneDNN reads the size of its cache once in a process, and all of
--bounds run at the same time. "bounded" trains as `seriatim train` does: lengths are padded to 16 buckets, oneDNN keeps
256 compiled products, and free memory is returned at each line of metrics. "unpadded" has no buckets. "free" has none
either, and has oneDNN's own default of 1,024 and returns nothing. The pictures are random numbers. The resident memory
is read at each line of metrics; with --log, each reading is appended to that file at once. The table gives it in MB,
its slope over the second half of the training in MB for each 1,000 steps, and the largest reading after the first tenth
of the training over the reading there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

BATCH = 16
BOUNDS = {"bounded": 16, "unpadded": 0, "free": 0}  # and their buckets


def resident() -> float:
    """The memory that this process holds now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def largest() -> float:
    """The most memory that this process has ever held, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


def train_and_measure(
    bound: str,
    folder: Path,
    dtype: str,
    steps: int,
    every: int,
    recipe: str,
    overrides: list[str],
    log: Path | None = None,
) -> None:
    """Train, printing a line of JSON with the step and the resident memory at each line of metrics."""
    if bound == "free":  # this is set before torch is imported, hence before the first product
        os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "1024"
    from seriatim.nn import onednn_training as linear
    from seriatim.training import loop, periodic
    from seriatim.training.config import read_recipe

    if dtype == "float32":
        linear.WORTHWHILE = 1
        setattr(linear, "mkl_is_slow", lambda: True)  # noqa: B010  (it has another type, that of a cached function)
    returned, lines = periodic.return_heap, 0

    def at_a_line_of_metrics() -> None:
        nonlocal lines
        lines += 1
        if bound != "free":
            returned()
        reading = {"step": min(steps, lines * every), "resident": resident()}
        print(json.dumps(reading), flush=True)  # noqa: T201
        if log is not None:
            with log.open("a") as file:
                file.write(json.dumps({"bound": bound, **reading}) + "\n")

    periodic.return_heap = at_a_line_of_metrics
    fixed = [
        f"data.path={folder / 'pictures'}",
        f"training.dtype={dtype}",
        "training.threads=1",
        f"training.buckets={BOUNDS[bound]}",
        f"training.batch_size={BATCH}",
        f"training.images={steps * BATCH}",
        f"training.log_images={every * BATCH}",
        "training.save_images=0",
        "training.sample_images=0",
    ]
    try:
        loop.train(read_recipe(recipe, [*overrides, *fixed]), folder / bound, device="cpu", quiet=True)
    finally:
        periodic.return_heap = returned
    print(json.dumps({"largest": largest()}), flush=True)  # noqa: T201


def pictures(folder: Path, count: int = 200) -> None:
    numbers = np.random.default_rng(0)
    for i in range(count):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "ab"[i % 2] / f"{i}.png")


def table(measured: dict[str, list[dict[str, float]]]) -> str:
    rows = [f"{'':8}{'start':>8}{'middle':>8}{'end':>8}{'peak':>8}{'slope':>8}{'ratio':>8}"]
    for bound, (*lines, last) in measured.items():
        steps, memory = ([line[name] for line in lines] for name in ("step", "resident"))
        late = slice(len(lines) // 2, None)
        slope = np.polyfit(steps[late], memory[late], 1)[0] * 1000 if len(steps[late]) > 1 else float("nan")
        numbers = (memory[0], memory[len(memory) // 2], memory[-1], last["largest"], slope)
        warm = memory[max(0, len(memory) // 10 - 1) :]
        rows.append(f"{bound:8}" + "".join(f"{number:8.0f}" for number in numbers) + f"{max(warm) / warm[0]:8.3f}")
    return "\n".join(rows)


def main(command: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as model.width=128")
    parser.add_argument("--recipe", default="mar-cifar10-tiny")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--every", type=int, default=100, help="steps between two lines of metrics")
    parser.add_argument("--bounds", nargs="+", choices=BOUNDS, default=["bounded", "free"])
    parser.add_argument("--log", type=Path, help="a file to which each reading is appended")
    parser.add_argument("--bound", choices=BOUNDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(command)
    if given.bound:
        sizes = (given.steps, given.every)
        train_and_measure(given.bound, given.folder, given.dtype, *sizes, given.recipe, given.overrides, given.log)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures(folder / "pictures")
        passed = ["--recipe", given.recipe, "--dtype", given.dtype, "--folder", name]
        passed += ["--steps", str(given.steps), "--every", str(given.every)]
        passed += ["--log", str(given.log.resolve())] if given.log else []
        running = {}
        for bound in given.bounds:
            with (folder / f"{bound}.jsonl").open("w") as lines:
                words = [sys.executable, __file__, *given.overrides, *passed, "--bound", bound]
                running[bound] = subprocess.Popen(words, stdout=lines)
        failed = [bound for bound, process in running.items() if process.wait() != 0]
        if failed:
            sys.exit(f"the training failed: {', '.join(failed)}")
        read = {bound: (folder / f"{bound}.jsonl").read_text().splitlines() for bound in given.bounds}
        print(table({bound: [json.loads(line) for line in lines] for bound, lines in read.items()}))  # noqa: T201


if __name__ == "__main__":
    main()
