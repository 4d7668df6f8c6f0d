"""`Noise` whose draws have the paths of tests/numerics_cases.py: recorded under them, or played back from them.

A `Noise` does not know for which token a row is drawn. So the calls of a model are watched: the backbone tells what is
asked of it, each head what it is about to draw. B images, L tokens, N rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from numerics_cases import CANDIDATES, Case, Sampling, Training
from seriatim.heads.nested import Nested
from seriatim.models.captions import Captions
from seriatim.models.masked import MaskedModel
from torch import Tensor

from seriatim.core.random import Noise
from seriatim.heads import mixture as mixtures
from seriatim.heads.base import Head
from seriatim.heads.bins import Bins
from seriatim.heads.categorical import Categorical
from seriatim.heads.diffusion import Diffusion
from seriatim.heads.flow import Flow
from seriatim.heads.mixture import Mixture
from seriatim.models.base import Model
from seriatim.models.build import build_model

Names = Mapping[str, Sequence[str]]  # kind of draw -> the names of the draws of that kind, one after another
LOSS: dict[type[Head], Names] = {Diffusion: {"integers": ["t"], "normal": ["eps"]}, Flow: {"normal": ["t", "eps"]}}
SAMPLE: dict[type[Head], Names] = {
    Diffusion: {"normal": ["noise"]},
    Flow: {"normal": ["noise"]},
    Mixture: {"uniform": ["component"], "normal": ["value"]},
    Bins: {"uniform": ["bin"]},
    Categorical: {"uniform": ["code"]},
}
EXACT: Names = {"uniform": ["product"]}
RESAMPLE: Names = {"uniform": ["candidates", "choice"], "normal": ["candidates"]}
IMAGE: Names = {"uniform": ["drop"], "permutation": ["order"]}
CHOICE: Names = {"uniform": ["choice"]}  # of rows that no head draws from

Source = Callable[[str, tuple[int, ...], int], Tensor]  # path, shape, and for integers the number above all of them


class Recorder:
    """Makes draws, and keeps them by path; a path drawn twice is a mistake in the names."""

    def __init__(self, seed: int) -> None:
        self.generator, self.draws = torch.Generator().manual_seed(seed), dict[str, Tensor]()

    def __call__(self, path: str, shape: tuple[int, ...], high: int = 0) -> Tensor:
        assert path not in self.draws, f"{path} is drawn twice"
        kind, g = path.rpartition("/")[2], self.generator
        if kind == "normal":
            value = torch.randn(shape, generator=g)
        elif kind == "uniform":
            value = torch.rand(shape, generator=g)
        elif kind == "integers":
            value = torch.randint(high, shape, generator=g)
        else:
            value = torch.randperm(*shape, generator=g)
        self.draws[path] = value
        return value


class Player:
    """Plays recorded draws back by path, whenever they are asked for, each once."""

    def __init__(self, draws: Mapping[str, Tensor]) -> None:
        self.draws, self.left = draws, set(draws)

    def __call__(self, path: str, shape: tuple[int, ...], _high: int = 0) -> Tensor:
        assert path in self.draws, f"{path} was not recorded"
        assert path in self.left, f"{path} is asked for twice"
        self.left.remove(path)
        value = self.draws[path]
        assert tuple(value.shape) == shape, f"{path} was recorded with shape {tuple(value.shape)}, not {shape}"
        return value


class NamedNoise(Noise):
    """N rows, each with the beginning of its path."""

    def __init__(self, paths: Sequence[str], source: Source, names: Names) -> None:
        self.paths, self.source, self.names = list(paths), source, names
        self.device = torch.device("cpu")
        self.made: dict[str, int] = {}  # kind -> how many draws of it there were

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: Tensor) -> NamedNoise:
        return self.at([self.paths[row] for row in rows.tolist()])

    def at(self, paths: Sequence[str]) -> NamedNoise:
        return NamedNoise(paths, self.source, self.names)

    def called(self, names: Names) -> NamedNoise:
        return NamedNoise(self.paths, self.source, names)

    def take(self, kind: str, tail: tuple[int, ...], draws: int | None = None, high: int = 0) -> Tensor:
        """(N, *tail), or (draws, N, *tail)."""
        count = self.made.get(kind, 0)
        assert count < len(self.names.get(kind, ())), f"draw {count} of kind {kind} has no name in {self.names}"
        self.made[kind], name = count + 1, self.names[kind][count]
        shape = tail if draws is None else (draws, *tail)
        rows = [self.source(f"{path}/{name}/{kind}", shape, high) for path in self.paths]
        return torch.stack(rows, dim=0 if draws is None else 1)

    def normal(self, *tail: int, draws: int | None = None) -> Tensor:
        return self.take("normal", tail, draws)

    def uniform(self, *tail: int, draws: int | None = None) -> Tensor:
        return self.take("uniform", tail, draws)

    def integers(self, high: int, *tail: int, draws: int | None = None) -> Tensor:
        return self.take("integers", tail, draws, high)

    def permutation(self, n: int) -> Tensor:
        return self.take("permutation", (n,))


class ImageNoise(NamedNoise):
    """A row for each image; the rows that a model selects from it are tokens, which `places` tells."""

    def __init__(self, images: int, source: Source, places: Callable[[list[int]], list[str]]) -> None:
        super().__init__([str(image) for image in range(images)], source, IMAGE)
        self.places, self.order = places, torch.empty(0)  # no permutation yet

    def select(self, rows: Tensor) -> NamedNoise:
        return NamedNoise(self.places(rows.tolist()), self.source, CHOICE)

    def permutation(self, n: int) -> Tensor:
        self.order = super().permutation(n)
        return self.order

    def once(self) -> float:
        return float(self.source("step/ratio/uniform", (), 0))


@contextlib.contextmanager
def named_noise(model: Model, images: int, source: Source, confident: bool = False) -> Iterator[ImageNoise]:
    """Inside, `model.loss` and `model.sample` draw from `source`, if they are given this noise, by path."""
    with contextlib.ExitStack() as stack:
        watch_head(model.head, stack)
        stack.enter_context(mock.patch.object(mixtures, "CANDIDATES", CANDIDATES))
        if isinstance(model, MaskedModel):
            noise = ImageNoise(images, source, masked_places(model, stack, confident))
        else:
            noise = ImageNoise(images, source, causal_places(model, stack, lambda: noise.order))
        yield noise


def masked_places(model: Model, stack: contextlib.ExitStack, confident: bool) -> Callable[[list[int]], list[str]]:
    """The tokens asked of the backbone, image by image; which images, the selected rows say."""
    inner = model.backbone.z
    seen: list[tuple[Tensor, Tensor]] = []  # known, ask of each step

    def z(state: Any, tokens: Tensor, known: Tensor, ask: Tensor) -> Tensor:
        if not seen or not torch.equal(seen[-1][0], known):  # the second pass of a guided step sees the same
            seen.append((known.clone(), ask.clone()))
        return inner(state, tokens, known, ask)

    def places(rows: list[int]) -> list[str]:
        ask, step = seen[-1][1], f"/step/{len(seen) - 1}" if confident else ""
        paths = [f"{b}/token/{p}{step}" for b in sorted(set(rows)) for p in ask[b].nonzero()[:, 0].tolist()]
        assert [int(path.partition("/")[0]) for path in paths] == rows, "rows are whole images, in order"
        return paths

    stack.enter_context(mock.patch.object(model.backbone, "z", z))
    return places


def causal_places(
    model: Any, stack: contextlib.ExitStack, permutation: Callable[[], Tensor]
) -> Callable[[list[int]], list[str]]:
    """In training all tokens of each image in its order; in sampling one token of an image at each selection."""
    inner = model.drawing_order
    drawing: list[list[int]] = []  # positions of each image that are still to be drawn

    def drawing_order(order: Any, noise: Noise, known: Tensor) -> Tensor:
        vectors = inner(order, noise, known)  # (B, L), known tokens first
        drawing[:] = [
            [p for p in vector if not there[p]] for vector, there in zip(vectors.tolist(), known.tolist(), strict=True)
        ]
        return vectors

    def places(rows: list[int]) -> list[str]:
        if not drawing:
            orders = permutation().tolist() or [list(range(model.tokens))] * (max(rows) + 1)
            drawing[:] = [list(order) for order in orders]
        return [f"{b}/token/{drawing[b].pop(0)}" for b in rows]

    stack.enter_context(mock.patch.object(model, "drawing_order", drawing_order))
    return places


def watch_head(head: Any, stack: contextlib.ExitStack) -> None:
    """Give each draw of a head, and of the heads inside it, its name."""

    def change(owner: Any, name: str, made: Callable[..., Any]) -> None:
        stack.enter_context(mock.patch.object(owner, name, made))

    if isinstance(head, Nested):
        watch_head(head.head, stack)
        watch_parts(head, change)
        return
    loss, sample = head.loss, head.sample
    losses, samples = LOSS.get(type(head), {}), SAMPLE[type(head)]
    change(head, "loss", lambda z, target, noise: loss(z, target, noise.called(losses)))
    change(head, "sample", lambda z, noise, *a, **options: sample(z, noise.called(samples), *a, **options))
    if isinstance(head, Mixture):
        product = head._product

        def renamed(cond: Any, null: Tensor, w: Tensor, noise: Any, temperature: float, exact: bool) -> Tensor:
            return product(cond, null, w, noise.called(EXACT if exact else RESAMPLE), temperature, exact)

        change(head, "_product", renamed)


def watch_parts(nested: Nested, change: Callable[[Any, str, Callable[..., Any]], None]) -> None:
    """Training asks the head inside for all parts of each token at once, sampling for one part after another."""
    loss, sample, outer, T = nested.head.loss, nested.head.sample, nested.sample, nested.parts
    asked = [0]

    def begin(z: Tensor, noise: Any, *arguments: Any, **options: Any) -> Tensor:
        asked[0] = 0
        return outer(z, noise, *arguments, **options)

    def inner_loss(z: Tensor, target: Tensor, noise: Any) -> Any:
        return loss(z, target, noise.at([f"{path}/part/{row % T}" for row, path in enumerate(noise.paths)]))

    def inner_sample(z: Tensor, noise: Any, *arguments: Any, **options: Any) -> Tensor:
        part, asked[0] = asked[0], asked[0] + 1
        return sample(z, noise.at([f"{path}/part/{part}" for path in noise.paths]), *arguments, **options)

    change(nested, "sample", begin)
    change(nested.head, "loss", inner_loss)
    change(nested.head, "sample", inner_sample)


# --- what the fixtures hold, computed here ------------------------------------------------------------------------


def built(case: Case) -> Model:
    """The model of a case, with its weights."""
    model = build_model(case.config)
    model.load_state_dict(case.weights)
    return model


def condition_of(of: Training | Sampling) -> Any:
    """Labels, captions or None, as version 0.1 takes them."""
    return of.labels if of.captions is None else Captions(*of.captions)


def trained(model: Model, of: Training, source: Source) -> Training:
    """`of` with what `model` makes of its tokens: loss, gradients, z."""
    model.train().zero_grad()
    told: list[tuple[Any, ...]] = []
    with named_noise(model, len(of.tokens), source) as noise:
        loss_of_head = model.head.loss

        def loss(z: Tensor, target: Tensor, noise: Any) -> Any:
            made = loss_of_head(z, target, noise)
            told.append((z, noise.paths, made))
            return made

        with mock.patch.object(model.head, "loss", loss):
            made = model.loss(of.tokens, condition_of(of), noise)
    made.mean.backward()
    ((z, paths, head_loss),) = told
    rows, places = (torch.tensor([int(path.split("/")[i]) for path in paths]) for i in (0, 2))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return replace(
        of,
        loss=made.mean.detach(),
        parts=made.parts,
        gradients=gradients,
        z=z.detach(),
        rows=rows,
        places=places,
        sums=head_loss.sum.detach(),
        counts=head_loss.count.float(),
    )


def sampled(model: Model, of: Sampling, source: Source) -> Tensor:
    """What `model.sample` draws."""
    confident = of.settings.get("order") == "confidence"
    images = len(of.result) if of.labels is None else len(of.labels)
    with named_noise(model.eval(), images, source, confident) as noise:
        start: dict[str, Any] = {} if of.known is None else {"tokens": of.tokens, "known": of.known}
        return model.sample(condition_of(of), noise, **start, **of.settings)
