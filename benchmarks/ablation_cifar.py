"""The cells on a folder of small pictures: training that resumes, sampling and judging by `seriatim.evaluation`.

OUT/tokenizers/{features,codes}     patches as features, and as k-means codes
OUT/real/                           the classifier's features of real images
OUT/trainings/TRAINING-SEED/        checkpoints/ while it trains; images/ and seconds/: averaged weights at a budget
OUT/judged/CELL-.../                features of samples, block by block, and results
OUT/pictures/CELL-....png           the first samples
OUT/CELL-....json                   what the tables are made of
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from ablation_cells import CELLS, Cell, refuse_other
from known_density import reached, spent_by
from known_density_tables import BUDGETS
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from seriatim.checkpoints.native import Bundle, save_bundle
from seriatim.checkpoints.tokenizer import load_tokenizer, save_tokenizer
from seriatim.core.errors import DataError
from seriatim.core.files import write_json
from seriatim.core.keys import Keys
from seriatim.core.progress import Progress
from seriatim.core.random import derive_seed
from seriatim.data.folder import Folder
from seriatim.data.loader import Batches, to_float
from seriatim.evaluation.base import FeatureExtractor
from seriatim.evaluation.blocks import Blocks, eight_bits, features_of
from seriatim.evaluation.features import open_features
from seriatim.evaluation.figures import Reference, Set, class_map, figures_of
from seriatim.evaluation.grid import grid, save_png
from seriatim.evaluation.metrics import Figure
from seriatim.evaluation.reference import Part, as_many, whole
from seriatim.evaluation.run import READ_AT_ONCE, asked, evaluate, features_folder, pictures
from seriatim.models.base import Loss, SequenceModel
from seriatim.models.build import build_model, parameter_count, seeded
from seriatim.pipeline.loading import load
from seriatim.tokenizers.base import Tokenizer, to_uint8
from seriatim.tokenizers.kmeans import KMeans
from seriatim.tokenizers.pixels import Pixels
from seriatim.training.state import Trainables
from seriatim.training.updates import power_average, updates

BATCH, RATE, WARMUP, CLIP, AVERAGE = 32, 1e-3, 50, 1.0, 8  # AVERAGE: the power of the average, about 10 % wide
FIGURES = ("frechet", "manifold", "accuracy")
SAVE_SECONDS = 120.0  # between checkpoints, by the clock
FIT, SHOWN = 4096, 20  # images that tokenizers are fitted to; samples of a cell in the picture
FOREVER = 1 << 40  # images of a run: it is stopped by its budgets

# In both, every mask ratio occurs, since sampling goes through all; the first, of nothing known, often
MASKED = {"kind": "masked", "buffer": 4, "dropout": 0.0, "min_mask_ratio": 0.1, "mask_ratio_std": 0.6}
CAUSAL = {"kind": "causal", "dropout": 0.0}
INSIDE = {"num_diffusion_steps": 15, "solver": "sde-dpm++"}


@dataclass(frozen=True)
class Task:
    """All that results depend on, but for cell, seed and budget."""

    data: Path
    real: Path
    classifier: Path
    out: Path
    images: int
    seconds: float
    samples: int
    guidance: tuple[float, ...]
    side: int  # of an image
    patch: int
    codes: int  # k-means centres
    width: int  # of trunk and Diffusion Loss
    depth: int  # of the trunk; the masked one has half in its encoder

    def settings(self) -> dict[str, Any]:
        """As JSON keeps it; folders may move."""
        told = {k: v for k, v in asdict(self).items() if k not in ("data", "real", "classifier", "out", "guidance")}
        return told | {"batch": BATCH, "rate": RATE, "warmup": WARMUP, "average": AVERAGE}

    def folder(self, path: Path) -> Folder:
        return Folder(str(path), self.side, flip=path == self.data, check=False)

    def extractor(self) -> FeatureExtractor:
        return open_features(str(self.classifier), size=(self.side, self.side), channels=3)

    def tokenizer(self, loss: str) -> Tokenizer:
        return load_tokenizer(self.out / "tokenizers" / ("codes" if loss == "ce" else "features"))

    def model(self, cell: Cell, classes: int, seed: int) -> SequenceModel:
        shape: dict[str, Any] = {"width": self.width, "heads": max(1, self.width // 32)}
        if cell.trunk == "masked":
            trunk = {**MASKED, **shape, "depth": [self.depth // 2, self.depth - self.depth // 2]}
        else:
            trunk = {**CAUSAL, **shape, "depth": self.depth, "order": cell.trunk}
        tokens = (self.side // self.patch) ** 2
        head: dict[str, Any]
        size: dict[str, Any]
        if cell.loss == "ce":
            head, size = {"kind": "categorical"}, {"vocab": self.codes}
        else:
            head = {"kind": "diffusion", "width": self.width, "depth": 3, "draws": 2}
            size = {"dim": 3 * self.patch**2}
        with seeded(derive_seed("weights", seed)):
            return build_model({**trunk, "head": head}, tokens=tokens, classes=classes, **size)

    def sampling(self, cell: Cell) -> dict[str, Any]:
        steps = cell.steps((self.side // self.patch) ** 2)
        told = {"num_inference_steps": steps} if cell.trunk == "masked" else {}
        return told | (INSIDE if cell.loss == "diffusion" else {})


# --- before all cells -----------------------------------------------------------------------------------------------


def prepare(task: Task) -> None:
    """Tokenizers, features of real images, and the rows that no cell can be better than; what is there is kept."""
    torch.set_num_threads(1)
    data, real = task.folder(task.data), task.folder(task.real)
    if not data.class_names:
        raise DataError(f"data: {task.data} has no class folders; the cells draw images of a class")
    told = task.settings() | {"data": data.fingerprint(), "real_data": real.fingerprint()}
    told["classifier"] = task.extractor().fingerprint()
    if not refuse_other(task.out / "task.json", told):
        write_json(task.out / "task.json", {"settings": told})
    options: dict[str, Any] = {"size": task.side, "patch": task.patch}
    for name, make in (("features", Pixels), ("codes", partial(KMeans, vocab=task.codes))):
        folder = task.out / "tokenizers" / name
        if not folder.exists():
            tokenizer = make(**options)
            tokenizer.fit(to_float(images) for images in data.some(FIT, 256))
            save_tokenizer(tokenizer, folder)
    if not (task.out / "truths.json").exists():
        truths(task, data, real)


def truths(task: Task, data: Folder, real: Folder) -> None:
    """Figures of as many real images, and of their codes decoded: truths.json, and a row of pictures of each."""
    extractor, tokenizer = task.extractor(), task.tokenizer("ce")
    names = data.class_names
    classes = len(names)
    reference, beside = whole(data, classes, names), as_many(whole(real, classes, names), task.samples, classes)
    stores = []
    for part, what in ((reference, "features of the reference"), (beside, "features of real images")):
        stores.append(Blocks(features_folder(task.out, extractor, part), len(part)))  # where `evaluate` looks
        stores[-1].fill(features_of(partial(pictures, part), extractor, what), what)
    coded = Blocks(task.out / "judged" / "codes", len(beside))
    what = "features of decoded codes"
    coded.fill(features_of(partial(reconstructions, beside, tokenizer), extractor, what), what)
    held_out = stores[1].read()
    numbers = class_map(extractor, classes, names)
    against = Reference(stores[0].read(), reference.labels, class_map=numbers, held_out=held_out)
    rows = {
        "real": figures_of(Set(held_out, beside.labels), against, extractor, FIGURES),
        "codes": figures_of(Set(coded.read(), beside.labels), against, extractor, FIGURES),
    }
    some = replace(beside, index=beside.index[:SHOWN])
    shown = range(len(some))
    for name, images in (("real", pictures(some, shown)), ("codes", reconstructions(some, tokenizer, shown))):
        save_strip(task.out / "pictures" / f"{name}.png", torch.cat(list(images)))
    write_json(task.out / "truths.json", {name: scores_of(figures) for name, figures in rows.items()})


@torch.no_grad()
def reconstructions(part: Part, tokenizer: Tokenizer, block: range) -> Iterator[Tensor]:
    for index in part.index[block.start : block.stop].split(READ_AT_ONCE):
        yield eight_bits(tokenizer.decode(tokenizer.tokens(tokenizer.moments(to_float(part.data.images(index))))))


def scores_of(figures: Mapping[str, Figure]) -> dict[str, dict[str, float]]:
    """Values and standard errors."""
    return {
        "scores": {name: figure.value for name, figure in figures.items()},
        "errors": {name: figure.error for name, figure in figures.items()},
    }


def save_strip(file: Path, images: Tensor) -> None:
    """Images (n, 3, H, W) in [-1, 1] in a row."""
    from PIL import Image

    drawn = [Image.fromarray(array) for array in to_uint8(images).numpy()]
    save_png(grid(drawn, len(drawn), side=1, gap=0), file)


# --- one training, and the cells that it serves ---------------------------------------------------------------------


@dataclass(frozen=True)
class CifarWork:
    task: Task
    training: str
    seed: int
    judged: tuple[tuple[str, str, float], ...]  # cell, budget, guidance

    @property
    def label(self) -> str:
        return f"cifar, {self.training}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.task.out / "trainings" / f"{self.training}-{self.seed}"

    def stem(self, name: str, budget: str, guidance: float) -> str:
        return f"{name}-{self.seed}-{budget}-{guidance:g}"

    def file(self, name: str, budget: str, guidance: float) -> Path:
        return self.task.out / f"{self.stem(name, budget, guidance)}.json"

    def settings(self, name: str) -> dict[str, Any]:
        return self.task.settings() | {"sampling": self.task.sampling(CELLS[name])}

    def run(self) -> None:
        torch.set_num_threads(1)
        budgets = [budget for budget in BUDGETS if any(b == budget for _, b, _ in self.judged)]
        left = [budget for budget in budgets if not (self.folder / budget).exists()]
        if left:
            train(self, left)
        for name, budget, guidance in self.judged:
            judge(self, name, budget, guidance)


def train(work: CifarWork, budgets: Sequence[str]) -> None:
    """Until the last budget; the averaged weights at each become a model folder. Goes on from its newest checkpoint."""
    task, cell = work.task, CELLS[work.training]
    data, tokenizer = task.folder(task.data), task.tokenizer(cell.loss)
    model = task.model(cell, len(data.class_names), work.seed).train()
    average = AveragedModel(model, multi_avg_fn=power_average(AVERAGE))
    parts = Trainables(model, average, torch.optim.Adam(model.parameters(), lr=RATE, fused=True))
    batches = Batches(data, derive_seed("training", work.seed), 0, FOREVER, BATCH)
    folder = work.folder / "checkpoints"

    def batch_of(update: int) -> tuple[Tensor, Tensor | None]:
        batch = batches[update]
        return tokenizer.tokens(tokenizer.moments(to_float(batch.images))), batch.labels

    def loss_of(batch: tuple[Tensor, Tensor | None], update: int) -> Loss:
        step = Keys.of("noise", work.seed, update)
        loss: Loss = model(*batch, step.fold(torch.arange(BATCH)), step)
        return loss

    def rate(images: int) -> float:
        return RATE * min(1.0, images / BATCH / WARMUP)

    states = updates(
        parts, batch_of, loss_of, size=BATCH, rate=rate, clip=CLIP, folder=folder, save_seconds=SAVE_SECONDS
    )
    run = next(states)  # every later step changes this same state
    with Progress(task.images, f"training {work.training}", "images", done=run.seen) as bar:
        while True:
            used_up = reached(run, budgets, task.images, task.seconds)
            for budget in [b for b in used_up if not (work.folder / b).exists()]:
                told = {"training": work.training, **spent_by(run)}
                made = Bundle(cast(SequenceModel, average.module), tokenizer, data.class_names, {}, told)
                save_bundle(made, work.folder / budget)
            if len(used_up) == len(budgets):
                break
            next(states)
            if "seconds" in budgets:  # how many images that will be, at the mean rate so far
                least = task.images if "images" in budgets else 0
                bar.total = max(least, round(run.seen * max(1.0, task.seconds / run.sums["seconds"])))
            bar.advance(BATCH, f"loss {run.sums['loss']:.3f}, {run.sums['seconds']:.0f} s of updates")
    shutil.rmtree(folder, ignore_errors=True)


def judge(work: CifarWork, name: str, budget: str, guidance: float) -> None:
    """Sample, measure, and write the row that tables are made of."""
    task, cell = work.task, CELLS[name]
    pipe = load(work.folder / budget, device="cpu", dtype="float32")
    settings = task.sampling(cell) | {"guidance_scale": guidance}
    made = evaluate(
        pipe,
        task.folder(task.data),
        task.out / "judged" / work.stem(name, budget, guidance),
        num=task.samples,
        features=task.extractor(),
        real=task.folder(task.real),
        figures=FIGURES,
        seed=work.seed,
        cache=task.out,
        **settings,
    )
    assert made.figures is not None, "this process has all shares"
    request = asked(pipe, task.samples, work.seed, settings).part(range(min(SHOWN, task.samples)))
    begin = time.process_time()
    images = pipe(request=request, output_type="pt").images
    took = (time.process_time() - begin) / len(images)
    save_strip(task.out / "pictures" / f"{work.stem(name, budget, guidance)}.png", images * 2 - 1)
    told = {k: v for k, v in pipe.bundle.provenance.items() if k != "training"}
    size = {"backbone": parameter_count(pipe.model.backbone), "head": parameter_count(pipe.model.head)}
    row = {"task": "cifar", "name": name, "seed": work.seed, "budget": budget, "guidance": guidance}
    row |= scores_of(made.figures) | told | {"parameters": size, "sample_seconds": took}
    write_json(work.file(name, budget, guidance), row | {"settings": work.settings(name)})


def works(task: Task, cells: Sequence[str], seeds: Sequence[int]) -> Iterator[CifarWork]:
    """What has no file yet."""
    trainings = list(dict.fromkeys(CELLS[name].training for name in cells))
    for seed, training in product(seeds, trainings):
        names = [name for name in cells if CELLS[name].training == training]
        work = CifarWork(task, training, seed, ())
        left = [
            w for w in product(names, BUDGETS, task.guidance) if not refuse_other(work.file(*w), work.settings(w[0]))
        ]
        if left:
            yield replace(work, judged=tuple(left))


def read_truths(out: Path) -> dict[str, Any]:
    """name -> scores and errors."""
    file = out / "truths.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
