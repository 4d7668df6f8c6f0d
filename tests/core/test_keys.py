"""Keys: known answers, statistics that a weak mix fails, and the same numbers however they are asked for."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pretend_cuda import pretend, pretend_cuda, real
from scipy import stats
from torch import Tensor

from seriatim.core import keys as module
from seriatim.core.errors import UsageError
from seriatim.core.keys import BLOCK, PIECE, Keys, ReplayKeys

KINDS: dict[str, Callable[[Keys, int], Tensor]] = {
    "bits": lambda keys, n: keys.bits(n),
    "uniform": lambda keys, n: keys.uniform(n),
    "normal": lambda keys, n: keys.normal(n),
    "integers": lambda keys, n: keys.integers(1000, n),
    "permutation": lambda keys, n: keys.permutation(n),
}
by_kind = pytest.mark.parametrize("draw", KINDS.values(), ids=KINDS)
SURE = 1e-6  # no statistic may be so improbable, nor so close to what is expected


# --- known answers ----------------------------------------------------------------------------------------------------


def test_mix_gives_what_splitmix64_is_published_to_give() -> None:
    published = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    counter = 1234567 + torch.arange(1, 6) * module.G
    assert [word % 2**64 for word in module.mix(counter).tolist()] == published


def test_words_follow_the_formula() -> None:
    keys = Keys.of_seeds([3, 2**63 - 1, -5]).fold("noise")
    for row, (k0, k1) in enumerate(keys.words.tolist()):
        for j, word in enumerate(keys.bits(4)[row].tolist()):
            once = module.mix(torch.tensor([module._signed(j * module.G + k0)]))
            assert word == module.mix(once ^ k1).item()


def test_a_change_of_any_number_is_noticed() -> None:
    """A change here changes every image that anybody ever drew."""
    keys = Keys.of(7, "token", 3)
    assert keys.words.tolist() == [[-6693989346246324226, 1403218018816165675]]
    assert keys.bits(2).tolist() == [[4603472122646196290, -7764648871763789605]]
    assert keys.fold("noise").words.tolist() == [[3633348957698682804, 5978054827120757786]]
    assert (keys.uniform(3) * 2**24).tolist() == [[4186833, 9715308, 964439]]
    assert keys.integers(1000, 5).tolist() == [[249, 579, 57, 225, 111]]
    assert keys.permutation(8).tolist() == [[1, 7, 6, 2, 4, 3, 0, 5]]
    assert keys.normal(4)[0].tolist() == pytest.approx([-0.7420703, 0.9160739, -0.5468527, 0.2127700], abs=2e-6)


# --- statistics -------------------------------------------------------------------------------------------------------


def nothing(x: Any) -> Any:
    """A mix that does not mix."""
    return x


def product(x: Any) -> Any:
    """The finaliser without its shifts: low bits never learn of high ones."""
    x *= module.M1
    return x


def shift(x: Any) -> Any:
    """The finaliser without its products: linear."""
    for by in (30, 27, 31):
        x ^= (x >> by) & ((1 << (64 - by)) - 1)
    return x


WEAK = {"nothing": nothing, "product": product, "shift": shift}


def plausible(what: str, p: float) -> None:
    assert SURE < p < 1 - SURE, f"{what}: p = {p:.3g}"


def even(words: np.ndarray) -> None:
    """Every bit of the words is set half of the time, the bytes are uniform, and so are the numbers made of them."""
    unsigned = words.ravel().view(np.uint64)
    for byte in range(8):
        counts = np.bincount(((unsigned >> np.uint64(8 * byte)) & np.uint64(255)).astype(np.int64), minlength=256)
        plausible(f"byte {byte}", float(stats.chisquare(counts).pvalue))


def apart(first: np.ndarray, second: np.ndarray) -> None:
    """Two series of words have nothing to do with one another: values, places of single bits, high and low ends."""
    a, b = (words.ravel().view(np.uint64) for words in (first, second))
    n = len(a)
    assert n >= 1 << 17, "too few for the statistics to tell"
    correlation = np.corrcoef(a.astype(np.float64), b.astype(np.float64))[0, 1]
    plausible("correlation", float(2 * stats.norm.sf(abs(correlation) * np.sqrt(n))))
    differing = np.unpackbits((a ^ b).view(np.uint8).reshape(n, 8), axis=1).sum(axis=0)  # (64,)
    plausible("differing bits", float(stats.chi2.sf(((differing - n / 2) ** 2 / (n / 4)).sum(), 64)))
    for end, shift in (("high", 59), ("low", 0)):
        x, y = ((words >> np.uint64(shift) & np.uint64(31)).astype(np.int64) for words in (a, b))
        counts = np.bincount(32 * x + y, minlength=1024)
        plausible(f"{end} bits", float(stats.chisquare(counts).pvalue))


N = 1 << 17


def neighbours(axis: str) -> tuple[Tensor, Tensor]:
    """Two series of words that belong to keys, folds, rows or places beside one another."""
    numbers = torch.arange(N)
    root = Keys.of(5, "train")
    match axis:
        case "places":
            words = root.bits(N + 1)
            return words[:, :-1], words[:, 1:]
        case "places of many":
            words = Keys.of_seeds(range(N // 4)).bits(5)
            return words[:, :-1], words[:, 1:]
        case "seeds":
            words = Keys.of_seeds(range(N + 1)).bits(1)
            return words[:-1], words[1:]
        case "folds":
            words = root.fold(torch.arange(N + 1)).bits(1)
            return words[:-1], words[1:]
        case "folds of folds":
            return root.fold(numbers).fold(1).bits(1), root.fold(numbers).fold(2).bits(1)
        case "far folds":  # which differ in the highest bit alone
            return root.fold(numbers).bits(1), root.fold(numbers - 2**63).bits(1)
        case "order of folds":
            return root.fold(numbers).fold(numbers + 1).bits(1), root.fold(numbers + 1).fold(numbers).bits(1)
        case "names":
            return Keys.of_seeds(range(N)).fold("a").bits(1), Keys.of_seeds(range(N)).fold("b").bits(1)
        case "parent and child":
            rows = root.fold(numbers)
            return rows.bits(1), rows.fold(0).bits(1)
        case "words and keys":  # a key is no word of its parent
            return root.bits(N), root.fold(numbers).words[:, 0][None]
        case "halves of keys":
            words = root.fold(numbers).words
            return words[:, 0], words[:, 1]
    raise AssertionError(axis)


AXES = [
    "places", "places of many", "seeds", "folds", "folds of folds", "far folds", "order of folds", "names",
    "parent and child", "words and keys", "halves of keys",
]  # fmt: skip


def check_neighbours(axis: str) -> None:
    first, second = (words.contiguous().numpy() for words in neighbours(axis))
    even(first)
    apart(first, second)


@pytest.mark.parametrize("axis", AXES)
def test_neighbours_have_nothing_to_do_with_one_another(axis: str) -> None:
    check_neighbours(axis)


@pytest.mark.parametrize("weak", WEAK)
@pytest.mark.parametrize("axis", AXES)
def test_a_weak_mix_fails_between_neighbours(axis: str, weak: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "mix", WEAK[weak])
    with pytest.raises(AssertionError, match="p = "):
        check_neighbours(axis)


def check_uniform(x: Tensor) -> None:
    plausible("uniform", float(stats.kstest(x.double().numpy().ravel(), "uniform").pvalue))


def check_normal(x: Tensor) -> None:
    values = x.double().numpy().ravel()
    n = len(values)
    plausible("normal", float(stats.kstest(values, "norm").pvalue))
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        off = ((values**power).mean() - mean) / np.sqrt(variance / n)
        plausible(f"moment {power}", float(2 * stats.norm.sf(abs(off))))
    tail = 2 * stats.norm.sf(4) * n
    plausible("tail", float(stats.poisson.cdf((np.abs(values) > 4).sum(), tail)))
    pairs = values.reshape(-1, 2)  # of one word
    for name, a, b in (("pairs", *pairs.T), ("squares of pairs", *(pairs**2).T), ("next", pairs[:-1, 1], pairs[1:, 0])):
        correlation = np.corrcoef(a, b)[0, 1]
        plausible(name, float(2 * stats.norm.sf(abs(correlation) * np.sqrt(len(a)))))


def check_integers(x: Tensor, high: int) -> None:
    counts = torch.bincount(x.ravel(), minlength=high)
    assert len(counts) == high
    plausible(f"integers below {high}", float(stats.chisquare(counts.numpy()).pvalue))


def check_permutation(x: Tensor) -> None:
    """All 24 orders of four are as frequent, and neighbours are as often one way round as the other."""
    number = (x * torch.tensor([64, 16, 4, 1])).sum(dim=1)
    counts = torch.bincount(number, minlength=256)
    assert int((counts > 0).sum()) == 24
    plausible("orders", float(stats.chisquare(counts[counts > 0].numpy()).pvalue))


DISTRIBUTIONS: dict[str, Callable[[Keys], None]] = {
    "uniform, many of a row": lambda keys: check_uniform(keys.select(slice(0, 10)).uniform(50_000)),
    "uniform, one of a row": lambda keys: check_uniform(keys.uniform()),
    "normal, many of a row": lambda keys: check_normal(keys.select(slice(0, 10)).normal(100_000)),
    "normal, two of a row": lambda keys: check_normal(keys.normal(2)),
    "integers below 6": lambda keys: check_integers(keys.integers(6, 4), 6),
    "integers below 1000": lambda keys: check_integers(keys.integers(1000, 4), 1000),
    "permutation": lambda keys: check_permutation(keys.permutation(4)),
}


@pytest.mark.parametrize("check", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_numbers_have_their_distribution(check: Callable[[Keys], None]) -> None:
    check(Keys.of(1).fold(torch.arange(100_000)))


@pytest.mark.parametrize("check", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_a_weak_mix_gives_another_distribution(check: Callable[[Keys], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "mix", nothing)
    with pytest.raises(AssertionError):
        check(Keys.of(1).fold(torch.arange(100_000)))


def equal_words(keys: int) -> int:
    """How many words of some keys, ten thousand of each, occur before."""
    words = np.sort(Keys.of_seeds(range(keys)).bits(10_000).numpy().ravel())
    return int((words[1:] == words[:-1]).sum())


def test_no_two_words_of_ten_million_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert equal_words(1000) == 0
    whole = module.mix

    def lossy(x: Any) -> Any:
        x &= (1 << 36) - 1
        return whole(x)

    monkeypatch.setattr(module, "mix", lossy)
    assert equal_words(100) > 0, "the test would not see that words repeat"


def test_no_two_keys_are_equal() -> None:
    root = Keys.of(1)
    keys = [root.fold(torch.arange(500)), root.fold(torch.arange(500)).fold(0), root.fold(0).fold(torch.arange(500))]
    keys += [Keys.of_seeds(range(500)), root.fold("a").fold(torch.arange(500)), root, root.fold("a"), Keys.of("1")]
    words = {tuple(row) for part in keys for row in part.words.tolist()}
    assert len(words) == sum(map(len, keys)) - 2, "root is seed 1, and fold(0).fold(0) is there twice"


# --- the same numbers however they are asked for ----------------------------------------------------------------------


def test_rows_of_one_image_differ() -> None:
    rows = Keys.of(3).fold("token").fold(torch.arange(100))
    for name in ("uniform", "normal", "bits"):
        assert len(KINDS[name](rows, 1).unique()) == 100
    assert len({tuple(row) for row in rows.permutation(20).tolist()}) == 100


def test_seeds_at_once_are_the_seeds_one_by_one() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    many = Keys.of_seeds(seeds)
    for row, seed in enumerate(seeds):
        assert torch.equal(many.select(torch.tensor([row])).words, Keys.of(seed).words)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_a_seed_of_more_than_64_bits_is_refused(seed: int) -> None:
    for make in (lambda: Keys.of(seed), lambda: Keys.of_seeds([1, seed])):
        with pytest.raises(UsageError, match=rf"seed: {seed} is not allowed"):
            make()


def test_a_number_is_a_tensor_of_it() -> None:
    keys = Keys.of_seeds([4, 5, 6])
    for number in (0, 7, -3, 2**62):
        assert torch.equal(keys.fold(number).words, keys.fold(torch.full((3,), number)).words)
    assert torch.equal(keys.fold(torch.tensor([1, 2, 3], dtype=torch.int32)).words[1], keys.fold(2).words[1])
    one = Keys.of(4)
    assert torch.equal(
        one.fold(torch.arange(5)).words, one.select(torch.zeros(5, dtype=torch.long)).fold(torch.arange(5)).words
    )
    with pytest.raises(AssertionError, match="3 keys are folded with one number each"):
        keys.fold(torch.arange(4))


def test_drawing_changes_nothing() -> None:
    keys = Keys.of_seeds([1, 2])
    before = keys.words.clone()
    for draw in KINDS.values():
        first = draw(keys, 9)
        second = draw(keys, 9)
        assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    assert torch.equal(keys.words, before)


@by_kind
def test_drawing_in_pieces_is_drawing_whole(draw: Callable[[Keys, int], Tensor]) -> None:
    """However rows are cut, whatever is beside them, and wherever the cache of the CPU ends."""
    keys = Keys.of_seeds(range(40)).fold("x")
    for n in (1, 2, 7, 64, 1000):
        whole = draw(keys, n)
        assert whole.shape == (40, n) and whole.is_contiguous()
        rows = torch.tensor([3, 3, 39, 0, 17])
        assert torch.equal(draw(keys.select(rows), n), whole[rows])
        for cut in (1, 3, 16):
            parts = [draw(keys.select(slice(at, at + cut)), n) for at in range(0, 40, cut)]
            assert torch.equal(torch.cat(parts), whole)


@by_kind
def test_an_element_depends_on_its_place_alone(draw: Callable[[Keys, int], Tensor]) -> None:
    if draw is KINDS["permutation"]:
        return  # which is one draw of n
    keys = Keys.of_seeds(range(3))
    n = PIECE + 11
    whole = draw(keys, 2 * n + 5)
    for m in (1, 2, 5, n, 2 * n):
        assert torch.equal(draw(keys, m), whole[:, :m])


def test_shapes() -> None:
    keys = Keys.of_seeds(range(5))
    assert keys.uniform().shape == (5,) and keys.normal().shape == (5,) and keys.integers(9).shape == (5,)
    assert torch.equal(keys.normal(3, 7), keys.normal(21).view(5, 3, 7))
    assert torch.equal(keys.uniform(2, 3, 2), keys.uniform(12).view(5, 2, 3, 2))
    assert keys.normal(4, 0).shape == (5, 4, 0) and keys.permutation(0).shape == (5, 0)
    assert keys.uniform().dtype == keys.normal(2).dtype == torch.float32
    assert keys.integers(3, 2).dtype == keys.permutation(2).dtype == keys.bits(1).dtype == torch.long
    assert len(keys) == 5 and keys.device == torch.device("cpu") and len(keys.to("meta")) == 5


def test_no_rows() -> None:
    for none in (Keys.of_seeds([]), Keys.of(1).fold(torch.arange(0)), Keys.of_seeds([1]).select(torch.arange(0))):
        assert len(none) == 0
        for keys in (none, none.fold("x"), none.fold(3), none.fold(torch.arange(0)), *none.split(2)):
            for draw in KINDS.values():
                assert draw(keys, 4).shape == (0, 4)


def test_ends_of_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of zeros and of ones give no infinity, no 1 and no `high`."""
    monkeypatch.setattr(module, "mix", nothing)  # so that the words are the first halves of these keys
    words = [0, -1, 2**63 - 1, -(2**63), 2**32 - 1, -(2**32), 2**31, 2**31 - 1]
    keys = Keys(torch.tensor([(word, 0) for word in words]))
    assert keys.bits(1)[:, 0].tolist() == words
    uniform = keys.uniform(1)
    assert uniform.min() == 0 and uniform.max() == 1 - 2**-24
    for high in (1, 2, 1000, 2**31):
        whole = keys.integers(high, 1)
        assert whole.min() == 0 and whole.max() == high - 1
    normal = keys.normal(2)
    assert torch.isfinite(normal).all() and 6.6 < normal.abs().max() < 6.7
    for high in (0, 2**31 + 1):
        with pytest.raises(AssertionError, match=f"high={high} is not allowed"):
            Keys.of(1).integers(high)


@by_kind
def test_torch_gives_what_numpy_gives(draw: Callable[[Keys, int], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices other than the CPU take torch's operations, which are run here on the CPU."""
    keys = Keys.of_seeds(range(-3, 30)).fold("a").fold(torch.arange(33))
    by_numpy = [draw(keys, n) for n in (1, 6, 33, 700)]
    moved = {"device": torch.device("meta"), "to": lambda self, *_, **__: self}
    elsewhere = type("Elsewhere", (torch.Tensor,), moved)
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *range_, **_: arange(*range_))
    there = Keys(Keys.of_seeds(range(-3, 30)).words.as_subclass(elsewhere)).fold("a")
    words = there.fold(arange(33).as_subclass(elsewhere)).words.as_subclass(torch.Tensor)
    assert torch.equal(words, keys.words)
    for n, expected in zip((1, 6, 33, 700), by_numpy, strict=True):
        found = draw(Keys(words.as_subclass(elsewhere)), n).as_subclass(torch.Tensor)
        if draw is KINDS["normal"]:
            assert torch.allclose(found, expected, rtol=1e-5, atol=2e-6)
        else:
            assert torch.equal(found, expected)


# --- parts ------------------------------------------------------------------------------------------------------------


@by_kind
@pytest.mark.parametrize("rows", [1, 5])
def test_split_is_fold(draw: Callable[[Keys, int], Tensor], rows: int) -> None:
    keys = Keys.of_seeds(range(rows))
    for n in (1, 6):
        for i, part in enumerate(keys.split(7)):
            assert len(part) == rows and part.device == keys.device
            assert torch.equal(part.words, keys.fold(i).words)
            assert torch.equal(draw(part, n), draw(keys.fold(i), n))
            assert torch.equal(draw(part.fold("value"), n), draw(keys.fold(i).fold("value"), n))
            assert torch.equal(draw(part.fold("a").fold(3), n), draw(keys.fold(i).fold("a").fold(3), n))
            last = torch.tensor([rows - 1])
            assert torch.equal(draw(part.fold("a").select(last), n), draw(keys.fold(i).fold("a").select(last), n))
            number = torch.arange(rows)
            assert torch.equal(draw(part.fold("a").fold(number), n), draw(keys.fold(i).fold("a").fold(number), n))
            inner, plain = part.fold("part").split(3), keys.fold(i).fold("part")
            assert torch.equal(draw(inner[2].fold("x"), n), draw(plain.fold(2).fold("x"), n))


def test_parts_can_be_asked_in_any_order_again_and_written_into() -> None:
    keys = Keys.of_seeds([1, 2, 3])
    parts = keys.split(5)
    for i in (4, 0, 2, 0, 4, 1, 3):
        drawn = parts[i].fold("value").normal(2)
        assert torch.equal(drawn, keys.fold(i).fold("value").normal(2))
        drawn.zero_()


def test_parts_are_drawn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = module._numbers

    def counting(xp: Any, kind: str, keys: Any, *rest: Any) -> Any:
        made.append(len(keys))
        return make(xp, kind, keys, *rest)

    monkeypatch.setattr(module, "_numbers", counting)
    for part in Keys.of_seeds([1, 2]).split(16):
        part.fold("component").uniform()
        part.fold("value").normal(1)
    assert made == [32, 32]


HOST: dict[str, Callable[[Keys], Keys]] = {
    "themselves": lambda keys: keys,
    "folded by name and number": lambda keys: keys.fold("token").fold(7),
    "folded by a number for each row": lambda keys: keys.fold(torch.tensor([5, 0, 9])),
    "selected": lambda keys: keys.select(torch.tensor([2, 0, 2])).select(slice(1, 3)),
    "parts": lambda keys: keys.fold("part").split(3)[1].fold("noise"),
    "parts, folded by a number for each row": lambda keys: keys.split(3)[2].fold(torch.tensor([5, 0, 9])),
    "parts, selected": lambda keys: keys.split(3)[2].fold("a").select(torch.tensor([2, 0])),
}


@pytest.mark.parametrize("changed", HOST.values(), ids=HOST)
def test_keys_that_came_from_the_host_are_there_without_a_read(changed: Callable[[Keys], Keys]) -> None:
    keys = Keys.of_seeds([1, 2, 3])
    expected = changed(keys).permutation(8)
    with pretend_cuda() as device:
        there = changed(keys.to("cuda"))
        assert there.device.type == "cuda" and there.host.device.type == "cpu"
        assert torch.equal(there.host.permutation(8), expected)
        assert torch.equal(there.to("cuda").host.permutation(8), expected)
        assert not device.reads
        assert torch.equal(real(there.permutation(8)), expected)


def test_keys_that_were_made_on_a_device_are_read_from_it() -> None:
    with pretend_cuda() as device:
        there = Keys(pretend(Keys.of_seeds([1, 2]).words))
        assert torch.equal(there.fold("a").host.words, Keys.of_seeds([1, 2]).fold("a").words)
        assert sum(device.reads.values()) == 1


def test_many_large_parts_are_drawn_in_blocks() -> None:
    keys = Keys.of_seeds([1, 2])
    large = BLOCK // 6  # three parts fit into a block
    parts = keys.split(7)
    for i in (0, 1, 2, 3, 6, 5, 0):
        assert torch.equal(parts[i].uniform(large), keys.fold(i).uniform(large))
    held = [block for _, block in parts[0]._parts.draws.values()]  # type: ignore[attr-defined]
    assert sum(len(block) for block in held) <= 3


# --- recorded draws ---------------------------------------------------------------------------------------------------


def test_recorded_draws_are_played_by_the_path_of_each_row() -> None:
    draws = {
        "0/order/permutation": torch.tensor([1, 0, 2]),
        "1/order/permutation": torch.tensor([2, 1, 0]),
        "1/token/5/eps/normal": torch.tensor([5.0, 6.0]),
        "0/token/2/eps/normal": torch.tensor([7.0, 8.0]),
        "0/token/2/t/integers": torch.tensor(3),
        "0/token/2/part/1/bin/uniform": torch.tensor(0.5),
        "step/ratio/uniform": torch.tensor(0.25),
        "0/never/normal": torch.tensor(0.0),
    }
    keys: Keys = ReplayKeys(draws, 2)
    assert len(keys) == 2
    assert keys.fold("order").permutation(3).tolist() == [[1, 0, 2], [2, 1, 0]]
    tokens = keys.fold("token").select(torch.tensor([1, 0])).fold(torch.tensor([5, 2]))
    assert tokens.fold("eps").normal(2).tolist() == [[5, 6], [7, 8]]
    assert keys.select(slice(0, 1)).fold("token").fold(2).fold("t").integers(10).tolist() == [3]
    first = keys.fold("token").select(torch.tensor([0])).fold(torch.tensor([2]))
    assert first.fold("part").split(2)[1].fold("bin").uniform().tolist() == [0.5]
    assert ReplayKeys(draws, ["step"]).fold("ratio").uniform().tolist() == [0.25]
    assert isinstance(keys, ReplayKeys) and keys.unused() == ["0/never/normal", "step/ratio/uniform"]


def test_one_row_of_recorded_draws_becomes_many() -> None:
    keys = ReplayKeys({f"0/{i}/uniform": torch.tensor(float(i)) for i in range(4)}, 1)
    assert keys.fold(torch.tensor([2, 0, 2])).uniform().tolist() == [2, 0, 2]
    assert keys.unused() == ["0/1/uniform", "0/3/uniform"]
    assert keys.select(torch.arange(0)).normal(3).shape == (0, 3)
    assert keys.to("meta").fold(3).device.type == "meta" and keys.fold(3).device.type == "cpu"


def test_a_draw_that_is_missing_or_of_another_shape_is_named() -> None:
    keys = ReplayKeys({"0/noise/normal": torch.zeros(4, 2)}, 1).fold("noise")
    with pytest.raises(AssertionError, match=re.escape("no draw '0/noise/uniform' was recorded")):
        keys.uniform(4, 2)
    with pytest.raises(AssertionError, match=re.escape("'0/noise/normal' has shape (4, 2), not (8,)")):
        keys.normal(8)
    with pytest.raises(AssertionError, match="'0/t/integers' is not below 5"):
        ReplayKeys({"0/t/integers": torch.tensor([4, 5])}, 1).fold("t").integers(5, 2)
    with pytest.raises(AssertionError, match="recorded draws have no keys"):
        _ = keys.words
    with pytest.raises(AssertionError, match="2 keys are folded with one number each"):
        ReplayKeys({}, 2).fold(torch.arange(3))
