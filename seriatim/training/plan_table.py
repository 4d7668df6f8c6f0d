"""What research has decided about training on a folder of pictures: sizes, tokenizer, models, optimiser, sampling.

Everything here is data. `folder_plan.py` chooses from it, and holds no constant of this kind itself. docs/log.md has
the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MINUTES = 20.0  # where neither minutes nor images are given


@dataclass(frozen=True)
class Option:
    """A size of pictures, and a model for it."""

    name: str
    size: int  # pixels
    patch: int  # pixels of a token's side
    worth: int  # images that a training must see for this option to be better than the one before
    model: dict[str, Any]


def causal(width: int, depth: int, heads: int, head_width: int, head_depth: int) -> dict[str, Any]:
    head = {"kind": "flow", "width": head_width, "depth": head_depth, "draws": 2}
    return {"kind": "causal", "width": width, "depth": depth, "heads": heads, "dropout": 0.0, "head": head}


OPTIONS = (  # from the fastest to the slowest
    Option("small", 32, 4, 0, causal(128, 4, 4, 128, 2)),
    Option("medium", 32, 4, 20_000, causal(256, 6, 4, 256, 3)),
    Option("medium, 64 pixels", 64, 4, 100_000, causal(256, 6, 4, 256, 3)),
    Option("large, 64 pixels", 64, 4, 400_000, causal(512, 10, 8, 512, 3)),
)
OTHER_PATCHES = ((16, 2), (48, 4), (96, 8), (10_000, 16))  # (largest size, patch) for sizes that no option has
COMPONENTS = (16, 24, 32)  # of a token of 48 values; the first with which the tokenizer loses little enough
LITTLE_ENOUGH = 28.0  # dB of PSNR
WHITEN = 0.5

BATCHES = ((0, 32), (20_000, 64))  # (images of a training from which it holds, images of a batch)
TRAINING = {"optimiser": "muon", "learning_rate": 6e-3, "schedule": "cosine", "ema": 0.999}
WARM_UP = 0.05  # the share of the images
SAMPLING = {"num_diffusion_steps": 25}
GUIDANCE = {"guidance_scale": 4.0, "guidance_schedule": "constant"}  # of models with several classes

VALIDATION = 0.05  # the share of pictures that is held out, where the others are seen often
VALIDATION_FROM = 400  # pictures
VALIDATION_EACH = 20  # pictures of each class that this needs
VALIDATION_PASSES = 5  # over the pictures
IN_MEMORY = 1 << 30  # bytes of decoded pictures that are kept in memory

EXPECTED = (  # (images of a training, what its samples are like)
    (0, "colours and large shapes; hardly anything can be named"),
    (10_000, "the right colours and layouts, and first objects"),
    (30_000, "simple objects such as cars and ships are plain, animals are shapes in the right colours"),
    (100_000, "most objects can be named; fine parts such as faces and legs are still wrong"),
    (1_000_000, "objects with their parts"),
)
BY_HEART = 30  # pictures, and fewer: they are learned by heart
FEW = 200  # pictures, and fewer: samples are near copies
FEW_OF_A_CLASS = 10  # fewer can't show what a class looks like
OFTEN = 100  # passes from which pictures are learned by heart
