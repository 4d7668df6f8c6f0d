"""The causal backbone, which computes z of each token from the condition and the tokens before it.

It is the Llama over the tokens of an image of Sun et al. 2024, "Autoregressive Model Beats Diffusion" (LlamaGen).
Unusual:
- the condition is put in front as `prefix` positions, or modulates every block (adaLN, as in VAR), or both;
- rotary positions encode row and column; with `rotate_prefix=False`, as in LlamaGen, the queries and keys of the prefix
  are zero, so that its score is 0 for every query, and a prefix position averages the positions that it may attend to;
- with order "any", the position of the token to be predicted is embedded and added to each input (as in RAR, Yu et al.
  2024), so that tokens may come in any order.

The sequence is [prefix][first token] ... [last token but one]; z of the i-th token is the output at place P-1+i.

Shapes: B images, L tokens, D features of a token (codes have no such axis), P prefix, S = P + L - 1 places, C width,
A width of the condition, h heads, d = C/h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seriatim.backbones.base import Sequential, token_embedding
from seriatim.backbones.causal_state import CausalState
from seriatim.backbones.masked_transformer import usual_heads
from seriatim.conditions.base import Condition
from seriatim.core.errors import UsageError, check_known, check_least, nearest
from seriatim.core.spec import TokenSpec, grid_of
from seriatim.nn.causal_block import MLPS, NORMS, CausalBlock, ModulatedNorm, make_norm
from seriatim.nn.kv_cache import KVCache, Window, causal_mask
from seriatim.nn.linear import Linear
from seriatim.nn.position import learned_positions, resized_positions
from seriatim.nn.rotary import grid_places, rotation
from seriatim.nn.scalar_qkv import ScalarQKV

CHOICES = {
    "conditioning": ("prefix", "adaln", "both"),
    "norm": NORMS,
    "mlp": MLPS,
    "positions": ("rope", "learned"),
    "order": ("raster", "any"),
}


class Causal(Sequential):
    """A decoder-only transformer that computes z one token at a time, with a cache, or for all tokens in one pass."""

    def __init__(
        self,
        tokens: int,  # L
        dim: int | None = None,  # D; give either dim or vocab
        *,
        vocab: int | None = None,  # V, the number of codes
        width: int = 768,  # C
        depth: int = 12,
        heads: int | None = None,  # None means `usual_heads`
        condition_width: int | None = None,  # A; None means C, without a projection
        prefix: int = 1,  # P
        conditioning: Literal["prefix", "adaln", "both"] = "prefix",
        norm: Literal["rms", "layer"] = "rms",
        mlp: Literal["swiglu", "gelu-tanh"] = "swiglu",
        hidden: int | None = None,  # the hidden width of the MLPs; None means `usual_hidden`
        positions: Literal["rope", "learned"] = "rope",
        grid: Sequence[int] | None = None,  # (h, w) of the tokens, for rope; None means a square or else a single row
        order: Literal["raster", "any"] = "raster",
        rotate_prefix: bool = True,  # False means LlamaGen's rope, in which queries and keys of the prefix are zero
        start_token: bool | None = None,  # add a learned vector to the prefix; None means only with pure "adaln"
        bias: bool = False,  # whether the linear layers inside the blocks have a bias
        attention_scale: float = 1.0,  # a factor on 1 / sqrt(d)
        dropout: float = 0.0,  # of the embedded tokens and of the output of attention and MLP, only in training
    ) -> None:
        super().__init__()
        given = {"conditioning": conditioning, "norm": norm, "mlp": mlp, "positions": positions, "order": order}
        for name, value in given.items():
            check_known(CHOICES[name], nearest, **{name: value})
        check_least(1, tokens=tokens, width=width, depth=depth, heads=heads, hidden=hidden, prefix=prefix)
        check_least(1, condition_width=condition_width)
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
        shape = grid_of(grid, tokens)
        hidden = usual_hidden(width, mlp) if hidden is None else hidden
        adaptive, in_front = conditioning != "prefix", conditioning != "adaln"
        start_token = not in_front if start_token is None else start_token
        if not in_front and not start_token:
            raise UsageError("start_token: False is not allowed with conditioning 'adaln'; leave it out or use True")
        A, C, P, S = condition_width or width, width, prefix, prefix + tokens - 1
        self.spec = TokenSpec(tokens, dim, vocab, grid=shape)
        self.width, self.z_dim = A, C
        self.prefix, self.positions_kind, self.any_order = P, positions, order == "any"
        # With scalar tokens, the input of the first layer norm is affine in the token, which ScalarQKV uses.
        plain = norm == "layer" and positions == "learned" and order == "raster"
        self.scalar = dim == 1 and P == 1 and adaptive and plain
        self.conditioning, self.length, self.head_dim, self.dropout = conditioning, S, C // heads, dropout
        # If True, every step attends to the whole cache with a mask, so that all steps have the same shapes, which
        # torch.compile needs.
        self.whole_cache = False
        self.config = {
            "tokens": tokens,
            **({"dim": dim} if vocab is None else {"vocab": vocab}),
            "width": C,
            "depth": depth,
            "heads": heads,
            "condition_width": condition_width,
            "prefix": P,
            "conditioning": conditioning,
            "norm": norm,
            "mlp": mlp,
            "hidden": hidden,
            "positions": positions,
            "grid": list(shape),
            "order": order,
            "rotate_prefix": rotate_prefix,
            "start_token": start_token,
            "bias": bias,
            "attention_scale": attention_scale,
            "dropout": dropout,
        }

        self.token_embed = token_embedding(self.spec, C)
        self.condition_embed = Linear(A, C) if in_front and condition_width is not None else None
        self.start_token = nn.Parameter(torch.randn(P, C) * 0.02) if start_token else None
        if positions == "learned":  # the prefix comes first; in raster order the last token is never an input
            self.positions = learned_positions(S if order == "raster" else P + tokens, C)
        if order == "any":
            self.ask_positions = learned_positions(tokens, C)  # positions of the tokens to be predicted
        same: dict[str, Any] = {"norm": norm, "mlp": mlp, "bias": bias, "dropout": dropout}
        same |= {"attention_scale": attention_scale, "condition": A if adaptive else None}
        self.blocks = nn.ModuleList(CausalBlock(C, heads, hidden, **same) for _ in range(depth))
        self.norm = ModulatedNorm(C, norm, A) if adaptive else make_norm(norm, C, affine=True)
        self._initialise(depth)
        self.table: Tensor | None = None
        if positions == "rope":  # not a buffer, so that casts leave it in float32 and a meta-device model has it too
            places = grid_places(shape, P, device="cpu")
            self.table = rotation(places, self.head_dim)  # (P+L, d/2, 2)
            if not rotate_prefix:
                self.table[:P] = 0.0

    @torch.no_grad()
    def _initialise(self, depth: int) -> None:
        """Initialise with N(0, 0.02) and zero biases (LlamaGen); a modulated block starts near the identity (VAR)."""
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
        """The weights `state`, learned on the token grid `grid` (h, w), with positions interpolated to `other`."""
        result = dict(state)
        whole = any(name.endswith("ask_positions") for name in state)
        for name, tensor in state.items():
            last = name.rpartition(".")[2]
            if last == "ask_positions" or (last == "positions" and whole):
                result[name] = resized_positions(tensor, grid, other)
            elif last == "positions":  # the last token has no position, so the one before it is repeated
                result[name] = resized_positions(torch.cat([tensor, tensor[-1:]]), grid, other)[:-1]
        return result

    # --- all tokens in one pass -----------------------------------------------------------------------------------

    def sequence(self, condition: Condition, tokens: Tensor, order: Tensor | None = None) -> Tensor:
        P, L, S = self.prefix, self.tokens, self.length
        prefix, modulations = self._condition(condition)
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
        if condition.valid is not None:
            mask = self._visible(condition.valid)[:, None, None] & causal_mask(S, x.device)
            mask = mask | torch.eye(S, dtype=torch.bool, device=x.device)  # (B, 1, S, S)
        window = Window(self._rotation(order, 0, S, x.device), mask, causal=mask is None)
        x = F.dropout(x, self.dropout, self.training)
        for i, block in enumerate(self.blocks):
            x = block(x, window, modulation=modulations[i] if modulations else ())
        return self._last(x[:, P - 1 :], modulations)

    # --- one step at a time ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, condition: Condition, order: Tensor | None = None) -> CausalState:
        """The state after the prefix; it holds z of the first token."""
        prefix, modulations = self._condition(condition)
        B, P = prefix.shape[:2]
        order = self._order(order, B)
        caches = [KVCache(self.length) for _ in self.blocks]
        places = torch.arange(self.length, device=prefix.device)
        state = CausalState(caches, modulations, order, condition.valid, places, prefix[:, 0], [P] * B)
        if order is not None:
            asked = F.embedding(order[:, :1], self.ask_positions)  # (B, 1, C)
            prefix = torch.cat([prefix[:, :-1], prefix[:, -1:] + asked], dim=1)
        state.z = self._advance(state, prefix, self._window(state, 0, P))[:, -1]
        if self.scalar and ScalarQKV.fits(modulations[0], self.length):
            state.scalar_qkv = ScalarQKV(self.blocks[0], self.token_embed, self.positions[1:], modulations[0])  # type: ignore[arg-type]
        return state

    @torch.no_grad()
    def step(
        self,
        state: CausalState,
        content: Tensor | None = None,
        content_valid: Tensor | None = None,
        ask: Tensor | None = None,
        ask_valid: Tensor | None = None,
    ) -> Tensor:
        """z of the next token of each image after `content` (B, m, D) or (B, m): (B, 1, C); see `Sequential.step`."""
        if (ask is not None and ask.shape[1] != 1) or ask_valid is not None:
            raise UsageError("ask: this backbone gives z of one token a step; ask for the next one of each image")
        if content is None or not content.shape[1]:
            return state.z[:, None]
        m, P = content.shape[1], self.prefix
        counts = [m] * len(state.seen) if content_valid is None else content_valid.sum(dim=1).tolist()
        if max(seen + count for seen, count in zip(state.seen, counts, strict=True)) > self.length:
            raise UsageError(
                f"content: all {self.tokens} tokens are known, so there is no next token; begin again with start()"
            )
        if len(set(state.seen)) == 1 and min(counts) == m:
            begin = state.seen[0]
            end = begin + m
            if state.order is None:
                own = state.places[begin - P : end - P]
            else:
                own = state.order[:, begin - P : end - P]
            x = self._embed(content, own)  # (B, m, C)
            if state.order is not None:
                x = x + F.embedding(state.order[:, begin - P + 1 : end - P + 1], self.ask_positions)
            qkv = state.scalar_qkv(begin - P, content[:, 0]) if state.scalar_qkv is not None and m == 1 else None
            state.z = self._advance(state, x, self._window(state, begin, end), qkv)[:, -1]
        else:
            state.z = self._uneven(state, content, counts)
        state.seen = [seen + count for seen, count in zip(state.seen, counts, strict=True)]
        return state.z[:, None]

    def _uneven(self, state: CausalState, content: Tensor, counts: list[int]) -> Tensor:
        """z (B, C) after `content`, of which row b has counts[b] tokens; rows may have seen different numbers."""
        P, S, m, device = self.prefix, self.length, content.shape[1], content.device
        seen, count = torch.tensor(state.seen), torch.tensor(counts)
        at = seen[:, None] + torch.arange(m)  # (B, m), places in the sequence
        real = torch.arange(m) < count[:, None]
        live = int((seen + count).max())
        index = at.masked_fill(~real, S).to(device)  # padding is written to place S, which no query attends to
        at = at.clamp(max=S - 1).to(device)
        keys = state.places[:live]
        mask = (keys <= at[..., None])[:, None]  # (B, 1, m, live)
        if state.valid is not None:
            mask = mask & self._visible(state.valid)[:, None, None, :live] | (keys == at[..., None])[:, None]
        own = at - P if state.order is None else state.order.gather(1, at - P)  # positions in the image
        x = self._embed(content, own)
        rotation = None
        if self.table is not None:
            rotation = self._table(device)[P:][own][:, None]  # (B, 1, m, d/2, 2)
        if state.order is not None:
            following = state.order.gather(1, (at - P + 1).clamp(max=self.tokens - 1))
            x = x + F.embedding(following, self.ask_positions)
        z = self._advance(state, x, Window(rotation, mask, live=live, index=index))  # (B, m, C)
        last = z.gather(1, (count - 1).clamp(min=0).to(device)[:, None, None].expand(-1, 1, z.shape[2]))[:, 0]
        return torch.where((count > 0).to(device)[:, None], last, state.z.to(last.dtype))

    def _window(self, state: CausalState, begin: int, end: int) -> Window:
        """The window of the new places begin .. end-1, which are the same for all rows."""
        live = self.length if self.whole_cache else end
        rotation = self._rotation(state.order, begin, end, state.places.device)
        index = state.places[begin:end] if self.whole_cache else None
        if state.valid is None and end - begin == 1 and not self.whole_cache:
            return Window(rotation, live=live, index=index)
        keys, queries = state.places[:live], state.places[begin:end, None]
        mask = (keys <= queries)[None, None]  # (1, 1, n, live)
        if state.valid is not None:
            mask = mask & self._visible(state.valid)[:, None, None, :live] | (keys == queries)
        return Window(rotation, mask, live=live, index=index)

    def _advance(self, state: CausalState, x: Tensor, window: Window, qkv: Tensor | None = None) -> Tensor:
        """The embedded new positions (B, n, C) -> their z (B, n, C), without waiting for a device.

        `qkv` holds the queries, keys and values of the first block if they are known already.
        """
        modulations = state.modulations
        for i, block in enumerate(self.blocks):
            x = block(x, window, state.caches[i], modulations[i] if modulations else (), None if i else qkv)
        return self._last(x, modulations)

    # --- parts ----------------------------------------------------------------------------------------------------

    def _condition(self, condition: Condition) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """The prefix (B, P, C), and the modulations of all blocks and of the last norm (empty without adaLN)."""
        vectors, P = condition.vectors, self.prefix
        B = len(vectors)
        if vectors.shape not in ((B, 1, self.width), (B, P, self.width)):
            shape = tuple(vectors.shape)
            raise UsageError(f"condition: shape {shape} is not ({B}, 1 or {P}, {self.width}), with a prefix of {P}")
        condition.check(B, self.width)
        each = vectors.expand(-1, P, -1)  # (B, P, A)
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
            if vectors.shape[1] > 1:
                raise UsageError(
                    f"conditioning: {self.conditioning!r} takes one vector for each image, not {P}; use 'prefix'"
                )
            activated = F.silu(vectors[:, 0])
            modulations = [block.modulate(activated) for block in self.blocks]  # type: ignore[operator]
            modulations.append(self.norm.modulate(activated))  # type: ignore[operator]
        return prefix, modulations

    def _order(self, order: Tensor | None, images: int) -> Tensor | None:
        """The order (B, L) of a backbone of order "any", or None in raster order; raises UsageError."""
        if not self.any_order:
            if order is not None:
                raise UsageError("order: a backbone of order 'raster' has its own; build it with order='any'")
            return None
        if order is None or order.shape != (images, self.tokens):
            shape = None if order is None else tuple(order.shape)
            raise UsageError(f"order: {shape} is not ({images}, {self.tokens}), all positions for each image")
        return order

    def _embed(self, tokens: Tensor, at: Tensor) -> Tensor:
        """The embeddings (B, n, C) of tokens (B, n, D) or (B, n) at the positions `at` (n,) or (B, n)."""
        x: Tensor = self.token_embed(tokens)
        return x if self.positions_kind == "rope" else x + F.embedding(at + self.prefix, self.positions)

    def _table(self, device: torch.device) -> Tensor:
        """The rotary table of all places, on `device`: (P+L, d/2, 2)."""
        assert self.table is not None, "this backbone has learned positions"
        if self.table.device != device:
            self.table = self.table.to(device)
        return self.table

    def _rotation(self, order: Tensor | None, begin: int, end: int, device: torch.device) -> Tensor | None:
        """The rotary table of the places begin .. end-1: (n, d/2, 2), or (B, 1, n, d/2, 2) with an order."""
        if self.table is None:
            return None
        table = self._table(device)
        if order is None:
            return table[begin:end]
        P = self.prefix
        front = table[begin : min(end, P)].expand(len(order), -1, -1, -1)
        own = table[P:][order[:, max(0, begin - P) : max(0, end - P)]]  # (B, n, d/2, 2)
        return torch.cat([front, own], dim=1)[:, None]

    def _visible(self, valid: Tensor) -> Tensor:
        """A mask (B, S) of the places that may be attended to, from the mask `valid` (B, P) of the prefix."""
        return torch.cat([valid, valid.new_ones(len(valid), self.tokens - 1)], dim=1)

    def _last(self, x: Tensor, modulations: list[tuple[Tensor, ...]]) -> Tensor:
        return self.norm(x, *modulations[-1]) if modulations else self.norm(x)


def usual_hidden(width: int, mlp: str) -> int:
    """The default hidden width of an MLP: 4 C, or for SwiGLU, which has three products, 8/3 C.

    8/3 C is rounded up to a multiple of 256 (of 32 in models of a width below 256).
    """
    if mlp != "swiglu":
        return 4 * width
    multiple = 256 if width >= 256 else 32
    return -(-int(8 * width / 3) // multiple) * multiple
