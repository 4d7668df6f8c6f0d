"""Schedules as pure functions of progress. They depend on no model and draw no random numbers.

Symbols: L tokens of an image, I steps over the image, u in [0, 1] progress.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

from seriatim.core.errors import UsageError, check_least, nearest

# --- how many tokens stay unknown -------------------------------------------------------------------------------


def cosine(u: float) -> float:
    """The share of tokens that are still unknown at progress u (MaskGIT; MAR section 3.4)."""
    return math.cos(math.pi / 2 * u)


def linear(u: float) -> float:
    """The share of tokens that are still unknown at progress u if every step generates equally many tokens."""
    return 1.0 - u


TOKEN_SCHEDULES: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "cosine": (cosine, lambda share: math.acos(share) * 2 / math.pi),
    "linear": (linear, lambda share: 1.0 - share),
}


def unknown_after(
    step: int,
    steps: int,
    tokens: int,
    unknown: int,
    start: int | None = None,
    schedule: str = "cosine",
    min_tokens: int = 1,
) -> int:
    """The number of tokens of an image that are still unknown after step `step` (0-based) of `steps`.

    `unknown` tokens are unknown now, and `start` tokens were unknown before the first step (default: all). An image
    that starts with known tokens enters the schedule at the progress at which the schedule has that share.

    With all tokens unknown, the result is floor(L cos(pi/2 (s+1)/I)) in double precision, clamped so that every step
    generates at least one token and leaves at least one for each later step (MAR section 3.4, with the official
    rounding). A larger `min_tokens` replaces this minimum of one token and so speeds up the first steps, in which the
    cosine generates one token each. An image with too few unknown tokens for all steps generates `min_tokens` a step
    and is finished early.
    """
    if unknown <= min_tokens or step >= steps - 1:
        return 0
    share, inverse = TOKEN_SCHEDULES[schedule]
    begin = 0.0 if start is None or start == tokens else inverse(start / tokens)
    u = begin + (1.0 - begin) * (step + 1) / steps
    later = (steps - 1 - step) * min_tokens  # tokens that must remain for the later steps
    return min(unknown - min_tokens, max(later, math.floor(tokens * share(u))))


def tokens_per_step(
    steps: int, tokens: int, unknown: int | None = None, schedule: str = "cosine", min_tokens: int = 1
) -> list[int]:
    """The number of tokens that each step generates; they sum to `unknown` (default: all tokens)."""
    check_least(1, min_tokens=min_tokens)
    start = tokens if unknown is None else unknown
    left, counts = start, []
    for step in range(steps):
        after = unknown_after(step, steps, tokens, left, start, schedule, min_tokens)
        counts.append(left - after)
        left = after
    return counts


# --- guidance over the image ------------------------------------------------------------------------------------
#
# Each function returns the guidance scale at the share u = (L - m) / L of known tokens, where m of L tokens are unknown
# after the step. The full scale is w.


def guidance_linear(scale: float, unknown: int, tokens: int) -> float:
    """The scale 1 + (w - 1) u, which grows linearly from 1 to w (MAR section 3.4; Muse)."""
    return 1.0 + (scale - 1.0) * (tokens - unknown) / tokens


def guidance_constant(scale: float, _unknown: int, _tokens: int) -> float:
    return scale


def guidance_interval(scale: float, unknown: int, tokens: int, interval: tuple[float, float] = (0.0, 1.0)) -> float:
    """w where low <= u <= high, else 1, which needs no unconditional pass (Kynkaanniemi et al. 2024; eMIGM)."""
    low, high = interval
    return scale if low <= (tokens - unknown) / tokens <= high else 1.0


def guidance_power_cosine(scale: float, unknown: int, tokens: int, power: float = 1.0) -> float:
    """The scale 1 + (w - 1) (1 - cos(pi u^s)) / 2; a larger power s starts later (Gao et al. 2023, MDT)."""
    u = (tokens - unknown) / tokens
    return 1.0 + (scale - 1.0) * (1.0 - math.cos(math.pi * u**power)) / 2


GUIDANCE_SCHEDULES: dict[str, Callable[..., float]] = {
    "linear": guidance_linear,
    "constant": guidance_constant,
    "interval": guidance_interval,
    "power-cosine": guidance_power_cosine,
}
GUIDANCE_OPTIONS = {"interval": "guidance_interval", "power-cosine": "guidance_power"}  # schedule -> its only setting


# --- steps inside a head over the image --------------------------------------------------------------------------


def annealed_steps(first: int, last: int | None, progress: float) -> int:
    """The number of steps inside a head when a share `progress` in [0, 1] of the image is known.

    It falls linearly from `first` to `last`, because a token is easier to predict when more of the image is known
    (DiSA, arXiv 2505.20297). If `last` is None, it is always `first`.
    """
    return first if last is None else max(1, round(first + (last - first) * min(max(progress, 0.0), 1.0)))


# --- training ---------------------------------------------------------------------------------------------------


def mask_ratio(u: float, mean: float = 1.0, std: float = 0.25, low: float = 0.7, high: float = 1.0) -> float:
    """The share of tokens to mask in training, from a uniform u in [0, 1).

    The share follows a normal(mean, std) truncated to [low, high], by its inverse CDF. MAR section 3.4 uses mean 1 and
    std 0.25 on [0.7, 1].
    """
    normal = NormalDist(mean, std)
    a, b = normal.cdf(low), normal.cdf(high)
    if b <= a:
        return high
    p = min(max(a + u * (b - a), 1e-12), 1 - 1e-12)
    return min(max(normal.inv_cdf(p), low), high)


def learning_rate(seen: int, total: int, warmup: int, schedule: str = "constant") -> float:
    """The factor on the learning rate after `seen` of `total` images.

    It rises linearly over `warmup` images and then stays constant or follows half a cosine down to 0.
    """
    if warmup > 0 and seen < warmup:
        return seen / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        u = (seen - warmup) / max(1, total - warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, u)))
    raise UsageError(f"schedule: {schedule!r} is not known{nearest(schedule, ('constant', 'cosine'))}")


def ema_decay(step: int, decay: float) -> float:
    """The decay of the weight average at update n = `step`: min(decay, (1 + n) / (10 + n)).

    The decay starts low, because a fixed 0.9999 would keep the random initial weights for tens of thousands of steps.
    """
    return min(decay, (1.0 + step) / (10.0 + step))


def crossed(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]; False if `every` is 0."""
    return bool(every) and now // every > before // every
