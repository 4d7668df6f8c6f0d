"""Escapes foreign names and texts for a Markdown page, so that they are never read as markup, HTML or a command."""

from __future__ import annotations

import re

from seriatim.core.names import printable

SPECIAL = re.compile(r"([\\`*_{}\[\]<>&|#~$])")


def inline(text: str) -> str:
    """Any text, escaped for one line of a paragraph or one cell of a table."""
    return SPECIAL.sub(r"\\\1", printable(" ".join(text.split())))


def block(text: str, language: str) -> str:
    """Any text as a code block, with a fence that is longer than every run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
