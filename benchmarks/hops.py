"""How far one request travels: the functions and files of this package that sampling enters, counted with a profiler.

    python benchmarks/hops.py

At most 60 functions, and at most 12 files outside `nn` and `core`, where single operations are.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import seriatim
from seriatim.checkpoints.native import Bundle
from seriatim.models.build import build_model, seeded
from seriatim.pipeline.pipeline import Pipeline
from seriatim.tokenizers.pixels import Pixels

PACKAGE = Path(seriatim.__file__).parent
NO_FUNCTIONS = {"<module>", "<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>", "<lambda>"}


def pipeline() -> Pipeline:
    """A small model of the published kind: masked, with Diffusion Loss."""
    config = {"kind": "masked", "tokens": 16, "dim": 4, "classes": 10, "width": 32, "depth": 1, "heads": 2}
    with seeded(0):
        model = build_model({**config, "head": {"kind": "diffusion", "width": 32, "depth": 1}})
    return Pipeline(Bundle(model.eval(), Pixels(8, 2, 1), [str(digit) for digit in range(10)]))


def entered(pipe: Pipeline) -> dict[str, list[str]]:
    """The functions that one guided request enters, by file."""
    codes: set[CodeType] = set()

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            codes.add(frame.f_code)

    sys.setprofile(look)
    try:
        pipe(["3"], seed=1, num_inference_steps=4, num_diffusion_steps=5, guidance_scale=2.0, progress=False)
    finally:
        sys.setprofile(None)
    found: dict[str, list[str]] = defaultdict(list)
    for code in codes:
        path = Path(code.co_filename)
        if path.is_relative_to(PACKAGE) and code.co_name not in NO_FUNCTIONS:
            found[str(path.relative_to(PACKAGE))].append(code.co_qualname)
    return {name: sorted(found[name]) for name in sorted(found)}


def counts(found: dict[str, list[str]]) -> tuple[int, int]:
    """Functions in all, and files outside `nn` and `core`."""
    outside = [name for name in found if not name.startswith(("nn/", "core/"))]
    return sum(map(len, found.values())), len(outside)


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=str(__doc__).split("\n")[0]).parse_args(argv)
    found = entered(pipeline())
    for name, functions in found.items():
        print(f"{name}: {', '.join(functions)}")  # noqa: T201
    entries, files = counts(found)
    print(f"{entries} functions; {files} files outside nn and core, {len(found)} in all")  # noqa: T201


if __name__ == "__main__":
    main()
