"""Plain data that is read back: JSON, YAML and text of bounded size, depth and numbers.

Whoever wrote a file decides what it holds, not how much work it makes. Every reader raises `Unreadable`, whose text
completes the sentence "this file ..."; the caller names the file and says what to do.
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

SETTINGS_BYTES = 1 << 24  # of a file of settings
YAML_BYTES = 1 << 18  # PyYAML takes seconds for a megabyte, and recipes have a few thousand bytes
LISTING_BYTES = 1 << 30  # of a file that lists every image of a data set
PRIVATE = 0xF0000  # a plane of Unicode for private use, where bytes that are not UTF-8 stand while YAML is read
DEEPEST = 64  # levels of nesting
MOST_VALUES = 100_000  # that the aliases of a YAML text may expand to
LARGEST = 1 << 64  # of whole numbers, either sign
KINDS = {dict: "a mapping", list: "a list", str: "text", int: "a number", float: "a number", bool: "a truth value",
         type(None): "nothing"}  # fmt: skip


class Unreadable(ValueError):
    """A file or a text can't be used; the message completes "it ..."."""


# --- files --------------------------------------------------------------------------------------------------------


def read_text(path: Path, most: int = SETTINGS_BYTES) -> str:
    """A file as text, if it is a plain file of at most `most` bytes in UTF-8."""
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
    """What a JSON file holds, which must be of type `kind`: dict or list."""
    return parse_json(read_text(path, most), kind)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds."""
    return parse_yaml(read_text(path, YAML_BYTES))


def read_or_raise(read: Callable[[], T], path: Path, error: type[Exception], remedy: str) -> T:
    """What `read` gives; where it is `Unreadable`, an `error` of one line that names the file."""
    try:
        return read()
    except Unreadable as why:
        raise error(f"{path} {why}; {remedy}") from why


# --- texts --------------------------------------------------------------------------------------------------------


def parse_json(text: str, kind: type[T]) -> T:
    """What a JSON text holds, which must be of type `kind`. NaN, infinity and absurdly long numbers are refused."""
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
    raise Unreadable(f"has {name}, which is no number of JSON")


def parse_yaml(text: str) -> Any:
    """What a YAML text holds: plain data only, its aliases expanded to at most MOST_VALUES values.

    Bytes of names that are not UTF-8, which YAML refuses, stay as they are.
    """
    if SURROGATE.search(text):
        return with_bytes(parse_yaml(SURROGATE.sub(lambda found: chr(ord(found[0]) + PRIVATE), text)))
    level = 0
    for bracket in re.findall(r"[\[\]{}]", text):  # PyYAML takes seconds to find out
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
        raise Unreadable(f"is not YAML ({one_line(error)[:160]})") from error  # what its readers of numbers may raise
    check_plain(value)
    return value


def with_bytes(value: Any) -> Any:
    """The same data, with bytes that are not UTF-8 put back in place of what stood for them."""
    if isinstance(value, str):
        return "".join(chr(ord(c) - PRIVATE) if 0 <= ord(c) - PRIVATE - 0xD800 < 0x800 else c for c in value)
    if isinstance(value, list):
        return [with_bytes(item) for item in value]
    return {with_bytes(k): with_bytes(v) for k, v in value.items()} if isinstance(value, dict) else value


def expanded(root: yaml.Node) -> int:
    """How many values a YAML node stands for once its aliases are written out; refuses too many and endless ones."""
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
            sizes[id(node)] = 0  # being counted
            children = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
            known = sizes[id(node)] = 1 + sum(size(child, level + 1) for child in children)
        if known > MOST_VALUES:
            raise Unreadable(f"has aliases that expand to more than {MOST_VALUES:,} values")
        return known

    return size(root, 0)


# --- values -------------------------------------------------------------------------------------------------------


def check_depth(value: Any) -> None:
    """Refuse what is nested deeper than DEEPEST levels."""
    level = [value]
    for _ in range(DEEPEST + 1):
        parts = [item.values() if isinstance(item, dict) else item for item in level]
        level = [inner for part in parts for inner in part if isinstance(inner, (dict, list))]
        if not level:
            return
    raise Unreadable(f"is nested deeper than {DEEPEST} levels")


def check_plain(value: Any, level: int = 0) -> None:
    """Refuse whatever no recipe needs: keys that are no text, and numbers that are not finite or absurdly long."""
    if level > DEEPEST:
        raise Unreadable(f"is nested deeper than {DEEPEST} levels")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise Unreadable(f"has the key {str(key)[:40]!r}, which is no text: put it in quotes")
            check_plain(inner, level + 1)
    elif isinstance(value, (list, tuple, set)):
        for inner in value:
            check_plain(inner, level + 1)
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise Unreadable(f"has a whole number of {value.bit_length():,} bits, more than 64")
    elif isinstance(value, float) and not math.isfinite(value):
        raise Unreadable("has a number that is not finite")
