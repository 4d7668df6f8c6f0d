"""docs/reliability.md names tests that exist, and has a line for every kind of fault."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_test_of_the_page_exists() -> None:
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", PAGE)
    assert len(named) > 40
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def test_every_row_is_there_once() -> None:
    """Each row has a test, or is listed as one that is not covered yet."""
    lines = re.findall(r"^\| (\d+) \|(.*)$", PAGE, flags=re.M)
    assert all("::test_" in line and line.count("|") == 6 for _, line in lines)
    waiting = re.findall(r"^- (\d+): ", PAGE, flags=re.M)
    assert sorted(int(number) for number in [*(row for row, _ in lines), *waiting]) == list(range(1, 51))
