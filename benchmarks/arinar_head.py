"""How long ARINAR's head takes for a few tokens: sixteen features one after another, plain and packed, free and guided.

    python benchmarks/arinar_head.py --tokens 1 4 64

Process CPU seconds of `arinar-b`'s head alone, with random weights, one thread: the best of some repetitions.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from seriatim.core.random import Noise
from seriatim.heads.build import build_head
from seriatim.models.build import seeded
from seriatim.nn.packed import prepare
from seriatim.zoo import PRESETS


def seconds(head: Any, tokens: int, repetitions: int, **options: Any) -> float:
    z, z_null = torch.randn(2, tokens, 768)
    guided = options.pop("guidance", 1.0)
    best = float("inf")
    for _ in range(repetitions):
        noise = Noise.shared(0, tokens)
        begin = time.process_time()
        head.sample(z, noise, z_null, guided, **options)
        best = min(best, time.process_time() - begin)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 64])
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways: dict[str, dict[str, Any]] = {
        "naive, free": {"naive": True},
        "free": {},
        "guided, exact": {"guidance": 3.0},
        "guided, resampling": {"guidance": 3.0, "guidance_mode": "resample"},
    }
    with seeded(0):
        head = build_head(PRESETS["arinar-b"].model["head"], dim=16, vocab=None)
        head.bind(768)
        sys.stdout.write(f"{'':28}" + "".join(f"{n:>8}" for n in arguments.tokens) + " tokens\n")
        for packed in (False, True):
            if packed:
                prepare(head)
            for name, options in ways.items():
                found = [seconds(head, n, arguments.repetitions, **options) for n in arguments.tokens]
                label = name + (", packed" if packed else "")
                sys.stdout.write(f"{label:28}" + "".join(f"{s:8.3f}" for s in found) + "\n")


if __name__ == "__main__":
    main()
