"""How the processes of one start find each other, and not what an earlier start left behind.

torchrun keeps one store of addresses through all its restarts, and torch writes the same names into it each time. A
process that is started again may therefore read where a process met that is dead by now, and fail to connect (PyTorch
issue 135712). Counting the restarts does not tell the starts apart, because each machine counts its own. So the
processes agree on a new name at every start, and keep everything else under it.
"""

from __future__ import annotations

import secrets
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from seriatim.core.errors import ResourceError
from seriatim.core.processes import Place

if TYPE_CHECKING:
    from torch.distributed import Store

PAUSE = 0.01  # seconds between two looks of the first process for the others


def store_of_this_start(where: Place, patience: timedelta) -> Store:
    """The store that only the processes of this start use, which the environment says how to reach.

    Raises ResourceError if a process has not arrived after `patience`.
    """
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store = next(rendezvous("env://", timeout=patience))[0]
    return PrefixStore(agreed_name(store, where, patience), store)


def agreed_name(store: Store, where: Place, patience: timedelta) -> str:
    """A name that the processes of this start agree on, and that no other start has.

    Each process draws a word. The first process answers each word that it finds with its own, which becomes the name.
    Only a process of this start can find the answer to its word, and only its confirmation, under the new name, counts.
    """
    own = secrets.token_hex(8)
    if where.rank:
        store.set(f"arrived/{where.rank}", own)
        name = store.get(f"answer/{own}").decode()  # waits until the first process has set it
        store.set(f"{name}/confirmed/{where.rank}", own)
        return name
    end = time.monotonic() + patience.total_seconds()
    missing = set(range(1, where.size))
    while missing:
        for rank in missing:
            if store.check([f"arrived/{rank}"]):
                store.set(f"answer/{store.get(f'arrived/{rank}').decode()}", own)
        missing = {rank for rank in missing if not store.check([f"{own}/confirmed/{rank}"])}
        if missing and time.monotonic() > end:
            raise ResourceError(
                f"processes: {len(missing)} of {where.size} have not arrived after {patience}, among them process "
                f"{min(missing)}; see what it says, and start all of them again"
            )
        if missing:
            time.sleep(PAUSE)
    return own
