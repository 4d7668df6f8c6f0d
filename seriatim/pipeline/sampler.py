"""Run a request batch by batch. Each batch of images is finished before the next begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from PIL import Image
from torch import Tensor

from seriatim.core.keys import Keys
from seriatim.core.orders import CONFIDENCE, ORDERS, RANDOM
from seriatim.models.base import SequenceModel
from seriatim.pipeline.request import SampleRequest
from seriatim.sampling.step import Start, Step


def sampled(
    model: SequenceModel,
    request: SampleRequest,
    labels: Tensor,
    grid: tuple[int, int],
    size: int,
    start: Start | None,
    dtype: torch.dtype,
    sampling: Callable[[], AbstractContextManager[None]],
    decode: Callable[[Tensor, Tensor], list[Image.Image]],
) -> Iterator[Step]:
    """Yield the steps of a resolved request, in batches of `size` images.

    `labels` (B,), on the host, holds the class of each image, -1 for none. `grid` is the tokenizer's, which named
    orders need. `start` holds tokens of all B images. The model runs only inside `sampling()`, so that between steps it
    is as its owner left it. `decode` makes previews.
    """
    seeds = request.image_seeds()
    batches = [range(i, min(i + size, len(labels))) for i in range(0, len(labels), size)]
    for number, images in enumerate(batches):
        some = slice(images.start, images.stop)
        with sampling():
            condition = model.condition(labels[some] if model.classes else None, len(images))
            steps = model.steps(
                condition,
                model.null(len(images), condition),
                Keys.of_seeds(seeds[some]),
                request,
                None if start is None else Start(start.tokens[some], start.known[some]),
                positions(request, grid, some),
                dtype=dtype,
            )
        while True:
            with sampling():
                step = next(steps, None)
            if step is None:
                break
            step.index, step.total = number * step.total + step.index, len(batches) * step.total
            step.images, step.decode = images, decode
            yield step


def positions(request: SampleRequest, grid: tuple[int, int], images: slice) -> Tensor | None:
    """The order of these images as positions on the grid, (L,) or (B, L); None if the model chooses it."""
    if request.order is None or request.order in (RANDOM, CONFIDENCE):
        return None
    if isinstance(request.order, str):
        return torch.tensor(ORDERS[request.order](*grid))
    given = torch.tensor(request.order)
    return given if given.ndim == 1 else given[images]
