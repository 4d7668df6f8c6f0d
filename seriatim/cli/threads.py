"""Choose how many CPU threads a command uses for sampling."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from seriatim.core.construct import MOST_THREADS

if TYPE_CHECKING:
    from seriatim.pipeline.pipeline import Pipeline

ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_THREADS, help="The number of CPU threads. Default: all, but one for small models."),
]
# A model with fewer parameters samples on one thread. That is nearly as fast on an idle machine, and ninety times
# faster on a busy one, where threads wait for each other (docs/log.md). It is a fixed rule and not measured at run
# time, so that the same command gives the same bits.
SMALL = 4_000_000


def threads_of(pipe: Pipeline, given: int | None) -> int:
    """The number of threads: `given` if it is not None, otherwise one for a small model and all for others."""
    import torch

    from seriatim.models.build import parameter_count

    return given or (1 if parameter_count(pipe.model) < SMALL else torch.get_num_threads())


def drawing_with(pipe: Pipeline, given: int | None) -> contextlib.AbstractContextManager[None]:
    """A context in which torch uses `threads_of(pipe, given)` threads."""
    from seriatim.training.precision import threads

    return threads(threads_of(pipe, given))
