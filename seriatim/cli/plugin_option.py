"""`--plugin FILE.py`, an option of `seriatim` itself, so that every verb has it: before the verb or after it.

Plug-ins are loaded before the verb reads its own options, because some options and the values of others come from the
tables to which plug-ins add.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.core import TyperGroup

OPTION = "--plugin"
WITHOUT = ("recipes",)  # verbs that use no part of any table, and are quick without installed plug-ins


class PluginGroup(TyperGroup):
    """A group of commands in whose arguments `--plugin` may stand anywhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, plugins_first(args))


def plugins_first(words: Sequence[str]) -> list[str]:
    """The words of a command line with each `--plugin FILE` moved to the front; words after `--` are left alone."""
    from seriatim.core.errors import UsageError

    end = words.index("--") if "--" in words else len(words)
    first: list[str] = []
    rest: list[str] = []
    before = iter(words[:end])
    for word in before:
        if word == OPTION:
            file = next(before, "")
            if not file or file.startswith("--"):
                raise UsageError(f"plugin: {OPTION} is followed by no file; write {OPTION} FILE.py")
            first += [word, file]
        elif word.startswith(f"{OPTION}="):
            first.append(word)
        else:
            rest.append(word)
    return [*first, *rest, *words[end:]]


def load_all(files: Sequence[Path], verb: str | None) -> None:
    """Load the plug-ins that are installed, unless `verb` uses none, and then those that the user names, in order."""
    from seriatim.core.plugins import load_installed_plugins, load_plugin

    if verb not in WITHOUT:
        load_installed_plugins()
    for file in files:
        load_plugin(file)
