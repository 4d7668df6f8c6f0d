"""What a verb prints: tables for people, JSON for programs, one line for what went wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

from seriatim.core.files import json_text
from seriatim.core.names import printable

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of a table.")]
WIDE = 1000  # columns of what is no terminal: a line of a table there is a line

DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")]


def print_json(value: Any) -> None:
    typer.echo(json_text(value))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """A table; the columns of numbers are the caller's to format."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")  # on a narrow terminal a word goes on below, none is cut
    for row in rows:
        table.add_row(*(printable(str(cell)) for cell in row))
    console = Console(highlight=False, markup=False)  # a figure is called FD[pixels]
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)
