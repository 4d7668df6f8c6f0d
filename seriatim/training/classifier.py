"""Training a classifier: the loop of `loop.py`, shorter, on images in memory.

B images, c channels, H x W pixels, K classes.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seriatim.checkpoints.native import check_class_names
from seriatim.core.construct import check_room
from seriatim.core.device import DTYPES, pick_device, plain_torch
from seriatim.core.errors import ConfigError, Stopped
from seriatim.core.files import write_json, write_text
from seriatim.core.progress import Progress
from seriatim.core.random import derive_seed
from seriatim.core.schedules import learning_rate
from seriatim.evaluation.classifier import PARTS, ResNet, TrainedClassifier, build_classifier, save_classifier
from seriatim.models.build import parameter_count, seeded
from seriatim.models.masked import Loss
from seriatim.training import state as checkpoints
from seriatim.training.blow_up import BlowUpGuard, way_out
from seriatim.training.config import ClassifierRecipe, dump
from seriatim.training.heap import bound_compiled_products, return_heap
from seriatim.training.labelled import InMemory, augmented, build_labelled, draws_of
from seriatim.training.loader import Batch, Batches, to_float
from seriatim.training.log import MetricsLog, accuracy_curve, classifier_card, loss_curve, record_choice
from seriatim.training.loop import check_finite, crossed, restore
from seriatim.training.optim import averaged, sgd
from seriatim.training.precision import fastest, threads
from seriatim.training.run_folder import check_out, occupied
from seriatim.training.setup import begin_run, changes_of, refuse_fewer_images
from seriatim.training.state import RunState, Trainables
from seriatim.training.stopping import StopRequest, refuse_many_processes

TEST_BATCH = 500
LOOK_PIXELS = 2_000_000  # at which the stem's filters are measured


@dataclass(frozen=True)
class Accuracy:
    """The shares of test images recognised."""

    plain: float
    mirrored: float  # from the mean logits of an image and its mirror image
    classes: dict[str, float]  # of each class, plain


@dataclass(frozen=True)
class ClassifierResult:
    folder: Path  # the run; `folder / "model"` is a classifier's folder
    images: int
    seconds: float  # in the loop
    images_per_second: float
    loss: float  # mean of the last logged stretch
    accuracy: Accuracy
    test_images: int
    parameters: int
    dtype: str
    threads: int


@plain_torch(grad=True)
def train_classifier(
    recipe: ClassifierRecipe,
    out: Path | str,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> ClassifierResult:
    """Train a classifier into the folder `out`, stopped and resumed as `loop.train` is, bitwise.

        out/results.json      accuracy on the test images, of each class too
        out/accuracy.png      accuracy on training and test images over images seen
        out/model/            the averaged weights, ready for `load_classifier`

    and recipe.yaml, data.json, environment.json, metrics.jsonl, training.png, checkpoints/ as there.
    """
    refuse_many_processes()
    settings = recipe.training
    out = Path(out)
    check_out(out, resume=resume, overwrite=overwrite)
    data, test, net = build(recipe, quiet=quiet)
    where = pick_device(device)
    if where.type == "cpu":
        bound_compiled_products()
    hold = occupied(out, PARTS, "a classifier", overwrite=overwrite)
    with hold, StopRequest() as stop, contextlib.ExitStack() as stack:
        begin_run(out, recipe, data, resume=resume)
        net.to(where).train()
        optimiser = sgd(net, settings.learning_rate, settings.momentum, settings.weight_decay)
        average = averaged(net, settings.ema)
        parts = Trainables(net, average, optimiser)
        run = restore(out, parts) if resume else None

        def logits_of(net: nn.Module, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            # Every draw depends on the image's number in the run alone: a resumed run draws what it would have drawn.
            draws = draws_of(recipe.seed, batch.first, len(batch))
            images = augmented(batch.images, draws, settings.crop, settings.cutout)
            labels = cast(Tensor, batch.labels).to(where)
            with torch.autocast(where.type, dtype=dtype, enabled=dtype != torch.float32):
                return net(images.to(where)).float(), labels  # (B, K), (B,)

        def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)

        total = -(-settings.images // settings.batch_size) * settings.batch_size  # batch norm wants whole batches
        if run is None:
            probe = Batches(data, recipe.seed, 0, total, settings.batch_size)[0]
            trial = copy.deepcopy(net)  # its batch norms remember what they see
            chosen = fastest(
                settings.dtype,
                settings.threads,
                where,
                lambda dtype: Loss(loss_of(*logits_of(trial, probe, dtype)), {}),
            )
            record_choice(out, chosen)
            run = RunState(dtype=chosen.dtype, threads=chosen.threads)
        refuse_fewer_images(total, run.seen, out)
        changes = changes_of(out, recipe, run.seen)  # none where the run begins: its recipe was just written
        if settings.dtype != "auto":
            run.dtype = settings.dtype
        settings = settings.model_copy(update={"dtype": run.dtype, "threads": run.threads})
        recipe = recipe.model_copy(update={"training": settings, "changes": changes})
        write_text(out / "recipe.yaml", dump(recipe))  # what was measured included: it repeats this run
        dtype = DTYPES[run.dtype]
        stack.enter_context(threads(run.threads))
        log = MetricsLog(out / "metrics.jsonl", run.seen, settings.tensorboard)
        began, started = run.seen, time.monotonic()
        logged = started

        def save_checkpoint() -> Path:
            path = checkpoints.save(out / "checkpoints", parts, run)
            checkpoints.prune(out / "checkpoints", settings.keep, path)
            return path

        guard, cure = BlowUpGuard(settings, out), way_out(settings, out)
        batches = Batches(data, recipe.seed, run.seen, total, settings.batch_size)
        with Progress(total, "training", "images", done=run.seen, quiet=quiet) as bar:
            for n in range(len(batches)):
                # --- one step
                batch = batches[n]
                size = len(batch)
                factor = learning_rate(run.seen + size, total, settings.warmup_images, settings.schedule)
                for group in optimiser.param_groups:
                    group["lr"] = settings.learning_rate * factor
                logits, labels = logits_of(net, batch, dtype)
                loss = loss_of(logits, labels)
                check_finite("loss", loss, run.seen, batch, data, cure)
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(net.parameters(), settings.clip)
                check_finite("gradient", norm, run.seen, batch, data, cure)
                guard.check(run, loss.item())
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                average.update_parameters(net)
                before, run.seen, run.steps = run.seen, run.seen + size, run.steps + 1
                right = (logits.argmax(dim=1) == labels).float().mean()
                for name, value in (("loss", loss), ("accuracy", right)):
                    run.sums[name] = run.sums.get(name, 0.0) + value.detach().item()
                run.steps_since += 1
                last = run.seen >= total
                # --- once in a while
                if run.seen - run.since >= settings.log_images or last:
                    now = time.monotonic()
                    means = {name: value / run.steps_since for name, value in run.sums.items()}
                    tested = {}
                    if last or crossed(run.since, run.seen, settings.test_images):
                        logits = judged(average.module, test, where, dtype)
                        tested["test_accuracy"] = recognised(logits, test).mean().item()
                    log.write(
                        images=run.seen,
                        **means,
                        **tested,
                        learning_rate=settings.learning_rate * factor,
                        gradient_norm=norm.item(),
                        images_per_second=(run.seen - max(run.since, began)) / max(1e-9, now - logged),
                    )
                    bar.note = f"loss {means['loss']:.3f}, accuracy {means['accuracy']:.1%}"
                    run.loss, run.since, run.steps_since, run.sums = means["loss"], run.seen, 0, {}
                    logged = time.monotonic()
                    return_heap()
                due = crossed(before, run.seen, settings.save_images) or (last and settings.save_images > 0)
                if due and not stop.requested:
                    save_checkpoint()
                    draw_curves(log, out, recipe.name)
                if stop.requested and not last:
                    path = save_checkpoint()
                    raise Stopped(
                        f"{stop.requested}: stopped after {run.seen} images, saved {path}; go on with --resume"
                    )
                bar.advance(size)
        seconds = time.monotonic() - started
        log.close()
        final = accuracy(average.module, test, where)
        summary = {"test": final.plain, "test_with_mirror_images": final.mirrored}
        loss_value = run.loss if run.loss is not None else math.nan
        report = {**summary, "classes": final.classes, "test_images": test.count, "images": run.seen}
        write_json(out / "results.json", report)
        provenance = {"recipe": recipe.model_dump(mode="json"), "images": run.seen, "test_images": test.count}
        trained = cast(ResNet, average.module).eval()
        card = classifier_card(recipe, run.seen, parameter_count(net), data, test.count, summary)
        bundle = TrainedClassifier(trained, recipe.name, data.size, data.class_names, summary, provenance)
        save_classifier(bundle, out / "model", card=card)
        draw_curves(log, out, recipe.name)
    rate = (run.seen - began) / seconds if run.seen > began else 0.0
    return ClassifierResult(
        out, run.seen, seconds, rate, loss_value, final, test.count, parameter_count(net), run.dtype, run.threads
    )


def build(recipe: ClassifierRecipe, *, quiet: bool = False) -> tuple[InMemory, InMemory, ResNet]:
    """Training images, test images and the network of a recipe; weights depend on its seed alone."""
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
    """Logits (n, K) of all test images, or of their mirror images; batch norms are at rest meanwhile."""
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
    """(n,) 1 where the largest of logits (n, K) is that of the image's class, else 0."""
    return (logits.argmax(dim=1) == test.labels(torch.arange(test.count))).double()


def accuracy(net: nn.Module, test: InMemory, where: torch.device) -> Accuracy:
    """On the test images, in float32."""
    logits, mirror = (judged(net, test, where, torch.float32, mirror=m) for m in (False, True))
    hit, labels = recognised(logits, test), test.labels(torch.arange(test.count))
    classes = {name: hit[labels == k].mean().item() for k, name in enumerate(test.class_names) if (labels == k).any()}
    return Accuracy(hit.mean().item(), recognised(logits + mirror, test).mean().item(), classes)


def draw_curves(log: MetricsLog, out: Path, title: str) -> None:
    loss_curve(log.rows, out / "training.png", title)
    accuracy_curve(log.rows, out / "accuracy.png", title)
