"""Heads, backbones and orders on processes whose density is known: how far from the truth, at equal images and seconds.

    OMP_NUM_THREADS=1 python benchmarks/known_density.py --out runs/known_density --jobs 2

Every contestant is trained on sequences of tokens from `known_processes`, three seeds each, with one rate and batch for
all, on sequences that nobody sees twice; within a seed all see the same. The weights are averaged over the last tenth
or so of the updates, whenever that is (Karras et al. 2024, a power function): one training is judged on its way, when
it has seen --images sequences, and when its updates have taken --seconds of one thread's processor time (k-means for
codes, drawing sequences and judging don't count). What is judged is in a file of --out, and is not done again. --report
only prints the tables, in markdown, and draws the figure. Scores:

    gap        -log p of held-out sequences less the truth's of the same, in nats per token: KL(truth || model). Of a
               model that draws in random orders, the mean over them: an order is drawn for each sequence. For heads
               that have a density of features; several tokens of a step are independent, as in sampling.
    distance   of samples from the truth: the energy distance in one dimension, sqrt(2 int (F - G)^2), its square
               averaged over classes and fixed directions, half of them of whole sequences, half of two neighbours
    excess     log density of samples under the truth, in nats per token, less the truth's own mean: below 0 they are
               where the truth is not, above 0 where it is densest only
    outside    the share of sampled tokens less likely, given those before in raster order, than 99 % of the truth's
               at that position, of the same class

`truth` is as many fresh sequences of the process in the place of samples: what chance alone leaves. Intervals are 95 %
t-intervals of the mean over seeds; with a seed change weights, training sequences, held-out ones and samples.

Codes are k-means centres of tokens; a sample is a sequence of centres. `truth-codes256` are true ones, coded by 256.

B sequences, L tokens, D features, N samples, P directions.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from known_contestants import CONTESTANTS, HELD_OUT, USUAL, Contestant
from known_density_scores import Codes, Ruler, log_likelihood
from known_density_tables import BUDGETS, figure, is_truth, tables
from known_processes import TASKS, Process
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from seriatim.core.errors import DataError, NumericsError, SeriatimError, UsageError, nearest, one_line
from seriatim.core.files import writable_folder, write_json
from seriatim.core.keys import Keys
from seriatim.core.random import derive_seed, generator
from seriatim.core.schedules import tokens_per_step
from seriatim.models.base import Loss, SequenceModel
from seriatim.models.build import parameter_count
from seriatim.training.state import RunState, Trainables
from seriatim.training.updates import power_average, updates

SEEDS, IMAGES, SECONDS = (0, 1, 2), 24_576, 10.0
BATCH, RATE, WARMUP, CLIP, AVERAGE = 48, 2e-3, 30, 1.0, 8  # AVERAGE: the power of the average, about 10 % wide
SAMPLES, TRUTH = 1024, 20_000


# --- training and judging -------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def ruler_of(task: str, samples: int) -> Ruler:
    return Ruler(TASKS[task](), samples, TRUTH)


def gap(contestant: Contestant, model: SequenceModel, process: Process, seed: int) -> dict[str, float]:
    """KL(truth || model) in nats per token on held-out sequences, and its standard error over these."""
    count, largest = contestant.scored
    if contestant.codes or not model.head.has_density or process.dim > largest:
        return {}
    L, g = process.tokens, generator(derive_seed("held out", seed))
    labels = torch.randint(process.classes, (max(count, HELD_OUT),), generator=g)
    x, labels = process.sample(labels, g)[:count], labels[:count]  # the same for all, as far as they go
    order = torch.rand(count, L, generator=g).argsort(dim=1) if contestant.order == "random" else None
    sizes = [1] * L if contestant.steps is None else tokens_per_step(contestant.steps, L)
    off = (process.log_density(x, labels) - log_likelihood(model, x, labels, order, sizes)) / L  # (B,)
    return {"gap": float(off.mean()), "gap_error": float(off.std()) / math.sqrt(count)}


@dataclass(frozen=True)
class Work:
    """One training, for the budgets that are not judged yet."""

    task: str
    name: str
    seed: int
    budgets: tuple[str, ...]
    images: int
    seconds: float
    samples: int
    out: Path

    def file(self, budget: str) -> Path:
        return self.out / f"{self.task}-{self.name}-{self.seed}-{budget}.json"


def trained(
    model: SequenceModel, batches: Iterator[tuple[Tensor, Tensor]], noise_seed: int
) -> Iterator[tuple[SequenceModel, RunState]]:
    """Yield the averaged model and the state of the training after each update, without end."""
    model.train()
    average = AveragedModel(model, multi_avg_fn=power_average(AVERAGE)).eval().requires_grad_(False)
    parts = Trainables(model, average, torch.optim.Adam(model.parameters(), lr=RATE, fused=True))

    def loss_of(batch: tuple[Tensor, Tensor], update: int) -> Loss:
        step = Keys.of(noise_seed, update + 1)
        loss: Loss = model(*batch, step.fold(torch.arange(BATCH)), step)
        return loss

    def rate(images: int) -> float:
        return RATE * min(1.0, images / BATCH / WARMUP)

    for state in updates(parts, lambda _: next(batches), loss_of, size=BATCH, rate=rate, clip=CLIP):
        yield cast(SequenceModel, average.module), state


def stream(process: Process, seed: int, codes: Codes | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (B, L, D) or codes (B, L), and labels; the same for all contestants of a seed."""
    g = generator(derive_seed("training", seed))
    while True:
        labels = torch.randint(process.classes, (32 * BATCH,), generator=g)
        x = process.sample(labels, g)
        yield from zip((codes.encode(x) if codes else x).split(BATCH), labels.split(BATCH), strict=True)


def judge(
    contestant: Contestant, model: SequenceModel, process: Process, ruler: Ruler, codes: Codes | None, seed: int
) -> dict[str, float]:
    """All scores; nan where a sample is not finite."""
    samples = contestant.sample(model, ruler.labels, Keys.of("samples", seed).fold(torch.arange(len(ruler.labels))))
    samples = codes.decode(samples) if codes else samples
    finite = bool(torch.isfinite(samples).all())
    return gap(contestant, model, process, seed) | (ruler(samples) if finite else {"distance": math.nan})


def reached(state: RunState, budgets: Iterable[str], images: int, seconds: float) -> list[str]:
    """Those of the budgets that are used up."""
    used_up = {"images": state.seen >= images, "seconds": state.sums["seconds"] >= seconds}
    return [budget for budget in budgets if used_up[budget]]


def spent_by(state: RunState) -> dict[str, float]:
    """What a training took, as the files of results have it."""
    return {"images": state.seen, "updates": state.steps, "train_seconds": state.sums["seconds"]}


def run(work: Work) -> tuple[Work, float]:
    """Train and judge, a file for each budget; in a process of its own."""
    torch.set_num_threads(1)
    begin, contestant, process = time.perf_counter(), CONTESTANTS[work.name], TASKS[work.task]()
    ruler, waiting = ruler_of(work.task, work.samples), list(work.budgets)
    codes = Codes(process, contestant.codes, work.seed) if contestant.codes else None
    model = contestant.build(process, work.seed)
    batches = stream(process, work.seed, codes)
    size = {"backbone": parameter_count(model.backbone), "head": parameter_count(model.head)}
    row = {"task": work.task, "name": work.name, "seed": work.seed, "parameters": size, "settings": settings(work)}
    progress = trained(model, batches, derive_seed("noise", work.seed))
    try:
        while waiting:
            average, state = next(progress)
            for budget in reached(state, waiting, work.images, work.seconds):
                scores = judge(contestant, average, process, ruler, codes, work.seed)
                spent = spent_by(state)
                write_json(work.file(budget), row | spent | {"budget": budget, "scores": scores})
                waiting.remove(budget)
    except NumericsError as error:  # that it diverged is its result; the others go on
        for budget in waiting:
            lost = {"images": math.nan, "updates": math.nan, "train_seconds": math.nan}
            scores = {"distance": math.nan, "gap": math.nan}
            write_json(work.file(budget), row | lost | {"why": one_line(error), "budget": budget, "scores": scores})
    return work, time.perf_counter() - begin


def run_truth(task: str, seed: int, samples: int, out: Path, codes: int | None = None) -> None:
    """What the ruler says of as many true sequences, or of such sequences coded."""
    name = f"truth-codes{codes}" if codes else "truth"
    file, settings = out / f"{task}-{name}-{seed}.json", {"samples": samples}
    if file.exists() and read(file)["settings"] == settings:
        return
    ruler = ruler_of(task, samples)
    x = ruler.process.sample(ruler.labels, generator(derive_seed("samples", seed)))
    if codes:
        k_means = Codes(ruler.process, codes, seed)
        x = k_means.decode(k_means.encode(x))
    row = {"task": task, "name": name, "seed": seed, "budget": "", "settings": settings}
    write_json(file, row | {"scores": ruler(x) | {"entropy": ruler.entropy}})


def settings(work: Work) -> dict[str, Any]:
    """All that a file's scores depend on, as JSON keeps it."""
    contestant = CONTESTANTS[work.name]
    how: dict[str, Any] = {
        "model": contestant.model,
        "order": contestant.order,
        "steps": contestant.steps,
        "codes": contestant.codes,
    }
    how |= {"sampling": contestant.sampling, "scored": contestant.scored, "samples": work.samples}
    how |= {"images": work.images, "seconds": work.seconds, "batch": BATCH, "rate": RATE, "average": AVERAGE}
    return json.loads(json.dumps(how))


def measure_speed(task: str, name: str, out: Path, repeats: int = 5) -> None:
    """Milliseconds of one thread for a token, at 1 and 64 sequences at once: medians; fresh weights take as long."""
    contestant, process = CONTESTANTS[name], TASKS[task]()
    row: dict[str, Any] = {"task": task, "name": name, "seed": 0, "budget": "speed"}
    row |= {"scores": {}, "settings": {}, "dtype": "float32"}
    model = contestant.build(process, 0).eval()
    for batch in (1, 64):
        labels, times = torch.zeros(batch, dtype=torch.long), []
        for _ in range(repeats + 1):
            begin = time.process_time()
            contestant.sample(model, labels, Keys.of(0).fold(torch.arange(batch)))
            times.append(time.process_time() - begin)
        row[str(batch)] = 1000 * statistics.median(times[1:]) / (batch * process.tokens)  # the first warms up
    write_json(out / f"{task}-{name}-speed.json", row | {"threads": torch.get_num_threads()})


# --- all of it ------------------------------------------------------------------------------------------------------


def check_names(argument: str, given: Sequence[str], allowed: Iterable[str]) -> None:
    names = list(allowed)
    for name in given:
        if name not in names:
            raise UsageError(f"{argument}: {name!r} is not known{nearest(name, names)}")


def available(names: Sequence[str]) -> list[str]:
    """Those that this package can build; the others are named in a line."""
    lacking = {name: CONTESTANTS[name].missing() for name in names}
    out = [name for name in names if lacking[name]]
    if out:
        kinds = ", ".join(dict.fromkeys(kind for name in out for kind in lacking[name]))
        print(f"left out, since this package has no {kinds}: {', '.join(out)}")  # noqa: T201
    left = [name for name in names if not lacking[name]]
    if not left:
        raise UsageError("only: none of the contestants named can be built; see --help for all names")
    return left


def to_do(a: argparse.Namespace) -> list[Work]:
    """What has no file yet, seed by seed; a file made with other settings is refused."""
    works = []
    for seed, task, name in product(a.seeds, a.tasks, a.only):
        work = Work(task, name, seed, BUDGETS, a.images, a.seconds, a.samples, a.out)
        for budget in BUDGETS:
            if work.file(budget).exists():
                check_made(work, work.file(budget))
        left = tuple(budget for budget in BUDGETS if not work.file(budget).exists())
        if left:
            works.append(Work(task, name, seed, left, a.images, a.seconds, a.samples, a.out))
    return works


def check_made(work: Work, file: Path) -> None:
    made, now = read(file)["settings"], settings(work)
    for key in now:
        if made.get(key) != now[key]:
            message = f"out: {file} was made with {key} {made.get(key)}, not {now[key]}; choose another folder"
            raise DataError(f"{message}, or delete it")


def read(file: Path) -> dict[str, Any]:
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
        if not {"task", "name", "seed", "budget", "scores", "settings"} <= set(row):
            raise ValueError("a key is missing")
    except (ValueError, TypeError) as error:
        raise DataError(f"out: {file} is no result of this script ({one_line(error)}); delete it") from None
    return row


def carry_out(works: Sequence[Work], jobs: int) -> None:
    """One process for each job; a line for each training that is done."""
    begin = time.perf_counter()

    def report(done: int, work: Work, seconds: float) -> None:
        left = (time.perf_counter() - begin) / done * (len(works) - done) / 60
        what = f"{work.task}, {work.name}, seed {work.seed}: {seconds:.0f} s"
        print(f"{done}/{len(works)} {what}; about {left:.0f} min left", flush=True)  # noqa: T201

    if jobs == 1:
        for done, work in enumerate(works, start=1):
            report(done, *run(work))
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run, work) for work in works]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                report(done, *future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def rows_of(a: argparse.Namespace) -> list[dict[str, Any]]:
    """What --out has of these tasks, contestants and seeds."""
    rows = [read(file) for file in sorted(a.out.glob("*.json"))]
    rows = [r for r in rows if r["task"] in a.tasks and (r["name"] in a.only or is_truth(r["name"]))]
    return [r for r in rows if r["seed"] in a.seeds or r["budget"] == "speed"]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--out", type=Path, default=Path("runs/known_density"))
    add("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    add("--only", nargs="+", default=list(USUAL), metavar="NAME",
        help=f"{', '.join(CONTESTANTS)}; default: all but the last {len(CONTESTANTS) - len(USUAL)}")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="SEED")
    add("--images", type=int, default=IMAGES, help="sequences of training, the one budget")
    add("--seconds", type=float, default=SECONDS, help="of updates, the other")
    add("--samples", type=int, default=SAMPLES, help="that a distance is of; rounded down to as many of each class")
    add("--jobs", type=int, default=1, help="processes of one thread each, no more than there are idle cores")
    add("--against", nargs=2, default=["masked-diffusion", "masked-mixture4"], metavar="NAME",
        help="contestants that the others' distance, and gap, are compared with")  # fmt: skip
    add("--plot", type=Path, help="default: known_density.png in --out")
    add("--report", action="store_true", help="of what is there; nothing is trained")
    a = parser.parse_args(argv)
    check_names("tasks", a.tasks, TASKS)
    check_names("only", a.only, CONTESTANTS)
    check_names("against", a.against, CONTESTANTS)
    for name, least in (("images", 1), ("jobs", 1), ("samples", 2 * max(make().classes for make in TASKS.values()))):
        if getattr(a, name) < least:
            raise UsageError(f"{name}: {getattr(a, name)} is not allowed; it must be at least {least}")
    if not 0 < a.seconds < math.inf:
        raise UsageError(f"seconds: {a.seconds} is not allowed; it must be above 0")
    return a


def compare(a: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if not a.report:
        writable_folder(a.out)
        a.only = available(a.only)
        begin, works = time.perf_counter(), to_do(a)
        carry_out(works, a.jobs)
        codes = sorted({c for name in a.only if (c := CONTESTANTS[name].codes)})
        for task, seed in product(a.tasks, a.seeds):
            for count in (None, *codes):
                run_truth(task, seed, a.samples, a.out, count)
        for task, name in product(a.tasks, a.only):
            if not (a.out / f"{task}-{name}-speed.json").exists():
                measure_speed(task, name, a.out)
        print(f"{time.perf_counter() - begin:.0f} s in all")  # noqa: T201
    rows = rows_of(a)
    if not rows:
        raise DataError(f"out: {a.out} has no results of these; run without --report first")
    figure(rows, a.tasks, a.only, a.plot or a.out / "known_density.png")
    print("\n".join(tables(rows, a.tasks, a.only, a.against)))  # noqa: T201


def main(argv: Sequence[str] | None = None) -> int:
    try:
        compare(arguments(argv))
    except SeriatimError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
