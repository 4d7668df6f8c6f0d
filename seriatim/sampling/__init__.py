"""Sampling: the fast loops that generate images step by step, for any backbone and head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seriatim.core.lazy import exports

if TYPE_CHECKING:
    from seriatim.sampling.parallel import parallel_steps as parallel_steps
    from seriatim.sampling.sequential import sequential_steps as sequential_steps
    from seriatim.sampling.step import Start as Start
    from seriatim.sampling.step import Step as Step
else:
    __all__, __getattr__, __dir__ = exports(
        __name__,
        {
            "parallel": "parallel_steps",
            "sequential": "sequential_steps",
            "step": "Start Step",
        },
    )
