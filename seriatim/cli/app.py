"""The `seriatim` application with all of its commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seriatim import __version__
from seriatim.cli.bench import bench
from seriatim.cli.cache import cache
from seriatim.cli.compare import compare
from seriatim.cli.convert import convert, export
from seriatim.cli.convert_arinar import convert_arinar, export_arinar
from seriatim.cli.convert_detok import convert_detok
from seriatim.cli.convert_ear import convert_ear
from seriatim.cli.demo import demo
from seriatim.cli.doctor import doctor
from seriatim.cli.edit import edit
from seriatim.cli.evaluate import evaluate
from seriatim.cli.measure import measure_latents
from seriatim.cli.models import models
from seriatim.cli.plugin_option import PluginGroup, load_all
from seriatim.cli.recipes import recipes
from seriatim.cli.sample import sample
from seriatim.cli.sampling_options import SamplingVerb
from seriatim.cli.sweep import sweep
from seriatim.cli.train import TrainVerb, train
from seriatim.core.errors import UsageError
from seriatim.core.processes import place

app = typer.Typer(
    name="seriatim",
    cls=PluginGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Autoregressive image generation: train models, generate images, evaluate them.",
    epilog="Exit codes: 0 success, 2 usage or config, 3 data, 4 checkpoint, 5 numbers that are not finite, "
    "6 resources, 143 stopped by a signal after saving.",
)

ALONE = ("demo", "edit", "convert", "export")  # commands that write files and don't share their work


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"seriatim {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 (its callback does the work)
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
    plugin: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.py",
            help="A Python file with heads, orders or other parts of your own, which is run before the verb. Repeat it "
            "for several. It may also stand after the verb.",
        ),
    ] = None,
) -> None:
    if context.invoked_subcommand in ALONE and place().size > 1:
        raise UsageError(
            f"{context.invoked_subcommand}: is the work of one process, and {place().size} were started; start it "
            "without torchrun, or unset WORLD_SIZE and RANK"
        )
    load_all(plugin or [], context.invoked_subcommand)


app.command()(demo)
app.command(cls=TrainVerb)(train)
app.command()(cache)
app.command(cls=SamplingVerb)(sample)
app.command(cls=SamplingVerb)(edit)
app.command(cls=SamplingVerb)(evaluate)
app.command()(sweep)
app.command(cls=SamplingVerb)(compare)
app.command()(measure_latents)
app.command()(bench)
app.command()(models)
app.command()(doctor)
app.add_typer(recipes, name="recipes")
convert.command("arinar")(convert_arinar)
convert.command("detok")(convert_detok)
convert.command("ear")(convert_ear)
export.command("arinar")(export_arinar)
app.add_typer(convert, name="convert")
app.add_typer(export, name="export")
