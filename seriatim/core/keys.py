"""Counter-based random numbers: the same key gives the same numbers, on every device, in any batch.

Shapes: N rows, each with a key of 128 bits, stored as two int64 words (k0, k1).

Word j of a row is mix(mix(j G + k0) ^ k1), where `mix` is the finaliser of SplitMix64 and G its odd constant (Steele,
Lea and Flood, "Fast splittable pseudorandom number generators", 2014). Replacing the state of a generator by a counter
is the idea of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011. Normal numbers use the method of Box
and Muller, 1958.

Keys have no state. Element j of row n depends only on the key of row n and on j, so that an image gets the same numbers
whatever else is in its batch. Drawing twice from one key gives the same numbers twice, so fold the key before each use.

    image = Keys.of_seeds([1, 2, 3])                      # 3 rows, one for each image
    noise = image.fold("token").fold(7).fold("noise")     # a separate key for each purpose
    x = noise.normal(100, 16)                             # (3, 100, 16)

Integer operations give the same result on every device, so `bits`, `uniform`, `integers` and `permutation` do too;
`normal` may differ in the last bits. On the CPU the numbers are computed by numpy, whose calls have less overhead.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seriatim.core.errors import UsageError

PIECE = 1 << 14  # words that are computed at a time on the CPU: 128 KiB, which fit into its cache
BLOCK = 1 << 20  # numbers that the parts of a `split` compute together; bounds the memory of many large parts


def _signed(word: int) -> int:
    """The int64 with the 64 lowest bits of `word`."""
    return (word + 2**63) % 2**64 - 2**63


G = _signed(0x9E3779B97F4A7C15)  # 2^64 / golden ratio
M1, M2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)  # SplitMix64's multipliers
ROOT = (_signed(0x243F6A8885A308D3), _signed(0x13198A2E03707344))  # first digits of pi: the key before any fold
FOLD0, FOLD1 = _signed(0xA4093822299F31D0), _signed(0x082EFA98EC4E6C89)  # next digits of pi: added by each fold


def mix(x: Any) -> Any:
    """SplitMix64's finaliser, a bijection of 64 bits, applied in place to the int64 tensor or array x.

    A right shift of int64 copies the sign bit, so the copied bits are masked out.
    """
    t = x >> 30
    t &= (1 << 34) - 1
    x ^= t
    x *= M1
    t = x >> 27
    t &= (1 << 37) - 1
    x ^= t
    x *= M2
    t = x >> 31
    t &= (1 << 33) - 1
    x ^= t
    return x


def _numbers(xp: ModuleType, kind: str, keys: Any, counter: Any, high: int) -> Any:
    """The random numbers (N, m), or (N, 2m) for normal ones, of the keys (N, 2) for the counters (m,)."""
    words = mix(counter * G + keys[:, :1])
    words ^= keys[:, 1:]
    words = mix(words)  # (N, m)
    match kind:
        case "uniform":
            words >>= 40
            words &= (1 << 24) - 1
            x = xp.asarray(words, dtype=xp.float32)  # exact, because a float32 holds 24 bits
            x *= 2.0**-24
            return x
        case "integers":
            words >>= 32
            words &= (1 << 32) - 1
            words *= high  # below 2^63
            words >>= 32
        case "normal":
            # The low half of a word gives the angle a, its high half the radius r: r cos a and r sin a are normal.
            # If v is a half as an int32, u = |v + 1/2| / 2^31 is uniform in (0, 1], and r^2 = -2 ln u = -ln u^2.
            halves = xp.asarray(words.view(xp.int32), dtype=xp.float32)  # (N, 2m): low, high, low, high, ...
            r = halves[:, 1::2] + 0.5
            r *= 2.0**-31
            r *= r
            xp.log(r, out=r)
            xp.negative(r, out=r)
            xp.sqrt(r, out=r)  # at most 6.7
            angle = halves[:, ::2] * (math.pi / 2**31)
            xp.multiply(xp.cos(angle), r, out=halves[:, ::2])
            xp.multiply(xp.sin(angle, out=angle), r, out=halves[:, 1::2])
            return halves
        case "permutation":
            return xp.argsort(words, -1)  # 64-bit words are practically never equal, so the order is unambiguous
    return words


@lru_cache(maxsize=4096)
def _step(data: int | str) -> int:
    """The int64 that folding a name or a number adds to a key; raises UsageError for more than 64 bits."""
    if isinstance(data, str):
        data = int.from_bytes(hashlib.sha256(data.encode()).digest()[:8], "big", signed=True)
    if not -(2**63) <= data < 2**63:
        raise UsageError(f"seed: {data} is not allowed; use a number of 64 bits, from {-(2**63)} to {2**63 - 1}")
    return _signed(data * G + FOLD0)


class Keys:
    """N keys, one a row, from which random numbers are drawn."""

    words: Tensor  # (N, 2) int64
    device: torch.device

    def __init__(self, words: Tensor, host: Callable[[], Keys] | None = None) -> None:
        assert words.shape[1:] == (2,) and words.dtype == torch.long, f"words: {words.dtype} {tuple(words.shape)}"
        self.words, self.device = words, words.device
        self._host = host  # computes the same keys on the host, without a copy

    @classmethod
    def of(cls, seed: int | str, *path: int | str) -> Keys:
        """The single key of a seed, into which each element of `path` is folded in turn."""
        keys = Keys(torch.tensor([ROOT]))
        for data in (seed, *path):
            keys = keys.fold(data)
        return keys

    @classmethod
    def of_seeds(cls, seeds: Sequence[int], device: torch.device | str = "cpu") -> Keys:
        """One key for each seed; the key of seed s equals `of(s)`."""
        try:
            data = torch.tensor(seeds, dtype=torch.long)
        except (RuntimeError, OverflowError, ValueError):  # the type of the error depends on torch's version
            for seed in seeds:
                _step(seed)  # raises a UsageError that names the wrong seed
            raise
        return Keys(torch.tensor([ROOT])).fold(data).to(device)

    @property
    def host(self) -> Keys:
        """The same keys on the host; keys that came from there are computed there again, without waiting."""
        elsewhere = self._host or (lambda: self.to("cpu"))
        return self if self.device.type == "cpu" else elsewhere()

    def __len__(self) -> int:
        return len(self.words)

    def to(self, device: torch.device | str) -> Keys:
        """The same keys on another device; their copy on the host is shared."""
        return Keys(self.words.to(device, non_blocking=True), lambda: self.host)

    def fold(self, data: int | str | Tensor) -> Keys:
        """New keys derived from these keys and `data`: a name, a number, or a number for each row (N,) int64.

        The order of several folds matters. A single key may be folded with (M,) numbers, which gives M keys. A number
        gives the same key as a tensor that holds it.
        """
        words: Any = self.words
        if isinstance(data, Tensor):
            assert data.ndim == 1 and (len(data) == len(words) or len(words) == 1), (
                f"{len(words)} keys are folded with one number each, not with {tuple(data.shape)}"
            )
            step: Any = data.to(self.device, torch.long, non_blocking=True) * G + FOLD0
        else:
            step = _step(data)
        xp: Any = torch
        if self.device.type == "cpu":
            xp, words, step = np, words.numpy(), np.asarray(step)
        # Two rounds of a Feistel network: different keys stay different, and different data give different keys.
        k0, k1 = words[:, 0], words[:, 1]
        a = mix(k0 + step)
        a ^= k1
        b = mix(a + FOLD1)
        b ^= k0
        folded = xp.concatenate((a[:, None], b[:, None]), 1)  # (N, 2)
        return Keys(torch.from_numpy(folded)) if xp is np else Keys(folded, lambda: self.host.fold(data))

    def select(self, rows: Tensor | slice) -> Keys:
        """The keys of the given rows: a slice, or indices (M,) int64, which may repeat."""
        words, there = self.words, rows if isinstance(rows, slice) else rows.to(self.device, non_blocking=True)
        chosen = words[there] if isinstance(there, slice) else words.index_select(0, there)
        return Keys(chosen, lambda: self.host.select(rows))

    def split(self, count: int) -> tuple[Keys, ...]:
        """`count` keys, of which key i equals `fold(i)` and gives the same numbers.

        When one of them draws, the numbers of all of them are computed at once, also after further folds by name or
        number, so that a loop over the parts pays for the operations only once.
        """
        parts = _Parts(self, count)
        return tuple(_Part(parts, i, (), lambda i=i: self.host.fold(i)) for i in range(count))  # type: ignore[misc]

    def draw(self, kind: str, shape: tuple[int, ...], high: int = 0) -> Tensor:
        """The random numbers (N, *shape) of a kind: what the methods below return, by their names."""
        each = 2 if kind == "normal" else 1  # numbers from one word
        count = math.prod(shape)
        m = -(-count // each)
        if self.device.type != "cpu":
            made = _numbers(torch, kind, self.words, torch.arange(m, device=self.device), high)
        elif len(self.words) * m <= PIECE or kind == "permutation":
            made = torch.from_numpy(_numbers(np, kind, self.words.numpy(), np.arange(m), high))
        else:
            keys, rows = self.words.numpy(), max(1, PIECE // m)
            made = torch.empty(
                len(keys), m * each, dtype=torch.float32 if kind in ("uniform", "normal") else torch.long
            )
            for row in range(0, len(keys), rows):
                for first in range(0, m, PIECE):
                    counter = np.arange(first, min(m, first + PIECE))
                    some = _numbers(np, kind, keys[row : row + rows], counter, high)
                    made.numpy()[row : row + rows, first * each : first * each + some.shape[1]] = some
        return made[:, :count].contiguous().view(len(self.words), *shape)

    def bits(self, *shape: int) -> Tensor:
        """Random 64-bit words: int64 (N, *shape)."""
        return self.draw("bits", shape)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), which are multiples of 2^-24: float32 (N, *shape)."""
        return self.draw("uniform", shape)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers: float32 (N, *shape)."""
        return self.draw("normal", shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high), int64 (N, *shape); `high` is at most 2^31."""
        assert 1 <= high <= 2**31, f"high={high} is not allowed; it must be from 1 to 2^31"
        return self.draw("integers", shape, high)

    def permutation(self, n: int) -> Tensor:
        """A permutation of 0..n-1 for each row: int64 (N, n)."""
        return self.draw("permutation", (n,))


class _Parts:
    """The state that all keys of one `split` share: the keys and draws of all parts, computed on first use."""

    def __init__(self, parent: Keys, count: int) -> None:
        self.parent, self.count, self.rows, self.device = parent, count, len(parent), parent.device
        self.keys: dict[tuple[int | str, ...], Keys] = {}  # path of folds -> count x N keys, part by part
        # (path, kind, shape, high) -> the first part of the block drawn last, and its draws until they are handed out
        self.draws: dict[tuple[Any, ...], tuple[int, list[Tensor | None]]] = {}

    def folded(self, path: tuple[int | str, ...]) -> Keys:
        if path not in self.keys:
            if path:
                self.keys[path] = self.folded(path[:-1]).fold(path[-1])
            else:
                index = torch.arange(self.count, device=self.device)[:, None].expand(self.count, self.rows)
                words = self.parent.words.expand(self.count, self.rows, 2)
                self.keys[path] = Keys(words.reshape(-1, 2)).fold(index.reshape(-1))
        return self.keys[path]

    def words(self, path: tuple[int | str, ...], first: int, last: int) -> Tensor:
        """The key words of parts first..last-1, part by part: ((last - first) N, 2)."""
        return self.folded(path).words[first * self.rows : last * self.rows]

    def draw(self, index: int, path: tuple[int | str, ...], kind: str, shape: tuple[int, ...], high: int) -> Tensor:
        asked = (path, kind, shape, high)
        first, block = self.draws.get(asked, (0, []))
        if not first <= index < first + len(block):
            at_once = max(1, BLOCK // max(1, self.rows * math.prod(shape)))
            first = index - index % at_once
            last = min(self.count, first + at_once)
            made = Keys(self.words(path, first, last)).draw(kind, shape, high)
            block = list(made.view(last - first, self.rows, *shape).unbind())
            self.draws[asked] = (first, block)
        drawn, block[index - first] = block[index - first], None
        if drawn is None:  # this draw was handed out before, and its receiver may have written into it
            return Keys(self.words(path, index, index + 1)).draw(kind, shape, high)
        return drawn


class _Part(Keys):
    """Part `index` of a `split`, folded along `path`."""

    def __init__(self, parts: _Parts, index: int, path: tuple[int | str, ...], host: Callable[[], Keys]) -> None:
        self._parts, self._index, self._path, self._host, self.device = parts, index, path, host, parts.device

    @cached_property
    def words(self) -> Tensor:  # type: ignore[override]
        return self._parts.words(self._path, self._index, self._index + 1)

    def __len__(self) -> int:
        return self._parts.rows

    def fold(self, data: int | str | Tensor) -> Keys:
        if isinstance(data, Tensor):
            return Keys(self.words, lambda: self.host).fold(data)
        return _Part(self._parts, self._index, (*self._path, data), lambda: self.host.fold(data))

    def draw(self, kind: str, shape: tuple[int, ...], high: int = 0) -> Tensor:
        return self._parts.draw(self._index, self._path, kind, shape, high)


class ReplayKeys(Keys):
    """Keys that return recorded draws, found by the path of the row and the kind, as in "0/token/5/noise/normal".

    `draws` maps such names to the draw of one row, without the row dimension. `roots` gives the names of the rows, or
    their number, in which case they are named "0", "1", ...
    """

    def __init__(self, draws: Mapping[str, Tensor], roots: int | Sequence[str], device: torch.device | str = "cpu"):
        self._paths = [str(i) for i in range(roots)] if isinstance(roots, int) else list(roots)
        self._draws, self.device, self._asked, self._host = draws, torch.device(device), set[str](), None

    def _at(self, paths: list[str], device: torch.device | str | None = None) -> ReplayKeys:
        keys = ReplayKeys(self._draws, paths, device or self.device)
        keys._asked = self._asked  # shared, so that `unused` counts the draws of all derived keys
        return keys

    @cached_property
    def words(self) -> Tensor:  # type: ignore[override]
        raise AssertionError("recorded draws have no keys")

    def __len__(self) -> int:
        return len(self._paths)

    def to(self, device: torch.device | str) -> Keys:
        return self._at(self._paths, device)

    def fold(self, data: int | str | Tensor) -> Keys:
        paths = self._paths
        if not isinstance(data, Tensor):
            return self._at([f"{path}/{data}" for path in paths])
        assert data.ndim == 1 and (len(data) == len(paths) or len(paths) == 1), (
            f"{len(paths)} keys are folded with one number each, not with {tuple(data.shape)}"
        )
        paths = paths * len(data) if len(paths) == 1 else paths
        return self._at([f"{path}/{number}" for path, number in zip(paths, data.tolist(), strict=True)])

    def select(self, rows: Tensor | slice) -> Keys:
        return self._at(self._paths[rows] if isinstance(rows, slice) else [self._paths[i] for i in rows.tolist()])

    def split(self, count: int) -> tuple[Keys, ...]:
        return tuple(self.fold(i) for i in range(count))

    def draw(self, kind: str, shape: tuple[int, ...], high: int = 0) -> Tensor:
        dtype = torch.float32 if kind in ("uniform", "normal") else torch.long
        rows = []
        for path in self._paths:
            name = f"{path}/{kind}"
            assert name in self._draws, f"no draw {name!r} was recorded, asked for with shape {shape}"
            row = self._draws[name]
            assert tuple(row.shape) == shape, f"the recorded draw {name!r} has shape {tuple(row.shape)}, not {shape}"
            assert kind != "integers" or bool((row < high).all()), f"the recorded draw {name!r} is not below {high}"
            self._asked.add(name)
            rows.append(row.to(self.device, dtype))
        return torch.stack(rows) if rows else torch.empty(0, *shape, dtype=dtype, device=self.device)

    def unused(self) -> list[str]:
        """The names of the recorded draws that were never used."""
        return sorted(set(self._draws) - self._asked)
