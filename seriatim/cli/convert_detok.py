"""`seriatim convert detok` makes a tokenizer folder of l-DeTok's weights and their statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seriatim.cli.convert import Ema, Out, Overwrite, Weights, both_heads, save_converted, unused
from seriatim.cli.output import JsonFlag


def convert_detok(
    weights: Weights,
    out: Out,
    stats: Annotated[
        str,
        typer.Option(
            help="The statistics of latents: the authors' stats.pkl, or a JSON file with the lists `mean` and `std`. "
            "Or the word `measure`, to measure them over the images of the first training or `measure-latents`."
        ),
    ],
    stats_key: Annotated[
        str | None, typer.Option(help="The name in stats.pkl. Default: the one that the file of weights begins with.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="The side of the images in pixels. Default: they are square.")
    ] = None,
    heads: Annotated[
        list[int] | None,
        typer.Option(
            help="The number of attention heads, for sizes that are not published. Give it twice if encoder and "
            "decoder differ."
        ),
    ] = None,
    ema: Ema = None,
    overwrite: Overwrite = False,
    json: JsonFlag = False,
) -> None:
    """Convert the tokenizer of l-DeTok (Yang et al. 2025). No code in the files is run, and every tensor must fit."""
    from seriatim.checkpoints.detok_weights import ENTRIES, tokenizer_from_file
    from seriatim.checkpoints.official import read_official
    from seriatim.core.errors import UsageError

    both = both_heads(heads, "heads")
    unused(out, overwrite)
    if stats_key is not None and (stats == "measure" or stats.endswith(".json")):
        raise UsageError(f"stats_key: {stats_key!r} has no effect without the authors' stats.pkl; leave it out")
    file = read_official(weights, which=None if ema is None else ENTRIES[0 if ema else 1], entries=ENTRIES)
    read = stats != "measure"
    tokenizer = tokenizer_from_file(
        file,
        size=size,
        heads=both,
        statistics=Path(stats) if read else None,
        key=stats_key,
    )
    provenance = {"converted_from": file.path.name, "weights": file.which}
    said = stats if read else "to be measured"
    save_converted(tokenizer, out, provenance, json, features=tokenizer.dim, statistics=said)
