"""TokenBridge's idea (Wang et al. 2025) as a composition: continuous latents, drawn feature by feature as bins.

    python examples/tokenbridge.py --steps 300 --out digits.png

Nothing is quantised beforehand, and no codebook is trained: a masked backbone over continuous tokens, a head that nests
(features one by one, a causal backbone), and `bins` as its leaf. `LARGE` is about the published size (L: 486M, 94M in
the head); what is trained here in a minute is the same thing for 8x8 digits, whose tokens are 2x2 pixels.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from seriatim.checkpoints.native import Bundle
from seriatim.core.keys import Keys
from seriatim.data.base import Digits
from seriatim.evaluation.grid import grid
from seriatim.models.build import build_model, parameter_count, seeded
from seriatim.pipeline.pipeline import Pipeline
from seriatim.tokenizers.pixels import Pixels

# 6 blocks of 1024 in the head, over the 16 channels of MAR's latents
LARGE: dict[str, Any] = {
    "kind": "masked", "tokens": 256, "dim": 16, "width": 1024, "depth": 16, "heads": 16, "buffer": 64, "classes": 1000,
    "head": {
        "kind": "nested",
        "split": {"kind": "features"},
        "model": {
            "kind": "causal", "width": 1024, "depth": 6, "heads": 16, "norm": "layer", "mlp": "gelu-tanh",
            "positions": "learned", "bias": True, "head": {"kind": "bins", "bins": 64, "clip": 5.0, "sigmas": 3.0},
        },
    },
}  # fmt: skip
SMALL: dict[str, Any] = {
    "kind": "masked", "tokens": 16, "dim": 4, "width": 64, "depth": 2, "heads": 4, "buffer": 4, "classes": 10,
    "dropout": 0.0, "min_mask_ratio": 0.05, "mask_ratio_std": 1.0,
    "head": {
        "kind": "nested",
        "split": {"kind": "features"},
        "model": {
            "kind": "causal", "width": 64, "depth": 1, "heads": 4, "positions": "learned", "head": {"kind": "bins"},
        },
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with torch.device("meta"):
        large = build_model(LARGE)
    print(f"at full size: {parameter_count(large):,} parameters, {parameter_count(large.head):,} in the head")

    data, tokenizer = Digits(), Pixels(8, patch=2, channels=1)
    tokenizer.fit(data.some(data.count, 256))
    every = torch.arange(data.count)
    tokens, labels = tokenizer.tokens(tokenizer.moments(data.images(every))), data.labels(every)
    with seeded(0):
        model = build_model(SMALL).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(arguments.steps):
        keys = Keys.of(step).fold(torch.arange(64))  # a row for each image
        batch = keys.fold("image").integers(data.count)
        loss = model(tokens[batch], labels[batch], keys, Keys.of(step, "step")).mean
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 0 or step + 1 == arguments.steps:
            print(f"step {step}: {loss.item() / SMALL['dim']:.3f} nats a feature (all bins alike: {math.log(64):.3f})")
    pipe = Pipeline(Bundle(model.eval(), tokenizer, data.class_names))
    result = pipe(class_labels=data.class_names, num_images_per_label=4, num_inference_steps=16, guidance_scale=1.5)
    if arguments.out is not None:
        grid(result.images, 4).save(arguments.out)
        print(f"wrote {arguments.out}: a row for each class")


if __name__ == "__main__":
    main()
