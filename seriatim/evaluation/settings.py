"""What an evaluation is, kept in its folder: the same goes on where it was stopped, another is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seriatim.core.errors import UsageError, one_line
from seriatim.core.files import write_json
from seriatim.pipeline.request import SampleRequest

SETTINGS = "settings.json"
RANDOM_NUMBERS = 2  # 1: generators for each image, until release 0.1; 2: counter-based keys
# The same weights, images or file elsewhere are the same: their hashes are compared.
SOURCES = {"model.source", "tokenizer.source", "reference.path", "real.path", "reference.file"}


def said(request: SampleRequest) -> dict[str, Any]:
    """What settings.json says of a request, and which random numbers its seed stands for."""
    settings = request.model_dump(mode="json", exclude={"class_labels", "num_images_per_label", "seeds"})
    return {**settings, "random_numbers": RANDOM_NUMBERS}


def same_settings(path: Path, chosen: Mapping[str, Any]) -> None:
    """Write what this evaluation is, or refuse to go on with another."""
    now = flat(chosen)
    if not path.exists():
        write_json(path, dict(chosen))
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        # A field that the version which began this did not know: it drew by what is now the default.
        if "request" in chosen:
            stored = {**stored, "request": said(SampleRequest()) | {"random_numbers": 1} | stored["request"]}
        before = flat(stored)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"out: {path} is damaged ({one_line(error)[:80]}); choose another folder") from error
    for name in sorted(now.keys() | before.keys(), key=lambda name: (name.count("."), name)):  # an extractor, then how
        if name not in SOURCES and before.get(name) != now.get(name):
            raise UsageError(
                f"{name}: {before.get(name)!r} in {path}, {now.get(name)!r} now; go on with the same settings, or "
                "choose another folder"
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
