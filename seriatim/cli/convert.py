"""`seriatim convert` reads official weights into a model folder; `seriatim export` writes them back."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seriatim.cli.output import JsonFlag, print_json, print_table
from seriatim.core.terminal import say

if TYPE_CHECKING:
    from torch import Tensor

    from seriatim.checkpoints.native import Bundle
    from seriatim.checkpoints.official import OfficialFile
    from seriatim.tokenizers.base import Tokenizer

convert = typer.Typer(no_args_is_help=True, help="Turn official weights into a model folder.")
export = typer.Typer(no_args_is_help=True, help="Write weights under their official names.")

Weights = Annotated[Path, typer.Argument(help="The downloaded file (.pth, .ckpt, .safetensors).")]
Out = Annotated[Path, typer.Argument(help="The folder to create.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing model or tokenizer in that folder.")]
Checkpoint = Annotated[
    Path, typer.Argument(help="checkpoint-last.pth, a safetensors file, or a folder that holds one of them.")
]
Vae = Annotated[
    Path,
    typer.Option(help="The model's autoencoder: kl16.ckpt, a folder made by `convert kl16`, or a trained tokenizer."),
]
Ema = Annotated[
    bool | None,
    typer.Option("--ema/--raw", help="Take averaged or last weights. Default: averaged, if the file has them."),
]
ClassNames = Annotated[Path | None, typer.Option(help="A text file with one class name per line.")]
Model = Annotated[Path, typer.Argument(help="A model folder, a run, or RUN@latest or the like.")]
OverwriteFile = Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")]


@convert.command("mar")
def convert_mar(
    weights: Checkpoint,
    out: Out,
    vae: Vae,
    ema: Ema = None,
    preset: Annotated[
        str | None, typer.Option(help="mar-b, mar-l or mar-h. Default: found from the sizes of the tensors.")
    ] = None,
    heads: Annotated[
        list[int] | None,
        typer.Option(
            help="The number of attention heads, for a model that is not a preset. Give it twice if encoder and "
            "decoder differ."
        ),
    ] = None,
    class_names: ClassNames = None,
    overwrite: Overwrite = False,
    json: JsonFlag = False,
) -> None:
    """Convert MAR (Li et al. 2024). No code in the file is run, and every tensor must fit."""
    from seriatim.checkpoints import mar

    check_preset(preset, mar.NAMES, "MAR")
    both = both_heads(heads, "heads")
    unused(out, overwrite)
    file, tokenizer = read_masked(mar, weights, vae, ema, preset)
    bundle = mar.bundle_from_mar(file, tokenizer, read_names(class_names), heads=both, preset=preset)
    save_model(bundle, out, file, json)


@convert.command("kl16")
def convert_kl16(
    weights: Weights,
    out: Out,
    size: Annotated[int, typer.Option(help="The side of the images in pixels.")] = 256,
    patch: Annotated[int, typer.Option(help="The side of a token in latents.")] = 1,
    scale: Annotated[
        float, typer.Option(help="The factor that normalises latents: 1 / their standard deviation.")
    ] = 0.2325,
    overwrite: Overwrite = False,
    json: JsonFlag = False,
) -> None:
    """Convert MAR's autoencoder KL-16, or one of its form in other sizes, to diffusers' AutoencoderKL."""
    from seriatim.checkpoints.kl16 import tokenizer_from_kl16
    from seriatim.checkpoints.official import read_official

    unused(out, overwrite)
    file = read_official(weights, entries=("model",))
    tokenizer = tokenizer_from_kl16(file.tensors, str(weights), size=size, patch=patch, scale=scale)
    save_converted(tokenizer, out, {"converted_from": file.path.name}, json, features=tokenizer.dim, scale=scale)


@convert.command("llamagen")
def convert_llamagen(
    weights: Annotated[Path, typer.Argument(help="c2i_B_256.pt, another .pt or .pth file, or a safetensors file.")],
    out: Out,
    vq: Annotated[
        Path, typer.Option(help="The model's tokenizer: vq_ds16_c2i.pt, or a folder made by `convert llamagen-vq`.")
    ],
    size: Annotated[int, typer.Option(help="The side of the images in pixels; needed if --vq is a file.")] = 256,
    ema: Annotated[bool, typer.Option("--ema", help="Take the averaged weights, if the file has them.")] = False,
    preset: Annotated[
        str | None, typer.Option(help="llamagen-b, ... Default: found from the sizes of the tensors.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="The number of attention heads, for a model that is not a preset.")
    ] = None,
    class_names: ClassNames = None,
    overwrite: Overwrite = False,
    json: JsonFlag = False,
) -> None:
    """Convert LlamaGen (Sun et al. 2024), of classes or of text. No code in the file is run; every tensor must fit."""
    from seriatim.checkpoints import llamagen
    from seriatim.checkpoints.llamagen_vq import ENTRIES, tokenizer_from_file
    from seriatim.checkpoints.official import read_official
    from seriatim.checkpoints.run_names import is_local
    from seriatim.checkpoints.tokenizer import load_tokenizer
    from seriatim.core.errors import UsageError

    check_preset(preset, llamagen.NAMES, "LlamaGen")
    unused(out, overwrite)
    if not vq.exists() and not is_local(vq):
        raise UsageError(f"vq: there is no {vq}; name vq_ds16_c2i.pt, or a folder that `convert llamagen-vq` made")
    say(f"reading {weights}")
    file = read_official(weights, which="ema" if ema else None, entries=llamagen.ENTRIES)
    if is_local(vq):
        tokenizer = load_tokenizer(vq)
    else:
        tokenizer = tokenizer_from_file(read_official(vq, entries=ENTRIES), size=size)
    bundle = llamagen.bundle_from_llamagen(file, tokenizer, read_names(class_names), heads=heads, preset=preset)
    save_model(bundle, out, file, json)


@convert.command("llamagen-vq")
def convert_llamagen_vq(
    weights: Weights,
    out: Out,
    size: Annotated[int, typer.Option(help="The side of the images in pixels.")] = 256,
    ema: Ema = None,
    overwrite: Overwrite = False,
    json: JsonFlag = False,
) -> None:
    """Convert LlamaGen's tokenizer VQ-16 or VQ-8, or one of their form in other sizes."""
    from seriatim.checkpoints.llamagen_vq import ENTRIES, tokenizer_from_file
    from seriatim.checkpoints.official import read_official

    unused(out, overwrite)
    file = read_official(weights, which=None if ema is None else ENTRIES[0 if ema else 1], entries=ENTRIES)
    tokenizer = tokenizer_from_file(file, size=size)
    provenance = {"converted_from": file.path.name, "weights": file.which}
    save_converted(tokenizer, out, provenance, json, codes=tokenizer.vocab, features=tokenizer.dim)


@export.command("mar")
def export_mar(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The file to write: .safetensors, or .pth for the official code.")],
    overwrite: OverwriteFile = False,
) -> None:
    """Write a masked model with a diffusion head for the official MAR code."""
    from seriatim.checkpoints.mar import ENTRIES, mar_tensors
    from seriatim.checkpoints.native import load_bundle

    tensors = mar_tensors(load_bundle(model).model)
    write_official(tensors, out, ENTRIES, overwrite)


@export.command("llamagen")
def export_llamagen(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The file to write: .safetensors, or .pt for the official code.")],
    overwrite: OverwriteFile = False,
) -> None:
    """Write a causal model of codes that has LlamaGen's form for the official LlamaGen code."""
    from seriatim.checkpoints.llamagen import llamagen_tensors
    from seriatim.checkpoints.native import load_bundle

    write_official(llamagen_tensors(load_bundle(model).model), out, ("model",), overwrite)


@export.command("kl16")
def export_kl16(
    model: Annotated[Path, typer.Argument(help="A tokenizer folder, model folder or run (or RUN@latest) of `kl`.")],
    out: Annotated[Path, typer.Argument(help="The file to write: .safetensors, or .ckpt for the official code.")],
    overwrite: OverwriteFile = False,
) -> None:
    """Write a `kl` tokenizer for the official MAR code."""
    from seriatim.checkpoints.kl16 import kl16_from_tokenizer
    from seriatim.checkpoints.tokenizer import load_tokenizer
    from seriatim.core.errors import UsageError
    from seriatim.tokenizers.kl import KL

    tokenizer = load_tokenizer(model)
    if not isinstance(tokenizer, KL):
        raise UsageError(
            f"model: {model} has the tokenizer {type(tokenizer).__name__}; only `kl` can be written as KL-16"
        )
    write_official(kl16_from_tokenizer(tokenizer), out, ("model",), overwrite)


@export.command("half")
def export_half(
    model: Annotated[Path, typer.Argument(help="A model, tokenizer or classifier folder, or a finished run.")],
    out: Out,
    summary: Annotated[str | None, typer.Option(help="A sentence for `seriatim models`.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Copy a model with its weights in half precision: half as many bytes, and it loads like any other."""
    from seriatim.checkpoints.half_precision import half_copy
    from seriatim.checkpoints.native import CLASSIFIER

    unused(out, overwrite, CLASSIFIER)
    made = half_copy(model, out, summary=summary)
    size = sum(file.stat().st_size for file in made.iterdir())
    say(f"wrote {made}: {size / 1e6:.1f} MB")


# --- parts --------------------------------------------------------------------------------------------------------


def unused(out: Path, overwrite: bool, *more: str) -> None:
    """Raise UsageError if the folder is not empty, unless it holds a model or tokenizer that may be replaced.

    `more` are files that such a folder may hold besides.
    """
    from seriatim.checkpoints.native import PARTS, replaceable
    from seriatim.core.errors import UsageError

    folder = replaceable(out, (*PARTS, *more))
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise UsageError(
                f"out: {out} holds a model or tokenizer already; choose another folder or pass --overwrite"
            )
        say(f"replacing {out}, which is kept until the new one is whole")


def check_preset(preset: str | None, names: Collection[str], paper: str) -> None:
    from seriatim.core.errors import UsageError, nearest

    if preset is not None and preset not in names:
        raise UsageError(f"preset: {preset!r} is not one of {paper}'s{nearest(preset, names)}")


def both_heads(heads: list[int] | None, name: str) -> tuple[int, int] | None:
    """The attention heads of encoder and decoder from one number or two."""
    from seriatim.core.errors import UsageError

    if heads and len(heads) > 2:
        raise UsageError(
            f"{name}: {heads} is not allowed; give one number, or one for the encoder and one for the decoder"
        )
    return (heads[0], heads[-1]) if heads else None


def read_masked(
    converter: Any, weights: Path, vae: Path, ema: bool | None, preset: str | None
) -> tuple[OfficialFile, Tokenizer]:
    """The official file of a model that `converter`, the module `mar` or `arinar`, converts, and its tokenizer."""
    file = read_generator(weights, vae, ema, converter.NAMES.get(preset or ""))
    config = converter.infer(file.tensors, str(file.path))
    return file, vae_of(vae, config["tokens"], config["dim"])


def read_generator(weights: Path, vae: Path, ema: bool | None, name: str | None) -> OfficialFile:
    """The official file of a generator, called `name` if `weights` is a folder; the vae must be there as well."""
    from seriatim.checkpoints.mar import ENTRIES
    from seriatim.checkpoints.official import one_file, read_official
    from seriatim.checkpoints.run_names import is_local
    from seriatim.core.errors import UsageError

    if not vae.exists() and not is_local(vae):
        raise UsageError(
            f"vae: there is no {vae}; name kl16.ckpt, a folder that `seriatim convert kl16` made, or a tokenizer's run"
        )
    path = one_file(weights, name)
    say(f"reading {path}")
    return read_official(path, which=None if ema is None else ENTRIES[0 if ema else 1], entries=ENTRIES)


def vae_of(path: Path, tokens: int, dim: int) -> Tokenizer:
    """The tokenizer, from an official file or a tokenizer folder, of a model with `tokens` tokens of `dim` features."""
    from seriatim.checkpoints.kl16 import tokenizer_from_kl16
    from seriatim.checkpoints.mar import patch_of
    from seriatim.checkpoints.official import read_official
    from seriatim.checkpoints.run_names import is_local
    from seriatim.checkpoints.tokenizer import load_tokenizer

    if is_local(path):
        return load_tokenizer(path)
    file = read_official(path, entries=("model",))
    kernel = file.tensors.get("post_quant_conv.weight")
    fits = kernel is not None and kernel.ndim == 4 and kernel.shape[1] > 0  # if not, the error comes from below
    patch = patch_of(dim, kernel.shape[1]) if kernel is not None and fits else 1
    levels = sum(name.endswith(".downsample.conv.weight") for name in file.tensors)
    side = round(tokens**0.5) * patch << levels
    return tokenizer_from_kl16(file.tensors, str(path), size=side, patch=patch)


def read_names(path: Path | None) -> list[str]:
    from seriatim.core.errors import UsageError
    from seriatim.core.reading import read_or_raise, read_text

    if path is None:
        return []
    text = read_or_raise(
        lambda: read_text(path), path, UsageError, "class_names must be a text file with one name per line"
    )
    return [line.strip() for line in text.splitlines() if line.strip()]


def write_official(tensors: Mapping[str, Tensor], out: Path, entries: tuple[str, ...], overwrite: bool) -> None:
    """Write the tensors to a safetensors file, or to a torch file in which every entry holds them."""
    from seriatim.checkpoints.native import write_tensors, write_torch
    from seriatim.core.errors import UsageError
    from seriatim.core.files import atomic_write

    if os.path.lexists(out):
        if not overwrite:
            raise UsageError(f"out: {out} exists already; choose another name or pass --overwrite")
        if not out.is_file():
            raise UsageError(f"out: {out} is not a file and can't be replaced by one; choose another name")
    if out.suffix not in (".safetensors", ".pth", ".pt", ".ckpt"):
        raise UsageError(f"out: {out} must end in .safetensors, .pth, .pt or .ckpt")
    if out.exists():
        say(f"replacing {out}, which is kept until the new one is whole")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if out.suffix == ".safetensors":
        atomic_write(out, lambda file: write_tensors(file, whole))
    else:
        atomic_write(out, lambda file: write_torch(file, {entry: whole for entry in entries}))
    say(f"wrote {out}: {len(whole)} tensors")


def save_model(bundle: Bundle, out: Path, file: OfficialFile, json: bool, **more: object) -> None:
    """Save a converted model, and report what it is."""
    from seriatim.checkpoints.native import save_bundle
    from seriatim.models.build import parameter_count

    save_bundle(bundle, out)
    found = {
        "model": str(out),
        "weights": file.which,
        "preset": bundle.provenance["preset"],
        "parameters": parameter_count(bundle.model),
        "tensors": len(file.tensors),
        "tokens": bundle.model.tokens,
        "classes": bundle.model.classes,
        "image": list(bundle.tokenizer.size),
    }
    report(found | more, json)


def save_converted(tokenizer: Tokenizer, out: Path, provenance: dict[str, Any], json: bool, **more: object) -> None:
    """Save a converted tokenizer, and report what it is."""
    from seriatim.checkpoints.tokenizer import save_tokenizer

    save_tokenizer(tokenizer, out, provenance)
    found = {
        "tokenizer": str(out),
        **{name: value for name, value in provenance.items() if name == "weights"},
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "image": list(tokenizer.size),
        "tokens": tokenizer.count,
    }
    report(found | more, json)


def report(found: dict[str, object], json: bool) -> None:
    if json:
        print_json(found)
    else:
        print_table(
            ("", ""), [(key, f"{value:,}" if isinstance(value, int) else value) for key, value in found.items()]
        )
