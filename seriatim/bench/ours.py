"""Our sampler, as the bench times it."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from seriatim.bench.opponent import Draws, Opponent, RecordedNoise, Workload, replaced, timed
from seriatim.bench.timing import Stages, synchronise
from seriatim.core.random import Noise, generator
from seriatim.heads.solvers import ODES
from seriatim.models.base import SequenceModel
from seriatim.sampling.loops import steps_of

STAGES = (("encode", "encoder"), ("decode", "decoder"), ("step", "backbone"))  # of a backbone, and what they are called


class Ours(Opponent):
    """The fast loop, as a pipeline calls it; nothing is kept from one run to the next."""

    name = "seriatim"

    def __init__(self, model: SequenceModel, dtype: torch.dtype, device: torch.device) -> None:
        self.model: SequenceModel = model
        self.device, self.half, self.dtype = device, dtype, str(dtype).removeprefix("torch.")

    @torch.no_grad()
    def sample(self, workload: Workload, draws: Draws, stages: Stages | None = None) -> tuple[Tensor, float]:
        B = len(workload.labels)
        noise = RecordedNoise([generator(i) for i in range(B)], torch.arange(B), self.device, draws)
        labels = torch.tensor(workload.labels, device=self.device) if self.model.classes else None
        options: dict[str, Any] = dict(workload.options)
        if "num_diffusion_steps" in self.model.head.sample_options:
            options["num_diffusion_steps"] = workload.head_steps
        gate = Gate(self.model, stages)
        seconds, computed = 0.0, set(workload.computed())
        with replaced(*(gate.changes() if stages or workload.every > 1 else ())):
            steps = steps_of(
                self.model, labels, noise, steps=workload.steps, guidance_scale=workload.guidance,
                guidance_schedule=workload.schedule, temperature=workload.temperature, dtype=self.half, **options,
            )  # fmt: skip
            synchronise(self.device)
            for step in range(workload.steps):
                gate.open = step in computed
                begin = time.perf_counter()
                now = next(steps)
                synchronise(self.device)
                seconds += (time.perf_counter() - begin) * gate.open
            steps.close()  # type: ignore[attr-defined]
        tokens = now.tokens.cpu()
        return tokens.float() if tokens.is_floating_point() else tokens, seconds * workload.factor


class Gate:
    """Closed, the model does nothing: z is zero, and a head's tokens are its first draw. Open, its stages are timed."""

    def __init__(self, model: SequenceModel, stages: Stages | None) -> None:
        self.open, self.model, self.stages = True, model, stages

    def changes(self) -> list[tuple[Any, str, Any]]:
        backbone: Any = self.model.backbone
        head = self.model.head
        z, sample = backbone.z, timed(self.stages, "head", head.sample)

        def gated_z(state: Any, tokens: Tensor, known: Tensor, ask: Tensor) -> Tensor:
            return z(state, tokens, known, ask) if self.open else tokens.new_zeros(int(ask.sum()), backbone.z_dim)

        def gated_sample(z: Tensor, noise: Noise, *arguments: Any, **options: Any) -> Tensor:
            if self.open:
                return sample(z, noise, *arguments, **options)
            one = options.get("solver") in ODES  # which draw their start alone
            draws = (1 if one else options["num_diffusion_steps"] + 1) if "num_diffusion_steps" in options else None
            drawn = noise.normal(head.output, draws=draws)
            return drawn if draws is None else drawn[0]

        inside = [(backbone, name, timed(self.stages, stage, getattr(backbone, name)))
                  for name, stage in STAGES if hasattr(backbone, name)]  # fmt: skip
        if self.model.one_by_one:  # no step can be left out: each needs those before
            return [(head, "sample", sample), *inside]
        return [(backbone, "z", gated_z), (head, "sample", gated_sample), *(inside if self.stages else ())]
