"""Names and texts of others in a Markdown page: they stand there as text, and never as markup, HTML or a command."""

from __future__ import annotations

import re

from seriatim.core.names import printable

SPECIAL = re.compile(r"([\\`*_{}\[\]<>&|#~$])")


def inline(text: str) -> str:
    """Any text on one line of a paragraph or in a cell of a table."""
    return SPECIAL.sub(r"\\\1", printable(" ".join(text.split())))


def block(text: str, language: str) -> str:
    """Any text as a block of code, whose fence is longer than every run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
