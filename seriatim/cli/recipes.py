"""`seriatim recipes` lists, shows and copies the training recipes that come with the package."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from seriatim.cli.output import JsonFlag, print_json, print_table
from seriatim.core.terminal import say

recipes = typer.Typer(help="Training recipes that come with the package.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A packaged recipe or a YAML file.")]


@recipes.command("list")
def list_recipes(json: JsonFlag = False) -> None:
    """List the name and description of each packaged recipe."""
    from seriatim.training.config import packaged, read_any

    rows = [{"name": name, "description": read_any(name).description} for name in packaged()]
    if json:
        print_json(rows)
    else:
        print_table(("recipe", "what"), [tuple(row.values()) for row in rows])


@recipes.command("show")
def show(name: Name, json: JsonFlag = False) -> None:
    """Print a recipe with every default filled in."""
    from seriatim.training.config import dump, read_any

    recipe = read_any(name)
    if json:
        print_json(recipe.model_dump(mode="json"))
    else:
        typer.echo(dump(recipe), nl=False)


@recipes.command("copy")
def copy(
    name: Name,
    to: Annotated[Path | None, typer.Argument(help="The file to write. Default: NAME.yaml in this folder.")] = None,
) -> None:
    """Copy a recipe with its comments, so that you can edit it."""
    from seriatim.core.errors import ConfigError, UsageError
    from seriatim.core.files import write_text
    from seriatim.core.reading import YAML_BYTES, read_or_raise, read_text
    from seriatim.training.config import find_recipe

    source = find_recipe(name)
    target = to or Path(source.name)
    if target.is_dir():
        target = target / source.name
    if os.path.lexists(target):
        raise UsageError(f"to: {target} exists already; name another file")
    text = read_or_raise(lambda: read_text(source, YAML_BYTES), source, ConfigError, "name a recipe")
    write_text(target, text)
    file, run = shlex.quote(str(target)), shlex.quote(f"runs/{source.stem}")
    say(f"wrote {target}; train it with: seriatim train {file} --out {run}")
