"""The masked backbone of MAR: a bidirectional encoder over what is known, a decoder over all positions.

Li et al. 2024, "Autoregressive Image Generation without Vector Quantization", section 3.4; He et al. 2022 (MAE).
Unusual:
- the condition enters as `buffer` extra tokens in front, all the same vector, told apart by position only;
- unknown tokens are dropped in the encoder and are a mask token in the decoder;
- a LayerNorm follows the encoder's positions, before its first block;
- a third set of positions is added after the decoder's last norm: it tells the head which token it draws.

Shapes: B images, L tokens, D features of a token (codes have no such axis), A buffer tokens, K known tokens (the most
of the batch), K' asked for (likewise), N asked for in all, E and C encoder and decoder width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seriatim.backbones.base import Backbone, token_embedding
from seriatim.core.errors import UsageError, nearest
from seriatim.nn.blocks import NORM_EPS, Block, gather, xavier
from seriatim.nn.linear import Linear
from seriatim.nn.position import learned_positions, resized_positions, sincos_positions

ROW_CAP = 1 << 16  # rows (images x positions) in one pass without gradients: bounds memory


@dataclass
class MaskedState:
    condition: Tensor  # (B, E)


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """One number for encoder and decoder alike, or one for each."""
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) != 2 or any(not isinstance(v, int) or v < 1 for v in values):
        raise UsageError(f"{name}: {value!r} is not allowed; give a positive integer or two (encoder, decoder)")
    return values[0], values[1]


def usual_heads(width: int) -> int:
    """One head for each 64 of width, or the next smaller number that divides it."""
    return next(count for count in range(max(1, width // 64), 0, -1) if width % count == 0)


class Masked(Backbone):
    """Encoder-decoder over a set of known tokens; several tokens a step, in any order."""

    def __init__(
        self,
        tokens: int,  # L
        dim: int | None = None,  # D; or vocab
        *,
        vocab: int | None = None,  # V, of codes
        width: int | Sequence[int] = 768,  # E and C, or one number for both
        depth: int | Sequence[int] = 12,  # blocks of encoder and of decoder, or one number for each of them
        heads: int | Sequence[int] | None = None,  # attention heads; None: `usual_heads`
        buffer: int = 64,  # A
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,  # of attention and of both MLP layers, in training
        positions: Literal["random", "sincos"] = "random",  # what the learned positions begin with
        grid: Sequence[int] | None = None,  # (h, w) of the tokens, for sincos; None: a square
    ) -> None:
        super().__init__()
        E, C = pair("width", width)
        depths = pair("depth", depth)
        both_heads = pair("heads", heads) if heads is not None else (usual_heads(E), usual_heads(C))
        for side, count in zip((E, C), both_heads, strict=True):
            if side % count:
                raise UsageError(f"heads: {count} does not divide the width {side}; choose a divisor")
        for name, value in (("tokens", tokens), ("buffer", buffer)):
            if value < 1:
                raise UsageError(f"{name}: {value!r} is not allowed; it must be at least 1")
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout: {dropout!r} is not allowed; it must be in [0, 1)")
        self.tokens, self.dim, self.vocab = tokens, dim, vocab
        self.width, self.z_dim, self.buffer = E, C, buffer
        self.row_cap = ROW_CAP
        self.config = {
            "tokens": tokens, **({"dim": dim} if vocab is None else {"vocab": vocab}),
            "width": [E, C], "depth": list(depths), "heads": list(both_heads),
            "buffer": buffer, "mlp_ratio": mlp_ratio, "dropout": dropout,
        }  # fmt: skip
        if positions not in ("random", "sincos"):
            raise UsageError(f"positions: {positions!r} is not known{nearest(positions, ('random', 'sincos'))}")
        if positions == "sincos":
            self.config["positions"] = positions
            if grid is not None:
                self.config["grid"] = list(grid)

        # Encoder
        self.token_embed = token_embedding(dim, vocab, E)
        self.encoder_positions = learned_positions(buffer + tokens, E)  # buffer first
        self.embed_norm = nn.LayerNorm(E, eps=NORM_EPS)
        self.encoder = nn.ModuleList(Block(E, both_heads[0], mlp_ratio, dropout) for _ in range(depths[0]))
        self.encoder_norm = nn.LayerNorm(E, eps=NORM_EPS)
        # Decoder
        self.decoder_embed = Linear(E, C)
        self.mask_token = nn.Parameter(torch.randn(1, C) * 0.02)
        self.decoder_positions = learned_positions(buffer + tokens, C)
        self.decoder = nn.ModuleList(Block(C, both_heads[1], mlp_ratio, dropout) for _ in range(depths[1]))
        self.decoder_norm = nn.LayerNorm(C, eps=NORM_EPS)
        self.output_positions = learned_positions(tokens, C)
        xavier(self)
        if vocab is not None:
            nn.init.normal_(self.token_embed.get_parameter("weight"), std=0.02)
        if positions == "sincos":
            self._begin_with_sincos(grid)

    @torch.no_grad()
    def _begin_with_sincos(self, grid: Sequence[int] | None) -> None:
        """Neighbours begin alike, and as loud as the tokens."""
        side = math.isqrt(self.tokens)
        h, w = (side, side) if grid is None else (int(grid[0]), int(grid[-1]))
        if h * w != self.tokens:
            raise UsageError(f"grid: {h}x{w} is not allowed for {self.tokens} tokens; give their rows and columns")
        for learned in (self.encoder_positions, self.decoder_positions, self.output_positions):
            learned[-self.tokens :].copy_(sincos_positions((h, w), learned.shape[1]))

    @staticmethod
    def resized(state: dict[str, Tensor], grid: tuple[int, int], other: tuple[int, int]) -> dict[str, Tensor]:
        """Weights of this backbone, learned on a grid (h, w) of tokens, for another: positions are interpolated."""
        learned = ("encoder_positions", "decoder_positions", "output_positions")
        return {k: resized_positions(t, grid, other) if k.endswith(learned) else t for k, t in state.items()}

    def start(self, condition: Tensor, B: int) -> MaskedState:
        assert condition.shape == (B, self.width), f"condition {tuple(condition.shape)} is not {(B, self.width)}"
        return MaskedState(condition)

    def z(self, state: MaskedState, tokens: Tensor, known: Tensor, ask: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self._z(state.condition, tokens, known, ask)
        chunk = max(1, self.row_cap // (self.buffer + self.tokens))
        pieces = zip(*(t.split(chunk) for t in (state.condition, tokens, known, ask)), strict=True)
        return torch.cat([self._z(*piece) for piece in pieces])

    def _z(self, condition: Tensor, tokens: Tensor, known: Tensor, ask: Tensor) -> Tensor:
        # Counting and sorting happens where the masks are: of masks on the CPU, an accelerator is not waited for.
        index, valid = (None if t is None else t.to(tokens.device, non_blocking=True) for t in first(known))
        at, wanted = first(ask)  # (B, K'), (B, K') or None
        assert index is not None
        x = self.encode(condition, tokens, index, valid)  # (B, A+K, E)
        x = self.decode(x, index, valid, at.to(tokens.device, non_blocking=True))  # (B, K', C)
        x = x.flatten(0, 1)
        if wanted is None:
            return x  # (N, C)
        # index_select and embedding, not x[...]: the backward of the latter adds in an order that threads decide
        return x.index_select(0, wanted.flatten().nonzero()[:, 0].to(x.device, non_blocking=True))  # (N, C)

    def encode(self, condition: Tensor, tokens: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
        """Known tokens, at positions index (B, K), behind the buffer -> (B, A+K, E)."""
        A, E = self.buffer, self.width
        buffer = condition[:, None] + self.encoder_positions[:A]  # (B, A, E)
        x = self.token_embed(gather(tokens, index) if self.vocab is None else tokens.gather(1, index))  # (B, K, E)
        x = x + F.embedding(index, self.encoder_positions[A:])
        x = torch.cat([buffer.to(x.dtype), x], dim=1)  # (B, A+K, E)
        x = self.embed_norm(x)
        mask = None
        if valid is not None:  # images with fewer known tokens than others: nobody looks at their padding
            mask = torch.cat([valid.new_ones(len(x), A), valid], dim=1)[:, None, None]  # (B, 1, 1, A+K)
        for block in self.encoder:
            x = block(x, mask)
        assert x.shape[-1] == E
        return self.encoder_norm(x)

    def decode(self, x: Tensor, index: Tensor, valid: Tensor | None, at: Tensor) -> Tensor:
        """Encoded buffer and known tokens (B, A+K, E) -> z of the positions at (B, K'): (B, K', C)."""
        A, L = self.buffer, self.tokens
        x = self.decoder_embed(x)  # (B, A+K, C)
        B, _, C = x.shape
        # One slot more than there are tokens: padding is written there, and the slot is dropped.
        slots = index if valid is None else index.masked_fill(~valid, L)
        full = self.mask_token.to(x.dtype).expand(B, L + 1, C)
        full = full.scatter(1, slots[..., None].expand(-1, -1, C), x[:, A:])[:, :L]  # (B, L, C)
        x = torch.cat([x[:, :A], full], dim=1) + self.decoder_positions  # (B, A+L, C)
        for block in self.decoder[:-1]:
            x = block(x)
        x = self.decoder[-1](x, at=at + A)  # (B, K', C): nothing looks at the others any more
        return self.decoder_norm(x) + F.embedding(at, self.output_positions)


def first(chosen: Tensor) -> tuple[Tensor, Tensor | None]:
    """chosen (B, L) -> the positions chosen, in raster order (B, K), and which of these are not padding.

    The second is None where as many are chosen in every image: nothing is padding then.
    """
    counts = chosen.sum(dim=1)  # (B,)
    most, least = int(counts.max()), int(counts.min())
    index = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]  # (B, K)
    if most == least:
        return index, None
    return index, torch.arange(most, device=chosen.device) < counts[:, None]
