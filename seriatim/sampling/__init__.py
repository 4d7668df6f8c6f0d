"""Sampling: what is asked for, and the fast loops that give it step by step."""

from __future__ import annotations

from seriatim.core.lazy import exporter

__all__ = ["SampleRequest", "Step"]


__getattr__ = exporter(__name__, {"SampleRequest": "seriatim.sampling.request", "Step": "seriatim.sampling.masked"})
