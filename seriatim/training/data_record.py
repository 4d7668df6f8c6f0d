"""The record of the images that a run began with, data.json, and the comparison with those that it is resumed on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seriatim.core.errors import DataError, shown
from seriatim.core.files import write_json
from seriatim.core.reading import LISTING_BYTES, read_json, read_or_raise
from seriatim.data.base import ImageData
from seriatim.training.run_folder import DATA

TIMES = "times of change"  # a trait that earlier versions recorded, and that copies lose


def write_record(out: Path, data: ImageData) -> None:
    """Write which images a run is trained on."""
    record = {
        "images": data.count,
        "classes": data.class_names,
        "fingerprint": data.fingerprint(),
        "traits": data.traits(),
        **({} if data.held_out is None else {"held_out": data.held_out.count}),
        "left_out": dict(data.bad),
        "passed_over": dict(data.passed_over),
    }
    write_json(out / DATA, record)


def check_record(out: Path, data: ImageData) -> None:
    """Raise DataError, which says what differs, if the images are not those that the run in `out` began with.

    A record of an earlier version is replaced by one of this version, so that the images may be copied from then on.
    """
    path = out / DATA
    remedy = "restore it, or begin another run with training.init_from; it says which images the run began with"
    recorded = read_or_raise(lambda: read_json(path, dict, LISTING_BYTES), path, DataError, remedy)
    if not isinstance(recorded.get("fingerprint"), str):
        raise DataError(f"{path} lacks the fingerprint of the images; {remedy}")
    now, *earlier = data.fingerprints()
    if recorded["fingerprint"] == now:
        return
    if recorded["fingerprint"] not in earlier:
        raise DataError(
            f"data: its images are not those that {out} began with: {what_differs(recorded, data)}, or begin another "
            "run with training.init_from"
        )
    write_record(out, data)


def what_differs(recorded: Mapping[str, Any], data: ImageData) -> str:
    """A text that says how the data differs from that recorded in data.json, and what to do."""
    before, now = recorded.get("traits"), data.traits()
    before = before if isinstance(before, dict) else {}
    changed = [name for name in now if before.get(name) not in (None, now[name])]
    if TIMES in before and not changed:
        return (
            "it was begun by a version that knew files by their times of change, and only these differ; copy the files "
            "with times (cp -p, rsync -t)"
        )
    differ = f"the {' and '.join(changed)} of files differ" if changed else "or files changed"
    return f"{shown(recorded.get('images'))} then, {data.count} now, {differ}; restore them"
