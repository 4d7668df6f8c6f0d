"""`seriatim measure-latents` measures the statistics of an autoencoder's latents over the images of a recipe."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from seriatim.cli.convert import unused
from seriatim.cli.output import DeviceOption, JsonFlag, print_json, print_table
from seriatim.core.processes import place
from seriatim.core.terminal import say


def measure_latents(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe (seriatim recipes list) or a YAML file.")],
    out: Annotated[Path, typer.Option(help="The tokenizer folder to create. A recipe uses it as tokenizer.from.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, such as data.path=photos tokenizer.patch=2.")
    ] = None,
    num: Annotated[int, typer.Option(help="About how many images to measure.")] = 10_000,
    statistics: Annotated[
        str,
        typer.Option(help="channel: a mean and a standard deviation for each; scale: one standard deviation for all."),
    ] = "channel",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing tokenizer in --out.")] = False,
    device: DeviceOption = "auto",
    json: JsonFlag = False,
) -> None:
    """Measure the mean and variance of a tokenizer's latents, and write a tokenizer that normalises by them."""
    from seriatim.core.errors import check_known
    from seriatim.training.config import read_recipe

    check_known(("channel", "scale"), statistics=statistics)
    chosen = read_recipe(recipe, overrides or ())
    if place().rank == 0:  # it may have written the folder before another process comes here
        unused(out, overwrite)

    from typing import cast

    from seriatim.tokenizers.latent import Statistics
    from seriatim.training.measure import measure_latents as run

    result = run(chosen, out, images=num, statistics=cast(Statistics, statistics), device=device, quiet=json)
    if result is None:  # the first of several processes has the result
        return None
    found = result.measured
    if json:
        return print_json(
            {
                "folder": str(result.folder),
                "images": found.images,
                "mean": found.mean.tolist(),
                "std": found.std.tolist(),
                "scale": found.scale,
                "statistics": statistics,
                "sha256": result.sha256,
            }
        )
    pairs = zip(found.mean.tolist(), found.std.tolist(), strict=True)
    rows = [(str(i), f"{mean:.4f}", f"{std:.4f}", f"{1 / max(std, 1e-9):.4f}") for i, (mean, std) in enumerate(pairs)]
    rows.append(("all", f"{found.mean.mean().item():.4f}", f"{1 / found.scale:.4f}", f"{found.scale:.5g}"))
    print_table(("channel", "mean", "std", "scale = 1 / std"), rows)
    say(f"measured {found.images:,} images; sha256 of the statistics {result.sha256}")
    say(f"wrote {result.folder}; train on it with {shlex.quote(f'tokenizer.from={result.folder}')}")
