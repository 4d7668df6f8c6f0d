"""Generic tests that any backbone must pass, parallel or sequential: `check_backbone(lambda: MyBackbone(9, 4))`.

B images, L tokens, N tokens asked for, C width of z.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seriatim.backbones.base import Backbone, Parallel, Sequential
from seriatim.conditions.base import Condition
from seriatim.core.errors import UsageError

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
        assert backbone.tokens >= 5, f"{name} has {backbone.tokens} tokens; make one of at least 5, which show enough"
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
    # Tokens one by one and, where they do not come in groups, two by two and all at once.
    for size in (1,) if backbone.groups else (1, 2, L - 1):
        state = backbone.start(condition, order)
        for begin in range(0, L, size):
            group = content[:, max(0, begin - size) : begin] if begin else None
            step = backbone.step(state, group)
            assert step.shape == (B, 1, C), f"{name}.step has shape {tuple(step.shape)}, not ({B}, 1, {C})"
            assert torch.allclose(step[:, 0], z[:, begin], atol=atol), (
                f"{name}.step, {size} tokens at a time, differs from sequence() at token {begin}"
            )
    if backbone.groups:
        _groups(backbone, condition, tokens, order, z, atol)
    else:
        try:
            backbone.step(backbone.start(condition, order), ask=places[:, :2])
        except UsageError:
            pass
        else:
            raise AssertionError(f"{name}.step gives z of several tokens, so set `groups`, or else raise UsageError")
    _uneven(backbone, condition, tokens, order, atol)


def _groups(
    backbone: Sequential, condition: Condition, tokens: Tensor, order: Tensor | None, z: Tensor, atol: float
) -> None:
    """Check tokens that come together: one pass against steps, what each group depends on, and kinds of requests."""
    name, L, device = type(backbone).__name__, backbone.tokens, tokens.device
    places = torch.arange(L, device=device).expand(B, L) if order is None else order
    rows = torch.arange(B, device=device)[:, None]
    content, other = tokens[rows, places], _other(backbone, tokens)
    singly = backbone.sequence_of_groups(condition, tokens, order, [1] * L)
    alike = singly.shape == z.shape and torch.allclose(singly, z, atol=atol)
    assert alike, f"{name}.sequence_of_groups of single tokens differs from sequence()"
    for sizes in ([1, 2, L - 3], [L // 2, L - L // 2], [L]):
        made = backbone.sequence_of_groups(condition, tokens, order, sizes)
        shape = (B, L, backbone.z_dim)
        assert made.shape == shape, f"{name}.sequence_of_groups has shape {tuple(made.shape)}, not {shape}"
        state, group, first = backbone.start(condition, order), None, 0
        for size in sizes:
            end = first + size
            changed = tokens.clone()
            changed[rows, places[:, first:]] = other[rows, places[:, first:]]
            blind = backbone.sequence_of_groups(condition, changed, order, sizes)[:, first:end]
            assert torch.allclose(blind, made[:, first:end], atol=atol), (
                f"{name}.sequence_of_groups: z of a group looks at its own tokens, or at later ones"
            )
            for i in range(first):
                changed = tokens.clone()
                changed[rows[:, 0], places[:, i]] = other[rows[:, 0], places[:, i]]
                seen = backbone.sequence_of_groups(condition, changed, order, sizes)[:, first:end]
                assert not torch.allclose(seen, made[:, first:end], atol=1e-6), (
                    f"{name}.sequence_of_groups ignores token {i} of an earlier group"
                )
            ask = places[:, first:end]
            step = backbone.step(state, group, ask=ask)
            assert step.shape == made[:, first:end].shape and torch.allclose(step, made[:, first:end], atol=atol), (
                f"{name}.step with a group of {size} differs from sequence_of_groups()"
            )
            assert torch.allclose(backbone.step(state, ask=ask.flip(1)).flip(1), step, atol=atol), (
                f"{name}.step: a request changes the state, or z depends on the order of the request"
            )
            assert torch.allclose(backbone.step(state), step[:, :1], atol=atol), (
                f"{name}.step: z of a token depends on what else is requested, or without `ask` it is not the next one"
            )
            valid = torch.arange(size, device="cpu") < torch.arange(1, B + 1, device="cpu")[:, None]
            padded = ask.where(valid.to(device), ask[:, :1])
            few = backbone.step(state, ask=padded, ask_valid=valid)[valid.to(device)]
            assert torch.allclose(few, step[valid.to(device)], atol=atol), (
                f"{name}.step: rows with fewer valid requests differ"
            )
            group, first = content[:, first:end], end


def _uneven(backbone: Sequential, condition: Condition, tokens: Tensor, order: Tensor | None, atol: float) -> None:
    """Rows that have seen different numbers of tokens, selected and joined."""
    name, L, device = type(backbone).__name__, backbone.tokens, tokens.device
    rows, seen = torch.arange(B, device="cpu"), torch.zeros(B, dtype=torch.long, device="cpu")
    places = torch.arange(L, device=device).expand(B, L) if order is None else order
    content = tokens[rows[:, None].to(device), places]
    came: list[list[int]] = [[] for _ in range(B)]  # the sizes of what each row has seen step by step

    def following(chosen: Tensor) -> Tensor:
        """z of the next token of the rows `chosen`, from one pass over each of them."""
        found = []
        for b in chosen.tolist():
            known, one = sum(came[b]), slice(b, b + 1)
            alone, own = (condition.select(one), tokens[one]), None if order is None else order[one]
            if backbone.groups:
                z = backbone.sequence_of_groups(*alone, own, [*filter(None, came[b]), L - known])
            else:
                z = backbone.sequence(*alone, own)
            found.append(z[0, known])
        return torch.stack(found)

    state = backbone.start(condition, order)
    for counts in ([0, 1, 2, L // 2], [1, 0, 1, 1], [1, 1, 0, 1]):
        count = torch.tensor(counts, device="cpu")
        at = (seen[:, None] + torch.arange(max(counts), device="cpu")).clamp(max=L - 1)
        valid = torch.arange(max(counts), device="cpu") < count[:, None]
        step = backbone.step(state, content[rows[:, None].to(device), at.to(device)], valid)
        seen = seen + count
        for sizes, added in zip(came, counts, strict=True):
            sizes.append(added)
        assert torch.allclose(step[:, 0], following(rows), atol=atol), (
            f"{name}.step: rows with fewer valid tokens differ from sequence()"
        )
    for chosen in (torch.tensor([2, 0], device="cpu"), slice(0, 2)):
        some, left = state.select(chosen), rows[chosen]
        assert len(some) == 2, f"{name}: a state of two selected rows has length {len(some)}"
        content_of_next = content[left.to(device), seen[left].to(device)][:, None]
        before = [list(sizes) for sizes in came]
        if isinstance(chosen, slice):  # which shares memory with the state: the rows join others of another length
            fresh = backbone.start(condition.select(slice(3, 4)), None if order is None else order[3:4])
            some, left = some.join(fresh), torch.cat([left, rows[3:4]])
            content_of_next = torch.cat([content_of_next, content[3:4, :1]])
            came[3] = []
        for b in left.tolist():
            came[b].append(1)
        step = backbone.step(some, content_of_next)[:, 0]
        assert torch.allclose(step, following(left), atol=atol), (
            f"{name}: selected or joined rows do not go on as they were"
        )
        came = before
