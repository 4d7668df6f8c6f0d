"""Sampling: the fast loops that generate images step by step, for any backbone and head."""

from __future__ import annotations

from seriatim.core.lazy import exporter

__all__ = ["Start", "Step", "parallel_steps", "sequential_steps"]


__getattr__ = exporter(
    __name__,
    {
        "Start": "seriatim.sampling.step",
        "Step": "seriatim.sampling.step",
        "parallel_steps": "seriatim.sampling.parallel",
        "sequential_steps": "seriatim.sampling.sequential",
    },
)
