"""The causal backbone: one pass and one by one agree, nothing looks ahead, any order, adaptive norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import golden, randomise
from safetensors.torch import load_file
from torch import Tensor

from seriatim.backbones.causal_transformer import Causal, CausalState, usual_hidden
from seriatim.conditions.base import Condition
from seriatim.core.errors import UsageError
from seriatim.models.build import seeded
from seriatim.nn import scalar_qkv
from seriatim.nn.kv_cache import Window
from seriatim.nn.prepare import prepare
from seriatim.nn.rotary import grid_places, rotate, rotation

L, D, C, V = 12, 4, 32, 20
VARIANTS: dict[str, dict[str, Any]] = {
    "llamagen": {"vocab": V, "rotate_prefix": False},
    "features": {"dim": D, "grid": (3, 4)},
    "long-prefix": {"vocab": V, "prefix": 3, "rotate_prefix": False},
    "projected": {"dim": D, "condition_width": 10, "prefix": 2, "positions": "learned", "bias": True},
    "any": {"dim": D, "order": "any", "grid": (3, 4)},
    "any-learned": {"vocab": V, "order": "any", "positions": "learned", "prefix": 2},
    "adaln": {"dim": D, "conditioning": "adaln", "condition_width": 10, "norm": "layer"},
    "var": {
        "dim": 1, "conditioning": "both", "condition_width": 10, "norm": "layer", "mlp": "gelu-tanh", "bias": True,
        "positions": "learned", "start_token": True, "attention_scale": 0.25,
    },
    "any-adaln-codes": {"vocab": V, "order": "any", "conditioning": "both", "heads": 1},
}  # fmt: skip
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def make(variant: str, **options: Any) -> Causal:
    with seeded(0):
        backbone = Causal(L, **{"width": C, "depth": 2, "heads": 2, **VARIANTS[variant], **options}).eval()
    randomise(backbone)
    return backbone


def inputs(backbone: Causal, B: int = 3, seed: int = 1) -> tuple[Condition, Tensor, Tensor | None]:
    """Condition, tokens and order."""
    g = torch.Generator().manual_seed(seed)
    condition = Condition(torch.randn(B, 1, backbone.width, generator=g))
    codes = torch.randint(V, (B, L), generator=g)
    tokens = codes if backbone.vocab else torch.randn(B, L, backbone.dim or 0, generator=g)
    order = torch.rand(B, L, generator=g).argsort(dim=1) if backbone.any_order else None
    return condition, tokens, order


def in_order(tokens: Tensor, order: Tensor | None) -> Tensor:
    """The tokens as they are generated."""
    return tokens if order is None else tokens[torch.arange(len(tokens))[:, None], order]


def one_by_one(backbone: Causal, condition: Condition, tokens: Tensor, order: Tensor | None) -> Tensor:
    state, content = backbone.start(condition, order), in_order(tokens, order)
    z = [backbone.step(state, content[:, i - 1 : i] if i else None) for i in range(L)]
    return torch.cat(z, dim=1)


@each_variant
@torch.no_grad()
def test_with_a_cache_it_is_the_same(variant: str) -> None:
    backbone = make(variant)
    condition, tokens, order = inputs(backbone)
    together = backbone.sequence(condition, tokens, order)
    assert together.shape == (3, L, C)
    assert torch.allclose(one_by_one(backbone, condition, tokens, order), together, atol=2e-5)
    backbone.whole_cache = True
    assert torch.allclose(one_by_one(backbone, condition, tokens, order), together, atol=2e-5)


@each_variant
@torch.no_grad()
def test_it_is_rebuilt_from_its_config(variant: str) -> None:
    backbone = make(variant)
    with torch.device("meta"):
        twin = Causal(**backbone.config)
    twin.load_state_dict(backbone.state_dict(), assign=True)
    condition, tokens, order = inputs(backbone)
    assert torch.equal(twin.eval().sequence(condition, tokens, order), backbone.sequence(condition, tokens, order))
    assert twin.config == backbone.config


@each_variant
def test_a_token_follows_from_those_before_it_and_from_no_other(variant: str) -> None:
    backbone = make(variant)
    condition, tokens, order = inputs(backbone, B=2)
    index = torch.arange(L).expand(2, -1) if order is None else order
    rows, with_ = torch.arange(2), torch.no_grad()
    with with_:
        before = backbone.sequence(condition, tokens, order)
        for i in range(L):
            changed = tokens.clone()
            other = (tokens + 1) % V if backbone.vocab else tokens + 1
            changed[rows, index[:, i]] = other[rows, index[:, i]]
            after = backbone.sequence(condition, changed, order)
            assert torch.equal(after[:, : i + 1], before[:, : i + 1]), i
            assert i == L - 1 or not torch.isclose(after[:, i + 1 :], before[:, i + 1 :]).all(dim=-1).any(), i
        moved = backbone.sequence(Condition(condition.vectors + 1), tokens, order)
    assert not torch.isclose(moved, before).all(dim=-1).any(), "every token follows from the condition"


@torch.no_grad()
def test_an_image_is_the_same_in_any_batch_and_any_order_of_the_batch() -> None:
    backbone = make("any")
    condition, tokens, order = inputs(backbone)
    assert order is not None
    whole = backbone.sequence(condition, tokens, order)
    swap = torch.tensor([2, 0, 1])
    assert torch.allclose(backbone.sequence(condition.select(swap), tokens[swap], order[swap]), whole[swap], atol=1e-5)
    assert torch.allclose(
        backbone.sequence(condition.select(slice(1, 2)), tokens[1:2], order[1:2]), whole[1:2], atol=1e-5
    )


@torch.no_grad()
def test_in_any_order_the_positions_are_what_counts() -> None:
    """z of a token is told by which tokens came before, where they are, and which is asked for."""
    backbone = make("any")
    condition, tokens, _ = inputs(backbone, B=1)
    first = torch.tensor([[3, 7, 1, 0, 2, 4, 5, 6, 8, 9, 10, 11]])
    z = backbone.sequence(condition, tokens, first)
    later = first.clone()
    later[0, 3:] = later[0, 3:].flip(0)  # another one is asked for after three
    other = backbone.sequence(condition, tokens, later)
    assert torch.equal(other[:, :3], z[:, :3]) and not torch.allclose(other[:, 3], z[:, 3], atol=1e-3)
    everywhere = tokens.clone()
    everywhere[:, first[0, 5:]] = 100.0  # what comes later
    assert torch.equal(backbone.sequence(condition, everywhere, first)[:, :5], z[:, :5])


@each_variant
@torch.no_grad()
def test_tokens_may_come_in_groups(variant: str) -> None:
    """What is known enters at once, and rows may have seen different numbers of tokens."""
    backbone = make(variant)
    condition, tokens, order = inputs(backbone)
    z, content = backbone.sequence(condition, tokens, order), in_order(tokens, order)
    state = backbone.start(condition, order)
    for begin, end in ((0, 0), (0, 1), (1, 5), (5, 6), (6, L - 1)):
        assert torch.allclose(backbone.step(state, content[:, begin:end])[:, 0], z[:, end], atol=2e-5), end
    state, seen = backbone.start(condition, order), torch.zeros(3, dtype=torch.long)
    for counts in ((0, 4, 1), (3, 0, 0), (0, 0, 0), (1, 1, 1), (2, 6, 9)):
        index = (seen[:, None] + torch.arange(max(counts))).clamp(max=L - 1)
        valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        asked = backbone.step(state, content[torch.arange(3)[:, None], index], valid)
        seen += torch.tensor(counts)
        assert torch.allclose(asked[:, 0], z[torch.arange(3), seen], atol=2e-5), seen


@torch.no_grad()
def test_padding_of_the_prefix_is_not_looked_at() -> None:
    for variant in ("long-prefix", "projected"):
        backbone = make(variant)
        condition, tokens, _ = inputs(backbone)
        vectors = torch.randn(3, backbone.prefix, backbone.width, generator=torch.Generator().manual_seed(3))
        valid = torch.ones(3, backbone.prefix, dtype=torch.bool)
        valid[0, 0] = False
        condition = Condition(vectors, valid)
        z = backbone.sequence(condition, tokens)
        assert torch.allclose(one_by_one(backbone, condition, tokens, None), z, atol=2e-5)
        other = vectors.clone()
        other[:, 0] += 1
        changed = backbone.sequence(Condition(other, valid), tokens)
        assert torch.equal(changed[0], z[0]) and not torch.allclose(changed[1], z[1], atol=1e-3)
        assert torch.allclose(backbone.sequence(Condition(vectors), tokens)[1:], z[1:], atol=1e-5)


@each_variant
@torch.no_grad()
def test_rows_are_selected_and_joined(variant: str) -> None:
    """Leading rows share memory with the whole; joined rows may have seen different numbers of tokens."""
    backbone = make(variant)
    condition, tokens, order = inputs(backbone)
    z, content = backbone.sequence(condition, tokens, order), in_order(tokens, order)

    def after(count: int) -> CausalState:
        state = backbone.start(condition, order)
        backbone.step(state, content[:, :count])
        return state

    first = after(4).select(slice(0, 2))
    assert len(first) == 2
    assert torch.allclose(backbone.step(first, content[:2, 4:5])[:, 0], z[:2, 5], atol=2e-5)
    mixed = after(4).select(torch.tensor([2, 0])).join(after(7).select(torch.tensor([1])))
    rows = torch.tensor([2, 0, 1])
    assert len(mixed) == 3
    following = content[rows, torch.tensor([4, 4, 7])][:, None]
    assert torch.allclose(backbone.step(mixed, following)[:, 0], z[rows, torch.tensor([5, 5, 8])], atol=2e-5)
    state = after(4)
    assert state.caches[0].keys is not None
    assert state.select(slice(0, 2)).caches[0].keys.data_ptr() == state.caches[0].keys.data_ptr()  # type: ignore[union-attr]


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_scalar_tokens_are_projected_before_they_are_known(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as memory goes: with it and without, of all rows and of some, where the embedding is a line or nothing."""
    backbone = make("var", depth=depth)
    condition, tokens, _ = inputs(backbone)
    tokens[0] = torch.linspace(-300, 300, L)[:, None]
    for fault in ("none", "parallel", "zero"):
        if fault == "parallel":  # x vanishes at f = 2
            weight = backbone.token_embed.get_parameter("weight")
            backbone.positions.copy_(-2 * weight[:, 0].expand_as(backbone.positions))
            backbone.token_embed.get_parameter("bias").zero_()
            tokens[1] = torch.linspace(2 - 1e-3, 2 + 1e-3, L)[:, None]
        elif fault == "zero":
            backbone.token_embed.get_parameter("weight").zero_()
        z = backbone.sequence(condition, tokens)
        assert backbone.start(condition).scalar_qkv is not None
        atol = 5e-3 if fault == "parallel" else 2e-5  # of what is nearly 0 the norm magnifies rounding
        assert torch.allclose(one_by_one(backbone, condition, tokens, None), z, atol=atol), fault
    assert backbone.double().start(Condition(condition.vectors.double())).scalar_qkv is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert backbone.float().start(condition).scalar_qkv is None, "which rounds otherwise"
    assert make("adaln").start(condition).scalar_qkv is None
    monkeypatch.setattr(scalar_qkv, "CAP", 3 * (2 + L) * 3 * C - 1)
    assert backbone.start(condition).scalar_qkv is None
    assert torch.allclose(one_by_one(backbone, condition, tokens, None), z, atol=2e-5)


@torch.no_grad()
def test_packed_weights_give_the_same() -> None:
    for variant in ("llamagen", "var"):
        backbone = make(variant, width=128, heads=4)
        condition, tokens, order = inputs(backbone)
        z = backbone.sequence(condition, tokens, order)
        prepare(backbone, keep=("token_embed",))
        assert torch.allclose(backbone.sequence(condition, tokens, order), z, atol=1e-4)
        assert torch.allclose(one_by_one(backbone, condition, tokens, order), z, atol=1e-4)
        prepare(other := make(variant, width=128, heads=4), torch.bfloat16, keep=("token_embed",))
        half = one_by_one(other, condition, tokens, order)
        assert 0 < float((half - z).abs().mean()) < 0.1 * float(z.abs().mean())


@torch.no_grad()
def test_the_modulated_block_is_that_of_the_equations() -> None:
    """VAR's, written out: adaLN in the order gamma1, gamma2, scale1, scale2, shift1, shift2."""
    block: Any = make("var").get_submodule("blocks.0")
    g = torch.Generator().manual_seed(5)
    x, condition = torch.randn(2, L, C, generator=g), torch.randn(2, 10, generator=g)
    six = F.linear(F.silu(condition), block.modulation.weight, block.modulation.bias).view(2, 6, 1, C)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = six.unbind(1)

    def norm(t: Tensor) -> Tensor:
        return F.layer_norm(t, (C,), eps=1e-6)

    a, m = block.attention, block.mlp
    y = norm(x) * (1 + scale1) + shift1
    bias = torch.cat([a.q_bias, torch.zeros(C), a.v_bias])
    q, k, v = F.linear(y, a.qkv.weight, bias).view(2, L, 3, 2, C // 2).permute(2, 0, 3, 1, 4)
    scores = 0.25 / (C // 2) ** 0.5 * q @ k.transpose(-2, -1)
    scores = scores.masked_fill(~torch.ones(L, L, dtype=torch.bool).tril(), float("-inf"))
    expected = x + gamma1 * a.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    y = norm(expected) * (1 + scale2) + shift2
    expected = expected + gamma2 * m.down(F.gelu(m.fc1(y), approximate="tanh"))
    ours = block(x, Window(causal=True), modulation=block.modulate(F.silu(condition)))
    assert torch.allclose(ours, expected, atol=1e-5)


def test_modulated_blocks_begin_as_the_identity_nearly() -> None:
    with seeded(0):
        block: Any = Causal(L, D, width=C, depth=2, conditioning="adaln").eval().get_submodule("blocks.0")
    x = torch.randn(2, L, C)
    activated = F.silu(torch.randn(2, C))
    assert torch.allclose(block(x, Window(causal=True), modulation=block.modulate(activated)), x, atol=1e-3)


def test_every_parameter_is_trained() -> None:
    for variant in VARIANTS:
        backbone = make(variant)
        condition, tokens, order = inputs(backbone)
        backbone.sequence(condition, tokens, order).square().sum().backward()
        idle = [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
        assert not idle, (variant, idle)


@torch.no_grad()
def test_a_step_waits_for_no_device() -> None:
    """No number of a tensor is looked at."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            looks = ("_local_scalar_dense", "nonzero", "equal.default", "is_nonzero")
            assert not any(name in str(func) for name in looks), func
            return func(*args, **(kwargs or {}))

    for variant in ("llamagen", "any"):
        backbone = make(variant)
        condition, tokens, order = inputs(backbone)
        state = backbone.start(condition, order)
        with Watch():
            for i in range(3):
                backbone.step(state, tokens[:, i : i + 1] if i else None)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["llamagen", "any", "var", "long-prefix"])
@torch.no_grad()
def test_a_step_compiles_into_one_graph_for_all_positions(variant: str) -> None:
    backbone = make(variant)
    condition, tokens, order = inputs(backbone)
    z = backbone.sequence(condition, tokens, order)
    graphs: list[Any] = []
    torch._dynamo.reset()

    def counting(graph: Any, _example: Any) -> Any:
        graphs.append(graph)
        return graph

    backbone.whole_cache = True
    backbone._advance = torch.compile(backbone._advance, fullgraph=True, backend=counting)  # type: ignore[method-assign]
    assert torch.allclose(one_by_one(backbone, condition, tokens, order), z, atol=2e-5)
    assert len(graphs) <= 2, "one for the prefix, one for all later steps"


# --- positions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(golden("llamagen").glob("rope2d*.safetensors")), ids=lambda p: p.stem)
def test_rotary_positions_are_those_of_the_official_code(path: Any) -> None:
    file = load_file(path)
    tables = {name: theirs for name, theirs in file.items() if name.startswith("freqs_")}
    assert tables
    for name, theirs in tables.items():
        parts = name.split("_")
        side, d, prefix = int(parts[1][1:]), int(parts[2][2:]), int(parts[3][3:])
        ours = rotation(grid_places((side, side), prefix), d)
        ours[:prefix] = 0
        if "rows" in parts:
            ours = ours[[int(row) for row in parts[parts.index("rows") + 1 :]]]
        elif "rope_in" in file and file["rope_in"].shape[1::2] == (len(ours), d):  # (B, S, h, d)
            turned = rotate(file["rope_in"].transpose(1, 2), ours).transpose(1, 2)
            assert torch.allclose(turned, file["rope_out"], atol=1e-6), name
        assert torch.allclose(ours, theirs, atol=1e-6), name


def test_rotation_keeps_lengths_and_tells_differences_alone() -> None:
    table = rotation(grid_places((3, 3), 2), 8)
    x = torch.randn(1, 1, 1, 8)
    turned = rotate(x.expand(1, 1, 11, 8), table)
    assert torch.allclose(turned.norm(dim=-1), x.norm().expand(1, 1, 11), atol=1e-5)
    dots = (turned @ turned.transpose(-2, -1))[0, 0]
    assert torch.allclose(dots[2, 3], dots[6, 7], atol=1e-5), "one column to the right, in any row"
    places = grid_places((3, 3), 2).tolist()
    assert len({tuple(p) for p in places}) == 11 and places[:3] == [[-2.0, -2.0], [-1.0, -1.0], [0.0, 0.0]]


def test_positions_are_resized_with_the_grid() -> None:
    for variant, rows in (("projected", 2 + 24 - 1), ("any-learned", 2 + 24), ("any", None)):
        state = {f"backbone.{name}": t for name, t in make(variant).state_dict().items()}
        resized = Causal.resized(state, (3, 4), (4, 6))
        if rows:
            assert resized["backbone.positions"].shape == (rows, C)
            assert torch.equal(resized["backbone.positions"][:2], state["backbone.positions"][:2])
        if "any" in variant:
            assert resized["backbone.ask_positions"].shape == (24, C)
        assert Causal.resized(state, (3, 4), (3, 4)).keys() == state.keys()


# --- refusals -----------------------------------------------------------------------------------------------------


def test_the_hidden_width_is_llamas() -> None:
    widths = {768: 2048, 1024: 2816, 1280: 3584, 1536: 4096, 3200: 8704, 64: 192}
    assert {width: usual_hidden(width, "swiglu") for width in widths} == widths
    assert usual_hidden(64, "gelu-tanh") == 256


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": "rastr"}, "order: 'rastr' is not known; did you mean 'raster'"),
        ({"prefix": 0}, "prefix: 0 is not allowed"),
        ({"heads": 3}, "heads: 3 does not divide the width 32"),
        ({"heads": 16}, "rope needs a multiple of 4"),
        ({"grid": (2, 5)}, "grid: .* is not allowed for 12 tokens"),
        ({"conditioning": "adaln", "start_token": False}, "start_token: False is not allowed with conditioning"),
        ({"dropout": 1.0}, "dropout: 1.0 is not allowed"),
        ({"attention_scale": 0.0}, "attention_scale: 0.0 is not allowed"),
        ({"vocab": V}, "give dim"),
    ],
)
def test_what_makes_no_backbone_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Causal(L, **{"dim": D, "width": C, "depth": 1, **options})


@torch.no_grad()
def test_what_makes_no_step_is_refused() -> None:
    backbone, free = make("features"), make("any")
    condition, tokens, order = inputs(free)
    with pytest.raises(UsageError, match="order: a backbone of order 'raster' has its own"):
        backbone.start(condition, order)
    with pytest.raises(UsageError, match="order: None is not"):
        free.start(condition)
    state = backbone.start(condition)
    with pytest.raises(UsageError, match="content: all 12 tokens are known, so there is no next token"):
        backbone.step(state, tokens)
    backbone.step(state, tokens[:, :5])
    with pytest.raises(UsageError, match="content: all 12 tokens are known"):
        backbone.step(state, tokens[:, 5:])
    for asked in ({"ask": torch.zeros(3, 2, dtype=torch.long)}, {"ask_valid": torch.ones(3, 1, dtype=torch.bool)}):
        with pytest.raises(UsageError, match="ask: this backbone gives z of one token a step"):
            backbone.step(state, tokens[:, 5:6], **asked)
    with pytest.raises(UsageError, match="one vector for each image, not 2"):
        make("adaln", prefix=2).start(Condition(torch.zeros(3, 2, 10)))


@pytest.mark.parametrize(
    ("shape", "valid", "words"),
    [
        ((3, 4, C), None, r"condition: shape \(3, 4, 32\) is not \(3, 1 or 3, 32\), with a prefix of 3"),
        ((3, 3, C + 1), None, "condition: shape"),
        (
            (3, 3, C),
            torch.ones(3, 4, dtype=torch.bool),
            r"condition.valid: torch.bool of shape \(3, 4\) is not",
        ),
        ((3, 3, C), torch.ones(3, 3), "condition.valid: torch.float32 of shape"),
    ],
)
def test_a_prefix_of_another_length_is_refused(shape: tuple[int, ...], valid: Tensor | None, words: str) -> None:
    backbone = make("long-prefix")
    _, tokens, _ = inputs(backbone)
    condition = Condition(torch.zeros(shape), valid)
    for call in (lambda: backbone.sequence(condition, tokens), lambda: backbone.start(condition)):
        with pytest.raises(UsageError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
