"""The data source for a latent cache, which holds the moments of every image and of its mirror image.

    CACHE/cache.json                the tokenizer, the images and the settings that the cache was made with
    CACHE/sources.json              the name of each image, and the files that were left out
    CACHE/shard-000000.safetensors  moments (n, m, h, w), moments_flip (n, m, h, w), labels (n,)
    CACHE/shard-000000.json         bytes, sha256 and number of images of the shard, and the key of the cache
    CACHE/manifest.json             bytes and sha256 of all these; it is written last and completes the cache

Shapes: B images, m x h x w moments of an image. `caching.py` writes the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from seriatim.core.array_reading import slice_of
from seriatim.core.errors import CheckpointError, ConfigError, DataError, one_line
from seriatim.core.files import MANIFEST, expanded, read_manifest, sha256, verify_file, write_json
from seriatim.core.flatten import WHITE, Colour
from seriatim.core.progress import track
from seriatim.core.reading import LISTING_BYTES, read_json, read_or_raise
from seriatim.core.validation import Strict, parse
from seriatim.data.base import ImageData
from seriatim.data.store import Shards
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.kinds import tokenizer_config

CACHE, SOURCES = "cache.json", "sources.json"
MEND = "repair it by repeating the `seriatim cache` that made it"
MAKE = "make one with `seriatim cache`"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
CODED = {"float32": "F32", "float16": "F16", "int16": "I16", "int32": "I32", "int64": "I64"}  # safetensors' names
MOST_IMAGES = 10**10
Side = Annotated[int, Field(ge=1, le=1 << 20)]
CODES = {"int16": torch.int16, "int32": torch.int32}  # the moments of a discrete tokenizer are codes


class CacheInfo(Strict):
    """The content of cache.json, which describes a cache."""

    format: Literal[1] = 1
    tokenizer: dict[str, Any]  # the config of the tokenizer that encoded the images
    moments_config: dict[str, Any]  # the part of it that moments depend on
    moments_fingerprint: str
    size: tuple[Side, Side]  # (H, W) of the images
    channels: Side
    crop: str = "ADM centre crop"
    data_fingerprint: str
    images: int = Field(ge=1, le=MOST_IMAGES)
    class_names: list[str]
    flip: bool  # whether the cache holds mirrored images too
    background: Colour = WHITE  # the colour of transparent parts of the images
    dtype: Literal["float32", "float16", "int16", "int32"]
    shard_images: int = Field(ge=1, le=MOST_IMAGES)
    moments: tuple[Side, Side, Side]  # (m, h, w)
    made_with: dict[str, Any]  # versions and the like, for information only

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_images)

    def count(self, shard: int) -> int:
        """The number of images in a shard."""
        return min(self.shard_images, self.images - shard * self.shard_images)

    def files(self) -> list[str]:
        """The names of all files that the manifest lists."""
        return [CACHE, SOURCES, *(shard_name(i) + end for i in range(self.shards) for end in (".json", ".safetensors"))]

    def key(self) -> str:
        """The sha256 of all that decides the contents, so that shards of another cache are not taken for these."""
        usual = {"background"} if self.background == WHITE else set()  # older caches have no such field
        return digest(self.model_dump(mode="json", exclude={"tokenizer", "made_with", *usual}))


def shard_name(number: int) -> str:
    return f"shard-{number:06d}"


def shards_of(folder: Path, info: CacheInfo) -> Shards:
    """The shards of a cache."""
    return Shards(folder, shard_name, info.count, info.key())


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain data with their own digest, which shows damage even before there is a manifest."""
    write_json(path, {**values, "sha256": digest(values)})


def read_sealed(path: Path) -> dict[str, Any]:
    """The data that `write_sealed` wrote. Raises CheckpointError if the file is missing or damaged."""
    values: dict[str, Any] = read_or_raise(lambda: read_json(path, dict, LISTING_BYTES), path, CheckpointError, MEND)
    if values.pop("sha256", None) != digest(values):
        raise CheckpointError(f"{path} is damaged: its digest does not match; {MEND}")
    return values


def read_info(path: Path) -> CacheInfo:
    """The content of cache.json. Raises CheckpointError if it is damaged or was written by an unknown version."""
    return parse(CacheInfo, read_sealed(path), where=str(path), error=CheckpointError)


def moments_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """The kind and the settings of a tokenizer that moments depend on, in the form that JSON gives them."""
    kind = tokenizer_config(tokenizer)["kind"]
    config: dict[str, Any] = json.loads(json.dumps({"kind": kind, **tokenizer.moments_config()}))
    return config


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first key whose values differ; None if all are equal."""
    return next((key for key in {**before, **now} if before.get(key) != now.get(key)), None)


def check_moments(info: CacheInfo, tokenizer: Tokenizer, path: Path) -> None:
    """Raise ConfigError, which names what differs, if the cache holds the moments of another tokenizer."""
    if tokenizer.moments_fingerprint() == info.moments_fingerprint:
        return
    now = moments_of(tokenizer)
    key = differing(info.moments_config, now)
    if key is None:
        raise ConfigError(f"tokenizer: {path} was made with other weights; use those, or make another cache")
    raise ConfigError(
        f"tokenizer.{key}: {path} was made with {info.moments_config.get(key)!r}, but the recipe has {now.get(key)!r}; "
        "change it back, or make another cache"
    )


class Latents(ImageData):
    """The moments of images in `path`, a folder made by `seriatim cache`.

    The size of every file, and with `check` its sha256, is checked before training begins.
    """

    cached = named = True

    def __init__(
        self,
        path: str,
        *,
        flip: bool = True,  # use the moments of the mirror image for half of the images, at random
        check: bool = True,  # check the sha256 of every file at the start; False checks sizes only
    ) -> None:
        self.root, self.flips = expanded(path), flip
        if not (self.root / CACHE).is_file():
            raise DataError(f"data.path: {self.root} is not a latent cache, since it has no {CACHE}; {MAKE}")
        try:
            self.info = read_info(self.root / CACHE)
            if not (self.root / MANIFEST).is_file():
                raise ConfigError(f"path: {self.root} is an incomplete cache; complete it with `seriatim cache`")
            self._verify(check)
        except CheckpointError as error:
            raise DataError(f"data.path: {one_line(error)}") from error
        if flip and not self.info.flip:
            raise ConfigError(f"flip: {self.root} holds no mirrored images; set it to false, or make another cache")
        self.count, self.size, self.channels = self.info.images, self.info.size, self.info.channels
        self.class_names, self.background = self.info.class_names, self.info.background
        self._slices: dict[tuple[int, str], Any] = {}
        self._names: list[str] | None = None
        self._labels = self._read_labels() if self.class_names else None

    def _verify(self, check: bool) -> None:
        listing = read_manifest(self.root, MEND)
        if len(listing) != 2 + 2 * self.info.shards:  # first, as a damaged file may claim billions
            shards = f"{self.info.shards:,} shards"
            raise CheckpointError(f"{self.root / MANIFEST} does not list the files of {shards}; {MEND}")
        for name in self.info.files():
            if name not in listing:
                raise CheckpointError(f"{self.root / MANIFEST} does not list {name}; {MEND}")
            small = name == CACHE
            verify_file(self.root / name, listing[name][0], listing[name][1] if small else None, MEND)
        if check:
            for name in track(self.info.files(), len(self.info.files()), "checking the cache", "files"):
                verify_file(self.root / name, *listing[name], MEND)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slices": {}}  # open files can't be sent to another process

    def _slice(self, shard: int, name: str) -> Any:
        """The rows of one tensor of a shard, which are read from disk only when they are used."""
        if (shard, name) not in self._slices:
            path = self.root / f"{shard_name(shard)}.safetensors"
            rows = read_or_raise(lambda: slice_of(path, name), f"data.path: {path}", DataError, MEND)
            tail, dtype = ((), "int64") if name == "labels" else (self.info.moments, self.info.dtype)
            if (tuple(rows.get_shape()), rows.get_dtype()) != ((self.info.count(shard), *tail), CODED[dtype]):
                found = f"{rows.get_dtype()} of shape {tuple(rows.get_shape())}"
                raise DataError(f"data.path: {path}: {name} is {found}, but {CACHE} says otherwise; {MEND}")
            self._slices[shard, name] = rows
        return self._slices[shard, name]

    def _read_labels(self) -> Tensor:
        labels = torch.cat([self._slice(shard, "labels")[:] for shard in range(self.info.shards)])
        if not -1 <= int(labels.min()) <= int(labels.max()) < len(self.class_names):
            raise DataError(f"data.path: {self.root} has labels outside its {len(self.class_names)} classes; {MEND}")
        return labels

    def _rows(self, index: Tensor, names: Sequence[str]) -> Tensor:
        places = (divmod(i, self.info.shard_images) for i in index.tolist())
        rows = [self._slice(shard, name)[row] for (shard, row), name in zip(places, names, strict=True)]
        found = torch.stack(rows).to(torch.int64 if self.info.dtype in CODES else torch.float32)
        bad = (~torch.isfinite(found)).flatten(1).any(dim=1)
        if bool(bad.any()):
            image = int(index[int(bad.nonzero()[0])])
            raise DataError(f"data.path: {self.root}: image {image} has moments that are not finite; {MEND}")
        return found

    def images(self, index: Tensor) -> Tensor:
        """The moments (B, m, h, w), float32 or int64 codes, of the images `index` (B,)."""
        return self._rows(index, ["moments"] * len(index))

    def mirrored(self, index: Tensor, chosen: Tensor) -> Tensor:
        """The moments of the images `index` (B,); those in the mask `chosen` (B,) are of the mirrored images."""
        return self._rows(index, ["moments_flip" if coin else "moments" for coin in chosen.tolist()])

    def labels(self, index: Tensor) -> Tensor | None:
        return None if self._labels is None else self._labels[index]

    def name(self, i: int) -> str:
        if self._names is None:
            try:
                names = read_sealed(self.root / SOURCES).get("names")
            except CheckpointError as error:
                raise DataError(f"data.path: {one_line(error)}") from error
            if not isinstance(names, list) or len(names) != self.count:
                raise DataError(f"data.path: {self.root / SOURCES} does not name the {self.count} images; {MEND}")
            self._names = [str(name) for name in names]
        return self._names[i]

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        check_moments(self.info, tokenizer, self.root)
        cls = type(tokenizer)
        if cls.fit is not Tokenizer.fit and cls.fit_moments is Tokenizer.fit_moments:
            raise ConfigError(
                f"tokenizer: {cls.__name__} measures its statistics in fit(), from images, which a cache does not "
                "have; implement fit_moments() instead"
            )

    def fingerprint(self) -> str:
        """The sha256 of the manifest, which lists the sha256 of all files."""
        return sha256(self.root / MANIFEST)

    def images_fingerprint(self) -> str:
        return self.info.data_fingerprint
