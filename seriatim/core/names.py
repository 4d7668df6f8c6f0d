"""Names that other people chose (files, classes): in any Unicode form, with any bytes, safe to print."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

SURROGATE = re.compile("[\ud800-\udfff]")  # how Python keeps the bytes of a file name that are not UTF-8
BREAKS_A_LINE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(found: re.Match[str]) -> str:
    """One character as an escape: a byte that is not UTF-8 as `\\xe9`."""
    code = ord(found[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else found[0].encode("unicode_escape").decode()


def as_text(name: str) -> str:
    """A name that can be stored and sent anywhere: bytes that are not UTF-8 become escapes such as `\\xe9`."""
    return SURROGATE.sub(escaped, name)


def printable(text: str) -> str:
    """The text for one line of output: what would break the line or steer a terminal becomes an escape."""
    return BREAKS_A_LINE.sub(escaped, text)


def find_name(name: str, names: Sequence[str]) -> list[int]:
    """The places of a name in `names`: where it stands exactly, else in the same Unicode normal form.

    A name that is there exactly has one place, the first. Else canonical equality (NFC, NFD) goes before compatibility
    (NFKC, NFKD); several places mean that the name is ambiguous.
    """
    if name in names:
        return [names.index(name)]
    for form in ("NFC", "NFKC"):
        wanted = unicodedata.normalize(form, name)
        places = [place for place, other in enumerate(names) if unicodedata.normalize(form, other) == wanted]
        if places:
            return places
    return []


def match_names(wanted: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """The place in `names` of each wanted name, in any normal form; None unless they are the same names."""
    places = [find_name(name, names) for name in wanted]
    found = [place[0] for place in places if len(place) == 1]
    return found if sorted(found) == list(range(len(names))) and len(wanted) == len(names) else None


def twins(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of names that differ in nothing but their Unicode normal form."""
    seen: dict[str, str] = {}
    for name in names:
        normal = unicodedata.normalize("NFKC", name)
        if normal in seen:
            yield seen[normal], name
        seen[normal] = name
