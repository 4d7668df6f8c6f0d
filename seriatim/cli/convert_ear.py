"""`seriatim convert ear` makes a model folder of a checkpoint of EAR's official code."""

from __future__ import annotations

from typing import Annotated

import typer

from seriatim.cli.convert import (
    Checkpoint,
    ClassNames,
    Ema,
    Out,
    Overwrite,
    Vae,
    check_preset,
    read_generator,
    read_names,
    save_model,
    unused,
    vae_of,
)
from seriatim.cli.output import JsonFlag


def convert_ear(
    weights: Checkpoint,
    out: Out,
    vae: Vae,
    ema: Ema = None,
    preset: Annotated[
        str | None, typer.Option(help="ear-b, ear-l or ear-h. Default: found from the sizes of the tensors.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="The number of attention heads, for a model that is not a preset.")
    ] = None,
    buffer: Annotated[
        int | None, typer.Option(help="The tokens of the condition. Default: as in the file's arguments, or 64.")
    ] = None,
    class_names: ClassNames = None,
    overwrite: Overwrite = False,
    json: JsonFlag = False,
) -> None:
    """Convert EAR (Shao et al. 2025), trained with the official code. No code in the file is run."""
    from seriatim.checkpoints import ear

    check_preset(preset, ear.NAMES, "EAR")
    unused(out, overwrite)
    file = read_generator(weights, vae, ema, ear.NAMES.get(preset or ""))
    config = ear.infer(file, buffer)
    tokenizer = vae_of(vae, config["tokens"], config["dim"])
    names = read_names(class_names)
    bundle = ear.bundle_from_ear(file, tokenizer, names, heads=heads, buffer=buffer, preset=preset)
    save_model(bundle, out, file, json)
