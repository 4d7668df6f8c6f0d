"""Where the weights of the FID convention's Inception are: a path, an environment variable, a cache, a download."""

from __future__ import annotations

import http.client
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch

from seriatim.core.cache_folder import cache_folder
from seriatim.core.errors import CheckpointError, UsageError, one_line
from seriatim.core.files import atomic_write, expanded, sha256
from seriatim.core.progress import Progress

FILE = "pt_inception-2015-12-05-6726825d.pth"
DIGEST = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # sha256
FIDELITY = "weights-inception-2015-12-05-6726825d.pth"  # the same file as torch-fidelity calls it
SHOWN = 8  # digits of a sha256
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
VARIABLE = "SERIATIM_INCEPTION"
TIMEOUT = 30.0  # seconds without an answer
PIECE = 1 << 20


def find_weights(path: Path | None = None) -> tuple[Path, str]:
    """The weights file and its sha256, which is the known one.

    Raises CheckpointError, one line, where it is nowhere and can't be fetched, or is another file.
    """
    named = path or (expanded(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is not None:
        if not named.is_file():
            raise UsageError(f"features: {named} is no file; name {FILE}{'' if path else f' in {VARIABLE}'}")
        return named, checked(named)
    for place in places():
        if place.is_file():
            return place, checked(place)
    target = places()[0]
    download(target)
    return target, checked(target)


def places() -> list[Path]:
    """Where the file may lie already: our cache, torch's (of pytorch-fid, of torch-fidelity and torchmetrics)."""
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    return [cache_folder() / FILE, hub / FILE, hub / FIDELITY]


def checked(path: Path) -> str:
    digest = sha256(path)
    if digest != DIGEST:
        raise CheckpointError(
            f"{path}: its sha256 begins with {digest[:SHOWN]}, that of {FILE} with {DIGEST[:SHOWN]}: other weights or "
            f"a damaged copy; download {URL}"
        )
    return digest


def download(target: Path) -> None:
    """Fetch the file; it appears only when it is the known one."""
    ways = (
        f"download {URL} to {target}, or name the file: --features inception:FILE, or {VARIABLE}=FILE; "
        "or use --features pixels or the folder of a trained classifier"
    )
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise CheckpointError(f"features: inception needs {FILE}, and HF_HUB_OFFLINE forbids fetching it; {ways}")

    def write(file: Path) -> None:
        with open(file, "wb") as out:
            for piece in pieces(ways):
                out.write(piece)
        if sha256(file) != DIGEST:
            raise CheckpointError(f"features: {URL} gave another file than {FILE}; {ways}")

    atomic_write(target, write)


def pieces(ways: str) -> Iterator[bytes]:
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT) as answer:
            total = -(-int(answer.headers.get("Content-Length") or 0) // PIECE)
            with Progress(total, f"fetching {FILE}", "MB") as bar:
                while piece := answer.read(PIECE):
                    yield piece
                    bar.advance()
    except (OSError, ValueError, http.client.HTTPException) as error:  # a proxy may answer anything
        why = one_line(error)[:80]
        raise CheckpointError(
            f"features: inception needs {FILE}, which could not be fetched ({why}); {ways}"
        ) from error
