"""Generic tests that any sequence model must pass: `check_model(lambda: MyModel(...))`.

B images, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seriatim.core.keys import Keys
from seriatim.core.settings import Settings
from seriatim.models.base import SequenceModel
from seriatim.sampling.step import Start

B = 3


def check_model(
    make: Callable[[], SequenceModel],
    *,
    inputs: Any = None,
    device: torch.device | str = "cpu",
    atol: float = 1e-3,
    **head_options: Any,
) -> SequenceModel:
    """Build `make()`, check the contract of `models/base.py`, and return the model.

    `inputs` are the conditions of three images, where they are not classes. Its weights are made random first. `atol`
    is what rounding may change. `head_options` are those of its head, such as num_diffusion_steps.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of the CPU alone
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, device="cpu"))
        model.to(device).eval()
        if inputs is None and model.classes:
            inputs = torch.arange(B, device="cpu") % model.classes
        shape = (B, *model.spec.shape)
        codes = model.spec.vocab
        tokens = torch.randint(codes, shape, device="cpu") if codes else torch.randn(shape, device="cpu")
        check = _Check(model, inputs, tokens.to(device), head_options, atol)
        check.loss()
        check.sampling()
        check.keeps_nothing(make())
    return model


class _Check:
    """A model with what it is asked."""

    def __init__(self, model: SequenceModel, inputs: Any, tokens: Tensor, options: dict[str, Any], atol: float) -> None:
        self.model, self.inputs, self.tokens, self.options, self.atol = model, inputs, tokens, options, atol
        self.name, self.keys = type(model).__name__, Keys.of_seeds(range(B))

    def gradients(self, parts: int) -> tuple[list[Tensor], float]:
        """Of the mean over the batch, which is cut into so many parts; and that mean."""
        self.model.zero_grad()
        step, total, count = Keys.of(7), 0.0, 0.0
        losses = []
        for rows in torch.arange(B, device="cpu").chunk(parts):
            some = slice(int(rows[0]), int(rows[-1]) + 1)
            inputs = self.inputs
            if isinstance(inputs, Tensor):
                inputs = inputs[some]
            elif inputs is not None:
                inputs = inputs.select(rows)
            loss = self.model(self.tokens[some], inputs, self.keys.select(some), step)
            losses.append(loss)
            total, count = total + float(loss.sum.detach()), count + float(loss.count)
        for loss in losses:
            (loss.sum / count).backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        self.model.zero_grad()
        return found, total / count

    def loss(self) -> None:
        name = self.name
        whole, mean = self.gradients(1)
        assert any(bool(g.any()) for g in whole), f"{name}: no parameter receives a gradient"
        _, same = self.gradients(1)
        assert same == mean, f"{name}: the loss differs with the same keys"
        parts, of_parts = self.gradients(B)
        near = abs(of_parts - mean) <= 1e-4 * max(1.0, abs(mean))
        assert near, f"{name}: sums over parts of a batch give the loss {of_parts:.6f}, the whole batch {mean:.6f}"
        largest = max(float(g.norm()) for g in whole)
        for (parameter, _), a, b in zip(self.model.named_parameters(), whole, parts, strict=True):
            bound = 1e-3 * max(float(a.norm()), 1e-3 * largest)
            near = float((a - b).norm()) <= bound
            assert near, f"{name}: accumulating parts of a batch changes the gradient of {parameter}"

    def arguments(self, rows: slice, settings: Settings, start: Start | None = None, seed: int = 0) -> tuple[Any, ...]:
        condition = self.model.condition(self.inputs, B)
        null = self.model.null(B, condition)
        begin = None if start is None else Start(start.tokens[rows], start.known[rows])
        keys = Keys.of_seeds(range(seed, seed + B)).select(rows)
        return condition.select(rows), null.select(rows), keys, settings, begin

    def naive(self, *arguments: Any) -> Tensor:
        return self.model.sample(*self.arguments(*arguments))

    def fast(self, *arguments: Any) -> Tensor:
        steps = list(self.model.steps(*self.arguments(*arguments)))
        assert steps, f"{self.name}.steps gave no step"
        last = steps[-1]
        assert bool(last.known.all()), f"{self.name}.steps ended before all tokens were known"
        return last.tokens

    def same(self, a: Tensor, b: Tensor, what: str) -> None:
        near = a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=self.atol, atol=self.atol)
        assert near, f"{self.name}: {what}"

    @torch.no_grad()
    def sampling(self) -> None:
        name, every = self.name, slice(0, B)
        guided = [1.0, 2.0] if self.model.head.guides else [1.0]
        for scale in guided:
            settings = Settings(guidance_scale=scale, head_options=self.options)
            drawn = self.naive(every, settings)
            self.same(self.fast(every, settings), drawn, "the fast loop gives other tokens than sample()")
            self.same(self.naive(every, settings), drawn, "the same keys give other tokens")
            for b in range(B):
                one = slice(b, b + 1)
                self.same(self.fast(one, settings), drawn[one], "an image differs alone and in a batch")
            assert not torch.equal(self.naive(every, settings, None, 100), drawn), f"{name}.sample ignores its keys"
        if self.model.one_by_one and self.model.order == "raster":
            return  # which begins from nothing alone
        counts = torch.tensor([0, self.model.tokens // 2, self.model.tokens], device="cpu")
        known = torch.rand(B, self.model.tokens, device="cpu").argsort(dim=1) < counts[:, None]
        settings = Settings(guidance_scale=guided[-1], head_options=self.options)
        start = Start(self.tokens, known.clone())
        drawn = self.naive(every, settings, start)
        self.same(self.fast(every, settings, start), drawn, "from known tokens the fast loop gives other tokens")
        assert torch.equal(start.known, known), f"{name} writes into the known tokens that a caller gave"
        there = known.to(drawn.device)
        assert torch.equal(drawn[there], self.tokens[there]), f"{name}.sample changes tokens that are known"

    @torch.no_grad()
    def keeps_nothing(self, fresh: SequenceModel) -> None:
        settings, every = Settings(head_options=self.options), slice(0, B)
        fresh.to(self.model.device).eval().load_state_dict(self.model.state_dict())
        self.fast(every, settings)
        twin = _Check(fresh, self.inputs, self.tokens, self.options, self.atol)
        for check in (self, twin):
            for parameter in check.model.parameters():
                parameter.data.mul_(1.05)
        what = "it keeps something of earlier weights between two samplings"
        self.same(self.fast(every, settings), twin.naive(every, settings), what)
