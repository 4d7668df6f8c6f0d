"""Write a latent cache shard by shard. It can be stopped and continued, and several processes may work on it at once.

Shapes: B images, c channels, H x W pixels, m x h x w moments of an image.

A shard is complete when the sidecar file, written after it, states its bytes and sha256. The process that holds a
shard's lock encodes the shard unless it is complete; a process that has seen all shards complete writes the manifest.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from seriatim import __version__
from seriatim.core.construct import MOST_AT_ONCE, MOST_WORKERS
from seriatim.core.device import pick_device
from seriatim.core.errors import CheckpointError, ConfigError, NumericsError, Stopped, UsageError
from seriatim.core.files import MANIFEST, read_manifest, sweep, writable_folder, write_manifest
from seriatim.core.ownership import json_of, owned
from seriatim.core.progress import Progress
from seriatim.core.stopping import StopRequest, claimed, claims
from seriatim.core.terminal import say
from seriatim.data.base import ImageData, StreamData
from seriatim.data.latents import (
    CACHE,
    CODES,
    DTYPES,
    MOST_IMAGES,
    SOURCES,
    CacheInfo,
    check_moments,
    moments_of,
    read_info,
    read_sealed,
    shard_name,
    shards_of,
    write_sealed,
)
from seriatim.data.loader import InOrder, Loader, to_float
from seriatim.data.store import STATED
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.kinds import tokenizer_config

LOCK = ".cache.lock"
LOOKED_AT = 100  # at most this many sidecars are read to find out whether a folder is a cache
SETTINGS = {  # the fields that must equal those of an unfinished cache -> the names that users know
    "format": "format",
    "size": "data.size",
    "channels": "data.channels",
    "moments_fingerprint": "tokenizer",
    "moments": "tokenizer (the shape of its moments)",
    "crop": "crop",
    "flip": "data.flip",
    "dtype": "dtype",
    "shard_images": "shard_images",
    "images": "data (its count)",
    "class_names": "data (its classes)",
    "background": "data.background",
    "data_fingerprint": "data (its images)",
}


@dataclass(frozen=True)
class CacheResult:
    folder: Path
    images: int  # the number in the cache
    encoded: int  # the number that this call encoded
    shards: int
    bytes: int
    seconds: float
    images_per_second: float  # the speed of encoding


def write_cache(
    data: ImageData,
    tokenizer: Tokenizer,
    out: Path | str,
    *,
    batch_size: int = 64,
    shard_images: int = 2048,
    dtype: str = "float32",
    device: str = "auto",
    workers: int = 0,
    quiet: bool = False,
) -> CacheResult:
    """Encode all of `data` into the folder `out`, or continue where another call stopped or was killed.

    Moments are stored as `dtype`, codes as the smallest integers that hold the vocabulary. Several processes or
    machines may work on one cache at once. Raises ConfigError if `out` was begun with other settings and names the
    first that differs, ResourceError if the disk is full, and Stopped on SIGTERM or SIGINT. Complete shards are kept in
    all of these cases.
    """
    for name, value, least, most in (
        ("batch_size", batch_size, 1, MOST_AT_ONCE),
        ("shard_images", shard_images, 1, MOST_IMAGES),
        ("workers", workers, 0, MOST_WORKERS),
    ):
        if not least <= value <= most:
            raise UsageError(f"{name}: {value!r} is not allowed; it must be from {least} to {most}")
    if dtype not in DTYPES:
        raise UsageError(f"dtype: {dtype!r} is not allowed; it must be {' or '.join(DTYPES)}")
    if isinstance(data, StreamData):
        raise ConfigError("data.kind: a stream has no images by number and can't be cached; use hf or folder")
    if not data.pictures:
        raise ConfigError("data.kind: arrays hold tokens already and need no cache; train from them")
    if data.cached:
        raise ConfigError("data.kind: latents are a cache already; name the images")
    owned(Path(out), "cache", is_cache, begun={LOCK})
    out, where = writable_folder(out), pick_device(device)
    tokenizer.to(where).eval()
    first = encode(tokenizer, to_float(data.images(torch.tensor([0])).to(where)))
    if not first.is_floating_point():  # codes are integers, and float16 holds only small ones exactly
        dtype = "int16" if (tokenizer.vocab or 1 << 31) <= 1 << 15 else "int32"
    info = CacheInfo(
        tokenizer=tokenizer_config(tokenizer),
        moments_config=moments_of(tokenizer),
        moments_fingerprint=tokenizer.moments_fingerprint(),
        size=data.size,
        channels=data.channels,
        data_fingerprint=data.fingerprint(),
        images=data.count,
        class_names=data.class_names,
        flip=data.flips,
        background=data.background,
        dtype=cast(Any, dtype),
        shard_images=shard_images,
        moments=tuple(first.shape[1:]),
        made_with={
            "seriatim": __version__,
            "torch": str(torch.__version__),
            "device": where.type,
            "batch_size": batch_size,
        },
    )
    info = begin(out, info, data, tokenizer)
    shards = shards_of(out, info)
    started, encoded, hashes = time.monotonic(), 0, dict[str, str]()
    with StopRequest() as stop, Progress(info.images, "encoding", "images", quiet=quiet) as bar:
        encoder = Encoder(data, tokenizer, info, where, batch_size, workers, stop, bar)
        with contextlib.closing(claims(range(info.shards), shards.lock, encoder.stop_if_asked)) as numbers:
            for number in numbers:
                shards.sweep(number)
                found = shards.whole(number)
                if found is None:
                    found = shards.write(number, encoder.shard(number))
                    encoded += info.count(number)
                else:
                    bar.skip(info.count(number))
                hashes[f"{shard_name(number)}.safetensors"] = found
                encoder.done = len(hashes)
    with claimed(out / LOCK, wait=True):
        write_manifest(out, info.files(), hashes)
    seconds = time.monotonic() - started
    size = sum((out / name).stat().st_size for name in info.files())
    return CacheResult(out, info.images, encoded, info.shards, size, seconds, encoded / max(1e-9, seconds))


# --- encoding -----------------------------------------------------------------------------------------------------


@dataclass
class Encoder:
    """Encodes the images of a shard into its tensors."""

    data: ImageData
    tokenizer: Tokenizer
    info: CacheInfo
    where: torch.device
    batch_size: int
    workers: int
    stop: StopRequest
    bar: Progress
    done: int = 0  # complete shards

    def shard(self, number: int) -> dict[str, Tensor]:
        """The tensors of a shard. Its batches start at its first image, so that all processes encode it equally."""
        info, first, count = self.info, number * self.info.shard_images, self.info.count(number)
        names = ("moments", "moments_flip") if info.flip else ("moments",)
        tensors = {name: torch.empty(count, *info.moments, dtype=(DTYPES | CODES)[info.dtype]) for name in names}
        labels = []
        loader = Loader(InOrder(self.data, first, first + count, self.batch_size), self.workers)
        with contextlib.closing(iter(loader)) as batches:
            for batch in batches:
                self.stop_if_asked()
                images = to_float(batch.images.to(self.where))  # (B, c, H, W)
                place = slice(batch.first - first, batch.first - first + len(batch))
                for name in names:
                    view = images if name == "moments" else images.flip(-1)
                    tensors[name][place] = encode(self.tokenizer, view).to(tensors[name].dtype)  # (B, m, h, w)
                    if not bool(torch.isfinite(tensors[name][place]).all()):
                        raise NumericsError(
                            f"the {name} of images {self.data.name(int(batch.index[0]))}, ... are not finite as "
                            f"{info.dtype}, so they were not written; use dtype float32 or another tokenizer"
                        )
                if batch.labels is not None:
                    labels.append(batch.labels.long())
                self.bar.advance(len(batch))
        return {**tensors, "labels": torch.cat(labels)} if labels else tensors

    def stop_if_asked(self) -> None:
        if self.stop.requested:
            raise Stopped(
                f"{self.stop.requested}: stopped with {self.done} of {self.info.shards} shards whole; "
                "repeat the command to encode the rest"
            )


@torch.no_grad()
def encode(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """The moments (B, m, h, w) of images (B, c, H, W) on the CPU: float32, or the codes of a discrete tokenizer."""
    moments = tokenizer.moments(images).cpu()
    return moments.float() if moments.is_floating_point() else moments


# --- the folder ---------------------------------------------------------------------------------------------------


def is_cache(folder: Path) -> bool:
    """Whether a cache was begun in the folder. Any of its files proves it if that file is intact."""
    for name in (CACHE, SOURCES):
        with contextlib.suppress(CheckpointError):
            return bool(read_sealed(folder / name))
    with contextlib.suppress(CheckpointError, OSError):
        return CACHE in read_manifest(folder)
    sidecars = islice(folder.glob("shard-*.json"), LOOKED_AT)
    return any(json_of(path).keys() == STATED for path in sidecars)


def begin(out: Path, info: CacheInfo, data: ImageData, tokenizer: Tokenizer) -> CacheInfo:
    """Write the description of the cache, or check that the folder holds the same cache already; return it.

    A cache that an earlier version began knows the images by another fingerprint, which it keeps.
    """
    with claimed(out / LOCK, wait=True):
        for name in (CACHE, SOURCES, MANIFEST):
            sweep(out, {name}.__contains__)  # temporary files of a process that was killed
        there = {path.name for path in out.iterdir() if not path.name.startswith((".", "shard-"))}
        foreign = sorted(there - {CACHE, SOURCES, MANIFEST})
        if foreign:
            raise UsageError(f"out: {out} holds {foreign[0]!r}, which is not part of a cache; choose another folder")
        if sealed(out / CACHE):
            before = read_info(out / CACHE)
            if before.data_fingerprint in data.fingerprints():
                info = info.model_copy(update={"data_fingerprint": before.data_fingerprint})
            refuse_other(before, info, tokenizer, out)
        else:  # shards that exist already are used only if their key fits
            write_sealed(out / CACHE, info.model_dump(mode="json"))
        if not sealed(out / SOURCES):
            names = [data.name(i) for i in range(data.count)]
            write_sealed(
                out / SOURCES, {"names": names, "left_out": dict(data.bad), "passed_over": dict(data.passed_over)}
            )
    return info


def sealed(path: Path) -> bool:
    """Whether the file exists and is intact. A damaged file is reported, because it will be written again."""
    try:
        read_sealed(path)
    except CheckpointError as error:
        if path.exists():
            say(f"mending: {error}")
        return False
    return True


def refuse_other(before: CacheInfo, now: CacheInfo, tokenizer: Tokenizer, out: Path) -> None:
    """Raise ConfigError if an unfinished cache has other settings than this one; it names the first that differs."""
    theirs, ours = before.model_dump(mode="json"), now.model_dump(mode="json")
    for field, name in SETTINGS.items():
        if field == "moments_fingerprint":
            check_moments(before, tokenizer, out)
        elif theirs[field] != ours[field]:
            shown = f"{clip(theirs[field])}, now {clip(ours[field])}" if field != "data_fingerprint" else "others"
            raise ConfigError(f"{name}: {out} was begun with {shown}; change it back, or choose another folder")


def clip(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
