"""Usage and revival of codes in training: known distributions, a collapsed codebook, any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from threading import Barrier, Thread

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seriatim.core.keys import Keys
from seriatim.tokenizers.code_watch import COLLAPSED, CodeWatch, Moved
from seriatim.tokenizers.finite_scalar import FiniteScalar
from seriatim.tokenizers.quantise import Quantiser

V, C, L = 12, 4, 5


def quantiser_of(seed: int = 0) -> Quantiser:
    made = Quantiser(V, C)
    made.codebook.data.copy_(F.normalize(torch.randn(V, C, generator=torch.Generator().manual_seed(seed)), dim=1))
    return made


def vectors_of(images: int, seed: int = 1) -> Tensor:
    return torch.randn(images, L, C, generator=torch.Generator().manual_seed(seed))


def one_step(watch: CodeWatch, codes: Tensor, seen: int = 0) -> Moved | None:
    watch.begin(seen, len(codes))
    watch.add(codes, vectors_of(len(codes)), Keys.of_seeds(range(len(codes))))
    return watch.end()


# --- usage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [1, 3, 8])
def test_equally_frequent_codes_have_their_number_as_perplexity(used: int) -> None:
    watch = CodeWatch(FiniteScalar([8]), 8, 10)
    assert watch.figures() == {}
    one_step(watch, torch.arange(24).view(3, 8) % used)
    found = watch.figures()
    assert found["perplexity"] == pytest.approx(used) and found["used"] == used / 8
    assert found["bits"] == pytest.approx(math.log2(used)) and found["codes"] == 8


def test_a_known_distribution() -> None:
    """Shares 1/2, 1/4, 1/8, 1/8: 1.75 bits."""
    watch = CodeWatch(FiniteScalar([5]), 8, 100)
    one_step(watch, torch.tensor([[0, 0, 0, 0, 1, 1, 2, 3]]))
    found = watch.figures()
    assert found["bits"] == pytest.approx(1.75) and found["perplexity"] == pytest.approx(2**1.75)
    assert found["used"] == 0.8 and found["largest"] == 0.5


def test_a_window_forgets_what_is_older_than_the_one_before() -> None:
    watch = CodeWatch(FiniteScalar([2, 2]), 4, 10)
    assert watch.window == 10
    for step, code in enumerate([0, 1, 2, 3]):  # a window is two steps
        one_step(watch, torch.full((5, 4), code), 5 * step)
    assert watch.figures()["used"] == 0.5, "codes 2 and 3, of the last window"
    one_step(watch, torch.full((5, 4), 0), 20)
    assert watch.figures()["used"] == 0.75


def test_a_window_is_long_enough_for_unlucky_codes() -> None:
    assert CodeWatch(FiniteScalar([100]), 10, 1).window == 100  # 10 tokens for each of 100 codes
    assert CodeWatch(FiniteScalar([100]), 10, 1000).window == 1000


# --- revival ------------------------------------------------------------------------------------------------------


def test_a_collapsed_codebook_is_revived() -> None:
    """All vectors choose one code; after a window all others are vectors of the encoder, and are used."""
    quantiser, vectors = quantiser_of(), F.normalize(vectors_of(30), dim=-1)
    with torch.no_grad():
        quantiser.codebook[1:] = -F.normalize(vectors.mean(dim=(0, 1)), dim=0)
        vectors[..., 0] = vectors[..., 0].abs() + 2  # on one side, far from them
        quantiser.codebook[1:, 0] = -5
        quantiser.codebook[0] = torch.tensor([1.0, 0, 0, 0])
    watch = CodeWatch(quantiser, L, 30)
    keys = Keys.of_seeds(range(30))
    found = quantiser(vectors)
    assert set(found.codes.unique().tolist()) == {0}
    watch.begin(0, 30)
    watch.add(found.codes, found.vectors, keys)
    before = watch.figures()
    moved = watch.end()
    assert not before and watch.figures()["used"] == pytest.approx(1 / V) and 1 / V < COLLAPSED
    assert moved is not None and moved.codes.tolist() == list(range(1, V))
    flat = found.vectors.flatten(0, 1)
    for code, vector in zip(moved.codes, moved.vectors, strict=True):
        assert torch.equal(quantiser.codebook[code], vector)
        assert (flat == vector).all(dim=1).any(), "a vector that the encoder made"
    assert len(moved.vectors.unique(dim=0)) == V - 1, "of different patches"
    assert set(quantiser(vectors).codes.unique().tolist()) == set(range(V))


def test_used_codes_stay_and_nothing_moves_inside_a_window() -> None:
    quantiser = quantiser_of()
    before = quantiser.codebook.detach().clone()
    watch = CodeWatch(quantiser, L, 40)
    codes = torch.arange(20 * L).view(20, L) % (V - 2)
    assert one_step(watch, codes) is None and torch.equal(quantiser.codebook, before)
    moved = one_step(watch, codes, 20)
    assert moved is not None and moved.codes.tolist() == [V - 2, V - 1]
    assert torch.equal(quantiser.codebook[: V - 2], before[: V - 2])
    assert one_step(watch, torch.arange(40 * L).view(40, L) % V, 40) is None, "all were used"


def test_with_fewer_vectors_than_dead_codes_the_rest_waits() -> None:
    quantiser = quantiser_of()
    watch = CodeWatch(quantiser, L, 24)
    one_step(watch, torch.zeros(23, L, dtype=torch.int64))
    moved = one_step(watch, torch.zeros(1, L, dtype=torch.int64), 23)
    assert moved is not None and moved.codes.tolist() == [1, 2, 3, 4, 5], "one image has five vectors"
    none = CodeWatch(quantiser, L, 24)
    none.begin(0, 24)
    assert none.end() is None


def test_what_is_only_watched() -> None:
    quantiser = quantiser_of()
    before = quantiser.codebook.detach().clone()
    for watched in (CodeWatch(quantiser, L, 24, revive=False), CodeWatch(FiniteScalar([3, 4]), L, 24)):
        assert one_step(watched, torch.zeros(24, L, dtype=torch.int64)) is None
        assert watched.figures()["used"] == pytest.approx(1 / 12)
        assert not list(watched.parameters())
    assert torch.equal(quantiser.codebook, before)


def test_an_average_and_an_optimiser_learn_of_it() -> None:
    quantiser, other = quantiser_of(), quantiser_of(5)
    optimiser = torch.optim.AdamW(quantiser.parameters(), lr=0.1)
    quantiser(vectors_of(3)).losses["codebook"].backward()
    optimiser.step()
    state = optimiser.state[quantiser.codebook]
    state["exp_avg"].fill_(1.0)
    moved = Moved(torch.tensor([2, 7]), torch.randn(2, C))
    moved.write(other.codebook)
    moved.forget(optimiser, quantiser.codebook)
    assert torch.equal(other.codebook[[2, 7]], moved.vectors)
    assert state["exp_avg"][[2, 7]].abs().max() == 0 and state["exp_avg"][3].min() == 1 and state["step"] == 1
    moved.forget(optimiser, other.codebook)  # which it does not know


# --- processes, micro-batches, resuming ---------------------------------------------------------------------------


class Processes:
    """Threads that add up and gather as processes do."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.held = size, Barrier(size), list[Tensor](torch.empty(size, 0).unbind())

    def all(self, rank: int, values: Tensor) -> list[Tensor]:
        self.held[rank] = values
        self.barrier.wait(10)
        found = list(self.held)
        self.barrier.wait(10)
        return found

    def run(self, work: Callable[[int], None]) -> None:
        threads = [Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def trained(size: int, micro: int) -> list[tuple[Tensor, Tensor]]:
    """Codebook and counts of each process after three steps of 16 images, seen `micro` images at a time."""
    world, results = Processes(size), dict[int, tuple[Tensor, Tensor]]()

    def work(rank: int) -> None:
        quantiser = quantiser_of()
        watch = CodeWatch(quantiser, L, 30)
        for step in range(3):
            watch.begin(16 * step, 16)
            vectors = F.normalize(vectors_of(16, seed=step), dim=-1)
            codes = (vectors[..., 0] > 0.5).long()
            keys = Keys.of(7, "train").fold(torch.arange(16 * step, 16 * step + 16))
            mine = torch.arange(16).tensor_split(size)[rank]
            for part in mine.split(micro):
                watch.add(codes[part], vectors[part], keys.select(part))
            watch.end(
                lambda x: torch.stack(world.all(rank, x)).double().sum(dim=0), lambda x: torch.cat(world.all(rank, x))
            )
        results[rank] = quantiser.codebook.detach(), watch.before + watch.counts

    world.run(work)
    return [results[rank] for rank in range(size)]


def test_the_same_codes_move_on_any_number_of_processes() -> None:
    (codebook, counts), *_ = trained(1, 16)
    assert not torch.equal(codebook, quantiser_of().codebook) and int(counts.sum()) == 3 * 16 * L
    for size, micro in ((1, 3), (2, 8), (3, 2), (20, 1)):  # of 20 processes, 4 have no images
        for other, others_counts in trained(size, micro):
            assert torch.equal(other, codebook) and torch.equal(others_counts, counts), (size, micro)


def test_it_resumes_in_the_middle_of_a_window() -> None:
    whole, first, again = quantiser_of(), quantiser_of(), quantiser_of()
    codes = torch.arange(15 * L).view(15, L) % 3
    watch, stopped, resumed = CodeWatch(whole, L, 30), CodeWatch(first, L, 30), CodeWatch(again, L, 30)
    one_step(watch, codes)
    one_step(stopped, codes)
    resumed.load_state_dict(stopped.state_dict())
    one_step(watch, codes + 1, 15)
    one_step(resumed, codes + 1, 15)
    assert torch.equal(whole.codebook, again.codebook) and watch.figures() == resumed.figures()
    assert not torch.equal(whole.codebook, first.codebook)


def test_a_step_that_was_broken_off_does_not_count() -> None:
    watch = CodeWatch(quantiser_of(), L, 30)
    watch.begin(0, 15)
    watch.add(torch.zeros(15, L, dtype=torch.int64), vectors_of(15), Keys.of_seeds(range(15)))
    one_step(watch, torch.ones(15, L, dtype=torch.int64))
    assert watch.counts.tolist()[:3] == [0, 15 * L, 0]
