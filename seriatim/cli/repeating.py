"""`seriatim sample --from FILE`: generate a picture again from its metadata, and compare the pixels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from seriatim.pipeline.metadata import Recorded
    from seriatim.pipeline.pipeline import Pipeline
    from seriatim.pipeline.request import SampleRequest

NEARLY = 2  # a repeated pixel may differ by this much, because another batch, thread count or version rounds otherwise


def read_repeatable(path: Path) -> tuple[Image.Image, Recorded]:
    """A picture and its metadata. Raises DataError if the picture can't be generated from its request alone."""
    from seriatim.core.errors import DataError
    from seriatim.pipeline.metadata import read_recorded

    image, says = read_recorded(path)
    if says.edited:
        raise DataError(f"from: {path} was edited from another picture; edit that one again with the same seed")
    if not says.matches(image):
        raise DataError(
            f"from: the pixels of {path} were changed later, so no comparison is possible; name an original"
        )
    return image, says


def request_of(says: Recorded, path: Path | None, pipe: Pipeline, given: list[str]) -> SampleRequest:
    """The request in a picture's metadata, checked for the model that generated the picture."""
    from seriatim.core.errors import CheckpointError, UsageError
    from seriatim.pipeline.labels import label_of

    if given:
        raise UsageError(f"{given[0]}: given together with --from, which repeats a picture as it was; leave it out")
    if says.model_sha256 != pipe.bundle.sha256:
        ours, theirs = pipe.bundle.sha256[:12], says.model_sha256[:12]
        raise CheckpointError(
            f"model: its weights have sha256 {ours}..., {path} was drawn by {theirs}...; name the model that drew it"
        )
    request = says.sample_request()
    if says.label in pipe.class_names:  # the name decides: in old metadata a number may also be a class's name
        number = pipe.class_names.index(says.label)
        request = request.model_copy(update={"class_labels": (label_of(number, pipe.class_names),)})
    return pipe.request(request)  # it is complete, so the model's defaults do not apply


def compared(original: tuple[Image.Image, Recorded], image: Image.Image, made: dict[str, str]) -> str:
    """A text that compares the pixels of the repeated picture with the original's.

    Raises NumericsError if they differ by more than rounding explains.
    """
    import numpy as np

    from seriatim.core.errors import NumericsError
    from seriatim.pipeline.metadata import pixels_sha256

    before, says = original
    if pixels_sha256(image) == says.pixels_sha256:
        return "identical"
    other = [
        f"{key} {says.versions.get(key)} then, {value} now"
        for key, value in made.items()
        if says.versions.get(key) != value
    ]
    if says.stored_sha256:
        before = before.convert(image.mode)  # WebP has no mode of one channel
    if before.size != image.size or before.mode != image.mode:
        raise NumericsError(
            f"from: the repeated picture is {image.size}, {image.mode}, not {before.size}, {before.mode}"
        )
    if says.stored_sha256:  # what the format changed can't be told from what was drawn otherwise
        mean = np.abs(np.asarray(before).astype(int) - np.asarray(image).astype(int)).mean()
        return f"not identical; mean difference {mean:.1f} of 255 from a file that is not exact (jpg or webp)"
    difference = np.abs(np.asarray(before).astype(int) - np.asarray(image).astype(int))
    found = f"largest difference {difference.max()} of 255, in {(difference > 0).mean():.1%} of the values"
    if difference.max() > NEARLY:
        raise NumericsError(
            f"from: the repeated picture differs: {found} ({'; '.join(other) or 'another batch or threads'})"
        )
    return found
