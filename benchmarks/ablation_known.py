"""The cells on processes whose density is known: `known_density`'s training, ruler and scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from ablation_cells import CELLS, Cell, refuse_other
from known_contestants import LEAVES, TRUNKS, Contestant
from known_density import AVERAGE, BATCH, RATE, judge, reached, ruler_of, run_truth, spent_by, stream, trained
from known_density_scores import Codes
from known_density_tables import BUDGETS
from known_processes import TASKS

from seriatim.core.errors import NumericsError, one_line
from seriatim.core.files import write_json
from seriatim.core.random import derive_seed
from seriatim.models.build import parameter_count

CODES = 256  # k-means centres
THEIR_TRUNKS = {"raster": "causal", "random": "causal-random", "masked": "masked"}


def contestant_of(cell: Cell, tokens: int) -> Contestant:
    model, order = TRUNKS[THEIR_TRUNKS[cell.trunk]]
    steps = cell.steps(tokens) if cell.row == "several" else None
    if cell.loss == "ce":
        return Contestant({**model, "head": {"kind": "categorical"}}, order, steps, codes=CODES)
    head, sampling = LEAVES["diffusion"]
    return Contestant({**model, "head": head}, order, steps, sampling)


@dataclass(frozen=True)
class KnownWork:
    """One training on one process, and who is judged of it when."""

    task: str
    training: str
    seed: int
    judged: tuple[tuple[str, str], ...]  # cell, budget
    images: int
    seconds: float
    samples: int
    out: Path

    @property
    def label(self) -> str:
        return f"{self.task}, {self.training}, seed {self.seed}"

    def file(self, name: str, budget: str) -> Path:
        return self.out / f"{self.task}-{name}-{self.seed}-{budget}.json"

    def settings(self, name: str) -> dict[str, Any]:
        """All that a file's scores depend on."""
        contestant = contestant_of(CELLS[name], TASKS[self.task]().tokens)
        how: dict[str, Any] = {"model": contestant.model, "order": contestant.order, "steps": contestant.steps}
        how |= {"codes": contestant.codes, "sampling": contestant.sampling, "samples": self.samples}
        how |= {"images": self.images, "seconds": self.seconds, "batch": BATCH, "rate": RATE, "average": AVERAGE}
        return how

    def run(self) -> None:
        """Train until the last budget, a file for each cell and budget."""
        torch.set_num_threads(1)
        process = TASKS[self.task]()
        ruler, waiting = ruler_of(self.task, self.samples), list(self.judged)
        cells = {name: contestant_of(CELLS[name], process.tokens) for name, _ in self.judged}
        whose = next(iter(cells.values()))
        codes = Codes(process, whose.codes, self.seed) if whose.codes else None
        model = whose.build(process, self.seed)
        batches, noise = stream(process, self.seed, codes), derive_seed("noise", self.seed)
        size = {"backbone": parameter_count(model.backbone), "head": parameter_count(model.head)}
        row = {"task": self.task, "seed": self.seed, "parameters": size}
        progress = trained(model, batches, noise)
        try:
            while waiting:
                average, state = next(progress)
                spent, used_up = spent_by(state), reached(state, BUDGETS, self.images, self.seconds)
                for name, budget in [w for w in waiting if w[1] in used_up]:
                    scores = judge(cells[name], average, process, ruler, codes, self.seed)
                    self.write(name, budget, row | spent | {"scores": scores})
                    waiting.remove((name, budget))
        except NumericsError as error:  # that it diverged is its result; the others go on
            spent = {"images": math.nan, "updates": math.nan, "train_seconds": math.nan}
            for name, budget in waiting:
                self.write(name, budget, row | spent | {"scores": {"distance": math.nan}, "why": one_line(error)})

    def write(self, name: str, budget: str, row: dict[str, Any]) -> None:
        write_json(self.file(name, budget), {**row, "name": name, "budget": budget, "settings": self.settings(name)})


def works(
    tasks: Sequence[str],
    cells: Sequence[str],
    seeds: Sequence[int],
    images: int,
    seconds: float,
    samples: int,
    out: Path,
) -> Iterator[KnownWork]:
    """What has no file yet, seed by seed."""
    trainings = list(dict.fromkeys(CELLS[name].training for name in cells))
    for seed, task, training in product(seeds, tasks, trainings):
        names = [name for name in cells if CELLS[name].training == training]
        work = KnownWork(task, training, seed, (), images, seconds, samples, out)
        left = [w for w in product(names, BUDGETS) if not refuse_other(work.file(*w), work.settings(w[0]))]
        if left:
            yield replace(work, judged=tuple(left))


def truths(tasks: Sequence[str], seeds: Sequence[int], samples: int, out: Path) -> None:
    """What the ruler says of true sequences, and of such sequences as codes: the floor of all cells, and of -ce."""
    for task, seed, codes in product(tasks, seeds, (None, CODES)):
        run_truth(task, seed, samples, out, codes)


def fewest_samples(tasks: Sequence[str]) -> int:
    """Two of each class, of the process that has most."""
    return 2 * max(TASKS[task]().classes for task in tasks)
