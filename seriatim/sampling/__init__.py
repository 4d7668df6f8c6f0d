"""Sampling: the fast loops that generate images step by step, for any backbone and head."""

from __future__ import annotations

from seriatim.core.lazy import exports

__all__, __getattr__ = exports(
    __name__,
    {
        "parallel": "parallel_steps",
        "sequential": "sequential_steps",
        "step": "Start Step",
    },
)
