"""Follows how codes are used in training, over windows of images, and revives codes that nothing uses.

Training calls, whatever the number of processes and micro-batches,

    watch = CodeWatch(tokenizer.quantiser, tokenizer.count, window)
    each step:         watch.begin(seen, images)                   # before this step and in it, by all processes
    each micro-batch:  watch.add(coded.codes, coded.vectors, keys) # not for images that are repeated and don't count
    after the update:  moved = watch.end(world.total, world.rows)  # None, or which codewords are new
                       if moved: moved.write(averaged codebook); moved.forget(optimiser, codebook)
    in the log:        watch.figures()                             # {} before the first step
    in a checkpoint:   watch.state_dict()                          # the same on all processes

A code that was not used in a window gets as its codeword the vector that the encoder made of some patch in the
window's last step (as in Jukebox, Dhariwal et al. 2020, arXiv 2005.00341). Random numbers from the keys of the images
choose the vectors, so the choice depends neither on the number of processes nor on micro-batches.

Shapes: B images, L codes of an image, V codewords of C features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seriatim.core.keys import Keys
from seriatim.tokenizers.quantise import Quantiser, usage_figures

COLLAPSED = 0.1  # a codebook of which less than this share is used has collapsed
TOKENS = 10  # a window has at least so many tokens for each code, so that an unlucky code does not pass as dead
NOBODY = torch.iinfo(torch.int64).max  # the rank of a place in the pool that holds no vector
Combine = Callable[[Tensor], Tensor]


def alone(values: Tensor) -> Tensor:
    """What the only process gets from all processes."""
    return values


@dataclass(frozen=True)
class Moved:
    """Codes that were revived, and their new codewords."""

    codes: Tensor  # (n,) int64
    vectors: Tensor  # (n, C)

    @torch.no_grad()
    def write(self, codebook: Tensor) -> None:
        """Put the new codewords into a codebook (V, C), such as that of the averaged weights."""
        codebook[self.codes] = self.vectors.to(codebook)

    def forget(self, optimiser: torch.optim.Optimizer, codebook: Tensor) -> None:
        """Set what an optimiser remembers of the old codewords to zero."""
        for value in optimiser.state.get(codebook, {}).values():
            if isinstance(value, Tensor) and value.shape == codebook.shape:
                value[self.codes] = 0


class CodeWatch(nn.Module):
    """Counts the codes of all processes, window by window, and revives dead ones at the end of each.

    A `quantiser` without a codebook is only watched, and so is one with `revive` False. `window` is a number of images.
    """

    counts: Tensor  # (V,) int64: of this window
    before: Tensor  # (V,) int64: of the window before

    def __init__(self, quantiser: nn.Module, tokens: int, window: int, *, revive: bool = True) -> None:
        super().__init__()
        vocab: int = quantiser.vocab  # type: ignore[assignment]
        # The list keeps the quantiser from being a part of this module.
        self.revives = [quantiser] if revive and isinstance(quantiser, Quantiser) else []
        self.vocab, self.window = vocab, max(window, -(-TOKENS * vocab // tokens))
        self.register_buffer("counts", torch.zeros(vocab, dtype=torch.int64))
        self.register_buffer("before", torch.zeros(vocab, dtype=torch.int64))
        self.begin(0, 0)

    def begin(self, seen: int, images: int) -> None:
        """A step of so many images begins, after so many; what `add` was told since the last `end` is forgotten."""
        self.closes = seen // self.window < (seen + images) // self.window
        self.step: Tensor | None = None  # (V,) int64: the counts of this process in this step
        self.pool: tuple[Tensor, Tensor] | None = None  # ranks (n,) int64 and vectors (n, C), n <= V

    @torch.no_grad()
    def add(self, codes: Tensor, vectors: Tensor, keys: Keys) -> None:
        """Count codes (B, L) of vectors (B, L, C); `keys` are those of the images."""
        flat = codes.flatten()
        if self.step is None:
            self.step = torch.zeros(self.vocab, dtype=torch.int64, device=flat.device)
        self.step.index_add_(0, flat, torch.ones_like(flat))
        if self.closes and self.revives:
            ranks = keys.to(flat.device).fold("revive").bits(codes.shape[1]).flatten()
            self.pool = lowest(*self.joined(ranks, vectors.flatten(0, -2).float()), self.vocab)

    def joined(self, ranks: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The pool and more candidates."""
        if self.pool is None:
            return ranks, vectors
        return torch.cat([self.pool[0], ranks]), torch.cat([self.pool[1], vectors])

    @torch.no_grad()
    def end(self, total: Combine = alone, rows: Combine = alone) -> Moved | None:
        """The step ends: counts are added up and, at the end of a window, dead codes are revived.

        All processes must call this. `total` gives the sum over processes, `rows` the rows of all processes.
        """
        step = torch.zeros_like(self.counts) if self.step is None else self.step.to(self.counts.device)
        self.counts += total(step).to(self.counts)
        moved = self.revived(rows) if self.closes and self.revives else None
        if self.closes:
            self.before.copy_(self.counts)
            self.counts.zero_()
        self.begin(0, 0)
        return moved

    def revived(self, rows: Combine) -> Moved | None:
        """Give the codes that this window did not use new codewords, as many as there are candidates."""
        codebook = self.revives[0].codebook
        ranks = torch.full((self.vocab,), NOBODY, dtype=torch.int64, device=codebook.device)
        vectors = torch.zeros_like(codebook, dtype=torch.float32)
        if self.pool is not None:
            ranks[: len(self.pool[0])], vectors[: len(self.pool[1])] = self.pool
        ranks, vectors = lowest(rows(ranks), rows(vectors), self.vocab)
        there = int((ranks < NOBODY).sum())
        dead = (self.counts == 0).nonzero()[:there, 0].to(codebook.device)
        if not len(dead):
            return None
        moved = Moved(dead, vectors[: len(dead)])
        moved.write(codebook)
        return moved

    def figures(self) -> dict[str, float]:
        """The usage of this window and the one before: `usage_figures`; nothing before any code was counted."""
        counts = self.counts + self.before
        return usage_figures(counts) if bool(counts.any()) else {}


def lowest(ranks: Tensor, vectors: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The candidates of the lowest ranks, at most `most`, in this order."""
    order = ranks.argsort()[:most]
    return ranks[order], vectors[order]
