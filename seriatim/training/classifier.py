"""Train a classifier on images in memory, with the engine that trains generators too.

Shapes: B images, c channels, H x W pixels, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seriatim.checkpoints.native import check_class_names
from seriatim.core.construct import check_room
from seriatim.core.device import DTYPES, plain_torch
from seriatim.core.errors import ConfigError
from seriatim.core.files import write_json
from seriatim.core.random import derive_seed
from seriatim.core.schedules import crossed
from seriatim.core.stopping import StopRequest
from seriatim.data.labelled import InMemory, augmented, build_labelled, draws_of
from seriatim.data.loader import Batch, Batches, to_float
from seriatim.evaluation.residual_net import PARTS, ResNet, TrainedClassifier, build_classifier, save_classifier
from seriatim.models.base import Loss
from seriatim.models.build import parameter_count, seeded
from seriatim.training.budget import Budget
from seriatim.training.config import ClassifierRecipe
from seriatim.training.engine import TrainingResult, fit
from seriatim.training.judge import FORWARD
from seriatim.training.log import MetricsLog, accuracy_curve, classifier_card, loss_curve
from seriatim.training.optim import averaged, sgd
from seriatim.training.run_folder import Resume
from seriatim.training.state import RunState, Trainables
from seriatim.training.task import Costs, Task

TEST_BATCH = 500
LOOK_PIXELS = 2_000_000  # about how many pixels the whitening filters of the stem are measured on


@dataclass(frozen=True)
class Accuracy:
    """The shares of test images that are recognised."""

    plain: float
    mirrored: float  # using the mean logits of an image and its mirror image
    classes: dict[str, float]  # the plain share of each class


@dataclass(frozen=True)
class ClassifierResult(TrainingResult):
    accuracy: Accuracy
    test_images: int


class ClassifierTask(Task):
    """Trains a residual network that classifies images."""

    files, what = PARTS, "a classifier"
    splits = False  # because of its batch norms

    def __init__(self, recipe: ClassifierRecipe, out: Path, where: torch.device, *, quiet: bool) -> None:
        settings = recipe.training
        self.recipe, self.out, self.where = recipe, out, where
        self.data, self.test, self.net = build(recipe, quiet=quiet)
        self.net.to(where).train()
        optimiser = sgd(self.net, settings.learning_rate, settings.momentum, settings.weight_decay)
        self.parts = Trainables(self.net, averaged(self.net, settings.ema), optimiser)
        self.settle(recipe)
        self.accuracy: Accuracy | None = None  # set when training ends

    def settle(self, recipe: ClassifierRecipe) -> None:
        """Take the recipe. The total is rounded up to whole batches, because batch norm needs them."""
        settings = recipe.training
        self.recipe, self.total = recipe, -(-settings.images // settings.batch_size) * settings.batch_size

    def costs(self, run: RunState, image: float, most: float) -> Costs:  # noqa: ARG002
        test = FORWARD * image * self.test.count
        return Costs(test=test, end=3 * test)  # the last one, and those of images and of their mirror images in float32

    def begin(self, stop: StopRequest) -> None:
        """Do nothing, because the network measures its images when it is built."""

    def batches(self, run: RunState) -> Generator[Batch]:
        batches = Batches(self.data, self.recipe.seed, run.seen, self.total, self.recipe.training.batch_size)
        return (batches[n] for n in range(len(batches)))

    def trial(self) -> Callable[[torch.dtype], Loss]:
        probe = Batches(self.data, self.recipe.seed, 0, self.total, self.recipe.training.batch_size)[0]
        net = copy.deepcopy(self.net)  # a trial must leave no trace in the batch norms
        return lambda dtype: self.loss_of(net, probe, dtype)

    def nominal(self, batch: Batch) -> float:
        return float(len(batch))

    def loss(self, batch: Batch, part: slice, dtype: torch.dtype) -> Loss:  # noqa: ARG002
        return self.loss_of(self.net, batch, dtype)

    def loss_of(self, net: nn.Module, batch: Batch, dtype: torch.dtype) -> Loss:
        """The cross-entropy of a batch, with the number of recognised images as the term "accuracy"."""
        settings = self.recipe.training
        # Every random number depends on the image's number in the run alone, so that resuming is bitwise.
        draws = draws_of(self.recipe.seed, batch.first, len(batch))
        images = augmented(batch.images, draws, settings.crop, settings.cutout).to(self.where)
        labels = cast(Tensor, batch.labels).to(self.where)
        with torch.autocast(self.where.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = net(images).float()  # (B, K)
        loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing, reduction="sum")
        right = (logits.argmax(dim=1) == labels).float().sum()
        return Loss(loss, loss.new_tensor(float(len(batch))), {"accuracy": right})

    def tested(self, run: RunState, *, last: bool) -> dict[str, float]:
        if not last and not crossed(run.since, run.seen, self.recipe.training.test_images):
            return {}
        logits = judged(self.parts.average.module, self.test, self.where, DTYPES[run.dtype])
        return {"test_accuracy": recognised(logits, self.test).mean().item()}

    def curves(self, log: MetricsLog) -> None:
        loss_curve(log.rows, self.out / "training.png", self.recipe.name)
        accuracy_curve(log.rows, self.out / "accuracy.png", self.recipe.name)

    def finish(self, run: RunState, log: MetricsLog) -> None:  # noqa: ARG002
        data, test = self.data, self.test
        self.accuracy = final = accuracy(self.parts.average.module, test, self.where)
        summary = {"test": final.plain, "test_with_mirror_images": final.mirrored}
        report = {**summary, "classes": final.classes, "test_images": test.count, "images": run.seen}
        write_json(self.out / "results.json", report)
        provenance = {"recipe": self.recipe.model_dump(mode="json"), "images": run.seen, "test_images": test.count}
        trained = cast(ResNet, self.parts.average.module).eval()
        card = classifier_card(self.recipe, run.seen, parameter_count(self.net), data, test.count, summary)
        bundle = TrainedClassifier(trained, self.recipe.name, data.size, data.class_names, summary, provenance)
        save_classifier(bundle, self.out / "model", card=card)


@plain_torch(grad=True)
def train_classifier(
    recipe: ClassifierRecipe,
    out: Path | str,
    *,
    device: str = "auto",
    resume: Resume = False,
    overwrite: bool = False,
    quiet: bool = False,
    minutes: float | Budget | None = None,
) -> ClassifierResult:
    """Train a classifier into the folder `out`. It can be stopped and resumed bitwise, like `loop.train`.

        out/results.json      the accuracy on the test images, in all and of each class
        out/accuracy.png      the accuracy on training and test images over images seen
        out/model/            the averaged weights, ready for `load_classifier`

    The other files (recipe.yaml, data.json, environment.json, metrics.jsonl, training.png, checkpoints/) and the errors
    are those of `loop.train`.
    """
    out = Path(out)

    def task(recipe: ClassifierRecipe, where: torch.device) -> ClassifierTask:
        return ClassifierTask(recipe, out, where, quiet=quiet)

    trained, result = fit(
        task, recipe, out, device=device, resume=resume, overwrite=overwrite, quiet=quiet, minutes=minutes
    )
    return ClassifierResult(**vars(result), accuracy=trained.accuracy, test_images=trained.test.count)


def build(recipe: ClassifierRecipe, *, quiet: bool = False) -> tuple[InMemory, InMemory, ResNet]:
    """The training images, the test images and the network of a recipe. Initial weights depend on its seed alone."""
    data, test = build_labelled(recipe.data, recipe.seed, quiet=quiet)
    check_class_names(data.class_names, len(data.class_names))
    side = min(data.size)
    if recipe.training.crop >= side:
        raise ConfigError(
            f"training.crop: {recipe.training.crop} is not allowed; it must be less than the side, {side}"
        )
    sizes = {"classes": len(data.class_names), "channels": data.channels}
    check_room(lambda: build_classifier(recipe.model, **sizes), {**recipe.model, **sizes}, "model")
    with seeded(derive_seed(recipe.seed, "weights")):
        net = build_classifier(recipe.model, **sizes)
    if side < net.least:
        raise ConfigError(
            f"model.widths: {len(net.stages)} stages halve images of side {side} away; use fewer, or "
            f"data.size of at least {net.least}"
        )
    wanted = max(1, LOOK_PIXELS // (data.size[0] * data.size[1]))
    look = torch.arange(data.count)[:: max(1, data.count // wanted)]
    net.whiten(to_float(data.images(look)))
    return data, test, net


@torch.no_grad()
def judged(net: nn.Module, test: InMemory, where: torch.device, dtype: torch.dtype, *, mirror: bool = False) -> Tensor:
    """The logits (n, K) of all test images, or of their mirror images, in evaluation mode."""
    training = net.training
    net.eval()
    logits = []
    with torch.autocast(where.type, dtype=dtype, enabled=dtype != torch.float32):
        for index in torch.arange(test.count).split(TEST_BATCH):
            images = to_float(test.images(index)).to(where)
            logits.append(net(images.flip(-1) if mirror else images).float().cpu())
    net.train(training)
    return torch.cat(logits)


def recognised(logits: Tensor, test: InMemory) -> Tensor:
    """A tensor (n,) of 1 where the largest of the logits (n, K) is that of the image's class, and 0 elsewhere."""
    return (logits.argmax(dim=1) == test.labels(torch.arange(test.count))).double()


def accuracy(net: nn.Module, test: InMemory, where: torch.device) -> Accuracy:
    """The accuracy on the test images, computed in float32."""
    logits, mirror = (judged(net, test, where, torch.float32, mirror=m) for m in (False, True))
    hit, labels = recognised(logits, test), test.labels(torch.arange(test.count))
    classes = {name: hit[labels == k].mean().item() for k, name in enumerate(test.class_names) if (labels == k).any()}
    return Accuracy(hit.mean().item(), recognised(logits + mirror, test).mean().item(), classes)
