"""The training loop: one function, read top to bottom.

B images of a batch, L tokens, D features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from seriatim.checkpoints.native import Bundle, save_bundle
from seriatim.core.errors import ConfigError, NumericsError, UsageError
from seriatim.core.files import writable_folder, write_json, write_text
from seriatim.core.progress import Progress
from seriatim.core.random import Noise, derive_seed
from seriatim.core.schedules import learning_rate
from seriatim.core.validation import parse
from seriatim.models.build import build_model, parameter_count, seeded
from seriatim.models.masked import Loss, MaskedModel
from seriatim.pipeline import pick_device
from seriatim.sampling.request import SampleRequest
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.build import build_tokenizer
from seriatim.training.config import Recipe, dump
from seriatim.training.data import ImageData, Order, build_data
from seriatim.training.log import MetricsLog, environment, loss_curve
from seriatim.training.optim import adamw, averaged

FIT_BATCH = 512  # images at a time when the tokenizer measures its statistics


@dataclass(frozen=True)
class TrainingResult:
    folder: Path  # the run; `folder / "model"` is a model folder
    images: int
    seconds: float  # in the loop
    images_per_second: float
    loss: float  # mean of the last logged stretch
    parameters: int
    dtype: str


def build(recipe: Recipe) -> tuple[ImageData, Tokenizer, MaskedModel]:
    """The data, tokenizer and model of a recipe; weights depend on its seed alone."""
    parse(SampleRequest, recipe.sampling, where="sampling")
    data = build_data(recipe.data)
    tokenizer = build_tokenizer({"size": list(data.size), "channels": data.channels, **recipe.tokenizer})
    if tokenizer.size != data.size or tokenizer.channels != data.channels:
        shapes = [
            f"{c} x {h} x {w}" for c, (h, w) in ((tokenizer.channels, tokenizer.size), (data.channels, data.size))
        ]
        raise ConfigError(f"tokenizer: made for images of {shapes[0]}, the data has {shapes[1]}")
    with seeded(derive_seed(recipe.seed, "weights")):
        model = build_model(recipe.model, tokens=tokenizer.count, dim=tokenizer.dim, classes=len(data.class_names))
    return data, tokenizer, model


def train(
    recipe: Recipe, out: Path | str, *, device: str = "auto", overwrite: bool = False, quiet: bool = False
) -> TrainingResult:
    """Train a recipe into the folder `out`.

        out/recipe.yaml       the recipe with every default filled in
        out/environment.json  versions and machine
        out/metrics.jsonl     loss, learning rate, images/s
        out/training.png      the loss curve
        out/model/            the averaged weights, ready for `seriatim.load`

    Raises UsageError where `out` holds a run already (unless `overwrite`), NumericsError when the loss or its gradient
    is not finite; the weights are as they were before that step.
    """
    settings = recipe.training
    out = Path(out)
    if (out / "recipe.yaml").exists() and not overwrite:
        raise UsageError(f"out: {out} holds a run already; choose another folder")
    data, tokenizer, model = build(recipe)
    out = writable_folder(out)
    where = pick_device(device)

    index = torch.arange(data.count)
    tokenizer.fit(data.images(some) for some in index.split(FIT_BATCH))
    model.to(where).train()
    tokenizer.to(where)
    optimiser = adamw(model, settings.learning_rate, settings.betas, settings.weight_decay)
    average = averaged(model, settings.ema)
    order = Order(data.count, derive_seed(recipe.seed, "data"))

    def batch(first: int, size: int) -> tuple[Tensor, Tensor | None]:
        chosen = order(first, size)  # (B,)
        labels = data.labels(chosen)
        noise = Noise.shared(derive_seed(recipe.seed, "tokens", first), size, where)
        tokens = tokenizer.tokens(tokenizer.moments(data.images(chosen).to(where)), noise)  # (B, L, D)
        return tokens, None if labels is None else labels.to(where)

    def loss_of(first: int, size: int, dtype: torch.dtype) -> Loss:
        # Every draw depends on (seed, first) alone, dropout's too: a resumed run draws what it would have drawn.
        tokens, labels = batch(first, size)
        noise = Noise.shared(derive_seed(recipe.seed, "noise", first), size, where)
        with torch.random.fork_rng(devices=[] if where.type == "cpu" else None):
            torch.manual_seed(derive_seed(recipe.seed, "dropout", first))
            with torch.autocast(where.type, dtype=dtype, enabled=dtype != torch.float32):
                return model.loss(tokens, labels, noise)

    dtype = pick_training_dtype(settings.dtype, lambda d: loss_of(0, min(settings.batch_size, settings.images), d))
    model.zero_grad(set_to_none=True)
    write_text(out / "recipe.yaml", dump(recipe))
    write_json(out / "environment.json", environment())
    log = MetricsLog(out / "metrics.jsonl")
    started = logged = time.monotonic()
    sums: dict[str, float] = {}
    steps_since = 0
    seen = since = 0
    with Progress(settings.images, "training", "images", quiet=quiet) as bar:
        while seen < settings.images:
            size = min(settings.batch_size, settings.images - seen)
            factor = learning_rate(seen + size, settings.images, settings.warmup_images, settings.schedule)
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * factor
            loss = loss_of(seen, size, dtype)
            check_finite("loss", loss.mean, seen, order(seen, size))
            loss.mean.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            check_finite("gradient", norm, seen, order(seen, size))
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            average.update_parameters(model)
            seen += size
            steps_since += 1
            for name, value in (("loss", loss.mean), *((f"loss_{k}", v) for k, v in loss.parts.items())):
                sums[name] = sums.get(name, 0.0) + value.detach().item()
            if seen - since >= settings.log_images or seen == settings.images:
                means = {name: value / steps_since for name, value in sums.items()}
                now = time.monotonic()
                log.write(
                    images=seen,
                    **means,
                    learning_rate=settings.learning_rate * factor,
                    gradient_norm=norm.item(),
                    images_per_second=(seen - since) / max(1e-9, now - logged),
                )
                bar.note = f"loss {means['loss']:.3f}"
                since, logged, steps_since, sums = seen, now, 0, {}
            bar.advance(size)
    seconds = time.monotonic() - started

    trained = cast(MaskedModel, average.module).eval()
    trained.zero_grad(set_to_none=True)
    bundle = Bundle(
        trained,
        tokenizer,
        data.class_names,
        recipe.sampling,
        {"recipe": recipe.model_dump(mode="json"), "images": seen},
    )
    save_bundle(bundle, out / "model")
    loss_curve(log.rows, out / "training.png", recipe.name)
    return TrainingResult(
        out,
        seen,
        seconds,
        seen / seconds,
        log.rows[-1]["loss"],
        parameter_count(model),
        str(dtype).removeprefix("torch."),
    )


def check_finite(what: str, value: Tensor, seen: int, batch: Tensor) -> None:
    """Stop before anything is updated."""
    number = value.detach().item()
    if not math.isfinite(number):
        named = ", ".join(map(str, batch[:8].tolist())) + (", ..." if len(batch) > 8 else "")
        raise NumericsError(
            f"the {what} is not finite ({number}) after {seen} images, in the batch of images {named}; nothing was "
            "updated; lower training.learning_rate, or use training.dtype=float32"
        )


def pick_training_dtype(name: str, loss_of: Callable[[torch.dtype], Loss]) -> torch.dtype:
    """float32 or bfloat16 autocast; "auto" times a few forward and backward passes of each and takes the faster."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        times = []
        for _ in range(4):  # the first is warm-up
            begin = time.perf_counter()
            loss_of(dtype).mean.backward()
            times.append(time.perf_counter() - begin)
        seconds[dtype] = min(times[1:])
    return torch.bfloat16 if seconds[torch.bfloat16] < seconds[torch.float32] else torch.float32
