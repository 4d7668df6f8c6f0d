"""How many CPU threads a verb draws with."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from seriatim.core.construct import MOST_THREADS

if TYPE_CHECKING:
    from seriatim.pipeline import Pipeline

ThreadsOption = Annotated[
    int | None, typer.Option(min=1, max=MOST_THREADS, help="Of the CPU. Default: all, one for small models.")
]
# Parameters below which one thread draws: nearly as fast on an idle machine, ninety times faster on a busy one where
# threads wait for each other (docs/log.md). A rule, not a measurement: the same command gives the same bits.
SMALL = 4_000_000


def threads_of(pipe: Pipeline, given: int | None) -> int:
    """As many as given; else all, or one for a small model."""
    import torch

    from seriatim.models.build import parameter_count

    return given or (1 if parameter_count(pipe.model) < SMALL else torch.get_num_threads())


def drawing_with(pipe: Pipeline, given: int | None) -> contextlib.AbstractContextManager[None]:
    """Inside, torch uses that many."""
    from seriatim.training.precision import threads

    return threads(threads_of(pipe, given))
