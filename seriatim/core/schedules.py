"""Schedules as pure functions of progress. Nothing here knows a model or draws a number.

Symbols: L tokens of an image, I steps over the image, u in [0, 1] progress.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

from seriatim.core.errors import UsageError, nearest

# --- how many tokens stay unknown -------------------------------------------------------------------------------


def cosine(u: float) -> float:
    """Share of tokens still unknown at progress u (MaskGIT; MAR section 3.4)."""
    return math.cos(math.pi / 2 * u)


def linear(u: float) -> float:
    """Share of tokens still unknown at progress u: equally many tokens every step."""
    return 1.0 - u


TOKEN_SCHEDULES: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "cosine": (cosine, lambda share: math.acos(share) * 2 / math.pi),
    "linear": (linear, lambda share: 1.0 - share),
}


def unknown_after(
    step: int, steps: int, tokens: int, unknown: int, start: int | None = None, schedule: str = "cosine"
) -> int:
    """Tokens of an image that are still unknown after step `step` (0-based) of `steps`.

    `unknown` are unknown now, `start` were so before the first step (default: all). An image that starts with
    known tokens enters the schedule where the schedule has that share. With all tokens unknown this is
    floor(L cos(pi/2 (s+1)/I)) in double precision, clamped so that each step takes a token and leaves one for each
    step to come (MAR section 3.4 and the official rounding). An image with fewer unknown tokens than there are
    steps takes one a step and is done early.
    """
    if unknown == 0 or step >= steps - 1:
        return 0
    share, inverse = TOKEN_SCHEDULES[schedule]
    begin = 0.0 if start is None or start == tokens else inverse(start / tokens)
    u = begin + (1.0 - begin) * (step + 1) / steps
    later = steps - 1 - step  # each later step needs a token of its own
    return min(unknown - 1, max(later, math.floor(tokens * share(u))))


def tokens_per_step(steps: int, tokens: int, unknown: int | None = None, schedule: str = "cosine") -> list[int]:
    """How many tokens each step generates; the sum is `unknown` (default: all)."""
    check_token_schedule(schedule)
    start = tokens if unknown is None else unknown
    left, counts = start, []
    for step in range(steps):
        after = unknown_after(step, steps, tokens, left, start, schedule)
        counts.append(left - after)
        left = after
    return counts


def check_token_schedule(name: str) -> None:
    if name not in TOKEN_SCHEDULES:
        raise UsageError(f"token_schedule: {name!r} is not known{nearest(name, TOKEN_SCHEDULES)}")


# --- guidance over the image ------------------------------------------------------------------------------------


def guidance_linear(scale: float, unknown: int, tokens: int) -> float:
    """1 + (w - 1) (L - m) / L with m tokens unknown after the step (MAR section 3.4; Muse)."""
    return 1.0 + (scale - 1.0) * (tokens - unknown) / tokens


def guidance_constant(scale: float, unknown: int, tokens: int) -> float:
    return scale


GUIDANCE_SCHEDULES: dict[str, Callable[[float, int, int], float]] = {
    "linear": guidance_linear,
    "constant": guidance_constant,
}


def guidance_at(schedule: str, scale: float, unknown_after: int, tokens: int) -> float:
    """The guidance scale of a step after which `unknown_after` tokens are unknown.

    The published schedule never lets that count fall below 1, not even after the last step.
    """
    if schedule not in GUIDANCE_SCHEDULES:
        raise UsageError(f"guidance_schedule: {schedule!r} is not known{nearest(schedule, GUIDANCE_SCHEDULES)}")
    return GUIDANCE_SCHEDULES[schedule](scale, max(1, unknown_after), tokens)


# --- steps inside a head over the image --------------------------------------------------------------------------


def annealed_steps(first: int, last: int | None, progress: float) -> int:
    """Steps inside a head when a share `progress` in [0, 1] of the image is known: linear from `first` to `last`.

    The more is known, the less is left to decide, and the fewer steps it takes (DiSA, arXiv 2505.20297). None: always
    `first`.
    """
    return first if last is None else max(1, round(first + (last - first) * min(max(progress, 0.0), 1.0)))


# --- training ---------------------------------------------------------------------------------------------------


def mask_ratio(u: float, mean: float = 1.0, std: float = 0.25, low: float = 0.7, high: float = 1.0) -> float:
    """The share of tokens to mask: a normal(mean, std) truncated to [low, high], by inverse CDF of u in [0, 1).

    MAR section 3.4: mean 1, std 0.25, on [0.7, 1].
    """
    normal = NormalDist(mean, std)
    a, b = normal.cdf(low), normal.cdf(high)
    if b <= a:
        return high
    p = min(max(a + u * (b - a), 1e-12), 1 - 1e-12)
    return min(max(normal.inv_cdf(p), low), high)


def learning_rate(seen: int, total: int, warmup: int, schedule: str = "constant") -> float:
    """Factor on the learning rate after `seen` of `total` images: linear warm-up, then constant or half a cosine."""
    if warmup > 0 and seen < warmup:
        return seen / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        u = (seen - warmup) / max(1, total - warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, u)))
    raise UsageError(f"schedule: {schedule!r} is not known{nearest(schedule, ('constant', 'cosine'))}")


def ema_decay(step: int, decay: float) -> float:
    """The decay of the weight average at its n-th update: min(decay, (1 + n) / (10 + n)).

    A fixed 0.9999 holds on to the random start for tens of thousands of steps; this warms up.
    """
    return min(decay, (1.0 + step) / (10.0 + step))
