"""The models that come with the package: folders of `seriatim/weights`, known by their names alone."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from seriatim.checkpoints.unfinished import CONFIG
from seriatim.core.files import present_or_previous
from seriatim.core.ownership import json_of

Kind = Literal["model", "tokenizer", "classifier"]

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


def packaged_names(kind: Kind | None = None) -> list[str]:
    """The names of what is packaged, of one kind or of all."""
    names = sorted(path.parent.name for path in WEIGHTS.glob(f"*/{CONFIG}"))
    return [name for name in names if kind in (None, packaged_kind(name))]


def packaged_kind(name: str) -> Kind:
    """What a packaged name stands for; a model has a tokenizer of its own, and counts as a model."""
    config = json_of(WEIGHTS / name / CONFIG)
    return "classifier" if "classifier" in config else "model" if "model" in config else "tokenizer"


def packaged(name: Path | str) -> Path | None:
    """The folder of the packaged model of this name; None if there is none, or if anything here has that name."""
    text = os.fspath(name)
    if NAME.fullmatch(text) is None or not (WEIGHTS / text / CONFIG).is_file():
        return None
    return None if os.path.lexists(present_or_previous(Path(text))) else WEIGHTS / text
