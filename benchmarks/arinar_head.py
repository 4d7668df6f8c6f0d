"""How long ARINAR's head takes for a few tokens: sixteen features one after another, plain and packed, free and guided.

    python benchmarks/arinar_head.py --tokens 1 4 64 --threads 2
    python benchmarks/arinar_head.py --threads 2 --official path/to/Arinar --json

Milliseconds of `arinar-b`'s head alone, random weights, float32: medians of some repetitions. With a checkout of the
original its head too, on the same weights, in turn with ours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seriatim.bench.arinar import OfficialARINAR
from seriatim.bench.checkout import here
from seriatim.core.random import Noise
from seriatim.models.build import build_model, seeded
from seriatim.nn.packed import prepare
from seriatim.zoo import PRESETS

CPU = torch.device("cpu")
GUIDANCE = 4.5  # the preset's
WAYS: dict[str, dict[str, Any]] = {
    "naive, free": {"naive": True},
    "free": {},
    "guided, exact": {"guidance": GUIDANCE},
    "guided, resampling": {"guidance": GUIDANCE, "guidance_mode": "resample"},
}
Call = Callable[[Tensor, Tensor], object]


def ours(head: Any, options: dict[str, Any]) -> Call:
    return lambda z, z_null: head.sample(z, Noise.shared(0, len(z)), z_null, **options)


def theirs(head: Any, guidance: float) -> Call:
    if guidance == 1.0:
        return lambda z, _: head.sample(z)
    return lambda z, z_null: head.sample(torch.cat([z, z_null]), cfg=guidance)


def timed(calls: dict[str, Call], tokens: int, width: int, repetitions: int) -> dict[str, float]:
    """Median seconds of each call on z of this width. They run in turn, to be slowed down alike."""
    z, z_null = torch.randn(2, tokens, width)
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + repetitions):
        for name, call in calls.items():
            begin = time.perf_counter()
            call(z, z_null)
            took[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds[1:]) for name, seconds in took.items()}  # the first warms up


def main(command: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 64])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--official", type=Path, help="a checkout of the original")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(command)
    torch.set_num_threads(arguments.threads)
    with seeded(0), torch.no_grad():
        model = build_model({**PRESETS["arinar-b"].model, "depth": 1}).eval()  # of the trunk, which is not run
        head, width = model.head, model.backbone.z_dim
        calls: dict[str, Call] = {}
        if arguments.official is None:
            plain = {name: ours(head, options) for name, options in WAYS.items()}
            found = {n: timed(plain, n, width, arguments.repetitions) for n in arguments.tokens}
        else:
            found = {n: {} for n in arguments.tokens}
            with contextlib.redirect_stdout(sys.stderr):  # what it prints
                original = OfficialARINAR(arguments.official, model, CPU).model.arhead
            calls = {"official, free": theirs(original, 1.0), "official, guided": theirs(original, GUIDANCE)}
        prepare(head)
        calls |= {f"{name}, packed": ours(head, options) for name, options in WAYS.items()}
        with here(CPU):
            for n in arguments.tokens:
                found[n] |= timed(calls, n, width, arguments.repetitions)
    if arguments.official is not None:
        for seconds in found.values():
            for name in WAYS:
                of = "official, guided" if name.startswith("guided") else "official, free"
                seconds[f"ratio: {name}"] = seconds[of] / seconds[f"{name}, packed"]
    if arguments.json:
        sys.stdout.write(json.dumps({"threads": arguments.threads, "seconds_and_ratios": found}, indent=2) + "\n")
        return
    sys.stdout.write(f"{'':28}" + "".join(f"{n:>9}" for n in arguments.tokens) + " tokens\n")
    for name in next(iter(found.values())):
        ratio = name.startswith("ratio")
        row = "".join(f"{found[n][name] * (1 if ratio else 1e3):8.2f}" + ("x" if ratio else " ") for n in found)
        sys.stdout.write(f"{name:28}{row}\n")


if __name__ == "__main__":
    main()
