"""What an evaluation is, kept in its folder: the same goes on where it was stopped, another is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from seriatim.core.array_reading import open_safetensors
from seriatim.core.errors import UsageError, shown
from seriatim.core.files import write_json
from seriatim.core.ownership import json_of, owned
from seriatim.core.reading import Unreadable, read_json, read_or_raise
from seriatim.evaluation.reference import Part
from seriatim.pipeline.request import SampleRequest

SETTINGS = "settings.json"
COMPARISON = "compare.json"
RANDOM_NUMBERS = 2  # 1: generators for each image, until release 0.1; 2: counter-based keys
LOOKED_AT = 100  # files that may prove whose a folder is
# The same weights, images or file elsewhere are the same: their hashes are compared.
SOURCES = {"model.source", "tokenizer.source", "reference.path", "real.path", "reference.file"}


def is_evaluation(folder: Path) -> bool:
    """Whether the folder is that of an evaluation, as its settings prove, or features beside damaged ones."""
    keys = json_of(folder / SETTINGS).keys()
    if {"block", "reference", "real"} <= keys and ("model" in keys or "tokenizer" in keys):
        return True
    return (folder / SETTINGS).is_file() and any(map(is_block, islice(folder.glob("samples/*.safetensors"), LOOKED_AT)))


def is_sweep(folder: Path) -> bool:
    """Whether the folder is that of a sweep: its table, or its points, which are evaluations, prove it."""
    if {"fields", "points"} <= json_of(folder / "sweep.json").keys():
        return True
    return any("=" in path.name and is_evaluation(path) for path in folder.iterdir())


def is_comparison(folder: Path) -> bool:
    """Whether the folder is that of a comparison: its report, or the evaluations of its models, prove it."""
    if {"a", "b", "figures"} <= json_of(folder / COMPARISON).keys():
        return True
    return any(re.fullmatch(r"[ab]-[0-9]+", path.name) and is_evaluation(path) for path in folder.iterdir())


def holds_features(folder: Path) -> bool:
    """Whether the folder keeps features of real images: a cache, an evaluation, a sweep or a comparison."""
    if is_evaluation(folder) or is_sweep(folder) or is_comparison(folder):
        return True
    return any(map(is_block, islice((folder / "real").glob("????????????????/*.safetensors"), LOOKED_AT)))


def is_block(path: Path) -> bool:
    """Whether a file holds features of images, as its header says."""
    try:
        return "features" in open_safetensors(path).keys()  # a file handle, not a dict
    except Unreadable:
        return False


def check_folders(out: Path, cache: Path | None) -> None:
    """Refuse folders that hold anything but evaluations, and features of real images, of ours; touches nothing."""
    owned(out, "evaluation", is_evaluation)
    if cache is not None:
        owned(cache, "cache of features", holds_features, argument="cache")


def said(request: SampleRequest) -> dict[str, Any]:
    """What settings.json says of a request, and which random numbers its seed stands for."""
    settings = request.model_dump(mode="json", exclude={"class_labels", "num_images_per_label", "seeds"})
    return {**settings, "random_numbers": RANDOM_NUMBERS}


def same_settings(path: Path, chosen: Mapping[str, Any], parts: Mapping[str, Part | None] | None = None) -> None:
    """Write what this evaluation is, or refuse to go on with another.

    `parts` are the real images that `chosen` describes under the same names; an earlier version may have written
    another fingerprint of the same images.
    """
    now = flat(chosen)
    if not path.exists():
        write_json(path, dict(chosen))
        return
    remedy = "it says what was measured in this folder: choose another folder"
    stored = read_or_raise(lambda: read_json(path, dict), path, UsageError, remedy)
    if "request" in chosen:
        # A field that the version which began this did not know: it drew by what is now the default.
        request = stored.get("request")
        if not isinstance(request, dict):
            raise UsageError(f"{path} lacks the request; {remedy}")
        stored = {**stored, "request": said(SampleRequest()) | {"random_numbers": 1} | request}
    before = flat(stored)
    for name, part in (parts or {}).items():
        if part is not None and before.get(f"{name}.sha256") in part.fingerprints():
            before[f"{name}.sha256"] = now[f"{name}.sha256"]

    def place(name: str) -> tuple[bool, int, str]:
        """Random numbers are named first, since no setting can bring others back; an extractor before how it is set."""
        return name != "request.random_numbers", name.count("."), name

    for name in sorted(now.keys() | before.keys(), key=place):
        if name not in SOURCES and before.get(name) != now.get(name):
            raise UsageError(
                f"{name}: {shown(before.get(name))} in {path}, {shown(now.get(name))} now; go on with the same "
                "settings, or choose another folder"
            )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"request.guidance_scale": 2.0, ...}`, as JSON would give them back."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = json.loads(json.dumps(value))
    return found
