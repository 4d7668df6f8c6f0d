"""Measure the statistics of latents once over the images of a recipe, and save them in a tokenizer folder."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from seriatim.checkpoints.tokenizer import read_provenance, save_tokenizer, writable
from seriatim.core.device import pick_device
from seriatim.core.errors import ConfigError, ResourceError, UsageError
from seriatim.core.files import MANIFEST, expanded, writable_folder
from seriatim.core.processes import place
from seriatim.core.progress import Progress
from seriatim.core.stopping import claimed, claims
from seriatim.data.base import ImageData, StreamData
from seriatim.data.loader import to_float
from seriatim.data.store import Shards
from seriatim.evaluation.impartial import seen_features
from seriatim.tokenizers.latent import Latent, Measured, Statistics
from seriatim.training.config import Recipe
from seriatim.training.setup import build_inputs, look_over

BATCH = 32  # images that are encoded at once
BLOCK = 8 * BATCH  # images of a block, the least that a process computes


@dataclass(frozen=True)
class Measurement:
    folder: Path  # the tokenizer folder
    measured: Measured
    sha256: str  # the sha256 of the statistics


def measure_latents(
    recipe: Recipe,
    out: Path | str,
    *,
    images: int = 10_000,
    statistics: Statistics = "channel",
    device: str = "auto",
    quiet: bool = False,
) -> Measurement | None:
    """Measure the recipe's tokenizer over about `images` of its images, and write it with its statistics to `out`.

    Earlier statistics are replaced. A recipe uses the folder as `tokenizer: {from: OUT}`. Several processes, such as
    those of torchrun, share the images; the first one writes the folder, and the others return None. Raises ConfigError
    if the tokenizer has no latents.
    """
    if images < 1:
        raise UsageError(f"num: {images!r} is not allowed; it must be at least 1")
    out = writable(out)
    data, tokenizer = build_inputs(recipe)
    if not isinstance(tokenizer, Latent):
        raise ConfigError(
            f"tokenizer.kind: {recipe.tokenizer.get('kind')!r} has no latents to measure; name kl or pretrained"
        )
    tokenizer.to(pick_device(device))
    parts = None if place().size == 1 else Parts(data, tokenizer, images, out)
    if parts is None:
        measured = tokenizer.measure(look_over(data, images, BATCH, quiet=quiet), statistics)
    else:
        parts.compute(quiet=quiet)
        if place().rank:
            return None
        measured = tokenizer.measured_from(parts.rows(), statistics)
    digest = statistics_sha256(tokenizer)
    provenance = {
        "statistics": {
            "kind": statistics,
            "images": measured.images,
            "scale": measured.scale,
            "sha256": digest,
            "data": {**recipe.model_dump(mode="json")["data"], "count": data.count, "fingerprint": data.fingerprint()},
        }
    }
    source = recipe.tokenizer.get("from")
    if source is not None:
        made = read_provenance(expanded(source))
        provenance |= {"from": {"folder": source, **made}} | seen_features([made])
    folder = save_tokenizer(tokenizer, out, provenance)
    if parts is not None:
        parts.remove()
    return Measurement(folder, measured, digest)


class Parts:
    """The sums of blocks of images, in files beside `out` that several processes share."""

    def __init__(self, data: ImageData, tokenizer: Latent, images: int, out: Path) -> None:
        if isinstance(data, StreamData):
            raise ConfigError("data.kind: a stream can't be shared by several processes; start one, without torchrun")
        self.data, self.tokenizer, self.out = data, tokenizer, out
        self.folder = out.with_name(f".{out.name}.measuring")
        index = torch.arange(data.count)[:: max(1, data.count // images)]
        self.blocks = index.split(BLOCK)
        about = f"{tokenizer.moments_fingerprint()} {data.fingerprint()} {len(index)}"
        key = hashlib.sha256(about.encode()).hexdigest()
        self.shards = Shards(self.folder, lambda n: f"{n:06d}", lambda n: len(self.blocks[n]), key)

    def compute(self, *, quiet: bool) -> None:
        """Compute this process's share, and those of processes that died. In the end all blocks are there."""
        where = place()
        if where.rank and not self.folder.exists() and (self.out / MANIFEST).exists():
            return  # the first process has finished already
        writable_folder(self.folder)
        try:
            with claimed(self.present(where.rank), wait=True):
                self._compute(quiet)
        except ResourceError:
            if where.rank == 0 or self.folder.exists():
                raise  # otherwise the first process has finished just now

    def _compute(self, quiet: bool) -> None:
        count = sum(map(len, self.blocks))
        with (
            Progress(count, "measuring tokens", "images", quiet=quiet) as bar,
            contextlib.closing(claims(range(len(self.blocks)), self.shards.lock)) as numbers,
        ):
            for number in numbers:
                self.shards.sweep(number)
                if not self.shards.there(number) or self.shards.whole(number) is None:
                    batches = [to_float(self.data.images(part)) for part in self.blocks[number].split(BATCH)]
                    sums = [self.tokenizer.sums(self.tokenizer.moments(batch)) for batch in batches]
                    self.shards.write(number, {"sums": torch.stack(sums)})  # (batches, 5, z)
                bar.advance(len(self.blocks[number]))

    def rows(self) -> Iterator[Tensor]:
        """The sums (5, z) of each batch in the order of the images, so that they add up as in one process."""
        for number in range(len(self.blocks)):
            yield from self.shards.read(number)["sums"]

    def present(self, rank: int) -> Path:
        """The lock that a process holds while it reads and writes blocks."""
        return self.folder / f".process-{rank}.lock"

    def remove(self) -> None:
        """Delete the blocks when no other process uses them; one that begins later finds that all is done."""
        with contextlib.ExitStack() as stack:
            for rank in range(1, place().size):
                stack.enter_context(claimed(self.present(rank), wait=True))
            shutil.rmtree(self.folder, ignore_errors=True)


def statistics_sha256(tokenizer: Latent) -> str:
    """The sha256 of mean and std in float32."""
    digest = hashlib.sha256()
    for values in (tokenizer.mean, tokenizer.std):
        digest.update(values.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
