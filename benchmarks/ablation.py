"""The eight cells of Li et al. 2024 (MAR), table 1, at a small budget: order and attention, crossed with the loss.

    OMP_NUM_THREADS=1 python benchmarks/ablation.py --out runs/ablation --data cifar10/train --real-data cifar10/test \\
        --classifier runs/classifier

Cells: {raster, random: causal; masked: bidirectional in random order, one token a step; several: the same, several a
step} x {ce: cross-entropy on codes; diffusion: Diffusion Loss}. `masked` and `several` are one training, sampled in two
ways. Width and depth are those of all trunks; rate, batch, images and their order too.

    known   the processes of `known_density`, and its scores: three seeds, 95 % t-intervals, differences seed by seed.
            Codes are 256 k-means centres of tokens.
    cifar   class folders of small pictures, one seed: Frechet distance, precision, recall and accuracy with a
            classifier's features, and as many real test images beside. Intervals are 95 % of Student's t, of one seed
            with the error of a jackknife of ten groups of its samples, which says nothing of other seeds. Codes are
            k-means centres of the same patches that features are of; what decoded codes of real images are given is
            the floor of -ce.

Every training is judged on its way twice: when it has seen --images (--known-images), and when its updates have taken
--seconds (--known-seconds) of a thread's processor time; reading images and judging don't count. The weights are
averaged over the last tenth or so of the updates, whenever that is. What is done already in --out is not done again,
and a training goes on from its last checkpoint: stop at any time. --report prints the tables, in markdown, and draws
the pictures. All that is said is of this budget.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import ablation_cifar
import ablation_known
import torch
from ablation_cells import CELLS, read
from ablation_cifar import CifarWork
from ablation_known import KnownWork
from ablation_tables import cifar_tables, known_tables, picture
from known_density import check_names
from known_density_tables import BUDGETS, figure, is_truth
from known_processes import TASKS as PROCESSES

from seriatim.core.errors import DataError, NumericsError, SeriatimError, UsageError, one_line
from seriatim.core.files import writable_folder, write_text

Work = KnownWork | CifarWork

TASKS = {"known": (0, 1, 2), "cifar": (0,)}  # and their seeds
SIZES = {"images": 50_000, "samples": 1000, "side": 32, "patch": 4, "codes": 1024, "width": 128, "depth": 4,
         "known_images": 24_576, "known_samples": 1024}  # fmt: skip


def run(work: Work) -> tuple[str, float, str]:
    """In a process of its own, or here: what it was, how long it took, and why it failed, empty where it did not."""
    begin, why = time.perf_counter(), ""
    try:
        work.run()
    except NumericsError as error:  # of this one alone: the others go on
        why = one_line(error)
    return work.label, time.perf_counter() - begin, why


def carry_out(works: Sequence[Work], jobs: int) -> list[str]:
    """One process for each job; a line for each training that is done. Why some failed."""
    begin, failed = time.perf_counter(), []

    def tell(done: int, label: str, seconds: float, why: str) -> None:
        left = (time.perf_counter() - begin) / done * (len(works) - done) / 60
        print(f"{done}/{len(works)} {label}: {seconds:.0f} s; about {left:.0f} min left", flush=True)  # noqa: T201
        if why:
            failed.append(f"{label}: {why}")
            print(f"failed: {failed[-1]}", file=sys.stderr, flush=True)  # noqa: T201

    if jobs == 1:
        for done, work in enumerate(works, start=1):
            tell(done, *run(work))
        return failed
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run, work) for work in works]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                tell(done, *future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def seeds_of(a: argparse.Namespace, task: str) -> Sequence[int]:
    return TASKS[task] if a.seeds is None else a.seeds


def known(a: argparse.Namespace) -> list[str]:
    folder, seeds = writable_folder(a.out / "known"), seeds_of(a, "known")
    sizes = (a.known_images, a.known_seconds, a.known_samples)
    failed = carry_out(list(ablation_known.works(a.processes, a.cells, seeds, *sizes, folder)), a.jobs)
    ablation_known.truths(a.processes, seeds, a.known_samples, folder)
    return failed


def task_of(a: argparse.Namespace) -> ablation_cifar.Task:
    return ablation_cifar.Task(
        data=a.data, real=a.real_data, classifier=a.classifier, out=writable_folder(a.out / "cifar"),
        images=a.images, seconds=a.seconds, samples=a.samples, guidance=tuple(a.guidance),
        side=a.side, patch=a.patch, codes=a.codes, width=a.width, depth=a.depth,
    )  # fmt: skip


def cifar(a: argparse.Namespace) -> list[str]:
    task = task_of(a)
    ablation_cifar.prepare(task)
    return carry_out(list(ablation_cifar.works(task, a.cells, seeds_of(a, "cifar"))), a.jobs)


def rows_of(a: argparse.Namespace, task: str) -> list[dict[str, Any]]:
    """What --out has of these cells and seeds."""
    rows = [r for file in sorted((a.out / task).glob("*.json")) if "budget" in (r := read(file))]
    return [r for r in rows if (r["name"] in a.cells or is_truth(r["name"])) and r["seed"] in seeds_of(a, task)]


def report(a: argparse.Namespace) -> None:
    lines: list[str] = []
    rows = rows_of(a, "known") if "known" in a.tasks else []
    if rows:
        lines += known_tables(rows, a.processes, a.cells)
        figure(rows, a.processes, a.cells, a.out / "known.png", scores=("distance",))
    rows = rows_of(a, "cifar") if "cifar" in a.tasks else []
    if rows:
        folder = a.out / "cifar"
        lines += cifar_tables(rows, ablation_cifar.read_truths(folder), a.cells)
        for budget in BUDGETS:
            for scale in sorted({r["guidance"] for r in rows}):
                picture(folder / "pictures", rows, a.cells, budget, scale, a.out / f"cifar-{budget}-{scale:g}.png")
    if not lines:
        raise DataError(f"out: {a.out} has no results of these; run without --report first")
    write_text(a.out / "tables.md", "\n".join(lines).lstrip() + "\n")
    print("\n".join(lines))  # noqa: T201


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--out", type=Path, default=Path("runs/ablation"))
    add("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    add("--cells", nargs="+", default=list(CELLS), metavar="NAME", help=", ".join(CELLS))
    add("--seeds", nargs="+", type=int, metavar="SEED", help="default: 0 1 2 for known, 0 for cifar")
    add("--jobs", type=int, default=1, help="processes of one thread each, no more than there are idle cores")
    add("--report", action="store_true", help="of what is there; nothing is trained")
    some = parser.add_argument_group("known")
    add = some.add_argument
    add("--processes", nargs="+", default=list(PROCESSES), metavar="NAME", help=", ".join(PROCESSES))
    add("--known-images", type=int, help="sequences of training, the one budget")
    add("--known-seconds", type=float, default=10.0, help="of updates, the other")
    add("--known-samples", type=int, help="that a distance is of")
    some = parser.add_argument_group("cifar")
    add = some.add_argument
    add("--data", type=Path, metavar="FOLDER", help="class folders of training images")
    add("--real-data", type=Path, metavar="FOLDER", help="class folders of other images, which stand beside samples")
    add("--classifier", type=Path, metavar="FOLDER", help="whose features judge: a trained classifier-cifar10")
    add("--images", type=int, help="of training, the one budget")
    add("--seconds", type=float, default=300.0, help="of updates, the other")
    add("--samples", type=int, help="of each cell, budget and guidance")
    add("--guidance", nargs="+", type=float, default=[1.0, 2.0], metavar="SCALE", help="the same for all cells")
    for name, what in (("side", "of an image"), ("patch", "side of a token"), ("codes", "k-means centres"),
                       ("width", "of trunk and Diffusion Loss"), ("depth", "of the trunk")):  # fmt: skip
        add(f"--{name}", type=int, help=what)
    parser.set_defaults(**SIZES)
    a = parser.parse_args(argv)
    check(a)
    return a


def check(a: argparse.Namespace) -> None:
    check_names("tasks", a.tasks, TASKS)
    check_names("cells", a.cells, CELLS)
    check_names("processes", a.processes, PROCESSES)
    least = dict.fromkeys(("jobs", *SIZES), 1) | {"known_samples": ablation_known.fewest_samples(a.processes)}
    least |= {"depth": 2, "codes": 2}
    for name, value in least.items():
        if getattr(a, name) < value:
            option = name.replace("_", "-")
            raise UsageError(f"{option}: {getattr(a, name)} is not allowed; it must be at least {value}")
    for name in ("seconds", "known_seconds"):
        if not 0 < getattr(a, name) < math.inf:
            option = name.replace("_", "-")
            raise UsageError(f"{option}: {getattr(a, name)} is not allowed; it must be above 0")
    if min(a.guidance) < 0 or not all(math.isfinite(scale) for scale in a.guidance):
        raise UsageError(f"guidance: {a.guidance} is not allowed; scales are 0 or more")
    for name in ("side", "width"):
        whole = {"side": a.patch, "width": 4}[name]
        if getattr(a, name) % whole:
            raise UsageError(f"{name}: {getattr(a, name)} is not allowed; it must be a multiple of {whole}")
    if "cifar" in a.tasks and not a.report:
        for name in ("data", "real_data", "classifier"):
            option, path = name.replace("_", "-"), getattr(a, name)
            if path is None:
                raise UsageError(f"{option}: is missing, the task cifar needs a folder; or give --tasks known")
            if not path.is_dir():
                raise UsageError(f"{option}: {path} is not a folder")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        a, failed = arguments(argv), []
        if not a.report:
            torch.set_num_threads(1)
            for task, half in (("known", known), ("cifar", cifar)):
                failed += half(a) if task in a.tasks else []
        report(a)
        if failed:
            raise NumericsError(f"{len(failed)} trainings failed, the first: {failed[0]}")
    except SeriatimError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)  # noqa: T201
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
