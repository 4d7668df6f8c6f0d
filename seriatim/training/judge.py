"""Judge a run on images that it is not trained on: the loss at fixed random draws, and the distance of samples.

Shapes: B images of a batch, F features of an image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seriatim.checkpoints.native import Bundle
from seriatim.core.errors import ConfigError, NumericsError, UsageError, one_line
from seriatim.core.keys import Keys
from seriatim.core.schedules import crossed
from seriatim.core.stopping import StopRequest
from seriatim.core.terminal import say
from seriatim.data.base import ImageData, StreamData
from seriatim.data.loader import Share, to_float
from seriatim.evaluation.blocks import eight_bits, extract
from seriatim.evaluation.features import open_features
from seriatim.evaluation.figures import check_count, named
from seriatim.evaluation.impartial import check_impartial
from seriatim.evaluation.metrics import Array, frechet_distance
from seriatim.evaluation.run import drawn
from seriatim.models.base import SequenceModel
from seriatim.pipeline.pipeline import Pipeline
from seriatim.tokenizers.base import Tokenizer
from seriatim.training.config import Training
from seriatim.training.distributed import ALONE, World

LEAST, MOST = 256, 2048  # images in one validation; fewer held-out images are used several times, with other draws
BATCH = 32  # a batch shares its mask ratio, so small batches cover many ratios
FORWARD = 0.4  # the share of a training step that a pass forward alone takes, about
MOST_REAL = 10_000  # images that samples are compared with

KEYS = Keys.of(0, "validation")  # the same for every run, so that runs of other seeds can be compared


@torch.no_grad()
def validation_loss(
    model: SequenceModel,
    tokenizer: Tokenizer,
    data: ImageData,
    dtype: torch.dtype,
    stop: StopRequest | None = None,
    world: World = ALONE,
) -> float | None:
    """The mean loss of a model on held-out images, without dropout, at random draws that are the same each time.

    The processes share the batches. None if `stop` is requested in one of them meanwhile.
    """
    where, training = model.device, model.training
    total = min(max(data.count, LEAST), MOST)
    places = torch.arange(total) * data.count // total  # each image about equally often
    sums = torch.zeros(3, dtype=torch.float64)  # of the loss, of its counts, and of the processes that gave up
    model.eval()
    try:
        for number, rows in list(enumerate(torch.arange(total).split(BATCH)))[world.rank :: world.size]:
            if stop is not None and stop.requested:
                sums[2] = 1
                break
            index, of_rows = places[rows], KEYS.fold(rows)
            images = data.images(index).to(where)
            moments = images if data.cached else tokenizer.moments(to_float(images))
            tokens = tokenizer.tokens(moments, of_rows.fold("posterior"))
            with torch.autocast(where.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = model(tokens, data.labels(index), of_rows, KEYS.fold("step").fold(number))
            sums[:2] += torch.stack([loss.sum, loss.count]).double().cpu()
    finally:
        model.train(training)
    loss_sum, count, gave_up = world.total(sums).tolist()
    return None if gave_up else loss_sum / count


class SampleDistance:
    """The Frechet distance of samples from real images, in the features of an extractor of `evaluation`."""

    def __init__(self, settings: Training, data: ImageData, seen: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Raises ConfigError, DataError or CheckpointError, before training, if it can't be computed.

        `seen` has the features that the tokenizer was trained with (`seen_features`), which are refused.
        """
        which, self.count = settings.evaluate_features, settings.evaluate_images
        if which is None:
            raise ConfigError("training.evaluate_features: is required by training.evaluate_images; name an extractor")
        try:
            self.extractor = open_features(which, size=data.size, channels=data.channels)
            check_impartial(seen, self.extractor)
        except UsageError as error:
            raise ConfigError(f"training.evaluate_{one_line(error)}") from error
        held_out = data.held_out  # too few images have a singular covariance
        self.data = data if held_out is None or held_out.count <= self.extractor.dim else held_out
        if self.data.cached or not self.data.pictures or isinstance(self.data, StreamData):
            raise ConfigError(
                "training.evaluate_images: the data holds no pictures that are read by index, with which samples could "
                "be compared; leave it out, and use `seriatim evaluate`"
            )
        check_count("training.evaluate_images", self.count, self.extractor, ("frechet",))
        check_count("data", self.data.count, self.extractor, ("frechet",))
        self.name = named("FD", self.extractor)
        self._real: Array | None = None

    def measured(self, bundle: Bundle, stop: StopRequest | None = None, world: World = ALONE) -> float | None:
        """The distance of the model's samples, with the same seeds each time.

        Each process draws its share of the images. None if `stop` is requested in one of them meanwhile. Raises
        NumericsError if a sample is not finite.
        """
        pipe, share = Pipeline(bundle), Share(world.rank, world.size)
        self.extractor.to(pipe.device)
        if self._real is None:
            total = min(self.data.count, MOST_REAL)
            places = (torch.arange(total) * self.data.count // total)[share.of(total)].split(BATCH)
            real = world.gathered(self.features([eight_bits(self.data.images(index)) for index in places], pipe.device))
            self._real = np.concatenate(real) if real else np.empty((0, self.extractor.dim))
        mine = self.samples(pipe, range(self.count)[share.of(self.count)], stop)
        return world.first(partial(self.distance, world.gathered(mine)))

    def samples(self, pipe: Pipeline, images: range, stop: StopRequest | None) -> Array | NumericsError | None:
        """The features (n, F) of these samples, the error that drawing them raised, or None if `stop` is requested."""
        found = []
        try:
            for batch in drawn(pipe, pipe.request(seed=0), None, images):
                if stop is not None and stop.requested:
                    return None
                found.append(batch)
        except NumericsError as error:
            return error
        return self.features(found, pipe.device)

    def distance(self, shares: Sequence[Array | NumericsError | None]) -> float | None:
        """The distance of all samples, whose features the processes have computed."""
        features = []
        for share in shares:
            if share is None:
                return None
            if isinstance(share, NumericsError):
                raise share
            features.append(share)
        assert self._real is not None, "the first process has gathered them"
        return frechet_distance(np.concatenate(features), self._real)

    def features(self, batches: Sequence[Tensor], device: torch.device) -> Array:
        """The features (n, F) of batches of images (B, c, H, W) in [-1, 1]."""
        found = [extract(self.extractor, images, device).features.double().numpy() for images in batches]
        return np.concatenate(found) if found else np.empty((0, self.extractor.dim))


class Judge:
    """What a run is judged by besides its training loss: at every checkpoint, and more often if the recipe says so."""

    def __init__(self, settings: Training, data: ImageData, seen: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Raises ConfigError, DataError or CheckpointError, before training, for settings that can't be followed."""
        self.settings, self.held_out = settings, data.held_out
        if settings.validate_images and self.held_out is None:
            raise ConfigError("training.validate_images: no images are held out; set data.validation, or leave it out")
        if settings.evaluate_features is not None and not settings.evaluate_images:
            raise ConfigError("training.evaluate_features: is used with training.evaluate_images only; set it too")
        self.distance = SampleDistance(settings, data, seen) if settings.evaluate_images else None

    def due(self, before: int, seen: int, *, last: bool) -> tuple[bool, bool]:
        """Whether a validation and an evaluation of samples are due since `before` images were seen."""
        saved = last or crossed(before, seen, self.settings.save_images)
        validated = saved or crossed(before, seen, self.settings.validate_images)
        return validated and self.held_out is not None, saved and self.distance is not None

    def seconds(self, image: float, sample: float) -> float:
        """About what the figures of a checkpoint take, if training on an image and drawing one take so many seconds."""
        held_out = 0 if self.held_out is None else min(max(self.held_out.count, LEAST), MOST)
        return FORWARD * held_out * image + (self.settings.evaluate_images * sample if self.distance else 0.0)

    def figures(
        self,
        bundle: Bundle,
        seen: int,
        dtype: torch.dtype,
        stop: StopRequest,
        world: World = ALONE,
        *,
        validated: bool,
        evaluated: bool,
    ) -> dict[str, float] | None:
        """The figures of a model after `seen` images, for a line of metrics; None if a process is asked to stop."""
        found: dict[str, float] = {}
        if validated and self.held_out is not None:
            loss = validation_loss(bundle.model, bundle.tokenizer, self.held_out, dtype, stop, world)
            if loss is None:
                return None
            found["validation_loss"] = loss
        if evaluated and self.distance is not None:
            try:
                distance = self.distance.measured(bundle, stop, world)
                if distance is None:
                    return None
                found[self.distance.name] = distance
            except NumericsError as error:  # training continues, since later weights may do better
                if world.main:
                    say(f"no {self.distance.name} after {seen} images: {one_line(error)}")
        return finite(found, seen, quiet=not world.main)


def finite(found: Mapping[str, float], seen: int, *, quiet: bool = False) -> dict[str, float]:
    """The figures for a line of metrics without those that are not finite, which are reported."""
    for name, value in found.items():
        if not math.isfinite(value) and not quiet:
            say(f"the {name} after {seen} images is not finite ({value}), and is left out")
    return {name: value for name, value in found.items() if math.isfinite(value)}
