"""The fixtures of tests/numerics_cases.py, computed again: the recorded draws are played back by their paths.

B images, N tokens asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from numerics_cases import CANDIDATES, Case, Sampling, Training
from torch import Tensor

from seriatim.checkpoints.renames import renamed
from seriatim.conditions.captions import Captions
from seriatim.core.keys import ReplayKeys
from seriatim.core.settings import Settings
from seriatim.heads import mixture
from seriatim.heads.base import HeadLoss
from seriatim.models.base import SequenceModel
from seriatim.models.build import build_model
from seriatim.sampling.step import Start, Step

RENAMED = (  # what the draws of version 0.1 are called now
    (r"/candidates/uniform$", "/candidates/component/uniform"),
    (r"/candidates/normal$", "/candidates/value/normal"),
    (r"/part/(\d+)/(t|eps)/", r"/part/token/\1/\2/"),  # of a loss: the parts are the tokens of the inner model
)


def built(case: Case) -> SequenceModel:
    """The model of a case, with its weights, in evaluation mode."""
    model = build_model(case.config).eval()
    model.load_state_dict(renamed(case.weights, 1))
    return model


def now_called(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The draws of a fixture under the names that the code gives them now."""
    found = {}
    for path, value in draws.items():
        for old, new in RENAMED:
            path = re.sub(old, new, path)
        found[path] = value
    return found


def beside(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a mixture now draws for guided rows too where others are not guided, and never uses for them."""
    guided = [path.removesuffix("/choice/uniform") for path in draws if path.endswith("/choice/uniform")]
    unused = {f"{path}/component/uniform": torch.tensor(0.5) for path in guided}
    for path in guided:
        if f"{path}/candidates/value/normal" in draws:
            unused[f"{path}/value/normal"] = torch.zeros_like(draws[f"{path}/candidates/value/normal"][0])
    return unused


class Draws:
    """The recorded draws of a run, for keys of any rows that are asked in it."""

    def __init__(self, draws: Mapping[str, Tensor]) -> None:
        self.recorded = now_called(draws)
        self.draws = beside(self.recorded) | self.recorded
        self.given: list[ReplayKeys] = []

    def keys(self, *roots: str) -> ReplayKeys:
        self.given.append(ReplayKeys(self.draws, roots))
        return self.given[-1]

    def images(self, count: int) -> ReplayKeys:
        return self.keys(*map(str, range(count)))

    def unused(self) -> list[str]:
        """The recorded draws that nobody asked for."""
        return sorted(set(self.recorded).intersection(*(keys.unused() for keys in self.given)))


def inputs_of(of: Training | Sampling) -> Any:
    """Labels, captions or None, as a model takes them."""
    return of.labels if of.captions is None else Captions(*of.captions)


def trained(model: SequenceModel, of: Training, draws: Draws) -> Training:
    """`of` with what `model` makes of its tokens: loss, gradients, z."""
    model.train().zero_grad()
    told: list[tuple[Tensor, ReplayKeys, HeadLoss]] = []
    loss_of_head = model.head.loss

    def loss(z: Tensor, target: Tensor, keys: Any) -> HeadLoss:
        made = loss_of_head(z, target, keys)
        told.append((z, keys, made))
        return made

    with mock.patch.object(model.head, "loss", loss):
        made = model(of.tokens, inputs_of(of), draws.images(len(of.tokens)), draws.keys("step"))
    made.mean.backward()
    ((z, keys, head_loss),) = told
    paths = [path.split("/") for path in keys._paths]  # of the form "2/token/5"
    return replace(
        of,
        loss=made.mean.detach(),
        parts={name: value / made.count for name, value in made.parts.items()},
        gradients={name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        z=z.detach(),
        rows=torch.tensor([int(path[0]) for path in paths]),
        places=torch.tensor([int(path[2]) for path in paths]),
        sums=head_loss.sum.detach(),
        counts=head_loss.count.float(),
    )


def settings_of(of: Sampling) -> Settings:
    """The arguments of version 0.1 as settings; those that are of no sampler are options of the head."""
    given = {{"steps": "num_inference_steps"}.get(name, name): value for name, value in of.settings.items()}
    shared = {name: value for name, value in given.items() if name in Settings.model_fields}
    return Settings(**shared, head_options={name: value for name, value in given.items() if name not in shared})


def arguments_of(model: SequenceModel, of: Sampling, draws: Draws) -> tuple[Any, ...]:
    """What `model.sample` and `model.steps` are called with."""
    inputs = inputs_of(of)
    images = len(of.result) if inputs is None else len(inputs)
    start = None if of.known is None or of.tokens is None else Start(of.tokens, of.known)
    condition = model.condition(inputs, images)
    return condition, model.null(images, condition), draws.images(images), settings_of(of), start


def sampled(model: SequenceModel, of: Sampling, draws: Draws) -> Tensor:
    """What the naive sampler, the specification, makes of a run."""
    with torch.no_grad(), mock.patch.object(mixture, "CANDIDATES", CANDIDATES):
        return model.sample(*arguments_of(model, of, draws))


def stepped(model: SequenceModel, of: Sampling, draws: Draws) -> Iterator[Step]:
    """The steps of the fast loop."""
    with torch.no_grad(), mock.patch.object(mixture, "CANDIDATES", CANDIDATES):
        yield from model.steps(*arguments_of(model, of, draws))
