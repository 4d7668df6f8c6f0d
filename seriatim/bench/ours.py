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
from seriatim.models.base import Model
from seriatim.sampling.loops import steps_of


class Ours(Opponent):
    """The fast loop, as a pipeline calls it; nothing is kept from one run to the next."""

    name = "seriatim"

    def __init__(self, model: Model, dtype: torch.dtype, device: torch.device) -> None:
        self.model: Model = model
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
        return now.tokens.float().cpu(), seconds * workload.factor


class Gate:
    """Closed, the model does nothing: z is zero, and a head's tokens are its first draw. Open, its stages are timed."""

    def __init__(self, model: Model, stages: Stages | None) -> None:
        self.open, self.model, self.stages = True, model, stages

    def changes(self) -> list[tuple[Any, str, Any]]:
        backbone: Any = self.model.backbone
        head = self.model.head
        inner, sample = "step" if backbone.causal else "z", timed(self.stages, "head", head.sample)
        z = getattr(backbone, inner)

        def gated_z(state: Any, tokens: Tensor, known: Tensor, ask: Tensor) -> Tensor:
            if self.open:
                return z(state, tokens, known, ask)
            return torch.zeros(int(ask.sum()), backbone.z_dim, device=tokens.device)

        def gated_step(state: Any, tokens: Tensor | None = None) -> Tensor:
            if self.open:
                return z(state, tokens)
            state.drawn += 1  # what stays empty in its caches takes as long to look at
            return torch.zeros(len(state.prefix), backbone.z_dim, device=state.prefix.device)

        def gated_sample(z: Tensor, noise: Noise, *arguments: Any, **options: Any) -> Tensor:
            if self.open:
                return sample(z, noise, *arguments, **options)
            if head.discrete:
                noise.uniform()
                return torch.zeros(len(z), dtype=torch.long, device=z.device)
            one = options.get("solver") in ODES  # which draw their start alone
            draws = (1 if one else options["num_diffusion_steps"] + 1) if "num_diffusion_steps" in options else None
            drawn = noise.normal(head.output, draws=draws)
            return drawn if draws is None else drawn[0]

        stages = (("encode", "encoder"), ("decode", "decoder"), ("advance", "backbone"))
        parts = [(name, stage) for name, stage in stages if hasattr(backbone, name)]
        inside = [(backbone, name, timed(self.stages, stage, getattr(backbone, name))) for name, stage in parts]
        gated = gated_step if backbone.causal else gated_z
        return [(backbone, inner, gated), (head, "sample", gated_sample), *(inside if self.stages else ())]
