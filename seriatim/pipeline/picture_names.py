"""The file names of pictures, which a pattern such as `{index:05d}-{label}-{seed}` makes from what they are."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

from seriatim.core.errors import UsageError, nearest, shown

PATTERN = "{index:04d}-{label}"
RESERVED = ("grid", "animation", "samples")  # files of these names, without a suffix, are written beside the pictures
MOST_BYTES = 200  # of a name; file systems take 255, and temporary names are longer
LONGEST_PATTERN = 200  # characters
SPEC = re.compile(r"[<>^]?0?[0-9]{0,2}(\.[0-9]{1,2})?[ds]?")
SEPARATORS = re.compile(r"[/\\]")
REFUSED = re.compile(r'[<>:"|?*\x00-\x1f\x7f]')  # by one file system or another


@dataclass(frozen=True)
class Picture:
    """What a pattern may name of a picture."""

    index: int  # its number in the folder
    label: str  # the name of its class, or "image"
    seed: int  # the seed that was given for it: that of `seeds`, or else that of its request
    job: str  # the name of its job, or the number of the job's line
    number: int  # its number within its label of its request


FIELDS = tuple(Picture.__dataclass_fields__)


def safe_name(name: str) -> str:
    """A class name made safe for a file name: at most 40 characters, all letters or digits of any script, - or _."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:40] or "image"


def file_names(labels: Sequence[str | None], pattern: str = PATTERN, suffix: str = "png") -> list[str]:
    """The file name of each image, made of its number and its class."""
    return names_of_pictures(
        [Picture(i, label or "image", 0, "", i) for i, label in enumerate(labels)], pattern, suffix
    )


def check_pattern(pattern: str, *, jobs: bool) -> None:
    """Raise UsageError if a name pattern has unknown fields or would make paths; `jobs` tells if there are any."""
    where = f"name_pattern: {shown(pattern)}"
    if not pattern or len(pattern) > LONGEST_PATTERN:
        raise UsageError(f"{where} has {len(pattern)} characters; give 1 to {LONGEST_PATTERN}, such as {PATTERN}")
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise UsageError(f"{where} can't be read ({error}); write fields as {{index:05d}}") from None
    for text, name, spec, conversion in parts:
        if SEPARATORS.search(text):
            raise UsageError(f"{where} would make paths; leave out / and \\, all pictures are in the folder of --out")
        if name is None:
            continue
        if name not in FIELDS:
            raise UsageError(f"{where} has the unknown field {name!r}{nearest(name, FIELDS)}")
        if conversion or not SPEC.fullmatch(spec or ""):
            raise UsageError(f"{where}: {spec or conversion!r} is not allowed for a field; write it as {{index:05d}}")
        if name == "job" and not jobs:
            raise UsageError(f"{where} has the field 'job', which needs a file of jobs; leave it out or give --jobs")
    if pattern.startswith("."):
        raise UsageError(f"{where} begins with a dot, and such files are hidden; begin it with another character")


def names_of_pictures(pictures: Sequence[Picture], pattern: str, suffix: str) -> list[str]:
    """The file name of each picture; raises UsageError if two are equal, or one is too long or not allowed.

    Two names that differ only in upper and lower case, or in their Unicode form, are one file on some systems.
    """
    where = f"name_pattern: {shown(pattern)}"
    names: list[str] = []
    taken: dict[str, int] = dict.fromkeys(RESERVED, -1)
    for picture in pictures:
        safe = replace(picture, label=safe_name(picture.label), job=safe_name(picture.job))
        try:
            stem = REFUSED.sub("_", pattern.format_map(safe.__dict__))
        except ValueError as error:
            raise UsageError(f"{where} can't be filled in ({error}); write fields as {{index:05d}}") from None
        if stem.startswith(".") or not stem.strip():
            raise UsageError(f"{where} gives image {picture.index} the name {stem!r}; begin it with another character")
        if len(stem.encode("utf-8", "replace")) > MOST_BYTES:
            raise UsageError(f"{where} gives image {picture.index} a name of more than {MOST_BYTES} bytes; shorten it")
        key = unicodedata.normalize("NFC", stem).casefold()
        other = taken.setdefault(key, picture.index)
        if other != picture.index or key in RESERVED:
            owner = f"images {other} and {picture.index}" if other >= 0 else f"image {picture.index} and an overview"
            raise UsageError(f"{where} gives {owner} the same name {stem}.{suffix}; add {{index}}")
        names.append(f"{stem}.{suffix}")
    return names
