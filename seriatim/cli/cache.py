"""`seriatim cache` encodes the images of a recipe once, into a folder that training reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seriatim.cli.output import DeviceOption, JsonFlag, print_json, print_table


def cache(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe (seriatim recipes list) or a YAML file.")],
    out: Annotated[Path, typer.Option(help="The folder to create, or an unfinished cache to complete.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, such as data.path=photos/ data.size=128.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="The number of images encoded at once.")] = 64,
    shard_images: Annotated[
        int, typer.Option(help="The number of images in a file. A stop loses at most the file being written.")
    ] = 2048,
    dtype: Annotated[
        str, typer.Option(help="The dtype of the cache: float32, or float16 for half the size.")
    ] = "float32",
    device: DeviceOption = "auto",
    workers: Annotated[int, typer.Option(help="The number of processes that read images ahead.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Encode the images of a recipe and their mirror images. Repeat the command to continue after a stop.

    Train on the cache with `seriatim train RECIPE 'data={kind: latents, path: DIR}'`.
    """
    from seriatim.training.config import read_recipe

    chosen = read_recipe(recipe, overrides or ())
    chosen.data.pop("validation", None)  # all images are encoded; training on the cache holds out the same ones

    from seriatim.data.caching import write_cache
    from seriatim.training.setup import build_inputs

    data, tokenizer = build_inputs(chosen)
    result = write_cache(
        data,
        tokenizer,
        out,
        batch_size=batch_size,
        shard_images=shard_images,
        dtype=dtype,
        device=device,
        workers=workers,
        quiet=json,
    )
    report = {
        "folder": str(result.folder),
        "images": result.images,
        "encoded_now": result.encoded,
        "shards": result.shards,
        "bytes": result.bytes,
        "seconds": round(result.seconds, 2),
        "images_per_second": round(result.images_per_second, 1),
    }
    return print_json(report) if json else print_table(("cached", ""), list(report.items()))
