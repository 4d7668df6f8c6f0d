"""One training step of MAR on cached latents, ours against the official code: same weights, batch and mask ratios.

    python benchmarks/mar_training_step.py path/to/mar --model mar-b --batch 8 --threads 2

A step is the loss, its gradients, clipping, AdamW and the moving average. The official code computes its head on every
token and multiplies the loss by the mask, ours on masked tokens only. The mask ratios are the same for both: low,
middle and high of those that training draws. Steps alternate; the median ratio of the repetitions is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from seriatim.bench.checkout import here
from seriatim.bench.official_mar import OfficialMAR
from seriatim.bench.opponent import replaced
from seriatim.bench.race import subject
from seriatim.bench.timing import processor
from seriatim.core.keys import Keys
from seriatim.models import masked_model
from seriatim.models.base import Loss
from seriatim.nn.onednn_training import prepare_training
from seriatim.training.optim import adamw, averaged
from seriatim.training.state import Trainables
from seriatim.training.updates import gradients

RATIOS = (0.77, 0.88, 0.96)  # of masked tokens: a sixth, half and five sixths of those that training draws are below


class Fixed:
    """Gives one number wherever one is drawn."""

    def __init__(self, value: float) -> None:
        self.value = value

    def rvs(self, count: int) -> list[float]:
        return [self.value] * count


def main(command: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("official", type=Path)
    parser.add_argument("--model", default="mar-b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args(command)
    torch.set_num_threads(arguments.threads)

    model = subject(arguments.model, decodes=False).model.train()
    device = torch.device("cpu")
    official = OfficialMAR(arguments.official, model, device, {"num_diffusion_steps": 100})
    theirs = official.model.train()
    prepare_training(model)  # as the training engine does
    parts = Trainables(model, averaged(model, 0.9999), adamw(model, 1e-4, (0.9, 0.95), 0.02))
    optimiser = torch.optim.AdamW(theirs.parameters(), lr=1e-4)
    copies = [p.detach().clone() for p in theirs.parameters()]
    latents = model.spec.blank(arguments.batch, device).normal_()
    labels = torch.arange(arguments.batch) % max(1, model.classes)
    keys = Keys.of(0).fold(torch.arange(arguments.batch))
    side = round(model.tokens**0.5)
    image = latents.transpose(1, 2).reshape(arguments.batch, -1, side, side)

    def our_step(ratio: float, dtype: torch.dtype) -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            with replaced((masked_model, "mask_ratio", lambda *_, **__: ratio)):
                loss: Loss = model(latents, labels, keys, Keys.of(0))
        gradients(parts.trained, [loss], float(loss.count), 3.0)
        parts.update()

    def their_step(ratio: float, dtype: torch.dtype) -> None:
        with here(device), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            with replaced((theirs, "mask_ratio_generator", Fixed(ratio))):
                loss = theirs(image, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 3.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            for mean, value in zip(copies, theirs.parameters(), strict=True):
                mean.mul_(0.9999).add_(value, alpha=0.0001)

    def seconds(step: Any, dtype: torch.dtype) -> float:
        begin = time.perf_counter()
        for ratio in RATIOS:
            step(ratio, dtype)
        return (time.perf_counter() - begin) / len(RATIOS)

    result: dict[str, Any] = {"device": processor(device), "threads": arguments.threads, "batch": arguments.batch}
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        our_step(RATIOS[0], dtype)
        their_step(RATIOS[0], dtype)
        pairs = []
        for turn in range(arguments.repetitions):  # who begins, alternates
            order = (our_step, their_step) if turn % 2 == 0 else (their_step, our_step)
            found = {step: seconds(step, dtype) for step in order}
            pairs.append((found[our_step], found[their_step]))
        result[name] = {
            "seconds": statistics.median(ours for ours, _ in pairs),
            "official_seconds": statistics.median(official for _, official in pairs),
            "ratio": statistics.median(official / ours for ours, official in pairs),
        }
        print(json.dumps({name: result[name]}), flush=True)  # noqa: T201
    print(json.dumps(result))  # noqa: T201


if __name__ == "__main__":
    main()
