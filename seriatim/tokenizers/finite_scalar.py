"""Finite scalar quantisation: each feature is rounded to one of a few levels (Mentzer et al. 2023, arXiv 2309.15505).

Training calls `FiniteScalar.forward` through a tokenizer's `coded`. There is no codebook and no loss.

Shapes: C features of a codeword, V = product of the numbers of levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from seriatim.core.device import full_float32
from seriatim.core.errors import UsageError
from seriatim.tokenizers.quantise import Quantised

MOST_CODES = 1 << 24


class FiniteScalar(nn.Module):
    """Rounds feature i to L_i evenly spaced levels from -1 to 1.

    The code of a vector is q_1 + L_1 (q_2 + L_2 (q_3 + ...)), where q_i, 0 to L_i - 1, is the level of feature i.
    With an even number of levels the paper shifts them by half a step, so that one of them is 0. Here they are
    symmetric, which is the same up to the biases of the layers before and after.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(int(n) for n in levels)
        if not self.levels or min(self.levels) < 2 or math.prod(self.levels) > MOST_CODES:
            raise UsageError(
                f"code_levels: {list(self.levels)} is not allowed; give at least 2 levels for each feature of a "
                f"codeword, and at most {MOST_CODES:,} codes, their product"
            )
        self.vocab, self.dim = math.prod(self.levels), len(self.levels)

    def most(self, like: Tensor) -> Tensor:
        """L_i - 1 of each feature: (C,)."""
        return torch.tensor([n - 1 for n in self.levels], dtype=torch.float32).to(like.device, non_blocking=True)

    def bases(self, like: Tensor) -> Tensor:
        """What a level of each feature adds to the code, 1, L_1, L_1 L_2, ...: (C,) int64."""
        bases = [math.prod(self.levels[:i]) for i in range(self.dim)]
        return torch.tensor(bases).to(like.device, non_blocking=True)

    def forward(self, vectors: Tensor) -> Quantised:
        """The codewords of vectors (..., C); the gradient is that of tanh, as if nothing were rounded."""
        with full_float32(vectors.device):
            bounded = vectors.float().tanh()  # (..., C), between -1 and 1
            most = self.most(vectors)
            q = ((bounded.detach() + 1) / 2 * most).round()  # 0 to L_i - 1
            values = 2 * q / most - 1
            codes = (q.long() * self.bases(vectors)).sum(dim=-1)
            return Quantised(bounded + (values - bounded).detach(), codes, bounded.detach())

    def codes(self, vectors: Tensor) -> Tensor:
        """The code (...) of each vector (..., C)."""
        return self(vectors).codes

    def lookup(self, codes: Tensor) -> Tensor:
        """The codewords (..., C) of codes (...)."""
        levels = torch.tensor(self.levels).to(codes.device, non_blocking=True)
        q = codes[..., None] // self.bases(codes) % levels
        return 2 * q / self.most(codes) - 1
