"""Images that a run does not train on and measures its validation loss on: a share of the data, or another folder.

Shapes: B images of a batch.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from seriatim.core.errors import ConfigError, DataError
from seriatim.core.files import expanded
from seriatim.core.names import find_name
from seriatim.core.terminal import say
from seriatim.data.array_file import ArrayData
from seriatim.data.base import ImageData, StreamData
from seriatim.data.sources import build_data
from seriatim.tokenizers.base import Tokenizer

AT_ONCE = 256  # images that are read at once where their contents decide
MOST_SHARED = 0.5  # the share of the validation images in another folder that may be trained on as well
MOST_NAMED = 5  # classes that a message names


class Part(ImageData):
    """The images `index` of another source, in that order, with its classes or with `labels` of their own."""

    def __init__(self, source: ImageData, index: Tensor, labels: Tensor | None = None) -> None:
        self.source, self.index = source, index
        self.count, self.size, self.channels = len(index), source.size, source.channels
        self.class_names, self.flips, self.bad = source.class_names, source.flips, source.bad
        self.passed_over, self.background = source.passed_over, source.background
        self.cached, self.pictures = source.cached, source.pictures
        self._labels = source.labels(index) if labels is None else labels

    def images(self, index: Tensor) -> Tensor:
        return self.source.images(self.index[index])

    def mirrored(self, index: Tensor, chosen: Tensor) -> Tensor:
        return self.source.mirrored(self.index[index], chosen)

    def labels(self, index: Tensor) -> Tensor | None:
        return None if self._labels is None else self._labels[index]

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        self.source.check_tokenizer(tokenizer)

    def name(self, i: int) -> str:
        return self.source.name(int(self.index[i]))

    def fingerprint(self) -> str:
        return self.fingerprints()[0]

    def fingerprints(self) -> tuple[str, ...]:
        chosen = hashlib.sha256(self.index.numpy().tobytes()).hexdigest()[:16]
        part = f"{self.count} of {self.source.count} images, {chosen}"
        return tuple(f"{known}, {part}" for known in self.source.fingerprints())

    def traits(self) -> dict[str, str]:
        return self.source.traits()

    def images_fingerprint(self) -> str:
        return self.source.images_fingerprint()


def build_divided(config: Mapping[str, Any]) -> ImageData:
    """The images to train on; its `held_out` are those to validate on, if the config of the data has `validation`.

    `validation` is a share of the images, or the path of other images of the same kind and classes. Raises ConfigError
    or DataError.
    """
    rest = dict(config)
    wanted = rest.pop("validation", None)
    if wanted is None:
        return build_data(rest)
    if isinstance(wanted, str) and not expanded(wanted).exists():
        with contextlib.suppress(ValueError):
            wanted = float(wanted)  # YAML takes 1e-2, which has no point, for text
    if isinstance(wanted, str):
        return with_folder(rest, wanted)
    if isinstance(wanted, bool) or not isinstance(wanted, float) or not 0 < wanted < 1:
        raise ConfigError(
            f"data.validation: {wanted!r} is not allowed; give a share between 0 and 1, such as 0.05, or the path of "
            "other images"
        )
    data = build_data(rest)
    if isinstance(data, StreamData):
        raise ConfigError("data.validation: a stream can't be split; give the path of a folder of other images")
    chosen = held_out(data, wanted)
    counts = int(chosen.sum()), int((~chosen).sum())
    if not all(counts):
        raise DataError(
            f"data.validation: a share of {wanted:g} holds out {counts[0]} of {data.count} images, and leaves "
            f"{counts[1]}; give a {'larger' if counts[1] else 'smaller'} share, or the path of other images"
        )
    train = Part(data, (~chosen).nonzero()[:, 0])
    refuse_untrained(data, train, wanted)
    train.held_out = Part(data, chosen.nonzero()[:, 0])
    return train


def refuse_untrained(data: ImageData, train: ImageData, share: float) -> None:
    """Raise DataError if all images of a class are held out: the model would have that class and never learn it."""
    before, after = (present(each) for each in (data, train))
    lost = [repr(data.class_names[label]) for label in sorted(before - after)]
    if lost:
        more = f" and {len(lost) - MOST_NAMED} more" if len(lost) > MOST_NAMED else ""
        raise DataError(
            f"data.validation: a share of {share:g} holds out all images of {len(lost)} of {len(data.class_names)} "
            f"classes ({', '.join(lost[:MOST_NAMED])}{more}), which leaves none to train on; give a smaller share, add "
            "images of these, or give the path of other images"
        )


def present(data: ImageData) -> set[int]:
    """The classes that have an image."""
    labels = data.labels(torch.arange(data.count)) if data.class_names else None
    return set() if labels is None else {label for label in labels.unique().tolist() if label >= 0}


def held_out(data: ImageData, share: float) -> Tensor:
    """A mask (count,) of about `share` of the images. Each image's name, or else its contents, decide alone.

    The mask does not depend on the order of listing, and other images that are added change nothing for these.
    """
    limit = share * 2.0**64
    if data.named:
        values = [fraction(data.name(i).encode("utf-8", "surrogateescape")) for i in range(data.count)]
    else:
        parts = (data.images(index) for index in torch.arange(data.count).split(AT_ONCE))
        values = [fraction(image.numpy().tobytes()) for part in parts for image in part]
    return torch.tensor([value < limit for value in values])


def fraction(identity: bytes) -> int:
    """A number of 64 bits for an image, evenly spread over all images."""
    return int.from_bytes(hashlib.sha256(b"held out " + identity).digest()[:8], "big")


def with_folder(config: Mapping[str, Any], path: str) -> ImageData:
    """The images of `config`, whose `held_out` are those in `path`, read in the same way."""
    if "path" not in config:
        raise ConfigError(
            f"data.validation: data of kind {config.get('kind')!r} has no path; give a share, such as 0.05"
        )
    data = build_data(config)
    if isinstance(data, StreamData):
        kept = ("size", "channels", "background", "max_pixels")
        config = {"kind": "folder", **{key: config[key] for key in kept if key in config}}
    if isinstance(data, ArrayData):  # the labels in a file of their own are those of the rows of data.path
        config = {key: value for key, value in config.items() if key != "labels"}
    try:
        other = build_data({**config, "path": path})
    except (ConfigError, DataError) as error:
        raise type(error)(str(error).replace("data.path", "data.validation")) from error
    if other.images_fingerprint() == data.images_fingerprint():
        raise ConfigError(f"data.validation: {path} holds the images of data.path; name others, or give a share")
    labels = matched(other, data.class_names)
    check_shared(data, other, path)
    data.held_out = Part(other, torch.arange(other.count), labels)
    return data


def check_shared(data: ImageData, other: ImageData, path: str) -> None:
    """Say how many images of `other`, which is in `path`, are trained on as well; DataError if it is most of them.

    Images are the same if their files are, byte by byte, under any name. A latent cache does not keep what its images'
    files were, so images that are in two caches are not found.
    """
    trained, held = data.contents(), other.contents()
    if trained is None or held is None:
        return
    each = list(held)
    same = set(each).intersection(trained)
    shared = sum(content in same for content in each)
    if not shared:
        return
    found = f"data.validation: {shared} of {len(each)} images in {path} are images of data.path too"
    if shared > MOST_SHARED * len(each):
        raise DataError(f"{found}; name images that are not trained on, or give a share, such as 0.05")
    say(f"{found}, so the loss on them tells nothing about new images; remove them from one of the two")


def matched(other: ImageData, names: list[str]) -> Tensor | None:
    """The labels of all images of `other` in the numbering of `names`. Raises DataError for a class of another name."""
    labels = other.labels(torch.arange(other.count))
    if not names:
        return None
    if labels is None and isinstance(other, ArrayData):
        raise DataError(
            f"data.validation: {other.root} has no labels, the rows of data.path have; give a share, such as 0.05, or "
            "a .safetensors file with the tensors 'tokens' and 'labels'"
        )
    if labels is None:
        raise DataError("data.validation: has no classes, those of data.path have; name a folder with the same classes")
    found = [find_name(name, names) for name in other.class_names]
    lacking = [name for name, places in zip(other.class_names, found, strict=True) if len(places) != 1]
    if lacking:
        raise DataError(f"data.validation: class {lacking[0]!r} is none of those of data.path; name images of the same")
    return torch.tensor([places[0] for places in found])[labels]
