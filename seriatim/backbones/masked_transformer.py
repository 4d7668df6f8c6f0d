"""The masked backbone of MAR: a bidirectional encoder over the known tokens, and a decoder over all positions.

Li et al. 2024, "Autoregressive Image Generation without Vector Quantization", section 3.4; He et al. 2022 (MAE).
Unusual:
- the condition enters as `buffer` extra tokens in front; its vectors are repeated to fill them and differ by position;
- unknown tokens are dropped in the encoder and replaced by a mask token in the decoder;
- a LayerNorm follows the encoder's positions, before its first block;
- a third set of positions is added after the decoder's last norm and tells the head which token it generates.

Shapes: B images, L tokens, D features of a token (codes have no such axis), P vectors of the condition, A buffer
tokens, K and K' the largest numbers of known and of requested tokens of an image, N requested tokens of the batch,
E and C width of the encoder and of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seriatim.backbones.base import Parallel, token_embedding
from seriatim.backbones.requests import fill_buffer, flat_requests, positions_in, with_neighbours
from seriatim.conditions.base import Condition
from seriatim.core.errors import UsageError, check_known, check_least
from seriatim.core.spec import TokenSpec, grid_of
from seriatim.nn.block import NORM_EPS, Block, gather, xavier
from seriatim.nn.linear import Linear
from seriatim.nn.position import learned_positions, resized_positions, sincos_positions

ROW_CAP = 1 << 16  # rows (images x positions) in one pass without gradients; bounds memory


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """The values for (encoder, decoder), from one number for both or one for each; raises UsageError."""
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) != 2 or any(not isinstance(v, int) or v < 1 for v in values):
        raise UsageError(f"{name}: {value!r} is not allowed; give a positive integer or two (encoder, decoder)")
    return values[0], values[1]


def usual_heads(width: int) -> int:
    """The default number of attention heads: one for every 64 features, or the next smaller divisor of `width`."""
    return next(count for count in range(max(1, width // 64), 0, -1) if width % count == 0)


class Masked(Parallel):
    """An encoder-decoder over a set of known tokens, which computes z of several tokens a step, in any order."""

    def __init__(
        self,
        tokens: int,  # L
        dim: int | None = None,  # D; give either dim or vocab
        *,
        vocab: int | None = None,  # V, the number of codes
        width: int | Sequence[int] = 768,  # E and C, or one number for both
        depth: int | Sequence[int] = 12,  # blocks of the encoder and of the decoder, or one number for each of them
        heads: int | Sequence[int] | None = None,  # attention heads; None means `usual_heads`
        buffer: int = 64,  # A
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,  # of the attention and of both MLP layers, only in training
        positions: Literal["random", "sincos"] = "random",  # the initial values of the learned positions
        grid: Sequence[int] | None = None,  # (h, w) of the tokens, for sincos; None means a square
    ) -> None:
        super().__init__()
        E, C = pair("width", width)
        depths = pair("depth", depth)
        both_heads = pair("heads", heads) if heads is not None else (usual_heads(E), usual_heads(C))
        for side, count in zip((E, C), both_heads, strict=True):
            if side % count:
                raise UsageError(f"heads: {count} does not divide the width {side}; choose a divisor")
        check_least(1, tokens=tokens, buffer=buffer)
        shape = grid_of(grid, tokens)
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout: {dropout!r} is not allowed; it must be in [0, 1)")
        self.spec = TokenSpec(tokens, dim, vocab, grid=shape)
        self.width, self.z_dim, self.buffer = E, C, buffer
        self.row_cap = ROW_CAP
        self.buckets = 0  # the number of lengths that K and K' may have in training; 0 means any
        self.config = {
            "tokens": tokens,
            **({"dim": dim} if vocab is None else {"vocab": vocab}),
            "width": [E, C],
            "depth": list(depths),
            "heads": list(both_heads),
            "buffer": buffer,
            "mlp_ratio": mlp_ratio,
            "dropout": dropout,
        }
        check_known(("random", "sincos"), positions=positions)
        if positions == "sincos":
            if grid is None and shape[0] != shape[1]:
                raise UsageError(f"grid: {tokens} tokens do not form a square; for sincos, give their rows and columns")
            self.config["positions"] = positions
        if grid is not None and (positions == "sincos" or shape != grid_of(None, tokens)):
            self.config["grid"] = list(grid)

        # Encoder
        self.token_embed = token_embedding(self.spec, E)
        self.encoder_positions = learned_positions(buffer + tokens, E)  # the buffer comes first
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
            self._begin_with_sincos(shape)

    @torch.no_grad()
    def _begin_with_sincos(self, grid: tuple[int, int]) -> None:
        """Initialise positions with sines and cosines: neighbours are similar, and vectors are as long as tokens."""
        for learned in (self.encoder_positions, self.decoder_positions, self.output_positions):
            learned[-self.spec.count :].copy_(sincos_positions(grid, learned.shape[1]))

    @staticmethod
    def resized(state: dict[str, Tensor], grid: tuple[int, int], other: tuple[int, int]) -> dict[str, Tensor]:
        """The weights `state`, learned on the token grid `grid` (h, w), with positions interpolated to `other`."""
        learned = ("encoder_positions", "decoder_positions", "output_positions")
        return {k: resized_positions(t, grid, other) if k.endswith(learned) else t for k, t in state.items()}

    def z(self, condition: Condition, tokens: Tensor, known: Tensor, ask: Tensor, neighbours: bool = False) -> Tensor:
        condition.check(len(tokens), self.width)
        chunk = max(1, self.row_cap // (self.buffer + self.spec.count))
        if len(tokens) > chunk and not torch.is_grad_enabled():
            parts = [slice(i, i + chunk) for i in range(0, len(tokens), chunk)]
            return torch.cat([self.z(condition.select(s), tokens[s], known[s], ask[s], neighbours) for s in parts])
        # Counting and sorting run on the device of the masks, so masks on the host never wait for an accelerator.
        buckets = self.buckets if torch.is_grad_enabled() else 0
        among = positions_in(known, buckets)
        index, valid = (None if t is None else t.to(tokens.device, non_blocking=True) for t in among)
        at, wanted = positions_in(ask, buckets)  # (B, K'), (B, K') or None
        assert index is not None
        x, seen = self.encode(condition, tokens, index, valid)  # (B, A+K, E), (B, A) or None
        there = at.to(tokens.device, non_blocking=True)
        if neighbours:
            every = self.decode(x, seen, index, valid, None)  # (B, L, C)
            x = with_neighbours(every, there, self.spec.grid or (1, self.spec.count))  # (B, K', 5, C)
        else:
            x = self.decode(x, seen, index, valid, there)  # (B, K', C)
        return flat_requests(x, wanted)

    def encode(
        self, condition: Condition, tokens: Tensor, index: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The encoded buffer and known tokens (B, A+K, E), and the mask (B, A) of the buffer, None without padding.

        index (B, K) holds the positions of the known tokens, and valid (B, K) is False at its padding.
        """
        A = self.buffer
        vectors, seen = fill_buffer(condition, A)
        buffer = vectors + self.encoder_positions[:A]  # (B, A, E)
        x = self.token_embed(gather(tokens, index) if self.spec.vocab is None else tokens.gather(1, index))  # (B, K, E)
        # The backward pass of embedding adds in a fixed order; that of positions[index] in one that threads decide.
        x = x + F.embedding(index, self.encoder_positions[A:])
        x = torch.cat([buffer.to(x.dtype), x], dim=1)  # (B, A+K, E)
        x = self.embed_norm(x)
        mask = None
        if valid is not None or seen is not None:  # hides the padding of captions and of known tokens
            front = seen if seen is not None else x.new_ones(len(x), A, dtype=torch.bool)
            back = valid if valid is not None else x.new_ones(index.shape, dtype=torch.bool)
            mask = torch.cat([front, back], dim=1)[:, None, None]  # (B, 1, 1, A+K)
        for block in self.encoder:
            x = block(x, mask)
        return self.encoder_norm(x), seen

    def decode(self, x: Tensor, seen: Tensor | None, index: Tensor, valid: Tensor | None, at: Tensor | None) -> Tensor:
        """z (B, K', C) at the positions `at` (B, K'), or of all positions, from the encoded sequence x (B, A+K, E)."""
        A, L = self.buffer, self.spec.count
        x = self.decoder_embed(x)  # (B, A+K, C)
        B, _, C = x.shape
        # There is one slot more than tokens; padding is written to it, and then the slot is dropped.
        slots = index if valid is None else index.masked_fill(~valid, L)
        full = self.mask_token.to(x.dtype).expand(B, L + 1, C)
        full = full.scatter(1, slots[..., None].expand(-1, -1, C), x[:, A:])[:, :L]  # (B, L, C)
        x = torch.cat([x[:, :A], full], dim=1) + self.decoder_positions  # (B, A+L, C)
        mask = None
        if seen is not None:
            mask = torch.cat([seen, seen.new_ones(B, L)], dim=1)[:, None, None]  # (B, 1, 1, A+L)
        for block in self.decoder[:-1]:
            x = block(x, mask)
        if at is None:
            x = self.decoder[-1](x, mask)[:, A:]  # (B, L, C)
            return self.decoder_norm(x) + self.output_positions
        x = self.decoder[-1](x, mask, at=at + A)  # (B, K', C); the other outputs of the last block are not needed
        return self.decoder_norm(x) + F.embedding(at, self.output_positions)
