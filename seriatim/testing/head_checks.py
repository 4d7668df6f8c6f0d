"""Generic tests that any head must pass: `check_head(MyHead, width=64)`.

They need torch alone, run in seconds on a CPU, and raise AssertionError with a sentence that says what is wrong.

N tokens, C width of z, D features of a token or V codes, B images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys
from seriatim.heads.base import Guidance, Head
from seriatim.models.build import head_config
from seriatim.models.nested import Nested

Z, D = 6, 3


def check_head(
    make: Callable[..., Head],
    *,
    dim: int = D,
    learn: bool = True,
    steps: int = 200,
    device: torch.device | str = "cpu",
    **config: Any,
) -> Head:
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
        head.to(device)
        _stir(head)
        _round_trip(make, head)
        _loss(head)
        _rows_are_independent(head)
        _sampling(head)
        _keeps_nothing(make, head)
        _says_what_it_cannot(head)
        if learn:
            (_learns_codes if head.discrete else _learns)(make(**size, **config), steps, torch.device(device))
    return head


@torch.no_grad()
def _stir(head: Head) -> None:
    """Add noise to all weights: a fresh head may have zeros in its output, behind which any fault would hide."""
    noise = torch.Generator().manual_seed(1)
    for parameter in head.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise, device="cpu").to(parameter.device))


def _on(head: Head) -> torch.device:
    return next(head.parameters()).device


def _z(head: Head, N: int) -> Tensor:
    return torch.randn(N, Z, device="cpu").to(_on(head))


def _keys(head: Head, rows: int, seed: int = 0) -> Keys:
    return Keys.of_seeds(range(seed, seed + rows), _on(head))


def _targets(head: Head, N: int) -> Tensor:
    """Tokens to model: (N, D), or codes (N,)."""
    target = torch.arange(N) % head.output if head.discrete else torch.randn(N, head.output, device="cpu")
    return target.to(_on(head))


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
        config = _config(head)
        twin = make(**config)
        twin.bind(Z)
    twin.load_state_dict(head.state_dict(), assign=True)
    assert _config(twin) == config, f"{name}.config must be the constructor's arguments: {config}"
    z, keys = _z(head, 4), [_keys(head, 4), _keys(head, 4)]
    same = torch.equal(head.sample(z, keys[0]), twin.sample(z, keys[1]))
    assert same, f"{name} rebuilt from config and weights draws something else: it keeps state outside of them"


def _config(head: Head) -> dict[str, Any]:
    """The arguments that make the head; a nested one is described by what it is composed of."""
    return {k: v for k, v in head_config(head).items() if k != "kind"} if isinstance(head, Nested) else head.config


def _keeps_nothing(make: Callable[..., Head], head: Head) -> None:
    """What is drawn follows from the weights as they are now, also where these are written through `.data`."""
    name, z = type(head).__name__, _z(head, 16)
    twin = make(**_config(head))
    twin.bind(Z)
    twin.to(_on(head)).load_state_dict(head.state_dict())
    head.sample(z, _keys(head, 16))
    for part in (head, twin):
        for i, parameter in enumerate(part.parameters()):
            parameter.data.mul_(1.02).add_(0.01 * (1 + i % 3))
    same = torch.equal(head.sample(z, _keys(head, 16)), twin.sample(z, _keys(head, 16)))
    assert same, f"{name} keeps something of earlier weights: move it into plan(), which is made for each batch"


def _loss(head: Head) -> None:
    name, N = type(head).__name__, 5
    z, target = _z(head, N).requires_grad_(), _targets(head, N)
    loss = head.loss(z, target, _keys(head, N))
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
    empty = head.loss(_z(head, 0), _targets(head, 0), _keys(head, 0))
    assert empty.sum.shape == (0,), f"{name}.loss() of no tokens must be empty"


def _rows_are_independent(head: Head) -> None:
    """A token's loss and sample are the same alone as among others: float32 products may differ by rounding."""
    name, N = type(head).__name__, 5
    z, target = _z(head, N), _targets(head, N)
    with torch.no_grad():
        together = head.loss(z, target, _keys(head, N)).sum
        alone = head.loss(z[2:3], target[2:3], _keys(head, 1, seed=2)).sum
    close = torch.allclose(together[2:3], alone, rtol=1e-4, atol=1e-4)
    assert close, f"{name}.loss() of a token depends on the other tokens ({together[2]:.6f}, alone {alone[0]:.6f})"
    many, one = head.sample(z, _keys(head, N)).float(), head.sample(z[2:3], _keys(head, 1, seed=2)).float()
    close = torch.allclose(many[2:3], one, rtol=1e-4, atol=1e-4 * float(one.abs().max() + 1))
    assert close, f"{name}.sample() of a token depends on the other tokens: draw from `keys`, row by row"


def _sampling(head: Head) -> None:
    name, N = type(head).__name__, 32 if head.discrete else 4
    z = _z(head, N)
    torch_state = torch.get_rng_state()
    x = head.sample(z, _keys(head, N))
    assert torch.equal(torch_state, torch.get_rng_state()), f"{name}.sample() draws from torch's global generator"
    tail = () if head.discrete else (head.output,)
    assert x.shape == (N, *tail), f"{name}.sample() has shape {tuple(x.shape)}, not {(N, *tail)}"
    if head.discrete:
        assert x.dtype == torch.long, f"{name}.sample() draws {x.dtype}; codes are int64"
        assert 0 <= int(x.min()) <= int(x.max()) < head.output, (
            f"{name}.sample() draws codes outside 0..{head.output - 1}"
        )
    assert bool(torch.isfinite(x).all()), f"{name}.sample() is not finite"
    assert torch.equal(x, head.sample(z, _keys(head, N))), f"{name}.sample() differs with the same keys"
    assert not torch.equal(x, head.sample(z, _keys(head, N, seed=9))), f"{name}.sample() ignores its keys"
    assert not x.requires_grad, f"{name}.sample() must run without gradients"
    none = head.sample(z[:0], _keys(head, 0))
    assert none.shape == (0, *tail), f"{name}.sample() of no tokens must be empty"
    if head.guides:
        z_null = _z(head, N)
        some = Guidance.of(torch.where(torch.arange(N, device="cpu") % 2 == 0, 1.0, 1.5), N, z.device)
        every = Guidance.of(1.5, N, z.device)
        mixed = head.sample(z, _keys(head, N), None, z_null, some)
        assert torch.allclose(x[::2], mixed[::2], rtol=1e-4, atol=1e-4), f"{name}: guidance 1 must be no guidance"
        whole = head.sample(z, _keys(head, N), None, z_null, every)
        assert torch.allclose(mixed[1::2], whole[1::2], rtol=1e-4, atol=1e-4), (
            f"{name}: a row's guidance must not depend on the scales of other rows"
        )
        _refuses(
            lambda: head.sample(z, _keys(head, N), None, None, every),
            f"{name}: refuse guidance without z_null",
        )
    if head.has_density:
        density = head.log_prob(z, x)
        assert density.shape == (N,), f"{name}.log_prob() has shape {tuple(density.shape)}, not ({N},)"


def _says_what_it_cannot(head: Head) -> None:
    name, z = type(head).__name__, _z(head, 2)
    _refuses(
        lambda: head.sample(z, _keys(head, 2), temperature=-1.0), f"{name}: a negative temperature must be refused"
    )
    early = f"{name}.check_options must refuse a negative temperature, before any work; call super().check_options"
    _refuses(lambda: head.check_options(head.options(), -1.0), early)
    _refuses(lambda: head.options(no_such_option=1), f"{name}.options must refuse an option that it does not have")
    if not head.guides:
        guidance = Guidance.of(2.0, 2, z.device)
        _refuses(
            lambda: head.sample(z, _keys(head, 2), None, z, guidance),
            f"{name}.guides is False: it must refuse it",
        )
    if not head.tempers:
        _refuses(lambda: head.sample(z, _keys(head, 2), temperature=0.5), f"{name}.tempers is False: so refuse 0.5")
    if not head.has_density:
        _refuses(lambda: head.log_prob(z, _targets(head, 2)), f"{name}.has_density is False: it must say so")


def known_density(z: Tensor, keys: Keys, dim: int) -> Tensor:
    """Two Gaussians of standard deviation 0.2 at m(z) + 1 and m(z) - 1, m(z) the first number of z: (N, D)."""
    sign = torch.where(keys.fold("sign").uniform() < 0.5, 1.0, -1.0)[:, None]
    return z[:, :1] + sign + 0.2 * keys.fold("spread").normal(dim)


def _trained(head: Head, steps: int, rate: float, target: Callable[[Tensor, Keys], Tensor]) -> None:
    """Train the head on `target`. The learning rate falls to 0, so that the last steps do not decide the outcome."""
    name, N = type(head).__name__, 128
    optimiser = torch.optim.Adam(head.parameters(), lr=rate)
    for step in range(steps):
        keys = Keys.of(step).fold(torch.arange(N)).to(_on(head))
        z = keys.fold("z").normal(Z)
        loss = head.loss(z, target(z, keys), keys)
        optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimiser.zero_grad()
        (loss.sum.sum() / loss.count.sum()).backward()
        optimiser.step()
    touched = [key for key, p in head.named_parameters() if p.grad is not None]
    assert touched, f"{name}: no parameter receives a gradient"


def _learns(head: Head, steps: int, device: torch.device) -> None:
    """After training on `known_density`, samples have its mean, its spread, and both its modes."""
    name = type(head).__name__
    head.bind(Z)
    head.to(device)
    _trained(head, steps, 3e-3, lambda z, keys: known_density(z, keys, head.output))
    keys = Keys.of(10**6).fold(torch.arange(500)).to(_on(head))
    z = keys.fold("z").normal(Z)
    x = head.sample(z, keys) - z[:, :1]  # (N, D), of modes at -1 and 1
    mean, std = x.mean(dim=0), x.std(dim=0)
    assert bool((mean.abs() < 0.25).all()), f"{name} has not learned how its token follows z: off by {mean.tolist()}"
    assert bool(((std - 1.02).abs() < 0.25).all()), f"{name}: standard deviation {std.tolist()}, the truth has 1.02"
    share = (x.mean(dim=1) > 0).float().mean()
    assert 0.3 < float(share) < 0.7, f"{name} draws the two modes with shares {share:.2f} and {1 - share:.2f}, not half"
    inside = (x.mean(dim=1).abs() - 1).abs() < 0.5
    assert float(inside.float().mean()) > 0.8, (
        f"{name} draws between the modes: {inside.float().mean():.0%} are near one"
    )


def _learns_codes(head: Head, steps: int, device: torch.device) -> None:
    """After training, codes come with the odds that z says: p(code | z) is a softmax of the first numbers of z."""
    name, V = type(head).__name__, head.output

    def odds(z: Tensor) -> Tensor:
        return (2 * z[:, [i % Z for i in range(V)]]).softmax(dim=1)  # (N, V)

    def codes(z: Tensor, keys: Keys) -> Tensor:
        return (keys.fold("true").uniform()[:, None] > odds(z).cumsum(dim=1)[:, :-1]).sum(dim=1)  # (N,)

    head.bind(Z)
    head.to(device)
    _trained(head, steps, 3e-2, codes)
    keys = Keys.of(10**6).fold(torch.arange(2000)).to(_on(head))
    z = keys.fold("z").normal(Z)
    drawn = torch.nn.functional.one_hot(head.sample(z, keys), V).float()  # (N, V)
    for code in range(V):
        sure = odds(z)[:, code] > 0.7
        share = float(drawn[sure, code].mean())
        truth = float(odds(z)[sure, code].mean())
        assert abs(share - truth) < 0.1, (
            f"{name} draws code {code} with a share of {share:.2f}, the truth is {truth:.2f}"
        )
