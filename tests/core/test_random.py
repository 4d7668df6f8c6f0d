"""Seeds that are derived from others."""

from __future__ import annotations

from seriatim.core.random import derive_seed


def test_seeds_are_stable_and_apart() -> None:
    assert derive_seed(7, 0) == 926381044385793237, "a change here changes every image that anybody ever drew"
    seeds = {derive_seed(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
    assert all(0 <= s < 2**63 for s in seeds)
