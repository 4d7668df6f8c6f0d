"""The models that come with the package: folders of `seriatim/weights`, known by their names alone."""

from __future__ import annotations

import os
import re
from pathlib import Path

from seriatim.checkpoints.unfinished import CONFIG
from seriatim.core.files import present_or_previous

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


def packaged_names() -> list[str]:
    """The names of all packaged models, tokenizers and classifiers."""
    return sorted(path.parent.name for path in WEIGHTS.glob(f"*/{CONFIG}"))


def packaged(name: Path | str) -> Path | None:
    """The folder of the packaged model of this name; None if there is none, or if anything here has that name."""
    text = os.fspath(name)
    if NAME.fullmatch(text) is None or not (WEIGHTS / text / CONFIG).is_file():
        return None
    return None if os.path.lexists(present_or_previous(Path(text))) else WEIGHTS / text
