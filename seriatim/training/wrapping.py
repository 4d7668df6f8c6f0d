"""Compile the blocks of a model, recompute their activations in the backward pass, or pad lengths to a few values.

A block is a module in an `nn.ModuleList` anywhere in the model, such as a transformer block of the backbone or a block
of the head's network. The rest of a loss (counting and sorting on the host, random numbers) is never compiled.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from seriatim.backbones.base import Parallel
from seriatim.core.errors import ResourceError, one_line
from seriatim.models.masked_model import MaskedModel

VARIANTS = 64  # how many shapes torch may compile of one kind of block; more would run uncompiled


class BlockForward:
    """Takes the place of a block's `forward` where gradients are recorded; elsewhere the block runs as it is.

    A copy of the block, such as that of averaged weights, has its usual `forward`.
    """

    def __init__(self, block: nn.Module, *, recompute: bool, compiled: bool, backend: str | Callable[..., Any]) -> None:
        self.plain = block.forward
        self.recompute, self.compiled = recompute, compiled
        self.usual = torch.compile(self.plain, dynamic=False, backend=backend) if compiled else self.plain
        self.kind = type(block).__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.plain(*args, **kwargs)
        if not self.compiled:
            return self._run(*args, **kwargs)
        try:
            return self._run(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ResourceError(
                f"training.compile: torch could not compile a {self.kind} on this machine ({one_line(error)[:200]}); "
                "set training.compile=false"
            ) from error

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if not self.recompute:
            return self.usual(*args, **kwargs)
        # The random numbers of dropout are drawn again from the same state.
        return checkpoint(self.usual, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.plain, memo)


@contextlib.contextmanager
def bucketed(model: nn.Module, buckets: int) -> Iterator[None]:
    """A context in which the masked models and backbones in `model` pad their lengths to so many values in training."""
    padding: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, MaskedModel | Parallel) and hasattr(module, "buckets")
    ]
    before = [module.buckets for module in padding]
    for module in padding:
        module.buckets = buckets
    try:
        yield
    finally:
        for module, value in zip(padding, before, strict=True):
            module.buckets = value


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model: those modules of its lists that have parts of their own. Blocks inside blocks are left."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            blocks = [block for block in module if any(True for _ in block.children())]
            found.extend(blocks)
            inside.update(id(part) for block in blocks for part in block.modules())
    return found


@contextlib.contextmanager
def wrapped_blocks(
    model: nn.Module, *, recompute: bool = False, compiled: bool = False, backend: str | Callable[..., Any] = "inductor"
) -> Iterator[None]:
    """A context in which training recomputes or compiles the blocks of a model, or both."""
    blocks = blocks_of(model) if recompute or compiled else []
    for block in blocks:
        block.forward = BlockForward(block, recompute=recompute, compiled=compiled, backend=backend)
    limit = torch._dynamo.config.patch(recompile_limit=VARIANTS) if compiled else contextlib.nullcontext()
    try:
        with limit:
            yield
    finally:
        for block in blocks:
            del block.forward  # the method of the class is visible again
