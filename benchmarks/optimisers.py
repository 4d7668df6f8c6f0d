"""AdamW and Muon at equal time: the same recipe, minutes and seeds, judged by the loss and by samples.

    OMP_NUM_THREADS=1 python benchmarks/optimisers.py --out runs/optimisers --data cifar10/train \\
        --real-data cifar10/test --minutes 4.5 --classifier classifier:runs/classifier

Each training has one thread, and ends when its updates have taken --minutes of the thread's processor time; reading
images doesn't count. Both optimisers have the recipe's learning rate, which warms up and then stays, unless
--rates names others. Judged are the averaged weights: by the loss on images of --real-data, at fixed random numbers,
and with --classifier also by the Frechet distance of samples to --data in its features. Intervals are 95 % of Student's
t over the seeds, differences are taken seed by seed. What is done already in --out is not done again, and a training
goes on from its last checkpoint: stop at any time.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from known_density_tables import interval, show
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from seriatim.checkpoints.native import Bundle, save_bundle
from seriatim.core.files import write_json
from seriatim.core.keys import Keys
from seriatim.core.random import derive_seed
from seriatim.data.folder import Folder
from seriatim.data.loader import Batches, to_float
from seriatim.evaluation.features import open_features
from seriatim.evaluation.run import evaluate
from seriatim.models.base import Loss, SequenceModel
from seriatim.pipeline.loading import load
from seriatim.tokenizers.base import Tokenizer
from seriatim.training.config import Recipe, read_recipe
from seriatim.training.optim import OPTIMISERS, make_optimiser
from seriatim.training.setup import build, fit_tokenizer
from seriatim.training.state import Trainables
from seriatim.training.updates import power_average, updates

SAVE_SECONDS, FOREVER = 60.0, 1 << 40
HELD_OUT = 1000  # images of the loss
NAMES = {"loss": "loss", "distance": "Frechet distance"}


def train(recipe: Recipe, name: str, rate: float, seconds: float, folder: Path) -> None:
    """Train until the budget is used up, then save the averaged weights in `folder/model`."""
    settings = recipe.training
    data, tokenizer, model = build(recipe)
    fit_tokenizer(tokenizer, data, quiet=True)
    optimiser = make_optimiser(name, model.train(), rate, settings.betas, settings.weight_decay)
    parts = Trainables(model, AveragedModel(model, multi_avg_fn=power_average(8)), optimiser)
    batches = Batches(data, recipe.seed, 0, FOREVER, settings.batch_size)

    def batch_of(update: int) -> tuple[Tensor, Tensor | None]:
        batch = batches[update]
        return tokenizer.tokens(tokenizer.moments(to_float(batch.images))), batch.labels

    def loss_of(batch: tuple[Tensor, Tensor | None], update: int) -> Loss:
        step = Keys.of("step", recipe.seed, update)
        torch.manual_seed(derive_seed("dropout", recipe.seed, update))
        loss: Loss = model(*batch, step.fold(torch.arange(settings.batch_size)), step)
        return loss

    states = updates(
        parts,
        batch_of,
        loss_of,
        size=settings.batch_size,
        rate=lambda images: rate * min(1.0, images / max(1, settings.warmup_images)),
        clip=settings.clip,
        folder=folder / "checkpoints",
        save_seconds=SAVE_SECONDS,
    )
    run = next(run for run in states if run.sums["seconds"] >= seconds)
    trained: Any = parts.average.module
    told = {"images": run.seen, "updates": run.steps, "seconds": run.sums["seconds"]}
    save_bundle(Bundle(trained, tokenizer, data.class_names, recipe.sampling, told), folder / "model")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


@torch.no_grad()
def held_out_loss(model: SequenceModel, tokenizer: Tokenizer, data: Folder) -> float:
    """The mean loss on HELD_OUT images from all over the data, which draw the same random numbers for every model."""
    total = count = 0.0
    index = torch.arange(data.count)[:: max(1, data.count // HELD_OUT)]
    for n, part in enumerate(index.split(100)):
        step = Keys.of("held out", n)
        tokens = tokenizer.tokens(tokenizer.moments(to_float(data.images(part))))
        loss = model.eval()(tokens, data.labels(part), step.fold(torch.arange(len(part))), step)
        total, count = total + float(loss.sum), count + float(loss.count)
    return total / count


def judged(given: argparse.Namespace, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The images, updates and seconds of a training, and its figures."""
    size = recipe.data["size"]
    data, real = (Folder(str(path), size, check=False) for path in (given.data, given.real_data))
    pipe = load(folder / "model", device="cpu", dtype="float32", prepare=False)
    loss = held_out_loss(pipe.model, pipe.tokenizer, real)
    told = {**pipe.bundle.provenance, "loss": loss}
    if given.classifier is None:
        return told
    features = open_features(str(given.classifier), size=(size, size), channels=3)
    made = evaluate(
        load(folder / "model", device="cpu", dtype="float32"),
        data,
        folder / "judged",
        num=given.samples,
        features=features,
        real=real,
        figures=("frechet",),
        seed=recipe.seed,
        cache=given.out / "real",
    )
    assert made.figures is not None, "this process has all shares"
    return {**told, "distance": next(iter(made.figures.values())).value}


def table(rows: list[dict[str, Any]]) -> str:
    """The means over seeds with their intervals, and the differences seed by seed."""
    figures = [key for key in ("loss", "distance") if key in rows[0]]
    lines = [
        f"| optimiser | updates | {' | '.join(NAMES[key] for key in figures)} |",
        "|---" * (2 + len(figures)) + "|",
    ]
    names = [name for name in OPTIMISERS if any(row["optimiser"] == name for row in rows)]
    of = {(row["optimiser"], row["seed"]): row for row in rows}
    for name in names:
        mine = [row for row in rows if row["optimiser"] == name]
        cells = (show(interval([row[key] for row in mine])) for key in ("updates", *figures))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name in names[1:]:
        firsts = [row for row in rows if row["optimiser"] == names[0]]
        pairs = [(row, of[name, row["seed"]]) for row in firsts if (name, row["seed"]) in of]
        cells = (show(interval([b[key] - a[key] for a, b in pairs]), signed=True) for key in figures)
        lines.append(f"| {name} less {names[0]} | | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(command: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as model.width=128")
    parser.add_argument("--out", type=Path, default=Path("runs/optimisers"))
    parser.add_argument("--recipe", default="mar-cifar10-tiny")
    parser.add_argument("--data", type=Path, required=True, help="class folders of training images")
    parser.add_argument("--real-data", type=Path, required=True, help="class folders of other images")
    parser.add_argument("--classifier", help="classifier:FOLDER of a trained one, whose features judge samples")
    parser.add_argument("--minutes", type=float, default=4.5, help="of updates, for each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--rates", nargs="*", default=[], metavar="NAME=RATE", help="other learning rates")
    given = parser.parse_args(command)
    torch.set_num_threads(1)
    rates = {name: float(rate) for name, _, rate in (text.partition("=") for text in given.rates)}
    rows = []
    for seed in given.seeds:
        for name in OPTIMISERS:
            recipe = read_recipe(given.recipe, [*given.overrides, f"data.path={given.data}", f"seed={seed}"])
            folder = given.out / f"{name}-{seed}"
            if not (folder / "row.json").exists():
                rate = rates.get(name, recipe.training.learning_rate)
                if not (folder / "model").exists():
                    train(recipe, name, rate, 60 * given.minutes, folder)
                row = {"optimiser": name, "seed": seed, "rate": rate, **judged(given, recipe, folder)}
                write_json(folder / "row.json", row)
            rows.append(json.loads((folder / "row.json").read_text()))
            print(json.dumps(rows[-1]), flush=True)  # noqa: T201
    print(table(rows))  # noqa: T201


if __name__ == "__main__":
    main()
