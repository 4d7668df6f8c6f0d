"""Compares and prints names that other people chose (files, classes), in any Unicode form and with any bytes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

SURROGATE = re.compile("[\ud800-\udfff]")  # Python stores bytes of a file name that are not UTF-8 as surrogates
BREAKS_A_LINE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(found: re.Match[str]) -> str:
    """The matched character as an escape; a byte that is not UTF-8 becomes, for example, `\\xe9`."""
    code = ord(found[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else found[0].encode("unicode_escape").decode()


def as_text(name: str) -> str:
    """The name as valid Unicode text, in which bytes that are not UTF-8 are escapes such as `\\xe9`."""
    return SURROGATE.sub(escaped, name)


def printable(text: str) -> str:
    """The text with escapes for the characters that would break the line or control a terminal."""
    return BREAKS_A_LINE.sub(escaped, text)


def find_name(name: str, names: Sequence[str]) -> list[int]:
    """The indices in `names` of a name: the index of its exact match, else those of names equal after normalisation.

    Only the first exact match is returned. Otherwise canonical equality (NFC) is tried before compatibility equality
    (NFKC). Several indices mean that the name is ambiguous, and an empty list that it is not there.
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
    """The index in `names` of each wanted name, in any Unicode normal form; None unless both hold the same names."""
    places = [find_name(name, names) for name in wanted]
    found = [place[0] for place in places if len(place) == 1]
    return found if sorted(found) == list(range(len(names))) and len(wanted) == len(names) else None


def twins(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Iterate over the pairs of names that differ only in their Unicode normal form."""
    seen: dict[str, str] = {}
    for name in names:
        normal = unicodedata.normalize("NFKC", name)
        if normal in seen:
            yield seen[normal], name
        seen[normal] = name
