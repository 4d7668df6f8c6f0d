"""Every random number of Seriatim: one generator per image, drawn on the CPU.

Shapes: B images, N rows (tokens asked for, flattened over images), k rows of one image.

`Noise` maps each row to the generator of the image that owns it, so that an image gets the same numbers whatever
else is in its batch. Padding rows are no rows: they draw nothing. For one image and one step a head makes one draw
of shape (draws, k, ...), so that the naive and the fast sampler consume the generators alike.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from seriatim.core.errors import UsageError


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) from any integers and names: stable over machines, versions and processes."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int) -> torch.Generator:
    """A CPU generator with this seed."""
    return torch.Generator().manual_seed(seed)


class Noise:
    """Random numbers for N rows; row n is drawn from `generators[owner[n]]`."""

    def __init__(
        self, generators: Sequence[torch.Generator], owner: Tensor, device: torch.device | str = "cpu"
    ) -> None:
        self.generators = list(generators)
        self.owner = owner.to("cpu", torch.long)  # (N,)
        self.device = torch.device(device)
        if self.owner.numel() and not 0 <= int(self.owner.min()) <= int(self.owner.max()) < len(self.generators):
            low, high = int(self.owner.min()), int(self.owner.max())
            raise UsageError(f"owner: names images {low} to {high}; there are generators for {len(self.generators)}")
        images, counts = torch.unique(self.owner, return_counts=True)
        self._runs = list(zip(images.tolist(), counts.tolist(), strict=True))
        order = self.owner.argsort(stable=True)  # (N,): rows grouped by image
        grouped = bool((order == torch.arange(len(order))).all())
        self._place = None if grouped else order.argsort()

    @classmethod
    def per_image(cls, seeds: Iterable[int], device: torch.device | str = "cpu") -> Noise:
        """One row and one generator for each seed."""
        generators = [generator(seed) for seed in seeds]
        return cls(generators, torch.arange(len(generators)), device)

    @classmethod
    def shared(cls, seed: int | None, rows: int, device: torch.device | str = "cpu") -> Noise:
        """One generator for all rows: for training, where a batch is one draw. None: seeded by torch's own."""
        if seed is None:
            seed = int(torch.randint(2**62, ()).item())
        return cls([generator(seed)], torch.zeros(rows, dtype=torch.long), device)

    def __len__(self) -> int:
        return len(self.owner)

    def select(self, rows: Tensor) -> Noise:
        """The noise of these rows, which may repeat; generators are shared, so draws go on where they were."""
        return Noise(self.generators, self.owner[rows.to("cpu")], self.device)

    def _draw(self, sample: Callable[..., Tensor], tail: tuple[int, ...], draws: int | None) -> Tensor:
        lead = () if draws is None else (draws,)
        if not self._runs:
            return torch.zeros(*lead, 0, *tail, device=self.device)
        parts = [sample((*lead, count, *tail), self.generators[image]) for image, count in self._runs]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=len(lead))  # (draws, N, ...), by image
        if self._place is not None:
            rows = rows.index_select(len(lead), self._place)
        return rows.to(self.device, non_blocking=self.device.type == "cuda")  # which is not waited for

    def normal(self, *tail: int, draws: int | None = None) -> Tensor:
        """Standard normal numbers: (N, *tail), or (draws, N, *tail)."""
        return self._draw(lambda shape, g: torch.randn(shape, generator=g), tail, draws)

    def uniform(self, *tail: int, draws: int | None = None) -> Tensor:
        """Uniform numbers in [0, 1): (N, *tail), or (draws, N, *tail)."""
        return self._draw(lambda shape, g: torch.rand(shape, generator=g), tail, draws)

    def integers(self, high: int, *tail: int, draws: int | None = None) -> Tensor:
        """Integers in [0, high), int64: (N, *tail), or (draws, N, *tail)."""
        return self._draw(lambda shape, g: torch.randint(high, shape, generator=g), tail, draws).long()

    def permutation(self, n: int) -> Tensor:
        """A permutation of 0..n-1 for each row: (N, n)."""

        def permute(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
            # float64 so that ties, which a sort would break in favour of low positions, do not occur
            return torch.rand(shape, generator=g, dtype=torch.float64).argsort(dim=-1)

        return self._draw(permute, (n,), None).long()

    def once(self) -> float:
        """One uniform number for the whole batch, from the first generator."""
        return float(torch.rand((), generator=self.generators[0]).item())


class ReplayNoise(Noise):
    """Plays recorded draws back in the order in which they were made, each kind from its own queue."""

    def __init__(
        self,
        *,
        normal: Iterable[Tensor] = (),
        uniform: Iterable[Tensor] = (),
        integers: Iterable[Tensor] = (),
        permutation: Iterable[Tensor] = (),
        once: Iterable[float] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.queues: dict[str, deque[Tensor]] = {
            "normal": deque(normal),
            "uniform": deque(uniform),
            "integers": deque(integers),
            "permutation": deque(permutation),
            "once": deque(torch.tensor(value) for value in once),
        }

    def __len__(self) -> int:
        raise UsageError("ReplayNoise has no rows of its own: it plays back what was recorded")

    @override
    def select(self, rows: Tensor) -> ReplayNoise:
        return self  # what was recorded is already that of the selected rows

    def _next(self, kind: str, tail: tuple[int, ...], draws: int | None) -> Tensor:
        assert self.queues[kind], f"no recorded draw of kind {kind!r} is left"
        value = self.queues[kind].popleft()
        lead = () if draws is None else (draws,)
        wanted = (*lead, "N", *tail)
        fits = value.ndim == len(wanted) and all(w == "N" or w == s for w, s in zip(wanted, value.shape, strict=True))
        assert fits, f"recorded {kind} draw has shape {tuple(value.shape)}, asked for {wanted}"
        return value.to(self.device)

    def normal(self, *tail: int, draws: int | None = None) -> Tensor:
        return self._next("normal", tail, draws)

    def uniform(self, *tail: int, draws: int | None = None) -> Tensor:
        return self._next("uniform", tail, draws)

    @override
    def integers(self, high: int, *tail: int, draws: int | None = None) -> Tensor:
        return self._next("integers", tail, draws).long()

    def permutation(self, n: int) -> Tensor:
        return self._next("permutation", (n,), None).long()

    def once(self) -> float:
        assert self.queues["once"], "no recorded draw of kind 'once' is left"
        return float(self.queues["once"].popleft())

    def exhausted(self) -> bool:
        """True once every recorded draw has been used."""
        return not any(self.queues.values())
