"""Our sampler, as the bench times it."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from seriatim.bench.opponent import Draws, Opponent, RecordingKeys, Workload, replaced, timed
from seriatim.bench.timing import Stages, synchronise
from seriatim.core.keys import Keys
from seriatim.core.settings import Settings
from seriatim.heads.base import Guidance
from seriatim.heads.denoiser import AdaLNHead
from seriatim.models.base import SequenceModel
from seriatim.nn.prepare import prepare

STAGES = (("encode", "encoder"), ("decode", "decoder"), ("step", "backbone"))  # of a backbone, and what they are called


def prepared(model: SequenceModel, dtype: torch.dtype = torch.float32) -> SequenceModel:
    """The model with its weights laid out for sampling, as `Pipeline.prepare` does it."""
    prepare(model.backbone, dtype, keep=("token_embed",))
    prepare(model.head)
    return model


class Ours(Opponent):
    """The fast loop, as a pipeline calls it; nothing is kept from one run to the next."""

    name = "seriatim"

    def __init__(self, model: SequenceModel, dtype: torch.dtype, device: torch.device) -> None:
        self.model: SequenceModel = model
        self.device, self.half, self.dtype = device, dtype, str(dtype).removeprefix("torch.")

    @torch.no_grad()
    def sample(self, workload: Workload, draws: Draws, stages: Stages | None = None) -> tuple[Tensor, float]:
        model, B = self.model, len(workload.labels)
        keys = RecordingKeys(Keys.of_seeds(range(B)), draws)
        settings = Settings(
            num_inference_steps=workload.steps,
            guidance_scale=workload.guidance,
            guidance_schedule=workload.schedule,
            temperature=workload.temperature,
            head_options=dict(workload.head_options),
            **workload.options,
        )
        gate = Gate(model, stages)
        seconds, computed = 0.0, set(workload.computed())
        with replaced(*(gate.changes() if stages or workload.every > 1 else ())):
            condition = model.condition(torch.tensor(workload.labels) if model.classes else None, B)
            steps = model.steps(condition, model.null(B, condition), keys, settings, dtype=self.half)
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
        z, sample = getattr(backbone, "z", None), timed(self.stages, "head", head.sample)

        def gated_z(condition: Any, tokens: Tensor, known: Tensor, ask: Tensor, neighbours: bool = False) -> Tensor:
            if self.open:
                return z(condition, tokens, known, ask, neighbours)  # type: ignore[misc]
            rows = int(ask.sum())
            shape = (rows, 5, backbone.z_dim) if neighbours else (rows, backbone.z_dim)
            return torch.zeros(shape, device=tokens.device)

        def gated_sample(
            z: Tensor, keys: Keys, plan: Any, z_null: Tensor | None, guidance: Guidance | None, temperature: Any
        ) -> Tensor:
            if self.open:
                return sample(z, keys, plan, z_null, guidance, temperature)
            if head.discrete:
                return torch.zeros(len(z), dtype=torch.long, device=z.device)
            if isinstance(head, AdaLNHead):  # where it would start from: the first of the numbers that it draws
                return keys.fold("noise").normal(1, head.output)[:, 0]
            return keys.fold("noise").normal(head.output)

        inside = [
            (backbone, name, timed(self.stages, stage, getattr(backbone, name)))
            for name, stage in STAGES
            if hasattr(backbone, name)
        ]
        if self.model.one_by_one:  # no step can be left out: each needs those before
            return [(head, "sample", sample), *inside]
        return [(backbone, "z", gated_z), (head, "sample", gated_sample), *(inside if self.stages else ())]
