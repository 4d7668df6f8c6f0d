"""Generic tests that any backbone must pass, parallel or sequential: `check_backbone(lambda: MyBackbone(9, 4))`.

B images, L tokens, N tokens asked for, C width of z.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seriatim.backbones.base import Backbone, Parallel, Sequential
from seriatim.conditions.base import Condition

B = 4


def check_backbone(make: Callable[[], Backbone], *, device: torch.device | str = "cpu", atol: float = 1e-4) -> Backbone:
    """Build `make()`, check the contract of `backbones/base.py` that it subclasses, and return the backbone.

    Its weights are made random first, so that nothing hides behind a layer that begins at zero. `atol` is what rounding
    may change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of the CPU alone
        backbone = make()
        name = type(backbone).__name__
        assert isinstance(backbone, Parallel | Sequential), f"{name} subclasses neither Parallel nor Sequential"
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, device="cpu"))
        backbone.to(device).eval()
        with torch.no_grad():
            if isinstance(backbone, Parallel):
                _parallel(backbone, torch.device(device), atol)
            else:
                _sequential(backbone, torch.device(device), atol)
    return backbone


def _inputs(backbone: Backbone, device: torch.device) -> tuple[Condition, Tensor]:
    spec = backbone.spec
    shape = (B, *spec.shape)
    tokens = torch.randint(spec.vocab or 1, shape, device="cpu") if spec.discrete else torch.randn(shape, device="cpu")
    return Condition(torch.randn(B, 1, backbone.width, device="cpu").to(device)), tokens.to(device)


def _other(backbone: Backbone, tokens: Tensor) -> Tensor:
    return (tokens + 1) % backbone.vocab if backbone.vocab is not None else tokens + 1


def _parallel(backbone: Parallel, device: torch.device, atol: float) -> None:
    name, L, C = type(backbone).__name__, backbone.tokens, backbone.z_dim
    condition, tokens = _inputs(backbone, device)
    counts = torch.tensor([0, L // 3, L // 2, L - 1], device="cpu")
    known = torch.rand(B, L, device="cpu").argsort(dim=1) < counts[:, None]
    ask = ~known  # another number in each image; the masks stay on the host
    z = backbone.z(condition, tokens, known, ask)
    N = int(ask.sum())
    assert z.shape == (N, C), f"{name}.z has shape {tuple(z.shape)}, not ({N}, {C}), a row for each token asked for"
    assert bool(torch.isfinite(z).all()), f"{name}.z is not finite"
    there = known[..., None].to(device) if tokens.ndim == 3 else known.to(device)
    unseen = torch.where(there, tokens, _other(backbone, tokens))
    same = torch.allclose(backbone.z(condition, unseen, known, ask), z, atol=atol)
    assert same, f"{name}.z looks at tokens that are not known"
    seen = torch.where(there, _other(backbone, tokens), tokens)
    rows = ask.nonzero()[:, 0]
    moved = (backbone.z(condition, seen, known, ask) - z).abs().amax(dim=1).cpu()[rows > 0]
    assert bool((moved > 0).all()), f"{name}.z ignores known tokens"
    for b in range(B):
        one = slice(b, b + 1)
        alone = backbone.z(condition.select(one), tokens[one], known[one], ask[one])
        assert torch.allclose(alone, z[(rows == b).to(device)], atol=atol), (
            f"{name}.z of an image depends on the other images, or on how many tokens they know"
        )
    few = ask & (torch.arange(L, device="cpu") % 2 == 0)
    some = z[few[ask].to(device)]
    assert torch.allclose(backbone.z(condition, tokens, known, few), some, atol=atol), (
        f"{name}.z of a token depends on what else is asked for, or is not in raster order"
    )
    moved_by = Condition(-condition.vectors)
    assert not torch.allclose(backbone.z(moved_by, tokens, known, ask), z, atol=atol), f"{name}.z ignores its condition"
    on_device = backbone.z(condition, tokens, known.to(device), ask.to(device))
    assert torch.allclose(on_device, z, atol=atol), f"{name}.z differs with masks on the device"
    if backbone.spec.grid is not None:
        _neighbours(backbone, condition, tokens, known, ask, atol)


def _neighbours(
    backbone: Parallel, condition: Condition, tokens: Tensor, known: Tensor, ask: Tensor, atol: float
) -> None:
    name, L, C = type(backbone).__name__, backbone.tokens, backbone.z_dim
    h, w = backbone.spec.grid or (1, L)
    every = backbone.z(condition, tokens, known, torch.ones_like(known)).view(B, h, w, C)
    padded = torch.nn.functional.pad(every, (0, 0, 1, 1, 1, 1))  # zeros outside
    shifts = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))  # itself, above, below, left, right
    around = torch.stack([padded[:, i : i + h, j : j + w] for i, j in shifts], dim=3).view(B, L, 5, C)
    z = backbone.z(condition, tokens, known, ask, neighbours=True)
    assert z.shape[1:] == (5, C), f"{name}.z with neighbours has shape {tuple(z.shape)}, not (N, 5, {C})"
    right = torch.allclose(z, around[ask.to(tokens.device)], atol=atol)
    assert right, f"{name}.z with neighbours: they are above, below, left and right of the token, zeros outside"


def _sequential(backbone: Sequential, device: torch.device, atol: float) -> None:
    name, L, C = type(backbone).__name__, backbone.tokens, backbone.z_dim
    condition, tokens = _inputs(backbone, device)
    order = torch.rand(B, L, device="cpu").argsort(dim=1).to(device) if backbone.any_order else None
    raster = torch.arange(L, device=device).expand(B, L)
    places, rows = raster if order is None else order, torch.arange(B, device=device)[:, None]
    content = tokens[rows, places]  # as the tokens come
    z = backbone.sequence(condition, tokens, order)
    assert z.shape == (B, L, C), f"{name}.sequence has shape {tuple(z.shape)}, not ({B}, {L}, {C})"
    for i in range(L):
        changed = tokens.clone()
        changed[rows[:, 0], places[:, i]] = _other(backbone, tokens)[rows[:, 0], places[:, i]]
        after = backbone.sequence(condition, changed, order)
        before = torch.allclose(after[:, : i + 1], z[:, : i + 1], atol=atol)
        assert before, f"{name}.sequence: z looks ahead, at token {i}"
        if i + 1 < L:
            assert not torch.allclose(after[:, i + 1], z[:, i + 1], atol=1e-6), f"{name}.sequence ignores token {i}"
    moved = backbone.sequence(Condition(-condition.vectors), tokens, order)
    assert not torch.allclose(moved[:, 0], z[:, 0], atol=atol), f"{name}.sequence ignores its condition"
    for size in (1, 2, L - 1):  # tokens one by one, two by two, and all at once
        state = backbone.start(condition, order)
        for begin in range(0, L, size):
            group = content[:, max(0, begin - size) : begin] if begin else None
            step = backbone.step(state, group)
            assert step.shape == (B, 1, C), f"{name}.step has shape {tuple(step.shape)}, not ({B}, 1, {C})"
            assert torch.allclose(step[:, 0], z[:, begin], atol=atol), (
                f"{name}.step, {size} tokens at a time, differs from sequence() at token {begin}"
            )
    _uneven(backbone, condition, content, order, z, atol)


def _uneven(
    backbone: Sequential, condition: Condition, content: Tensor, order: Tensor | None, z: Tensor, atol: float
) -> None:
    """Rows that have seen different numbers of tokens, selected and joined."""
    name, L, device = type(backbone).__name__, backbone.tokens, content.device
    rows, seen = torch.arange(B, device="cpu"), torch.zeros(B, dtype=torch.long, device="cpu")
    state = backbone.start(condition, order)
    for counts in ([0, 1, 2, L // 2], [1, 0, 1, 1], [1, 1, 0, 1]):
        count = torch.tensor(counts, device="cpu")
        at = (seen[:, None] + torch.arange(max(counts), device="cpu")).clamp(max=L - 1)
        valid = torch.arange(max(counts), device="cpu") < count[:, None]
        step = backbone.step(state, content[rows[:, None].to(device), at.to(device)], valid)
        seen = seen + count
        assert torch.allclose(step[:, 0], z[rows.to(device), seen.to(device)], atol=atol), (
            f"{name}.step: rows with fewer valid tokens differ from sequence()"
        )
    for chosen in (torch.tensor([2, 0], device="cpu"), slice(0, 2)):
        some = state.select(chosen)
        left = rows[chosen]
        assert len(some) == 2, f"{name}: a state of two selected rows has length {len(some)}"
        following = content[left.to(device), seen[left].to(device)][:, None]
        wanted = z[left.to(device), (seen[left] + 1).to(device)]
        if isinstance(chosen, slice):  # which shares memory with the state: the rows join others of another length
            fresh = backbone.start(condition.select(slice(3, 4)), None if order is None else order[3:4])
            some = some.join(fresh)
            padding = torch.cat([following, content[3:4, :1]])
            step = backbone.step(some, padding)[:, 0]
            wanted = torch.cat([wanted, z[3:4, 1]])
        else:
            step = backbone.step(some, following)[:, 0]
        assert torch.allclose(step, wanted, atol=atol), f"{name}: selected or joined rows do not go on as they were"
