"""A latent cache: the moments of every image and of its mirror image, encoded once, read by index.

    CACHE/cache.json                what it is: the tokenizer, the images, the settings it was made with
    CACHE/sources.json              the name of each image, and what was left out
    CACHE/shard-000000.safetensors  moments (n, m, h, w), moments_flip (n, m, h, w), labels (n,)
    CACHE/shard-000000.json         its bytes and sha256, images, and the key of what it belongs to
    CACHE/manifest.json             bytes and sha256 of all these, written last: without it the cache is incomplete

B images, m x h x w moments of an image. `caching.py` writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seriatim.core.errors import CheckpointError, ConfigError, DataError, one_line
from seriatim.core.files import MANIFEST, read_manifest, sha256, utf8_path, verify_file, write_json
from seriatim.core.flatten import WHITE, Colour
from seriatim.core.progress import track
from seriatim.core.reading import LISTING_BYTES, read_json, read_or_raise
from seriatim.core.validation import Strict, parse
from seriatim.data.base import ImageData
from seriatim.data.store import Shards
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.kinds import tokenizer_config

CACHE, SOURCES = "cache.json", "sources.json"
MEND = "mend it with the same `seriatim cache` as before"
MAKE = "make one with `seriatim cache`"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
CODED = {"float32": "F32", "float16": "F16", "int16": "I16", "int32": "I32", "int64": "I64"}  # by safetensors
MOST_IMAGES = 10**10
Side = Annotated[int, Field(ge=1, le=1 << 20)]
CODES = {"int16": torch.int16, "int32": torch.int32}  # of a discrete tokenizer's moments where they are its codes


class CacheInfo(Strict):
    """cache.json: what a cache is."""

    format: Literal[1] = 1
    tokenizer: dict[str, Any]  # that made it
    moments_config: dict[str, Any]  # those of its settings that moments depend on
    moments_fingerprint: str
    size: tuple[Side, Side]  # of the images
    channels: Side
    crop: str = "ADM centre crop"
    data_fingerprint: str
    images: int = Field(ge=1, le=MOST_IMAGES)
    class_names: list[str]
    flip: bool  # whether it holds mirrored images too
    background: Colour = WHITE  # what transparent parts of the images show
    dtype: Literal["float32", "float16", "int16", "int32"]
    shard_images: int = Field(ge=1, le=MOST_IMAGES)
    moments: tuple[Side, Side, Side]  # (m, h, w)
    made_with: dict[str, Any]  # versions and the like: for people

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_images)

    def count(self, shard: int) -> int:
        """Images in a shard."""
        return min(self.shard_images, self.images - shard * self.shard_images)

    def files(self) -> list[str]:
        """All that the manifest lists."""
        return [CACHE, SOURCES, *(shard_name(i) + end for i in range(self.shards) for end in (".json", ".safetensors"))]

    def key(self) -> str:
        """sha256 of what decides the contents: a shard of another cache doesn't pass for one of this."""
        usual = {"background"} if self.background == WHITE else set()  # caches made before there was a choice
        return digest(self.model_dump(mode="json", exclude={"tokenizer", "made_with", *usual}))


def shard_name(number: int) -> str:
    return f"shard-{number:06d}"


def shards_of(folder: Path, info: CacheInfo) -> Shards:
    """The shards of a cache."""
    return Shards(folder, shard_name, info.count, info.key())


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Plain data with a digest of their own, for what must be told from damage before there is a manifest."""
    write_json(path, {**values, "sha256": digest(values)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Raises CheckpointError where the file is absent or not what was written."""
    values: dict[str, Any] = read_or_raise(lambda: read_json(path, dict, LISTING_BYTES), path, CheckpointError, MEND)
    if values.pop("sha256", None) != digest(values):
        raise CheckpointError(f"{path} is damaged: its digest does not match; {MEND}")
    return values


def read_info(path: Path) -> CacheInfo:
    """cache.json; raises CheckpointError where it is damaged or another version wrote it."""
    return parse(CacheInfo, read_sealed(path), where=str(path), error=CheckpointError)


def moments_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """Kind and settings of a tokenizer that moments depend on, as they come back from JSON."""
    kind = tokenizer_config(tokenizer)["kind"]
    config: dict[str, Any] = json.loads(json.dumps({"kind": kind, **tokenizer.moments_config()}))
    return config


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first key whose values differ."""
    return next((key for key in {**before, **now} if before.get(key) != now.get(key)), None)


def check_moments(info: CacheInfo, tokenizer: Tokenizer, path: Path) -> None:
    """Refuse a tokenizer whose moments those of the cache are not, naming what differs."""
    if tokenizer.moments_fingerprint() == info.moments_fingerprint:
        return
    now = moments_of(tokenizer)
    key = differing(info.moments_config, now)
    if key is None:
        raise ConfigError(f"tokenizer: {path} was made with other weights; use those, or another cache")
    raise ConfigError(
        f"tokenizer.{key}: {path} was made with {info.moments_config.get(key)!r}, the recipe has {now.get(key)!r}; "
        "change it back, or make another cache"
    )


class Latents(ImageData):
    """The images of `path`, a folder that `seriatim cache` has made, as moments.

    Every file is checked against its size, and with `check` against its sha256, before training begins.
    """

    cached = True

    def __init__(
        self,
        path: str,
        *,
        flip: bool = True,  # mirror half of the images at random, by the moments of their mirror images
        check: bool = True,  # read all of it at the start; False looks at sizes only
    ) -> None:
        self.root, self.flips = Path(path).expanduser(), flip
        if not (self.root / CACHE).is_file():
            raise DataError(f"data.path: {self.root} is no latent cache: it has no {CACHE}; {MAKE}")
        try:
            self.info = read_info(self.root / CACHE)
            if not (self.root / MANIFEST).is_file():
                raise ConfigError(f"path: {self.root} is an incomplete cache; go on with `seriatim cache`")
            self._verify(check)
        except CheckpointError as error:
            raise DataError(f"data.path: {one_line(error)}") from error
        if flip and not self.info.flip:
            raise ConfigError(f"flip: {self.root} holds no mirrored images; set it to false, or make another")
        self.count, self.size, self.channels = self.info.images, self.info.size, self.info.channels
        self.class_names, self.background = self.info.class_names, self.info.background
        self._slices: dict[tuple[int, str], Any] = {}
        self._names: list[str] | None = None
        self._labels = self._read_labels() if self.class_names else None

    def _verify(self, check: bool) -> None:
        listing = read_manifest(self.root, MEND)
        if len(listing) != 2 + 2 * self.info.shards:  # compared before the files are named: there may be billions
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
        return {**self.__dict__, "_slices": {}}  # open files stay with their process

    def _slice(self, shard: int, name: str) -> Any:
        """Rows of one tensor of a shard, which the system maps into memory as they are read."""
        if (shard, name) not in self._slices:
            path = self.root / f"{shard_name(shard)}.safetensors"
            try:
                with utf8_path(path) as file:
                    rows = safe_open(file, framework="pt").get_slice(name)
            except (SafetensorError, OSError) as error:
                raise DataError(f"data.path: {path} can't be read ({one_line(error)}); {MEND}") from error
            tail, dtype = ((), "int64") if name == "labels" else (self.info.moments, self.info.dtype)
            if (tuple(rows.get_shape()), rows.get_dtype()) != ((self.info.count(shard), *tail), CODED[dtype]):
                found = f"{rows.get_dtype()} of shape {tuple(rows.get_shape())}"
                raise DataError(f"data.path: {path}: {name} is {found}, {CACHE} says otherwise; {MEND}")
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
        """index (B,) -> moments (B, m, h, w): float32, or int64 codes."""
        return self._rows(index, ["moments"] * len(index))

    def mirrored(self, index: Tensor, chosen: Tensor) -> Tensor:
        """The same, the chosen (B,) of them of the mirrored images."""
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
                f"tokenizer: {cls.__name__} measures its statistics in fit(), from images, which a cache has not; "
                "let it have fit_moments() instead"
            )

    def fingerprint(self) -> str:
        """sha256 of the manifest, which has those of all files."""
        return sha256(self.root / MANIFEST)

    def images_fingerprint(self) -> str:
        return self.info.data_fingerprint
