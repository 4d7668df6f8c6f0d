"""The bidirectional backbone of EAR: one stack of blocks over all positions, with mask tokens where tokens are unknown.

Shao et al. 2025 (EAR), section 4.1; it is the form of BERT (Devlin et al. 2019) and MaskGIT (Chang et al. 2022). Unlike
MAR's encoder and decoder (`masked`), a pass costs the same however many tokens are known. Unusual:
- the condition enters as `buffer` extra tokens in front; its vectors are repeated to fill them and differ by position;
- there is no norm before the first block, and no positions are added after the last one.

Shapes: B images, L tokens, D features of a token (codes have no such axis), A buffer tokens, K the largest number of
requested tokens of an image, N requested tokens of the batch, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from seriatim.backbones.base import Parallel, token_embedding
from seriatim.backbones.masked_transformer import ROW_CAP, usual_heads
from seriatim.backbones.requests import fill_buffer, flat_requests, positions_in, with_neighbours
from seriatim.conditions.base import Condition
from seriatim.core.errors import UsageError, check_known, check_least
from seriatim.core.spec import TokenSpec, grid_of
from seriatim.nn.block import NORM_EPS, Block, xavier
from seriatim.nn.position import learned_positions, resized_positions, sincos_positions


class Bidirectional(Parallel):
    """One transformer over the buffer and all positions, which computes z of several tokens a step, in any order."""

    def __init__(
        self,
        tokens: int,  # L
        dim: int | None = None,  # D; give either dim or vocab
        *,
        vocab: int | None = None,  # V, the number of codes
        width: int = 768,  # C
        depth: int = 24,  # blocks
        heads: int | None = None,  # attention heads; None means `usual_heads`
        buffer: int = 64,  # A
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,  # of the attention and of both MLP layers, only in training
        positions: Literal["random", "sincos"] = "random",  # the initial values of the learned positions
        grid: Sequence[int] | None = None,  # (h, w) of the tokens, for sincos; None means a square
    ) -> None:
        super().__init__()
        check_least(1, tokens=tokens, buffer=buffer, width=width, depth=depth)
        heads = usual_heads(width) if heads is None else heads
        check_least(1, heads=heads)
        if width % heads:
            raise UsageError(f"heads: {heads} does not divide the width {width}; choose a divisor")
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout: {dropout!r} is not allowed; it must be in [0, 1)")
        check_known(("random", "sincos"), positions=positions)
        shape = grid_of(grid, tokens)
        if positions == "sincos" and grid is None and shape[0] != shape[1]:
            raise UsageError(f"grid: {tokens} tokens do not form a square; for sincos, give their rows and columns")
        self.spec = TokenSpec(tokens, dim, vocab, grid=shape)
        self.width = self.z_dim = width
        self.buffer, self.row_cap = buffer, ROW_CAP
        self.buckets = 0  # the number of values that K may have in training; 0 means any
        self.config = {"tokens": tokens, **({"dim": dim} if vocab is None else {"vocab": vocab}), "width": width}
        self.config |= {"depth": depth, "heads": heads, "buffer": buffer, "mlp_ratio": mlp_ratio, "dropout": dropout}
        self.config |= {"positions": positions} if positions == "sincos" else {}
        self.config |= {"grid": list(grid)} if grid is not None else {}

        self.token_embed = token_embedding(self.spec, width)
        self.mask_token = nn.Parameter(torch.randn(1, width) * 0.02)
        self.positions = learned_positions(buffer + tokens, width)  # the buffer comes first
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        xavier(self)
        if vocab is not None:
            nn.init.normal_(self.token_embed.get_parameter("weight"), std=0.02)
        if positions == "sincos":
            with torch.no_grad():
                self.positions[buffer:].copy_(sincos_positions(shape, width))

    @staticmethod
    @override
    def resized(state: dict[str, Tensor], grid: tuple[int, int], other: tuple[int, int]) -> dict[str, Tensor]:
        """The weights `state`, learned on the token grid `grid` (h, w), with positions interpolated to `other`."""
        return {k: resized_positions(t, grid, other) if k.endswith("positions") else t for k, t in state.items()}

    @override
    def z(self, condition: Condition, tokens: Tensor, known: Tensor, ask: Tensor, neighbours: bool = False) -> Tensor:
        condition.check(len(tokens), self.width)
        chunk = max(1, self.row_cap // (self.buffer + self.spec.count))
        if len(tokens) > chunk and not torch.is_grad_enabled():
            parts = [slice(i, i + chunk) for i in range(0, len(tokens), chunk)]
            return torch.cat([self.z(condition.select(s), tokens[s], known[s], ask[s], neighbours) for s in parts])
        # Sorting runs on the device of the mask, so a mask on the host never waits for an accelerator.
        at, wanted = positions_in(ask, self.buckets if torch.is_grad_enabled() else 0)  # (B, K), (B, K) or None
        there = at.to(tokens.device, non_blocking=True)
        x, mask = self.embed(condition, tokens, known.to(tokens.device, non_blocking=True))  # (B, A+L, C)
        if neighbours:
            every = self.norm(self.transform(x, mask, None)[:, self.buffer :])  # (B, L, C)
            z = with_neighbours(every, there, self.spec.grid or (1, self.spec.count))  # (B, K, 5, C)
        else:
            z = self.norm(self.transform(x, mask, there + self.buffer))  # (B, K, C)
        return flat_requests(z, wanted)

    def embed(self, condition: Condition, tokens: Tensor, known: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input of the first block (B, A+L, C), and the attention mask (B, 1, 1, A+L), None if all is visible."""
        vectors, seen = fill_buffer(condition, self.buffer)
        B, A = len(tokens), self.buffer
        # Unknown tokens may hold anything, even NaN, so they are replaced before the embedding as well as after it.
        blank = known if self.spec.vocab is not None else known[..., None]
        x = self.token_embed(tokens.masked_fill(~blank, 0))  # (B, L, C)
        x = torch.where(known[..., None], x, self.mask_token.to(x.dtype))
        x = torch.cat([vectors.to(x.dtype).expand(-1, A, -1), x], dim=1) + self.positions  # (B, A+L, C)
        if seen is None:
            return x, None
        return x, torch.cat([seen, seen.new_ones(B, self.spec.count)], dim=1)[:, None, None]

    def transform(self, x: Tensor, mask: Tensor | None, at: Tensor | None) -> Tensor:
        """The output of the last block at the positions `at` (B, K), or at all: (B, K, C) or (B, A+L, C)."""
        for block in self.blocks[:-1]:
            x = block(x, mask)
        return self.blocks[-1](x, mask, at=at)  # the other outputs of the last block are not needed
