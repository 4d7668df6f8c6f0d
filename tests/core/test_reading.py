"""Plain data that is read back: what is wrong with it is one line, and it never decides how much is done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from seriatim.core.errors import CheckpointError, one_line, printable, shown
from seriatim.core.reading import (
    MOST_VALUES,
    Unreadable,
    check_plain,
    parse_json,
    parse_yaml,
    read_json,
    read_or_raise,
    read_text,
    read_yaml,
)

BAD_JSON = {
    "empty": ("", "is empty"),
    "spaces": ("  \n", "is empty"),
    "half": ('{"a": [1, 2', "is not JSON"),
    "list": ("[1]", "holds a list, not a mapping"),
    "number": ("5", "holds a number, not a mapping"),
    "null": ("null", "holds nothing, not a mapping"),
    "deep": ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested deeper"),
    "deep mappings": ('{"a": ' * 70 + "1" + "}" * 70, "nested deeper"),
    "digits": ('{"a": ' + "9" * 5000 + "}", "5,000 digits"),
    "large": ('{"a": -18446744073709551617}', "64 bits"),
    "exponent": ('{"a": 1e999}', "not finite"),
    "nan": ('{"a": NaN}', "NaN"),
    "infinity": ('{"a": [-Infinity]}', "Infinity"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_json_that_is_refused(case: str) -> None:
    text, words = BAD_JSON[case]
    with pytest.raises(Unreadable, match=words) as caught:
        parse_json(text, dict)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_json_that_is_read() -> None:
    value: Any = {"a": [1, -2.5, None, True, "ü"], "b": {"c": 2**63, "d": 1e300}, "e": [[[]]]}
    assert parse_json(json.dumps(value), dict) == value
    assert parse_json("[1, 2]", list) == [1, 2]


BAD_YAML = {
    "half": ("a: [1, 2", "is not YAML"),
    "tab": ("a:\n\t- 1", "is not YAML"),
    "control": ("a: \x00", "is not YAML"),
    "deep": ("a: " + "[" * 5000 + "]" * 5000, "nested deeper"),
    "deep blocks": ("\n".join("  " * i + "a:" for i in range(80)), "nested deeper"),
    "digits": ("a: " + "9" * 5000, "is not YAML"),
    "many digits": ("a: " + "9" * 4000, "more than 64"),
    "binary": ("a: 0b" + "1" * 100, "more than 64"),
    "nan": ("a: .nan", "not finite"),
    "infinity": ("a: [-.inf]", "not finite"),
    "date": ("a: 2026-99-99", "is not YAML"),
    "object": ("a: !!python/object/apply:os.system [id]", "is not YAML"),
    "key": ("a: {1: 2}", "'1', which is not text"),
    "truth": ("no: 2", "which is not text"),
    "cycle": ("a: &a [*a]", "holds itself"),
    "endless mapping": ("a: &a {b: *a}", "holds itself"),
    "laughs": (
        "x0: &x0 [lol]\n" + "\n".join(f"x{i}: &x{i} [{','.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 40)),
        "aliases that expand",
    ),
    "laughing keys": (
        "x0: &x0 {a: 1}\n" + "\n".join(f"x{i}: &x{i} {{a: *x{i - 1}, b: *x{i - 1}}}" for i in range(1, 60)),
        "aliases that expand",
    ),
    "merged": (
        "x0: &x0 {a: 1}\n" + "\n".join(f"x{i}: &x{i} {{<<: [{','.join([f'*x{i - 1}'] * 10)}]}}" for i in range(1, 9)),
        "aliases that expand",
    ),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_yaml_that_is_refused(case: str) -> None:
    text, words = BAD_YAML[case]
    with pytest.raises(Unreadable, match=words) as caught:
        parse_yaml(text)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_yaml_that_is_read() -> None:
    assert parse_yaml("") is None and parse_yaml("5") == 5
    assert parse_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}") == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}
    assert len(parse_yaml("a: [" + "1, " * 20_000 + "1]")["a"]) == 20_001, "no aliases, so the file's size is the limit"


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for prepare, words in (
        (lambda: None, "is missing"),
        (lambda: file.write_bytes(b'{"a": "\xff\xfe"}'), "not UTF-8 text .at byte 7"),
        (lambda: file.write_bytes(b" " * 1001), "more than 1,000 bytes"),
    ):
        prepare()
        with pytest.raises(Unreadable, match=words):
            read_json_of(file)
    file.write_text("[1]", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"x\.json holds a list, not a mapping; copy it again"):
        read_or_raise(lambda: read_json(file, dict), file, CheckpointError, "copy it again")
    with pytest.raises(Unreadable, match="not a plain file"):
        read_text(tmp_path)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(Unreadable, match="not a plain file"):  # opening it would wait for ever
        read_yaml(fifo)


def read_json_of(file: Path) -> dict[str, Any]:
    from seriatim.core.reading import parse_json

    return parse_json(read_text(file, most=1000), dict)


def test_values_are_shown_in_bounds() -> None:
    deep: Any = [1]
    for _ in range(100):
        deep = [deep] * 10
    for value in (deep, "x" * 10**6, 10**5000, [10**5000], {"a": [10**5000]}, [[[["y" * 1000]]]], list(range(1000))):
        assert len(shown(value)) <= 100
    assert shown("ab") == "'ab'" and shown(5) == "5" and shown([1, "a"]) == "[1, 'a']"


def test_one_line_is_safe_for_a_terminal() -> None:
    text = one_line(ValueError("a\x1b[31mb\nc\u202ed\x9b2J\udcff" + "x" * 10**6))
    assert text.startswith("a\\x1b[31mb c\\u202ed\\x9b2J\\xff") and len(text) <= 2000
    assert text.isprintable() and printable("größe 中 🙂") == "größe 中 🙂"


def test_a_long_list_is_plain() -> None:
    check_plain({"a": [1] * (2 * MOST_VALUES)})
