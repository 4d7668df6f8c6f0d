"""Schedules as pure functions of progress. Nothing here knows a model or draws a number.

Symbols: L tokens of an image, I steps over the image, u in [0, 1] progress.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    step: int,
    steps: int,
    tokens: int,
    unknown: int,
    start: int | None = None,
    schedule: str = "cosine",
    min_tokens: int = 1,
) -> int:
    """Tokens of an image that are still unknown after step `step` (0-based) of `steps`.

    `unknown` are unknown now, `start` were so before the first step (default: all). An image that starts with
    known tokens enters the schedule where the schedule has that share. With all tokens unknown this is
    floor(L cos(pi/2 (s+1)/I)) in double precision, clamped so that each step takes a token and leaves one for each
    step to come (MAR section 3.4 and the official rounding). `min_tokens` in the place of that one makes the first
    steps, of which the cosine takes a token each, fewer. An image with too few unknown tokens for that takes
    `min_tokens` a step, in the end what is left, and is done early.
    """
    if unknown <= min_tokens or step >= steps - 1:
        return 0
    share, inverse = TOKEN_SCHEDULES[schedule]
    begin = 0.0 if start is None or start == tokens else inverse(start / tokens)
    u = begin + (1.0 - begin) * (step + 1) / steps
    later = (steps - 1 - step) * min_tokens  # each later step needs tokens of its own
    return min(unknown - min_tokens, max(later, math.floor(tokens * share(u))))


def tokens_per_step(
    steps: int, tokens: int, unknown: int | None = None, schedule: str = "cosine", min_tokens: int = 1
) -> list[int]:
    """How many tokens each step generates; the sum is `unknown` (default: all)."""
    check_token_schedule(schedule, min_tokens)
    start = tokens if unknown is None else unknown
    left, counts = start, []
    for step in range(steps):
        after = unknown_after(step, steps, tokens, left, start, schedule, min_tokens)
        counts.append(left - after)
        left = after
    return counts


def check_token_schedule(name: str, min_tokens: int = 1) -> None:
    if name not in TOKEN_SCHEDULES:
        raise UsageError(f"token_schedule: {name!r} is not known{nearest(name, TOKEN_SCHEDULES)}")
    if min_tokens < 1:
        raise UsageError(f"min_tokens: {min_tokens!r} is not allowed; it must be at least 1")


def check_one_a_step(steps: int | None, tokens: int, schedule: str = "cosine", min_tokens: int = 1) -> None:
    """Refuse what makes no sense for a model that draws one token a step; None is as many steps as tokens."""
    if steps is not None and steps != tokens:
        raise UsageError(
            f"num_inference_steps: {steps} steps asked of a causal model of {tokens} tokens, which draws one a step; "
            "leave it out"
        )
    for name, value, default in (("token_schedule", schedule, "cosine"), ("min_tokens", min_tokens, 1)):
        if value != default:
            raise UsageError(f"{name}: {value!r} asked of a causal model, which draws one token a step; leave it out")


# --- guidance over the image ------------------------------------------------------------------------------------
#
# Each is a scale at the known share u = (L - m) / L, with m of L tokens unknown after the step; w is the full scale.


def guidance_linear(scale: float, unknown: int, tokens: int) -> float:
    """1 + (w - 1) u (MAR section 3.4; Muse)."""
    return 1.0 + (scale - 1.0) * (tokens - unknown) / tokens


def guidance_constant(scale: float, _unknown: int, _tokens: int) -> float:
    return scale


def guidance_interval(scale: float, unknown: int, tokens: int, interval: tuple[float, float] = (0.0, 1.0)) -> float:
    """w where low <= u <= high, else 1, which costs no unconditional pass (Kynkaanniemi et al. 2024; eMIGM)."""
    low, high = interval
    return scale if low <= (tokens - unknown) / tokens <= high else 1.0


def guidance_power_cosine(scale: float, unknown: int, tokens: int, power: float = 1.0) -> float:
    """1 + (w - 1) (1 - cos(pi u^s)) / 2: the larger the power s, the later (Gao et al. 2023, MDT)."""
    u = (tokens - unknown) / tokens
    return 1.0 + (scale - 1.0) * (1.0 - math.cos(math.pi * u**power)) / 2


GUIDANCE_SCHEDULES: dict[str, Callable[..., float]] = {
    "linear": guidance_linear,
    "constant": guidance_constant,
    "interval": guidance_interval,
    "power-cosine": guidance_power_cosine,
}
GUIDANCE_OPTIONS = {"interval": "guidance_interval", "power-cosine": "guidance_power"}  # schedule -> its own setting


def guidance_at(
    schedule: str,
    scale: float,
    unknown_after: int,
    tokens: int,
    interval: Sequence[float] | None = None,
    power: float | None = None,
) -> float:
    """The guidance scale of a step after which `unknown_after` tokens are unknown.

    The published schedule never lets that count fall below 1, not even after the last step.
    """
    check_guidance_schedule(schedule)
    options = {"interval": interval, "power": power}
    given = {name: value for name, value in options.items() if value is not None}
    return GUIDANCE_SCHEDULES[schedule](scale, max(1, unknown_after), tokens, **given)


def check_guidance_schedule(name: str) -> None:
    if name not in GUIDANCE_SCHEDULES:
        raise UsageError(f"guidance_schedule: {name!r} is not known{nearest(name, GUIDANCE_SCHEDULES)}")


def check_guidance(schedule: str, interval: Sequence[float] | None = None, power: float | None = None) -> None:
    """Refuse a schedule that isn't known, and a setting that is not allowed or not of this schedule."""
    check_guidance_schedule(schedule)
    given = {"guidance_interval": interval, "guidance_power": power}
    for owner, name in GUIDANCE_OPTIONS.items():
        if given[name] is not None and schedule != owner:
            raise UsageError(
                f"{name}: the schedule {schedule!r} has none; leave it out, or set guidance_schedule to {owner!r}"
            )
    if schedule == "interval" and interval is None:
        raise UsageError(
            "guidance_interval: is missing; give the known shares it begins and ends at, such as 0.2 and 1"
        )
    if interval is not None and not (len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1):
        raise UsageError(f"guidance_interval: {tuple(interval)} is not allowed; it must be 0 <= low <= high <= 1")
    if power is not None and not 0 < power < math.inf:
        raise UsageError(f"guidance_power: {power!r} is not allowed; it must be above 0")


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
