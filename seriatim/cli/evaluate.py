"""`seriatim evaluate`: a model's samples, or a tokenizer's reconstructions, against real images."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seriatim.cli.output import DeviceOption, JsonFlag, print_json, print_table
from seriatim.cli.sample import order_or_positions
from seriatim.cli.threads import ThreadsOption, drawing_with
from seriatim.core.terminal import say

if TYPE_CHECKING:
    from seriatim.core.flatten import Colour
    from seriatim.evaluation.blocks import Share
    from seriatim.evaluation.reference import Images, Statistics

NUM = ("--num", "--num-images")  # torchrun takes the short one for an abbreviation of its own --numa-binding
DataOption = Annotated[
    str, typer.Option(help="The reference: a folder of images, a reference .npz, or a data section in YAML.")
]
RealOption = Annotated[
    str | None, typer.Option(help="Other real images, such as a test set. Default: half of --data is set aside.")
]
FeaturesOption = Annotated[
    str, typer.Option(help="inception, pixels, a registered name, NAME:PATH, a classifier's folder, a weights file.")
]


def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, a run, or a hub repository.")],
    data: DataOption,
    num: Annotated[
        int, typer.Option(*NUM, help="Samples to draw, class after class; of a tokenizer, images to encode.")
    ],
    real_data: RealOption = None,
    features: FeaturesOption = "inception",
    figures: Annotated[
        list[str] | None,
        typer.Option(
            help="frechet, kernel, manifold, score, accuracy, diversity, nearest; repeat it. Default: what can be had."
        ),
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance; higher is more typical.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Steps over the image.")] = None,
    num_diffusion_steps: Annotated[int | None, typer.Option(help="Steps inside a diffusion head.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Below 1 is sharper.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other field of a request, such as solver=dpm++; repeat it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Image i has the seed hash(seed, i).")] = 0,
    batch_size: Annotated[int | None, typer.Option(help="Images drawn at once.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for features and results.json; the same goes on.")] = Path(
        "evaluation"
    ),
    cache: Annotated[Path | None, typer.Option(help="Folder for features of real images. Default: --out.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="This process's share, such as 0/2. Default: torchrun's, or all.")
    ] = None,
    neighbours: Annotated[
        int, typer.Option(min=0, help="Also draw the samples nearest to training images, so many of them.")
    ] = 0,
    tokenizer: Annotated[
        bool, typer.Option("--tokenizer", help="Measure a model's tokenizer; a tokenizer folder needs no such word.")
    ] = False,
    noise: Annotated[
        list[float] | None, typer.Option(help="Of a tokenizer's tokens, in standard deviations; repeat it.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="Of the backbone: auto, float32, bfloat16.")] = "auto",
    threads: ThreadsOption = None,
    json: JsonFlag = False,
) -> None:
    """Measure samples against real images, beside as many real ones; resumable, and shared between processes.

    Of a tokenizer folder: what it loses, and what its tokens are like, or how its codes are used.
    """
    share = share_of(shard)
    of_model = {
        "figures": figures,
        "guidance_scale": guidance_scale,
        "num_inference_steps": num_inference_steps,
        "num_diffusion_steps": num_diffusion_steps,
        "temperature": temperature,
        "set": set_,
        "batch_size": batch_size,
        "neighbours": neighbours or None,
    }
    is_one = tokenizer or is_tokenizer(Path(model))
    refuse_given(of_model if is_one else {"noise": noise}, "a tokenizer" if is_one else "a model")
    if is_one:
        return evaluate_tokenizer(model, data, num, real_data, features, noise, seed, out, share, cache, device, json)

    from seriatim.core.progress import duration
    from seriatim.evaluation.base import check_pictures
    from seriatim.evaluation.features import open_features
    from seriatim.evaluation.run import evaluate as run
    from seriatim.pipeline import load

    pipe = load(model, device=device_of(device), dtype=dtype)
    check_pictures(pipe.tokenizer)
    size, channels = pipe.tokenizer.size, pipe.tokenizer.channels
    settings = dict(
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        num_diffusion_steps=num_diffusion_steps,
        temperature=temperature,
    ) | fields(set_ or [])
    extractor = open_features(features, size=size, channels=channels)
    opened = partial(open_data, size=size, channels=channels, background=pipe.bundle.background)
    reference = opened(data, argument="data")
    others = None if real_data is None else only_images(opened(real_data, argument="real-data"), real_data)
    with drawing_with(pipe, threads):
        done = run(
            pipe,
            reference,
            out,
            num=num,
            features=extractor,
            real=others,
            figures=figures or (),
            seed=seed,
            batch_size=batch_size,
            share=share,
            cache=cache,
            neighbours=neighbours,
            quiet=json,
            **settings,
        )
    if done.figures is None:
        return say_missing(out, done.missing, json)
    if json:
        return print_json(done.report)
    print_figures(done.report, f"{num:,} samples")
    if neighbours or any(name.startswith("nearest") for name in done.figures):
        say(f"nearest: the way to {done.report['nearest_to']}")
    say(f"markdown and settings: {out / 'results.json'} ({duration(done.seconds)})")
    return None


def refuse_given(options: dict[str, Any], what: str) -> None:
    """Refuse options that mean nothing here, rather than leave them out in silence."""
    from seriatim.core.errors import UsageError

    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name}: is not for the evaluation of {what}; leave it out")


def is_tokenizer(folder: Path) -> bool:
    """A folder with a tokenizer's weights and no model's."""
    return (folder / "tokenizer.safetensors").is_file() and not (folder / "model.safetensors").exists()


def evaluate_tokenizer(
    folder: str,
    data: str,
    num: int,
    real_data: str | None,
    features: str,
    noise: list[float] | None,
    seed: int,
    out: Path,
    share: Share,
    cache: Path | None,
    device: str,
    json: bool,
) -> None:
    from seriatim.checkpoints.tokenizer import load_tokenizer
    from seriatim.core.device import pick_device
    from seriatim.evaluation.base import check_pictures
    from seriatim.evaluation.features import open_features
    from seriatim.evaluation.tokenizers import evaluate_tokenizer as run

    made = load_tokenizer(folder)
    check_pictures(made)
    size, channels = made.size, made.channels
    done = run(
        made,
        only_images(open_data(data, "data", size, channels), data),
        out,
        num=num,
        features=None if features == "none" else open_features(features, size=size, channels=channels),
        real=None if real_data is None else only_images(open_data(real_data, "real-data", size, channels), real_data),
        noise=noise,
        source=folder,
        seed=seed,
        share=share,
        cache=cache,
        device=pick_device(device_of(device)),
        quiet=json,
    )
    if done.missing:
        return say_missing(out, done.missing, json)
    if json:
        return print_json(done.report)
    rows = [
        (name, f"{x.value:.4g} ± {x.error:.2g}", f"{done.real[name].value:.4g}" if name in done.real else "")
        for name, x in done.figures.items()
    ]
    rows += [(f"PSNR, noise {level:g}", f"{x.value:.4g} ± {x.error:.2g}", "") for level, x in done.noise.items()]
    kind = "tokens" if made.vocab is None else "codes"
    rows += [(f"{kind}: {name}", f"{value:.4g}", "") for name, value in done.latents.items()]
    print_table(("figure", f"{done.report['num']:,} reconstructions", "the images themselves"), rows)
    typer.echo(done.report["markdown"])
    say(f"markdown and settings: {out / 'results.json'}")
    return None


def say_missing(out: Path, missing: int, json: bool) -> None:
    say(f"this share is done; {missing:,} images are left to the others: who ends last writes results.json")
    if json:
        print_json({"folder": str(out), "missing": missing})


def print_figures(report: dict[str, Any], title: str) -> None:
    rows = [
        (name, f"{x['value']:.4g} ± {x['error']:.2g}", f"{x['real']:.4g} ± {x['real_error']:.2g}")
        + ((f"{x['as_many']:.4g} ± {x['as_many_error']:.2g}",) if "as_many" in x else ())
        for name, x in report["figures"].items()
    ]
    fewer = (f"{report['num_real']:,} samples",) if rows and len(rows[0]) > 3 else ()
    print_table(("figure", title, f"{report['num_real']:,} real", *fewer), rows)
    typer.echo(report["markdown"])


# --- arguments ----------------------------------------------------------------------------------------------------


def share_of(shard: str | None) -> Share:
    """`1/4`, or what torchrun says."""
    from seriatim.core.errors import UsageError
    from seriatim.evaluation.blocks import Share

    text = shard or f"{os.environ.get('RANK', '0')}/{os.environ.get('WORLD_SIZE', '1')}"
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not found or not int(found[1]) < int(found[2]):
        raise UsageError(f"shard: {text!r} is not allowed; give number/processes, the first of two is 0/2")
    return Share(int(found[1]), int(found[2]))


def device_of(device: str) -> str:
    """Of torchrun's processes on one machine, each takes the accelerator of its own number."""
    if device != "auto" or "LOCAL_RANK" not in os.environ:
        return device

    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return "cpu"
    return f"{accelerator.type}:{int(os.environ['LOCAL_RANK']) % torch.accelerator.device_count()}"


def fields(given: list[str]) -> dict[str, Any]:
    """`["solver=dpm++", "order=3,1,0,2"]` as settings of a request."""
    from seriatim.core.errors import UsageError
    from seriatim.sampling.request import SampleRequest

    settings = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"set: {text!r} is not allowed; write name=value, such as guidance_scale=2")
        settings[name] = field_value(name, value, SampleRequest.model_fields)
    return settings


def field_value(name: str, text: str, known: Any) -> Any:
    """A request's field from the command line: an order is a name or positions, all else YAML."""
    from seriatim.core.errors import UsageError, nearest, shown
    from seriatim.core.reading import Unreadable, parse_yaml

    if name not in known:
        raise UsageError(f"{name}: is no field of a request{nearest(name, known)}")
    if name == "order":
        return order_or_positions(text)
    try:
        return parse_yaml(text)
    except Unreadable as error:
        raise UsageError(f"{name}: {shown(text)} {error}") from error


def open_data(
    text: str, argument: str, size: tuple[int, int], channels: int, background: Colour | None = None
) -> Images | Statistics:
    """A folder, a reference `.npz`, the name of a source, or its section of a recipe: `{kind: hf, path: cifar10}`.

    `background` is that of the model: what transparent parts of its training images showed.
    """
    from seriatim.core.errors import UsageError, shown
    from seriatim.core.reading import Unreadable, parse_yaml
    from seriatim.evaluation.reference import read_statistics
    from seriatim.training.data import StreamData
    from seriatim.training.sources import DATASETS, build_data

    if text.endswith(".npz"):
        return read_statistics(text)
    if text.lstrip().startswith("{"):
        try:
            config = parse_yaml(text)
        except Unreadable as error:
            raise UsageError(f"{argument}: {shown(text)} {error}") from error
    elif text in DATASETS and not Path(text).exists():
        config = {"kind": text}
    else:
        config = {"kind": "folder", "path": text}
    if config.get("kind") in ("folder", "hf"):
        usual = {} if background is None else {"background": list(background)}
        config = {"size": list(size), "channels": channels, **usual, **config}
    found = build_data(config)
    if found.cached or isinstance(found, StreamData):
        raise UsageError(f"{argument}: {config.get('kind')!r} can't be read image by image; name folder, hf or digits")
    return found


def only_images(found: Images | Statistics, text: str) -> Images:
    from seriatim.core.errors import UsageError
    from seriatim.evaluation.reference import Statistics

    if isinstance(found, Statistics):
        raise UsageError(f"{text} is a reference file; name a folder of images here")
    return found
