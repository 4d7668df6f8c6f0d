"""Print the result of a command: a table for people, or JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

from seriatim.core.files import json_text
from seriatim.core.names import printable
from seriatim.core.terminal import speaks

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of a table.")]
WIDE = 1000  # the width of output that is not a terminal, where table rows must not wrap

DeviceOption = Annotated[str, typer.Option(help="The device to use: auto, cpu, cuda, cuda:1, mps, ...")]


def print_json(value: Any) -> None:
    if speaks():
        typer.echo(json_text(value))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print a table; the caller formats the numbers."""
    if not speaks():
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")  # a narrow terminal wraps long words and cuts none
    for row in rows:
        table.add_row(*(printable(str(cell)) for cell in row))
    console = Console(highlight=False, markup=False)  # names such as FD[pixels] are not markup
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)
