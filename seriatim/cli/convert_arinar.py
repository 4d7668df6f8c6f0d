"""`seriatim convert arinar` and `export arinar`: weights whose files don't tell all, so that images may."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seriatim.cli.convert import Out, Overwrite, read_names, report, unused, vae_of, write_official
from seriatim.cli.output import JsonFlag
from seriatim.core.terminal import say

if TYPE_CHECKING:
    from torch import Tensor

    from seriatim.tokenizers.base import Tokenizer


def convert_arinar(
    weights: Annotated[Path, typer.Argument(help="checkpoint-last.pth, a safetensors file, or a folder of such.")],
    out: Out,
    vae: Annotated[Path, typer.Option(help="Its autoencoder: kl16.ckpt, or a folder that `convert kl16` made.")],
    heads: Annotated[
        int | None,
        typer.Option(help="Attention heads inside the head: 4 as first released (default), 16 as their code is today."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Some images: take the number of heads under which they are likelier.")
    ] = None,
    temperature_convention: Annotated[
        str | None, typer.Option(help="What the file's temperature means: release (above 1 is sharper) or current.")
    ] = None,
    ema: Annotated[
        bool | None, typer.Option("--ema/--raw", help="Averaged or last weights. Default: averaged, where there are.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="arinar-b or arinar-l; usually told by the sizes.")] = None,
    trunk_heads: Annotated[
        list[int] | None, typer.Option(help="Attention heads, of a trunk that is no preset's; twice: encoder, decoder.")
    ] = None,
    class_names: Annotated[Path | None, typer.Option(help="A text file, one name a line.")] = None,
    overwrite: Overwrite = False,
    json: JsonFlag = False,
) -> None:
    """ARINAR (Zhao et al. 2025). Nothing in a file is run; every tensor must fit."""
    from seriatim.checkpoints import arinar, mar
    from seriatim.checkpoints.native import save_bundle
    from seriatim.checkpoints.official import one_file, read_official
    from seriatim.core.errors import UsageError, nearest
    from seriatim.models.build import parameter_count

    if preset is not None and preset not in arinar.NAMES:
        raise UsageError(f"preset: {preset!r} is not one of ARINAR's{nearest(preset, arinar.NAMES)}")
    if heads is not None and images is not None:
        raise UsageError("images: tell how many heads there are; leave out heads, or images")
    if heads is not None and heads < 1:
        raise UsageError(f"heads: {heads} is not allowed; 4 as first released, 16 as the official code is today")
    if trunk_heads and len(trunk_heads) > 2:
        raise UsageError(
            f"trunk_heads: {trunk_heads} is not allowed; give one number, or two: of the encoder, of the decoder"
        )
    trunk = (trunk_heads[0], trunk_heads[-1]) if trunk_heads else None
    if temperature_convention is not None:
        arinar.our_temperature(1.0, temperature_convention)
    unused(out, overwrite)
    if not vae.exists():
        raise UsageError(f"vae: there is no {vae}; name kl16.ckpt, or a folder that `seriatim convert kl16` made")
    path = one_file(weights, arinar.NAMES.get(preset or ""))
    say(f"reading {path}")
    file = read_official(path, which=None if ema is None else mar.ENTRIES[0 if ema else 1], entries=mar.ENTRIES)
    config = arinar.infer(file.tensors, str(path))
    tokenizer = vae_of(vae, config["tokens"], config["dim"])
    losses = {}
    if images is not None:
        tokens = tokens_of(images, tokenizer)
        losses = arinar.losses_by_heads(file, tokens, trunk_heads=trunk, preset=preset)
        heads = min(losses, key=losses.__getitem__)
        each = ", ".join(f"{loss:.2f} with {n} heads" for n, loss in losses.items())
        say(f"loss of {len(tokens)} images, in nats a token: {each}; taking {heads}")
    bundle = arinar.bundle_from_arinar(
        file, tokenizer, read_names(class_names), convention=temperature_convention,
        inner_heads=heads or arinar.INNER_HEADS["release"], trunk_heads=trunk, preset=preset,
    )  # fmt: skip
    save_bundle(bundle, out)
    found = {
        "model": str(out),
        "weights": file.which,
        "preset": bundle.provenance["preset"],
        "parameters": parameter_count(bundle.model),
        "tensors": len(file.tensors),
        "tokens": bundle.model.tokens,
        "classes": bundle.model.classes,
        "image": list(tokenizer.size),
        "inner heads": bundle.provenance["inner_heads"],
        **({"losses": losses} if losses else {}),
    }
    report(found, json)


def export_arinar(
    model: Annotated[Path, typer.Argument(help="A model folder or a run.")],
    out: Annotated[Path, typer.Argument(help="The file: .safetensors, or .pth as the official code reads it.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """A masked model whose head is nested as ARINAR's, for the official ARINAR code."""
    from seriatim.checkpoints import arinar, mar
    from seriatim.checkpoints.native import load_bundle

    made = load_bundle(model).model
    write_official(arinar.arinar_tensors(made), out, mar.ENTRIES, overwrite)
    say(f"its head has {arinar.inner_heads_of(made)} attention heads, which the official code must have too")


def tokens_of(folder: Path, tokenizer: Tokenizer, most: int = 64) -> Tensor:
    """Tokens (B, L, D) of images from all over a folder."""
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
