"""The table of heads, complete: `HEADS["mine"] = Mine` registers one of your own."""

from __future__ import annotations

from seriatim.heads.nested import Nested  # which needs the table, and so puts itself into it
from seriatim.heads.table import HEADS, build_head

__all__ = ["HEADS", "Nested", "build_head"]
