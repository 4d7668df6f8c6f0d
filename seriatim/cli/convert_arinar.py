"""`seriatim convert arinar` and `export arinar`. The weights don't tell the number of heads, but some images can."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seriatim.cli.convert import (
    Checkpoint,
    ClassNames,
    Ema,
    Model,
    Out,
    Overwrite,
    OverwriteFile,
    Vae,
    both_heads,
    check_preset,
    read_masked,
    read_names,
    save_model,
    unused,
    write_official,
)
from seriatim.cli.output import JsonFlag
from seriatim.core.terminal import say

if TYPE_CHECKING:
    from torch import Tensor

    from seriatim.tokenizers.base import Tokenizer


def convert_arinar(
    weights: Checkpoint,
    out: Out,
    vae: Vae,
    heads: Annotated[
        int | None,
        typer.Option(
            help="The number of attention heads inside the head: 4 in the first release (default), 16 in the current "
            "official code."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="A folder of images. The number of heads that makes them likelier is taken."),
    ] = None,
    temperature_convention: Annotated[
        str | None,
        typer.Option(help="What the file's temperature means: release (above 1 is sharper) or current."),
    ] = None,
    ema: Ema = None,
    preset: Annotated[
        str | None, typer.Option(help="arinar-b or arinar-l. Default: found from the sizes of the tensors.")
    ] = None,
    trunk_heads: Annotated[
        list[int] | None,
        typer.Option(
            help="The number of attention heads of the backbone, if it is not a preset's. Give it twice if encoder and "
            "decoder differ."
        ),
    ] = None,
    class_names: ClassNames = None,
    overwrite: Overwrite = False,
    json: JsonFlag = False,
) -> None:
    """Convert ARINAR (Zhao et al. 2025). No code in the file is run, and every tensor must fit."""
    from seriatim.checkpoints import arinar
    from seriatim.core.errors import UsageError

    check_preset(preset, arinar.NAMES, "ARINAR")
    if heads is not None and images is not None:
        raise UsageError("images: given together with heads, which images would find out; leave one of them out")
    if heads is not None and heads < 1:
        raise UsageError(
            f"heads: {heads} is not allowed; give 4 for the first release, 16 for the current official code"
        )
    trunk = both_heads(trunk_heads, "trunk_heads")
    if temperature_convention is not None:
        arinar.our_temperature(1.0, temperature_convention)
    unused(out, overwrite)
    file, tokenizer = read_masked(arinar, weights, vae, ema, preset)
    losses = {}
    if images is not None:
        tokens = tokens_of(images, tokenizer)
        losses = arinar.losses_by_heads(file, tokens, trunk_heads=trunk, preset=preset)
        heads = min(losses, key=losses.__getitem__)
        each = ", ".join(f"{loss:.2f} with {n} heads" for n, loss in losses.items())
        say(f"loss of {len(tokens)} images, in nats per token: {each}; taking {heads} heads")
    bundle = arinar.bundle_from_arinar(
        file,
        tokenizer,
        read_names(class_names),
        convention=temperature_convention,
        inner_heads=heads or arinar.INNER_HEADS["release"],
        trunk_heads=trunk,
        preset=preset,
    )
    inner = {"inner heads": bundle.provenance["inner_heads"]}
    save_model(bundle, out, file, json, **inner, **({"losses": losses} if losses else {}))


def export_arinar(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The file to write: .safetensors, or .pth for the official code.")],
    overwrite: OverwriteFile = False,
) -> None:
    """Write a masked model whose nested head has ARINAR's form for the official ARINAR code."""
    from seriatim.checkpoints import arinar, mar
    from seriatim.checkpoints.native import load_bundle

    made = load_bundle(model).model
    write_official(arinar.arinar_tensors(made), out, mar.ENTRIES, overwrite)
    say(f"its head has {arinar.inner_heads_of(made)} attention heads, which the official code must have too")


def tokens_of(folder: Path, tokenizer: Tokenizer, most: int = 64) -> Tensor:
    """The tokens (B, L, D) of up to about `most` images, chosen from all over a folder."""
    import torch

    from seriatim.core.errors import UsageError
    from seriatim.data.folder import Folder
    from seriatim.data.loader import to_float

    if not folder.is_dir():
        raise UsageError(f"images: {folder} is not a folder; name one that holds images")
    data = Folder(str(folder), size=list(tokenizer.size), channels=tokenizer.channels, check=False)
    with torch.no_grad():
        parts = [tokenizer.tokens(tokenizer.moments(to_float(part))) for part in data.some(most, 8)]
    return torch.cat(parts)
