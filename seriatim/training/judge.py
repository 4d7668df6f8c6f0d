"""Judge a run on images that it is not trained on: the loss at fixed random draws, and the distance of samples.

Shapes: B images of a batch, F features of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from seriatim.checkpoints.native import Bundle
from seriatim.core.errors import ConfigError, NumericsError, UsageError, one_line
from seriatim.core.keys import Keys
from seriatim.core.stopping import StopRequest
from seriatim.core.terminal import say
from seriatim.data.base import ImageData, StreamData
from seriatim.data.loader import to_float
from seriatim.evaluation.blocks import eight_bits, extract
from seriatim.evaluation.features import open_features
from seriatim.evaluation.figures import check_count, named
from seriatim.evaluation.metrics import Array, frechet_distance
from seriatim.evaluation.run import drawn
from seriatim.models.base import SequenceModel
from seriatim.pipeline.pipeline import Pipeline
from seriatim.tokenizers.base import Tokenizer
from seriatim.training.config import Training
from seriatim.training.engine import crossed

LEAST, MOST = 256, 2048  # images in one validation; fewer held-out images are used several times, with other draws
BATCH = 32  # a batch shares its mask ratio, so small batches cover many ratios
MOST_REAL = 10_000  # images that samples are compared with

KEYS = Keys.of(0, "validation")  # the same for every run, so that runs of other seeds can be compared


@torch.no_grad()
def validation_loss(
    model: SequenceModel, tokenizer: Tokenizer, data: ImageData, dtype: torch.dtype, stop: StopRequest | None = None
) -> float | None:
    """The mean loss of a model on held-out images, without dropout, at random draws that are the same each time.

    None if `stop` is requested meanwhile.
    """
    where, training = model.device, model.training
    total = min(max(data.count, LEAST), MOST)
    places = torch.arange(total) * data.count // total  # each image about equally often
    sums = torch.zeros(2, dtype=torch.float64)
    model.eval()
    try:
        for number, rows in enumerate(torch.arange(total).split(BATCH)):
            if stop is not None and stop.requested:
                return None
            index, of_rows = places[rows], KEYS.fold(rows)
            images = data.images(index).to(where)
            moments = images if data.cached else tokenizer.moments(to_float(images))
            tokens = tokenizer.tokens(moments, of_rows.fold("posterior"))
            with torch.autocast(where.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = model(tokens, data.labels(index), of_rows, KEYS.fold("step").fold(number))
            sums += torch.stack([loss.sum, loss.count]).double().cpu()
    finally:
        model.train(training)
    return float(sums[0] / sums[1])


class SampleDistance:
    """The Frechet distance of samples from real images, in the features of an extractor of `evaluation`."""

    def __init__(self, settings: Training, data: ImageData) -> None:
        """Raises ConfigError, DataError or CheckpointError, before training, if it can't be computed."""
        which, self.count = settings.evaluate_features, settings.evaluate_images
        if which is None:
            raise ConfigError("training.evaluate_features: is required by training.evaluate_images; name an extractor")
        try:
            self.extractor = open_features(which, size=data.size, channels=data.channels)
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

    def measured(self, bundle: Bundle, stop: StopRequest | None = None) -> float | None:
        """The distance of the model's samples, with the same seeds each time; None if `stop` is requested meanwhile."""
        pipe = Pipeline(bundle)
        self.extractor.to(pipe.device)
        if self._real is None:
            total = min(self.data.count, MOST_REAL)
            places = (torch.arange(total) * self.data.count // total).split(BATCH)
            self._real = self.features([eight_bits(self.data.images(index)) for index in places], pipe.device)
        samples = []
        for images in drawn(pipe, pipe.request(seed=0), None, range(self.count)):
            if stop is not None and stop.requested:
                return None
            samples.append(images)
        return frechet_distance(self.features(samples, pipe.device), self._real)

    def features(self, batches: Sequence[Tensor], device: torch.device) -> Array:
        """The features (n, F) of batches of images (B, c, H, W) in [-1, 1]."""
        return torch.cat([extract(self.extractor, images, device).features for images in batches]).double().numpy()


class Judge:
    """What a run is judged by besides its training loss: at every checkpoint, and more often if the recipe says so."""

    def __init__(self, settings: Training, data: ImageData) -> None:
        """Raises ConfigError, DataError or CheckpointError, before training, for settings that can't be followed."""
        self.settings, self.held_out = settings, data.held_out
        if settings.validate_images and self.held_out is None:
            raise ConfigError("training.validate_images: no images are held out; set data.validation, or leave it out")
        if settings.evaluate_features is not None and not settings.evaluate_images:
            raise ConfigError("training.evaluate_features: is used with training.evaluate_images only; set it too")
        self.distance = SampleDistance(settings, data) if settings.evaluate_images else None

    def due(self, before: int, seen: int, *, last: bool) -> tuple[bool, bool]:
        """Whether a validation and an evaluation of samples are due since `before` images were seen."""
        saved = last or crossed(before, seen, self.settings.save_images)
        validated = saved or crossed(before, seen, self.settings.validate_images)
        return validated and self.held_out is not None, saved and self.distance is not None

    def figures(
        self, bundle: Bundle, seen: int, dtype: torch.dtype, stop: StopRequest, *, validated: bool, evaluated: bool
    ) -> dict[str, float]:
        """The figures of a model after `seen` images, for a line of metrics."""
        found: dict[str, float] = {}
        if validated and self.held_out is not None:
            loss = validation_loss(bundle.model, bundle.tokenizer, self.held_out, dtype, stop)
            found |= finite("validation_loss", loss, seen)
        if evaluated and self.distance is not None:
            try:
                found |= finite(self.distance.name, self.distance.measured(bundle, stop), seen)
            except NumericsError as error:  # training continues, since later weights may do better
                say(f"no {self.distance.name} after {seen} images: {one_line(error)}")
        return found


def finite(what: str, value: float | None, seen: int) -> dict[str, float]:
    """The figure for a line of metrics; empty if there is none, or if it is not finite, which is reported."""
    if value is None:
        return {}
    if not math.isfinite(value):
        say(f"the {what} after {seen} images is not finite ({value}), and is left out")
        return {}
    return {what: value}
