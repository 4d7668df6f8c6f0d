"""The causal backbone: each token from the condition and the tokens before it.

Sun et al. 2024, "Autoregressive Model Beats Diffusion" (LlamaGen): a Llama over the tokens of an image in raster order.
Unusual:
- the condition stands in front as `prefix` positions, or modulates every block (adaLN, as in VAR), or both;
- rotary positions tell row and column; LlamaGen's own, with `rotate_prefix=False`, make queries and keys of the prefix
  zero, so that it is looked at without being asked for, and averages what it may see;
- with order "any" a position also says which token is asked of it next (as in RAR, Yu et al. 2024): an embedding of
  that token's position is added, and tokens may come in any order.

The sequence is [prefix][first token drawn] ... [last but one]; z of the i-th token comes out at its place P-1+i.

Shapes: B images, L tokens, D features of a token (codes have no such axis), P prefix, S = P + L - 1 places, C width,
A width of the condition, h heads, d = C/h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seriatim.backbones.base import Backbone, token_embedding
from seriatim.backbones.masked import usual_heads
from seriatim.core.errors import UsageError, nearest
from seriatim.nn.ahead import Ahead
from seriatim.nn.cache import KVCache, causal_mask
from seriatim.nn.causal import MLPS, NORMS, CausalBlock, ModulatedNorm, make_norm
from seriatim.nn.linear import Linear
from seriatim.nn.position import learned_positions, resized_positions
from seriatim.nn.rotary import grid_places, rotation

CHOICES = {
    "conditioning": ("prefix", "adaln", "both"),
    "norm": NORMS,
    "mlp": MLPS,
    "positions": ("rope", "learned"),
    "order": ("raster", "any"),
}


@dataclass
class CausalState:
    """Of B images on the way: what `step` has seen."""

    prefix: Tensor  # (B, P, C), embedded
    caches: list[KVCache]  # of each block
    modulations: list[tuple[Tensor, ...]]  # of each block and of the last norm; none of either without adaLN
    order: Tensor | None  # (B, L): positions, the first drawn first; None: raster
    valid: Tensor | None  # (B, P) bool: which prefix positions count; None: all
    places: Tensor = field(repr=False)  # 0 .. S-1, on the device
    drawn: int = 0  # how many z were given
    ahead: Ahead | None = None  # of the first block

    def first(self, rows: int) -> CausalState:
        """That of the first `rows` images, in the same memory."""
        return CausalState(
            self.prefix[:rows],
            [cache.first(rows) for cache in self.caches],
            [tuple(t[:rows] for t in six) for six in self.modulations],
            None if self.order is None else self.order[:rows],
            None if self.valid is None else self.valid[:rows],
            self.places,
            self.drawn,
            self.ahead and self.ahead.first(rows),
        )


class Causal(Backbone):
    """A decoder-only transformer; one token at a time, with a cache, or all of them in one pass."""

    causal = True

    def __init__(
        self,
        tokens: int,  # L
        dim: int | None = None,  # D; or vocab
        *,
        vocab: int | None = None,  # V, of codes
        width: int = 768,  # C
        depth: int = 12,
        heads: int | None = None,  # None: `usual_heads`
        condition_width: int | None = None,  # A; None: C, and no projection
        prefix: int = 1,  # P
        conditioning: Literal["prefix", "adaln", "both"] = "prefix",
        norm: Literal["rms", "layer"] = "rms",
        mlp: Literal["swiglu", "gelu-tanh"] = "swiglu",
        hidden: int | None = None,  # of the MLP; None: `usual_hidden`
        positions: Literal["rope", "learned"] = "rope",
        grid: Sequence[int] | None = None,  # (h, w) of the tokens, for rope; None: a square, or else a row
        order: Literal["raster", "any"] = "raster",
        rotate_prefix: bool = True,  # False: LlamaGen's rope, which makes queries and keys of the prefix zero
        start_token: bool | None = None,  # a learned vector added to the prefix; None: where the condition is not there
        bias: bool = False,  # of the products inside blocks
        attention_scale: float = 1.0,  # factor on 1 / sqrt(d)
        dropout: float = 0.0,  # of embedded tokens and of what each block adds, in training
    ) -> None:
        super().__init__()
        given = {"conditioning": conditioning, "norm": norm, "mlp": mlp, "positions": positions, "order": order}
        for name, value in given.items():
            if value not in CHOICES[name]:
                raise UsageError(f"{name}: {value!r} is not known{nearest(str(value), CHOICES[name])}")
        sizes = {"tokens": tokens, "width": width, "depth": depth, "heads": heads, "hidden": hidden, "prefix": prefix,
                 "condition_width": condition_width}  # fmt: skip
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise UsageError(f"{name}: {size!r} is not allowed; it must be at least 1")
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout: {dropout!r} is not allowed; it must be in [0, 1)")
        if not attention_scale > 0:
            raise UsageError(f"attention_scale: {attention_scale!r} is not allowed; it must be above 0")
        heads = usual_heads(width) if heads is None else heads
        if width % heads:
            raise UsageError(f"heads: {heads} does not divide the width {width}; choose a divisor")
        if positions == "rope" and width // heads % 4:
            raise UsageError(
                f"heads: {heads} of width {width} have {width // heads} features each, rope needs a multiple of 4"
            )
        self.grid = grid_of(grid, tokens)
        hidden = usual_hidden(width, mlp) if hidden is None else hidden
        adaptive, in_front = conditioning != "prefix", conditioning != "adaln"
        start_token = not in_front if start_token is None else start_token
        if not in_front and not start_token:
            raise UsageError("start_token: False is not allowed with conditioning 'adaln'; a sequence begins somewhere")
        A, C, P, S = condition_width or width, width, prefix, prefix + tokens - 1
        self.tokens, self.dim, self.vocab = tokens, dim, vocab
        self.width, self.z_dim = A, C
        self.prefix, self.positions_kind, self.order, self.rotate_prefix = P, positions, order, rotate_prefix
        # One number a token, and the first norm sees a line of it: `Ahead`
        usual = {"norm": "layer", "positions": "learned", "order": "raster"}
        self.scalar = dim == 1 and P == 1 and adaptive and usual.items() <= given.items()
        self.conditioning, self.length, self.head_dim, self.dropout = conditioning, S, C // heads, dropout
        # Every step over the whole cache, behind a mask: all steps have the same shapes, as torch.compile likes them
        self.whole_cache = False
        self.config = {
            "tokens": tokens, **({"dim": dim} if vocab is None else {"vocab": vocab}),
            "width": C, "depth": depth, "heads": heads, "condition_width": condition_width, "prefix": P,
            "conditioning": conditioning, "norm": norm, "mlp": mlp, "hidden": hidden, "positions": positions,
            "grid": list(self.grid), "order": order, "rotate_prefix": rotate_prefix, "start_token": start_token,
            "bias": bias, "attention_scale": attention_scale, "dropout": dropout,
        }  # fmt: skip

        self.token_embed = token_embedding(dim, vocab, C)
        self.condition_embed = Linear(A, C) if in_front and condition_width is not None else None
        self.start_token = nn.Parameter(torch.randn(P, C) * 0.02) if start_token else None
        if positions == "learned":  # prefix first; in raster order the last token is no input
            self.positions = learned_positions(S if order == "raster" else P + tokens, C)
        if order == "any":
            self.ask_positions = learned_positions(tokens, C)  # of the token asked for
        self.blocks = nn.ModuleList(
            CausalBlock(
                C, heads, hidden, norm=norm, mlp=mlp, bias=bias, attention_scale=attention_scale, dropout=dropout,
                condition=A if adaptive else None,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm = ModulatedNorm(C, norm, A) if adaptive else make_norm(norm, C, affine=True)
        self._initialise(depth)
        self.table: Tensor | None = None
        if positions == "rope":  # no buffer: its dtype stays, and a model built without memory has it
            places = grid_places(self.grid, P, device="cpu")
            self.table = rotation(places, self.head_dim)  # (P+L, d/2, 2)
            if not rotate_prefix:
                self.table[:P] = 0.0

    @torch.no_grad()
    def _initialise(self, depth: int) -> None:
        """N(0, 0.02), no bias (LlamaGen); a modulated block begins as the identity, nearly (VAR)."""
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
                if name.endswith("modulation"):
                    layer.weight.mul_(0.5)
                    if name != "norm.modulation":
                        layer.weight[: 2 * self.z_dim].mul_(2e-5)  # gamma1, gamma2
                elif self.conditioning != "prefix" and name.endswith((".proj", ".down")):
                    layer.weight.div_(math.sqrt(2 * depth))
        if self.vocab is None:
            nn.init.xavier_uniform_(self.token_embed.get_parameter("weight"))  # tokens have unit variance
        else:
            nn.init.normal_(self.token_embed.get_parameter("weight"), std=0.02)

    @staticmethod
    def resized(state: dict[str, Tensor], grid: tuple[int, int], other: tuple[int, int]) -> dict[str, Tensor]:
        """Weights of this backbone, learned on a grid (h, w) of tokens, for another: positions are interpolated."""
        result = dict(state)
        whole = any(name.endswith("ask_positions") for name in state)
        for name, tensor in state.items():
            last = name.rpartition(".")[2]
            if last == "ask_positions" or (last == "positions" and whole):
                result[name] = resized_positions(tensor, grid, other)
            elif last == "positions":  # the last token's is not there: the one before stands for it
                result[name] = resized_positions(torch.cat([tensor, tensor[-1:]]), grid, other)[:-1]
        return result

    # --- all tokens in one pass -----------------------------------------------------------------------------------

    def sequence(
        self, condition: Tensor, tokens: Tensor, order: Tensor | None = None, valid: Tensor | None = None
    ) -> Tensor:
        """z of every token, each from the condition and the tokens drawn before it: (B, L, C), in the order given.

        condition (B, A) or (B, P, A); tokens (B, L, D) or codes (B, L) by position; order (B, L) lists positions, the
        first drawn first, and the i-th z is that of the token at order[:, i]; valid (B, P) bool, False at padding.
        """
        P, L = self.prefix, self.tokens
        prefix, modulations = self._condition(condition, valid)
        order = self._order(order, len(prefix))
        if order is None:
            x = self._embed(tokens[:, :-1], torch.arange(L - 1, device=prefix.device))  # (B, L-1, C)
        else:
            index = order[:, :-1]
            x = self._embed(tokens[torch.arange(len(index), device=index.device)[:, None], index], index)
        x = torch.cat([prefix.to(x.dtype), x], dim=1)  # (B, S, C)
        if order is not None:
            asked = F.embedding(order, self.ask_positions)  # (B, L, C)
            x = torch.cat([x[:, : P - 1], x[:, P - 1 :] + asked], dim=1)
        mask = None
        if valid is not None:
            mask = self._visible(valid)[:, None, None] & causal_mask(self.length, x.device)
            mask = mask | torch.eye(self.length, dtype=torch.bool, device=x.device)  # (B, 1, S, S)
        table = self._rotation(order, 0, self.length, x.device)
        x = F.dropout(x, self.dropout, self.training)
        for i, block in enumerate(self.blocks):
            x = block(x, table, mask, causal=mask is None, modulation=modulations[i] if modulations else ())
        return self._last(x[:, P - 1 :], modulations)

    # --- one after another ----------------------------------------------------------------------------------------

    def start(self, condition: Tensor, B: int, order: Tensor | None = None, valid: Tensor | None = None) -> CausalState:
        """The state of B images of which no token is drawn; arguments as in `sequence`."""
        assert len(condition) == B, f"condition {tuple(condition.shape)} is not one for each of {B} images"
        prefix, modulations = self._condition(condition, valid)
        caches = [KVCache(self.length) for _ in self.blocks]
        places = torch.arange(self.length, device=prefix.device)
        state = CausalState(prefix, caches, modulations, self._order(order, B), valid, places)
        if self.scalar and Ahead.fits(modulations[0], self.length):
            state.ahead = Ahead(self.blocks[0], self.token_embed, self.positions[1:], modulations[0])  # type: ignore[arg-type]
        return state

    @torch.no_grad()
    def step(self, state: CausalState, tokens: Tensor | None = None) -> Tensor:
        """z of the next token: (B, C). tokens (B, D), or codes (B,), is the one drawn last; None at first."""
        i, P = state.drawn, self.prefix
        if i >= self.tokens:
            raise UsageError(f"state: all {self.tokens} tokens are drawn; begin another with start()")
        if (tokens is None) != (i == 0):
            raise UsageError(f"tokens: {'none is' if i else 'one is'} given at step {i}; give the token drawn last")
        if tokens is None:
            x, begin, end = state.prefix, 0, P
        else:
            begin, end = P + i - 1, P + i
            own = state.places[i - 1 : i] if state.order is None else state.order[:, i - 1 : i]
            x = self._embed(tokens[:, None], own)  # (B, 1, C)
        if state.order is not None:
            asked = F.embedding(state.order[:, i : i + 1], self.ask_positions)  # (B, 1, C)
            x = torch.cat([x[:, :-1], x[:, -1:] + asked], dim=1)
        live = self.length if self.whole_cache else end
        table = self._rotation(state.order, begin, end, x.device)
        mask = self._step_mask(state, begin, end, live)
        at = state.places[begin:end] if self.whole_cache else None
        qkv = state.ahead(i - 1, tokens) if state.ahead is not None and tokens is not None else None
        z = self.advance(x, table, mask, at, live, state.caches, state.modulations, qkv)
        state.drawn += 1
        return z

    def advance(
        self,
        x: Tensor,  # (B, n, C): new positions, embedded
        table: Tensor | None,  # their rotation
        mask: Tensor | None,  # (B or 1, 1, n, live)
        at: Tensor | None,  # (n,): their places; None: the last of `live`
        live: int,  # places of the cache that are looked at
        caches: list[KVCache],
        modulations: list[tuple[Tensor, ...]],
        qkv: Tensor | None = None,  # of the first block
    ) -> Tensor:
        """z of the last of them: (B, C). Nothing here waits for a device, and torch.compile takes it whole."""
        for i, block in enumerate(self.blocks):
            six = modulations[i] if modulations else ()
            x = block(x, table, mask, cache=caches[i], at=at, live=live, modulation=six, qkv=None if i else qkv)
        return self._last(x[:, -1:], modulations)[:, 0]

    def z(self, state: CausalState, tokens: Tensor, known: Tensor, ask: Tensor) -> Tensor:
        """z of the one token of each image that is next in order, by `step`: (B, C)."""
        B, n = len(known), state.drawn
        order = torch.arange(self.tokens).expand(B, -1) if state.order is None else state.order.to(known.device)
        count = int(known[0].sum())
        fits = torch.equal(known, torch.zeros_like(known).scatter(1, order[:, :count], True)) and torch.equal(
            ask, torch.zeros_like(ask).scatter(1, order[:, count : count + 1], True)
        )
        if not fits or count < n:
            raise UsageError("ask: a causal backbone gives z of the next token of its order alone, of all images alike")
        z = tokens
        for i in range(n, count + 1):
            at = order[:, i - 1].to(tokens.device)
            rows = torch.arange(B, device=tokens.device)
            z = self.step(state, tokens[rows, at] if i else None)
        return z

    # --- parts ----------------------------------------------------------------------------------------------------

    def _condition(self, condition: Tensor, valid: Tensor | None) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """condition (B, A) or (B, P, A) -> the prefix (B, P, C), and the modulations of all blocks and the norm."""
        B, P, A = len(condition), self.prefix, self.width
        if condition.shape not in ((B, A), (B, P, A)):
            shape = tuple(condition.shape)
            raise UsageError(f"condition: shape {shape} is not ({B}, {A}) or ({B}, {P}, {A}), with a prefix of {P}")
        if valid is not None and (valid.shape != (B, P) or valid.dtype != torch.bool):
            raise UsageError(f"valid: {valid.dtype} of shape {tuple(valid.shape)} is not bool ({B}, {P})")
        each = condition[:, None].expand(-1, P, -1) if condition.ndim == 2 else condition  # (B, P, A)
        if self.conditioning == "adaln":
            prefix = each.new_zeros(B, P, self.z_dim)
        else:
            prefix = each if self.condition_embed is None else self.condition_embed(each)  # (B, P, C)
        if self.start_token is not None:
            prefix = prefix + self.start_token
        if self.positions_kind == "learned":
            prefix = prefix + self.positions[:P]
        modulations: list[tuple[Tensor, ...]] = []
        if self.conditioning != "prefix":
            if condition.ndim == 3 and P > 1:
                raise UsageError(
                    f"conditioning: {self.conditioning!r} takes one vector for each image, not {P}; use 'prefix'"
                )
            activated = F.silu(each[:, 0])
            modulations = [block.modulate(activated) for block in self.blocks]  # type: ignore[operator]
            modulations.append(self.norm.modulate(activated))  # type: ignore[operator]
        return prefix, modulations

    def _order(self, order: Tensor | None, images: int) -> Tensor | None:
        """The order as this backbone takes it, checked."""
        if self.order == "raster":
            if order is not None:
                raise UsageError("order: a backbone of order 'raster' has its own; build it with order='any'")
            return None
        if order is None or order.shape != (images, self.tokens):
            shape = None if order is None else tuple(order.shape)
            raise UsageError(f"order: {shape} is not ({images}, {self.tokens}), the positions of each image as drawn")
        return order

    def _embed(self, tokens: Tensor, at: Tensor) -> Tensor:
        """Tokens (B, n, D) or (B, n) and their positions at (n,) or (B, n) -> (B, n, C)."""
        x: Tensor = self.token_embed(tokens)
        return x if self.positions_kind == "rope" else x + F.embedding(at + self.prefix, self.positions)

    def _rotation(self, order: Tensor | None, begin: int, end: int, device: torch.device) -> Tensor | None:
        """Cosines and sines of the sequence's places begin .. end-1: (n, d/2, 2), or (B, 1, n, d/2, 2)."""
        if self.table is None:
            return None
        if self.table.device != device:
            self.table = self.table.to(device)
        if order is None:
            return self.table[begin:end]
        P = self.prefix
        front = self.table[begin : min(end, P)].expand(len(order), -1, -1, -1)
        own = self.table[P:][order[:, max(0, begin - P) : max(0, end - P)]]  # (B, n, d/2, 2)
        return torch.cat([front, own], dim=1)[:, None]

    def _visible(self, valid: Tensor) -> Tensor:
        """valid (B, P) -> which places may be looked at: (B, S)."""
        return torch.cat([valid, valid.new_ones(len(valid), self.tokens - 1)], dim=1)

    def _step_mask(self, state: CausalState, begin: int, end: int, live: int) -> Tensor | None:
        """What the places begin .. end-1 may look at among the first `live`: (B or 1, 1, n, live); None: all."""
        if state.valid is None and end - begin == 1 and not self.whole_cache:
            return None
        keys, queries = state.places[:live], state.places[begin:end, None]
        mask = (keys <= queries)[None, None]  # (1, 1, n, live)
        if state.valid is not None:
            mask = mask & self._visible(state.valid)[:, None, None, :live] | (keys == queries)
        return mask

    def _last(self, x: Tensor, modulations: list[tuple[Tensor, ...]]) -> Tensor:
        return self.norm(x, *modulations[-1]) if modulations else self.norm(x)


def usual_hidden(width: int, mlp: str) -> int:
    """4 C; of SwiGLU, which has three products, 8/3 C rounded up to a multiple of 256 (of 32 in small models)."""
    if mlp != "swiglu":
        return 4 * width
    multiple = 256 if width >= 256 else 32
    return -(-int(8 * width / 3) // multiple) * multiple


def grid_of(grid: Sequence[int] | None, tokens: int) -> tuple[int, int]:
    """Rows and columns of so many tokens: as given, or a square, or one row."""
    if grid is None:
        side = math.isqrt(tokens)
        return (side, side) if side * side == tokens else (1, tokens)
    if len(grid) != 2 or grid[0] * grid[1] != tokens:
        raise UsageError(f"grid: {list(grid)} is not allowed for {tokens} tokens; give their rows and columns")
    return int(grid[0]), int(grid[1])
