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
from seriatim.core.errors import ConfigError, UsageError
from seriatim.core.files import MANIFEST, writable_folder
from seriatim.core.processes import place
from seriatim.core.progress import Progress
from seriatim.core.stopping import claims
from seriatim.data.base import ImageData, StreamData
from seriatim.data.loader import to_float
from seriatim.data.store import Shards
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
    if place().size == 1:
        measured = tokenizer.measure(look_over(data, images, BATCH, quiet=quiet), statistics)
    else:
        parts = shared_parts(data, tokenizer, images, out, quiet=quiet)
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
        provenance["from"] = {"folder": source, **read_provenance(Path(source).expanduser())}
    folder = save_tokenizer(tokenizer, out, provenance)
    shutil.rmtree(parts_folder(folder), ignore_errors=True)
    return Measurement(folder, measured, digest)


@dataclass(frozen=True)
class Parts:
    """The sums of blocks of images, in files that processes share."""

    shards: Shards
    count: int

    def rows(self) -> Iterator[Tensor]:
        """The sums (5, z) of each batch in the order of the images, so that they add up as in one process."""
        for number in range(self.count):
            yield from self.shards.read(number)["sums"]


def shared_parts(data: ImageData, tokenizer: Latent, images: int, out: Path, *, quiet: bool) -> Parts:
    """The sums of all blocks, of which this process computes its share, and the shares of processes that died."""
    if isinstance(data, StreamData):
        raise ConfigError("data.kind: a stream can't be shared by several processes; start one, without torchrun")
    index = torch.arange(data.count)[:: max(1, data.count // images)]
    blocks = index.split(BLOCK)
    folder = parts_folder(out)
    key = hashlib.sha256(f"{tokenizer.moments_fingerprint()} {data.fingerprint()} {len(index)}".encode()).hexdigest()
    shards = Shards(folder, lambda number: f"{number:06d}", lambda number: len(blocks[number]), key)
    if place().rank and not folder.exists() and (out / MANIFEST).exists():
        return Parts(shards, len(blocks))  # the first process has finished already
    writable_folder(folder)
    with (
        Progress(len(index), "measuring tokens", "images", quiet=quiet) as bar,
        contextlib.closing(claims(range(len(blocks)), shards.lock)) as numbers,
    ):
        for number in numbers:
            shards.sweep(number)
            if not shards.there(number) or shards.whole(number) is None:
                batches = [to_float(data.images(part)) for part in blocks[number].split(BATCH)]
                sums = [tokenizer.sums(tokenizer.moments(batch)) for batch in batches]
                shards.write(number, {"sums": torch.stack(sums)})  # (batches, 5, z)
            bar.advance(len(blocks[number]))
    return Parts(shards, len(blocks))


def parts_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.measuring")


def statistics_sha256(tokenizer: Latent) -> str:
    """The sha256 of mean and std in float32."""
    digest = hashlib.sha256()
    for values in (tokenizer.mean, tokenizer.std):
        digest.update(values.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
