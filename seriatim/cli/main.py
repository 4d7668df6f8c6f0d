"""`seriatim`: the verbs, and how an error becomes one line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from seriatim import __version__
from seriatim.cli.bench import bench
from seriatim.cli.cache import cache
from seriatim.cli.convert import convert, export
from seriatim.cli.convert_arinar import convert_arinar, export_arinar
from seriatim.cli.demo import demo
from seriatim.cli.doctor import doctor
from seriatim.cli.edit import edit
from seriatim.cli.evaluate import evaluate
from seriatim.cli.measure import measure_latents
from seriatim.cli.models import models
from seriatim.cli.output import say
from seriatim.cli.recipes import recipes
from seriatim.cli.sample import sample
from seriatim.cli.sweep import sweep
from seriatim.cli.train import train
from seriatim.core.errors import ResourceError, SeriatimError, Stopped, one_line

INTERRUPTED = 130

app = typer.Typer(
    name="seriatim",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Autoregressive image generation: train, sample, look.",
    epilog="Exit codes: 0 done, 2 usage or config, 3 data, 4 checkpoint, 5 numbers, 6 resources, 143 stopped, saved.",
)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"seriatim {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command()(demo)
app.command()(train)
app.command()(cache)
app.command()(sample)
app.command()(edit)
app.command()(evaluate)
app.command()(sweep)
app.command()(measure_latents)
app.command()(bench)
app.command()(models)
app.command()(doctor)
app.add_typer(recipes, name="recipes")
convert.command("arinar")(convert_arinar)
export.command("arinar")(export_arinar)
app.add_typer(convert, name="convert")
app.add_typer(export, name="export")


def run(arguments: Sequence[str]) -> int:
    """Run one command line; return its exit code. Prints no traceback unless SERIATIM_DEBUG is set."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {one_line(Warning(message))}")
        try:
            code = int(app(list(arguments), prog_name="seriatim", standalone_mode=False) or 0)
            if code == INTERRUPTED:  # typer has turned Ctrl-C into an exit code
                say("stopped")
            return code
        except BaseException as error:
            if os.environ.get("SERIATIM_DEBUG"):
                traceback.print_exc()
            return explain(error)


def explain(error: BaseException) -> int:
    """Print what happened on one line; return the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, SeriatimError):
        say(one_line(error) if isinstance(error, Stopped) else f"error: {one_line(error)}")
        return error.exit_code
    if hasattr(error, "format_message"):  # the argument parser's own; its classes are private to typer
        text = error.format_message()
        if text:
            say(f"error: {one_line(Exception(text)).rstrip('.')}; see `seriatim --help`")
        else:
            show: Any = getattr(error, "show", lambda: None)
            show()
        return int(getattr(error, "exit_code", 2))
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        say("stopped")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return 0
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        say(f"error: out of memory ({one_line(error)[:120]}); use a smaller batch or model")
        return ResourceError.exit_code
    if isinstance(error, OSError):
        say(f"error: {one_line(error)}; check the path and the disk")
        return ResourceError.exit_code
    say(f"error: {type(error).__name__}: {one_line(error)[:300]} (a bug: please report it; SERIATIM_DEBUG=1 shows it)")
    return 1


def main() -> NoReturn:
    sys.exit(run(sys.argv[1:]))
