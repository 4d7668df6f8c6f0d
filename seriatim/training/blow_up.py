"""Notice when the loss blows up, and name the remedies in every message about numbers that go wrong."""

from __future__ import annotations

import math
from pathlib import Path

from seriatim.core.errors import NumericsError
from seriatim.core.terminal import warn
from seriatim.training.config import Common, Training
from seriatim.training.distributed import ALONE, World
from seriatim.training.state import RunState

GROWTH = 1000.0  # a loss this many times its recent mean has blown up
SHARE = 0.01  # the weight of each step in that mean, which thus spans about a hundred steps
TINY = 1e-12


def way_out(settings: Common, out: Path) -> str:
    """The remedies for a run whose numbers went wrong. `--resume` allows exactly these settings to change."""
    float32 = "" if settings.dtype == "float32" else ", or training.dtype=float32"
    anew = f"; or begin another run with training.init_from={out}, or with one of its older checkpoints"
    return (
        f"go on with --resume and a lower training.learning_rate (now {settings.learning_rate:g}) or training.clip "
        f"(now {settings.clip:g}){float32}{anew if isinstance(settings, Training) else ''}; "
        "--resume takes a change as --override KEY=VALUE"
    )


def growth(run: RunState, loss: float) -> float:
    """The factor by which a step's loss exceeds its recent mean; the mean is then updated with this loss.

    The mean is taken over logarithms of absolute values, so that a few large losses on the way up don't hide the
    growth, and so that it also exists for losses that may be negative.
    """
    size = math.log(max(abs(loss), TINY))
    if run.recent is None:
        run.recent = size if run.loss is None else math.log(max(abs(run.loss), TINY))
    grown = math.exp(min(size - run.recent, 700.0)) if loss > 0 else 0.0
    run.recent += SHARE * (size - run.recent)
    return grown


class BlowUpGuard:
    """Checks the loss of each step before the weights are updated, and warns once each time that it blows up."""

    def __init__(self, settings: Common, out: Path, world: World = ALONE) -> None:
        self.settings, self.out, self.world, self.warned = settings, out, world, False

    def check(self, run: RunState, loss: float) -> None:
        """Warn if the loss has blown up, or raise NumericsError if `training.on_blow_up` is "stop"."""
        grown = growth(run, loss)
        if grown <= GROWTH:
            self.warned = False
        elif not self.warned:
            self.warned = True
            what = f"the loss has grown {grown:.3g} times over its recent mean, to {loss:.3g} after {run.seen} images"
            remedy = way_out(self.settings, self.out)
            if self.settings.on_blow_up == "stop":
                raise self.world.told(NumericsError(f"{what}; stopped before the next update; {remedy}"))
            if self.world.main:
                warn(f"{what}; training.on_blow_up=stop would stop here; stop it and {remedy}")
