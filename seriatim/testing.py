"""Generic tests that any head must pass: `check_head(MyHead, width=64)`.

They need torch alone, run in seconds on a CPU, and raise AssertionError with a sentence that says what is wrong.

N tokens, C width of z, D features of a token or V codes, B images.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seriatim.core.errors import UsageError
from seriatim.core.random import Noise
from seriatim.heads.base import Head

Z, D = 6, 3


def check_head(make: Callable[..., Head], *, dim: int = D, learn: bool = True, steps: int = 300, **config: Any) -> Head:
    """Build `make(dim=dim, **config)` and check the contract of `heads/base.py`; return the head.

    A head of codes (`discrete = True`) is built as `make(vocab=dim, **config)`. With `learn`, the head is also trained
    for `steps` steps on a known density (two Gaussians whose mean follows z; codes whose odds do) and must then draw
    from it. Sampling options other than the defaults are the head's own business.
    """
    size = {"vocab" if getattr(make, "discrete", False) else "dim": dim}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of the CPU alone
        head = make(**size, **config)
        assert isinstance(head, Head), f"{make!r} made a {type(head).__name__}, which is no seriatim.heads.Head"
        name = type(head).__name__
        assert head.output == dim, f"{name}.output is {head.output!r}; it must be {next(iter(size))}, {dim}"
        head.bind(Z)
        assert head.z_dim == Z, f"{name}.bind({Z}) left z_dim at {head.z_dim!r}; call super().bind(z_dim)"
        _refuses(lambda: head.bind(Z + 1), f"{name}.bind must refuse a second, other width")
        _round_trip(make, head)
        _loss(head)
        _rows_are_independent(head)
        _sampling(head)
        _says_what_it_cannot(head)
        if learn:
            (_learns_codes if head.discrete else _learns)(make(**size, **config), steps)
    return head


def _noise(rows: int, seed: int = 0) -> Noise:
    return Noise.per_image(range(seed, seed + rows))


def _targets(head: Head, N: int) -> Tensor:
    """Tokens to model: (N, D), or codes (N,)."""
    return torch.arange(N) % head.output if head.discrete else torch.randn(N, head.output)


def _refuses(call: Callable[[], object], what: str) -> None:
    try:
        call()
    except UsageError as error:
        assert "\n" not in str(error), f"{what}: the message must be one line"
        return
    raise AssertionError(f"{what} with a UsageError")


def _round_trip(make: Callable[..., Head], head: Head) -> None:
    """A head is rebuilt from its config, on the meta device, and takes the weights: what loading a model does."""
    name = type(head).__name__
    with torch.device("meta"):
        twin = make(**head.config)
        twin.bind(Z)
    twin.load_state_dict(head.state_dict(), assign=True)
    assert twin.config == head.config, f"{name}.config must be the constructor's arguments: {head.config}"
    z, noise = torch.randn(4, Z), [_noise(4), _noise(4)]
    same = torch.equal(head.sample(z, noise[0]), twin.sample(z, noise[1]))
    assert same, f"{name} rebuilt from config and weights draws something else: it keeps state outside of them"


def _loss(head: Head) -> None:
    name, N = type(head).__name__, 5
    z, target = torch.randn(N, Z, requires_grad=True), _targets(head, N)
    loss = head.loss(z, target, _noise(N))
    assert loss.sum.shape == (N,), (
        f"{name}.loss().sum has shape {tuple(loss.sum.shape)}, not ({N},), one for each token"
    )
    assert loss.count.shape == (N,), f"{name}.loss().count has shape {tuple(loss.count.shape)}, not ({N},)"
    assert bool((loss.count > 0).all()), f"{name}.loss().count must be positive"
    assert bool(torch.isfinite(loss.sum).all()), f"{name}.loss() is not finite"
    for key, part in loss.parts.items():
        assert part.shape == (N,), f"{name}.loss().parts[{key!r}] has shape {tuple(part.shape)}, not ({N},)"
    loss.sum.sum().backward()
    head.zero_grad()
    empty = head.loss(torch.randn(0, Z), _targets(head, 0), _noise(N).select(torch.empty(0, dtype=torch.long)))
    assert empty.sum.shape == (0,), f"{name}.loss() of no tokens must be empty"


def _rows_are_independent(head: Head) -> None:
    """A token's loss and sample are the same alone as among others: float32 products may differ by rounding."""
    name, N = type(head).__name__, 5
    z, target = torch.randn(N, Z), _targets(head, N)
    with torch.no_grad():
        together = head.loss(z, target, _noise(N)).sum
        alone = head.loss(z[2:3], target[2:3], _noise(1, seed=2)).sum
    close = torch.allclose(together[2:3], alone, rtol=1e-4, atol=1e-4)
    assert close, f"{name}.loss() of a token depends on the other tokens ({together[2]:.6f}, alone {alone[0]:.6f})"
    many, one = head.sample(z, _noise(N)).float(), head.sample(z[2:3], _noise(1, seed=2)).float()
    close = torch.allclose(many[2:3], one, rtol=1e-4, atol=1e-4 * float(one.abs().max() + 1))
    assert close, f"{name}.sample() of a token depends on the other tokens: draw from `noise`, row by row"


def _sampling(head: Head) -> None:
    name, N = type(head).__name__, 32 if head.discrete else 4
    z = torch.randn(N, Z)
    torch_state = torch.get_rng_state()
    x = head.sample(z, _noise(N))
    assert torch.equal(torch_state, torch.get_rng_state()), f"{name}.sample() draws from torch's global generator"
    tail = () if head.discrete else (head.output,)
    assert x.shape == (N, *tail), f"{name}.sample() has shape {tuple(x.shape)}, not {(N, *tail)}"
    if head.discrete:
        assert x.dtype == torch.long, f"{name}.sample() draws {x.dtype}; codes are int64"
        assert 0 <= int(x.min()) <= int(x.max()) < head.output, (
            f"{name}.sample() draws codes outside 0..{head.output - 1}"
        )
    assert bool(torch.isfinite(x).all()), f"{name}.sample() is not finite"
    assert torch.equal(x, head.sample(z, _noise(N))), f"{name}.sample() differs with the same noise"
    assert not torch.equal(x, head.sample(z, _noise(N, seed=9))), f"{name}.sample() ignores its noise"
    assert not x.requires_grad, f"{name}.sample() must run without gradients"
    none = head.sample(z[:0], _noise(N).select(torch.empty(0, dtype=torch.long)))
    assert none.shape == (0, *tail), f"{name}.sample() of no tokens must be empty"
    if head.guides:
        z_null = torch.randn(N, Z)
        unguided = head.sample(z, _noise(N), z_null, 1.0)
        assert torch.allclose(x, unguided, rtol=1e-4, atol=1e-4), f"{name}: guidance 1 must be no guidance"
        per_row = head.sample(z, _noise(N), z_null, torch.full((N,), 1.5))
        assert torch.allclose(per_row, head.sample(z, _noise(N), z_null, 1.5), rtol=1e-4, atol=1e-4), (
            f"{name}: a guidance scale for each row must equal the same scale for all"
        )
        _refuses(lambda: head.sample(z, _noise(N), None, 2.0), f"{name}: guidance without z_null must be refused")
    if head.has_density:
        density = head.log_prob(z, x)
        assert density.shape == (N,), f"{name}.log_prob() has shape {tuple(density.shape)}, not ({N},)"


def _says_what_it_cannot(head: Head) -> None:
    name, z = type(head).__name__, torch.randn(2, Z)
    _refuses(lambda: head.sample(z, _noise(2), temperature=-1.0), f"{name}: a negative temperature must be refused")
    early = f"{name}.check_options must refuse a negative temperature, before any work; call super().check_options"
    _refuses(lambda: head.check_options(temperature=-1.0), early)
    takes = inspect.signature(head.sample).parameters
    missing = [] if any(p.kind is p.VAR_KEYWORD for p in takes.values()) else sorted(head.sample_options - set(takes))
    assert not missing, f"{name}.sample_options names {missing[0]}, which is no argument of {name}.sample"
    if not head.guides:
        _refuses(lambda: head.sample(z, _noise(2), z, 2.0), f"{name}.guides is False: it must refuse guidance")
    if not head.tempers:
        _refuses(lambda: head.sample(z, _noise(2), temperature=0.5), f"{name}.tempers is False: it must refuse 0.5")
    if not head.has_density:
        _refuses(lambda: head.log_prob(z, _targets(head, 2)), f"{name}.has_density is False: it must say so")


def known_density(z: Tensor, noise: Noise, dim: int) -> Tensor:
    """Two Gaussians of standard deviation 0.2 at m(z) + 1 and m(z) - 1, m(z) the first number of z: (N, D)."""
    sign = torch.where(noise.uniform() < 0.5, 1.0, -1.0)[:, None]
    return z[:, :1] + sign + 0.2 * noise.normal(dim)


def _learns(head: Head, steps: int) -> None:
    """After training on `known_density`, samples have its mean, its spread, and both its modes."""
    name, dim, N = type(head).__name__, head.output, 128
    head.bind(Z)
    optimiser = torch.optim.Adam(head.parameters(), lr=2e-3)
    for step in range(steps):
        noise = Noise.shared(step, N)
        z = noise.normal(Z)
        loss = head.loss(z, known_density(z, noise, dim), noise)
        optimiser.zero_grad()
        (loss.sum.sum() / loss.count.sum()).backward()
        optimiser.step()
    touched = [key for key, p in head.named_parameters() if p.grad is not None]
    assert touched, f"{name}: no parameter receives a gradient"
    noise = Noise.shared(10**6, 500)
    z = noise.normal(Z)
    x = head.sample(z, noise) - z[:, :1]  # (N, D), of modes at -1 and 1
    mean, std = x.mean(dim=0), x.std(dim=0)
    assert bool((mean.abs() < 0.25).all()), f"{name} has not learned how its token follows z: off by {mean.tolist()}"
    assert bool(((std - 1.02).abs() < 0.25).all()), f"{name}: standard deviation {std.tolist()}, the truth has 1.02"
    share = (x.mean(dim=1) > 0).float().mean()
    assert 0.3 < float(share) < 0.7, f"{name} draws the two modes with shares {share:.2f} and {1 - share:.2f}, not half"
    inside = (x.mean(dim=1).abs() - 1).abs() < 0.5
    assert float(inside.float().mean()) > 0.8, (
        f"{name} draws between the modes: {inside.float().mean():.0%} are near one"
    )


def _learns_codes(head: Head, steps: int) -> None:
    """After training, codes come with the odds that z says: p(code | z) is a softmax of the first numbers of z."""
    name, V, N = type(head).__name__, head.output, 128
    head.bind(Z)
    optimiser = torch.optim.Adam(head.parameters(), lr=2e-2)

    def odds(z: Tensor) -> Tensor:
        return (2 * z[:, [i % Z for i in range(V)]]).softmax(dim=1)  # (N, V)

    for step in range(steps):
        noise = Noise.shared(step, N)
        z = noise.normal(Z)
        codes = (noise.uniform()[:, None] > odds(z).cumsum(dim=1)[:, :-1]).sum(dim=1)  # (N,)
        loss = head.loss(z, codes, noise)
        optimiser.zero_grad()
        (loss.sum.sum() / loss.count.sum()).backward()
        optimiser.step()
    touched = [key for key, p in head.named_parameters() if p.grad is not None]
    assert touched, f"{name}: no parameter receives a gradient"
    noise = Noise.shared(10**6, 2000)
    z = noise.normal(1, Z)[:, 0]
    drawn = torch.nn.functional.one_hot(head.sample(z, noise), V).float()  # (N, V)
    for code in range(V):
        sure = odds(z)[:, code] > 0.7
        share = float(drawn[sure, code].mean())
        truth = float(odds(z)[sure, code].mean())
        assert abs(share - truth) < 0.1, (
            f"{name} draws code {code} with a share of {share:.2f}, the truth is {truth:.2f}"
        )
