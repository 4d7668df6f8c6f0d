"""Reads JSON, YAML and text files, with limits on size, depth and numbers.

The limits protect against files that would take very long or very much memory to read. Every reader raises
`Unreadable`, whose text completes the sentence "this file ..."; the caller names the file and says what to do.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from seriatim.core.errors import one_line
from seriatim.core.names import SURROGATE

T = TypeVar("T")

SETTINGS_BYTES = 1 << 24  # largest size of a settings file
YAML_BYTES = 1 << 18  # largest size of a YAML file; PyYAML takes seconds a megabyte, and recipes have a few kilobytes
LISTING_BYTES = 1 << 30  # largest size of a file that lists every image of a data set
PRIVATE = 0xF0000  # a private-use plane of Unicode that stands in for bytes that are not UTF-8 while YAML is parsed
DEEPEST = 64  # levels of nesting
MOST_VALUES = 100_000  # values that the aliases of a YAML text may expand to
LARGEST = 1 << 64  # largest absolute value of an integer
KINDS = {
    dict: "a mapping",
    list: "a list",
    str: "text",
    int: "a number",
    float: "a number",
    bool: "a truth value",
    type(None): "nothing",
}


class Unreadable(ValueError):
    """A file or a text can't be used; the message completes "it ..."."""


# --- files --------------------------------------------------------------------------------------------------------


def read_text(path: Path, most: int = SETTINGS_BYTES) -> str:
    """The text of a file; raises Unreadable unless it is a plain UTF-8 file of at most `most` bytes."""
    if not path.exists():
        raise Unreadable("is missing")
    if not path.is_file():
        raise Unreadable("is not a plain file")
    try:
        with open(path, "rb") as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise Unreadable(f"can't be read ({error.strerror or one_line(error)})") from error
    if len(raw) > most:
        raise Unreadable(f"has more than {most:,} bytes")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(f"is not UTF-8 text (at byte {error.start})") from error


def read_json(path: Path, kind: type[T], most: int = SETTINGS_BYTES) -> T:
    """The content of a JSON file, which must be of type `kind` (dict or list); raises Unreadable."""
    return parse_json(read_text(path, most), kind)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file as plain data; raises Unreadable."""
    return parse_yaml(read_text(path, YAML_BYTES))


def read_or_raise(read: Callable[[], T], path: Path | str, error: type[Exception], remedy: str) -> T:
    """The result of `read()`; if that raises `Unreadable`, raises `error` with one line that names the file."""
    try:
        return read()
    except Unreadable as why:
        raise error(f"{path} {why}; {remedy}") from why


# --- texts --------------------------------------------------------------------------------------------------------


def parse_json(text: str, kind: type[T]) -> T:
    """The content of a JSON text, which must be of type `kind`.

    Raises Unreadable, also for NaN, infinity and integers of more than 64 bits.
    """
    try:
        value = json.loads(text, parse_int=whole_number, parse_float=finite_number, parse_constant=refuse_constant)
    except Unreadable:
        raise
    except RecursionError as error:
        raise Unreadable(f"is nested deeper than {DEEPEST} levels") from error
    except ValueError as error:
        raise Unreadable("is empty" if not text.strip() else f"is not JSON ({one_line(error)[:80]})") from error
    if not isinstance(value, kind):
        raise Unreadable(f"holds {KINDS.get(type(value), 'something')}, not {KINDS.get(kind, kind.__name__)}")
    check_depth(value)
    return value


def whole_number(digits: str) -> int:
    if len(digits) > 21 or abs(int(digits)) > LARGEST:
        raise Unreadable(f"has a whole number of {len(digits):,} digits, more than fit into 64 bits")
    return int(digits)


def finite_number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise Unreadable(f"has the number {digits[:20]}, which is not finite")
    return value


def refuse_constant(name: str) -> float:
    raise Unreadable(f"has {name}, which is not a JSON number")


def parse_yaml(text: str) -> Any:
    """The content of a YAML text, which must be plain data and expand to at most MOST_VALUES values.

    Bytes of names that are not UTF-8, which YAML does not allow, are preserved. Raises Unreadable.
    """
    if SURROGATE.search(text):
        return with_bytes(parse_yaml(SURROGATE.sub(lambda found: chr(ord(found[0]) + PRIVATE), text)))
    level = 0
    for bracket in re.findall(r"[\[\]{}]", text):  # checked here because PyYAML takes seconds to fail on deep nesting
        level += 1 if bracket in "[{" else -1
        if level > 10 * DEEPEST:
            raise Unreadable(f"is nested deeper than {DEEPEST} levels")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        expanded(node)
        value = loader.construct_document(node)
    except Unreadable:
        raise
    except RecursionError as error:
        raise Unreadable(f"is nested deeper than {DEEPEST} levels") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, ArithmeticError, LookupError) as error:
        raise Unreadable(f"is not YAML ({one_line(error)[:160]})") from error  # PyYAML's number parsers raise the rest
    check_plain(value)
    return value


def with_bytes(value: Any) -> Any:
    """The same data, with the private-use characters replaced by the bytes that they stand for."""
    if isinstance(value, str):
        return "".join(chr(ord(c) - PRIVATE) if 0 <= ord(c) - PRIVATE - 0xD800 < 0x800 else c for c in value)
    if isinstance(value, list):
        return [with_bytes(item) for item in value]
    return {with_bytes(k): with_bytes(v) for k, v in value.items()} if isinstance(value, dict) else value


def expanded(root: yaml.Node) -> int:
    """The number of values of a YAML node after its aliases are expanded; raises Unreadable if too many or endless."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, level: int) -> int:
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if level > DEEPEST:
            raise Unreadable(f"is nested deeper than {DEEPEST} levels")
        known = sizes.get(id(node))
        if known == 0:
            raise Unreadable("has an alias that holds itself")
        if known is None:
            sizes[id(node)] = 0  # 0 marks a node that is being counted
            children = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
            known = sizes[id(node)] = 1 + sum(size(child, level + 1) for child in children)
        if known > MOST_VALUES:
            raise Unreadable(f"has aliases that expand to more than {MOST_VALUES:,} values")
        return known

    return size(root, 0)


# --- values -------------------------------------------------------------------------------------------------------


def check_depth(value: Any) -> None:
    """Raise Unreadable for data that is nested deeper than DEEPEST levels."""
    level = [value]
    for _ in range(DEEPEST + 1):
        parts = [item.values() if isinstance(item, dict) else item for item in level]
        level = [inner for part in parts for inner in part if isinstance(inner, (dict, list))]
        if not level:
            return
    raise Unreadable(f"is nested deeper than {DEEPEST} levels")


def check_plain(value: Any, level: int = 0) -> None:
    """Raise Unreadable for data that no recipe needs: keys that are not text, numbers not finite or beyond 64 bits."""
    if level > DEEPEST:
        raise Unreadable(f"is nested deeper than {DEEPEST} levels")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise Unreadable(f"has the key {str(key)[:40]!r}, which is not text: put it in quotes")
            check_plain(inner, level + 1)
    elif isinstance(value, (list, tuple, set)):
        for inner in value:
            check_plain(inner, level + 1)
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise Unreadable(f"has a whole number of {value.bit_length():,} bits, more than 64")
    elif isinstance(value, float) and not math.isfinite(value):
        raise Unreadable("has a number that is not finite")
