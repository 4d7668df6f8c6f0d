"""Processes that start find each other, whatever an earlier start has left in the store of addresses."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from forked import Fork
from processes import add_up_ranks, environment, free_port
from torch.distributed import HashStore, TCPStore

from seriatim.core.errors import ResourceError
from seriatim.core.processes import Place
from seriatim.training.distributed import joined
from seriatim.training.meeting import agreed_name

SOON = timedelta(seconds=20)


def start(store: HashStore, order: list[int], pause: float = 0.05) -> list[str]:
    """The names on which processes agree that come one after another, `pause` seconds apart."""

    def arrive(at: int, rank: int) -> str:
        time.sleep(at * pause)
        return agreed_name(store, Place(rank, len(order), rank, len(order)), SOON)

    with ThreadPoolExecutor(len(order)) as pool:
        return list(pool.map(arrive, range(len(order)), order))


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [2, 0, 3, 1], [3, 2, 1, 0]])
def test_all_processes_agree_and_each_start_has_a_name_of_its_own(order: list[int]) -> None:
    store = HashStore()
    names = [start(store, order) for _ in range(4)]
    assert all(len(set(each)) == 1 for each in names)
    assert len({each[0] for each in names}) == len(names)


def test_a_process_that_died_while_it_waited_is_not_taken_for_its_successor() -> None:
    store = HashStore()
    store.set("arrived/1", "the word of a dead process")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(agreed_name, store, Place(0, 2, 0, 2), SOON)
        time.sleep(0.1)
        assert not first.done()
        assert agreed_name(store, Place(1, 2, 1, 2), SOON) == first.result()


def test_who_does_not_come_is_named() -> None:
    with pytest.raises(ResourceError, match=r"2 of 3 have not arrived .* process 1"):
        agreed_name(HashStore(), Place(0, 3, 0, 3), timedelta(seconds=0.05))


def test_a_second_start_does_not_use_addresses_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)  # torchrun keeps one like it
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for _ in range(2):
        places = [{**os.environ, **environment(rank, 2, kept.port)} for rank in range(2)]
        with Fork(add_up_ranks, [], env=places[0]) as first, Fork(add_up_ranks, [], env=places[1]) as second:
            found = [each.wait(60) for each in (first, second)]
        assert [(each.returncode, each.stdout) for each in found] == [(0, "3.0\n")] * 2, found


def test_an_address_that_nobody_listens_at_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": "99999"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ResourceError, match=r"process 1 of 2 could not meet the others.*MASTER_PORT"), joined("cpu"):
        pass
