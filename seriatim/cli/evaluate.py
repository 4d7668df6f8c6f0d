"""`seriatim evaluate` compares a model's samples, or a tokenizer's reconstructions, with real images."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seriatim.cli.output import DeviceOption, JsonFlag, print_json, print_table
from seriatim.cli.sampling_options import name_or_numbers
from seriatim.cli.threads import ThreadsOption, drawing_with
from seriatim.core.terminal import say

if TYPE_CHECKING:
    from seriatim.core.flatten import Colour
    from seriatim.evaluation.blocks import Share
    from seriatim.evaluation.reference import Images, Statistics

NUM = ("--num", "--num-images")  # the long name is for torchrun, which takes --num for its own --numa-binding
DataOption = Annotated[
    str,
    typer.Option(help="The real images to compare with: a folder, a reference .npz, or the data section of a recipe."),
]
RealOption = Annotated[
    str | None,
    typer.Option(help="More real images, such as a test set, to show how real ones score. Default: half of --data."),
]
FeaturesOption = Annotated[
    str,
    typer.Option(
        help="The features to compare: inception, pixels, a registered name, NAME:PATH, a classifier's folder, or a "
        "weights file."
    ),
]
BatchSizeOption = Annotated[int | None, typer.Option(help="The number of images generated at once.")]
CacheOption = Annotated[
    Path | None, typer.Option(help="The folder for features of real images. Default: the folder of --out.")
]
ShardOption = Annotated[
    str | None,
    typer.Option(help="The share of this process, such as 0/2. Default: all, which processes of torchrun divide."),
]
DtypeOption = Annotated[str, typer.Option(help="The dtype of the backbone: auto, float32 or bfloat16.")]


def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model folder, a run, RUN@latest or the like, or a hub repository.")],
    data: DataOption,
    num: Annotated[
        int,
        typer.Option(
            *NUM,
            help="The number of samples to generate, spread over the classes; for a tokenizer, of images to encode.",
        ),
    ],
    real_data: RealOption = None,
    features: FeaturesOption = "inception",
    figures: Annotated[
        list[str] | None,
        typer.Option(
            help="A figure to compute: frechet, kernel, manifold, score, accuracy, diversity or nearest. Repeat it for "
            "several. Default: all that the features allow."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another sampling setting, such as solver=dpm++. Repeat it for several."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed; image i has the seed hash(seed, i).")] = 0,
    batch_size: BatchSizeOption = None,
    out: Annotated[
        Path,
        typer.Option(help="The folder for features and results.json. Name the same folder to continue after a stop."),
    ] = Path("evaluation"),
    cache: CacheOption = None,
    shard: ShardOption = None,
    neighbours: Annotated[
        int,
        typer.Option(min=0, help="Also show this many samples that are nearest to training images, beside those."),
    ] = 0,
    tokenizer: Annotated[
        bool,
        typer.Option("--tokenizer", help="Evaluate the tokenizer of a model. A tokenizer folder needs no such option."),
    ] = False,
    noise: Annotated[
        list[float] | None,
        typer.Option(help="Noise added to a tokenizer's tokens, in standard deviations. Repeat it for several levels."),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    json: JsonFlag = False,
) -> None:
    """Compare samples with real images, and as many other real images for scale. It can be resumed and shared out.

    For a tokenizer it reports what the reconstructions lose, and how its tokens are distributed or its codes used.
    """
    share = share_of(shard)
    of_model = {
        "figures": figures,
        **context.obj,
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
    from seriatim.pipeline.loading import load

    pipe = load(model, device=device, dtype=dtype)
    check_pictures(pipe.tokenizer)
    size, channels = pipe.tokenizer.size, pipe.tokenizer.channels
    settings = {**context.obj, **fields(set_ or [], context.obj)}
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
    """Raise UsageError if an option was given that has no meaning here, rather than ignore it silently."""
    from seriatim.core.errors import UsageError

    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name}: has no meaning in the evaluation of {what}; leave it out")


def is_tokenizer(name: Path) -> bool:
    """Whether a folder, a run or its checkpoint holds a tokenizer but no model, as its config says."""
    from seriatim.checkpoints.native import CONFIG
    from seriatim.checkpoints.run_names import find
    from seriatim.core.errors import CheckpointError
    from seriatim.core.ownership import json_of

    try:
        config = json_of(find(name, quiet=True).folder / CONFIG)
    except CheckpointError:  # whoever reads the model says what is wrong
        return False
    return "tokenizer" in config and "model" not in config


def evaluate_tokenizer(
    folder: str,
    data: str,
    num: int,
    real_data: str | None,
    features: str,
    noise: list[float] | None,
    seed: int,
    out: Path,
    share: Share | None,
    cache: Path | None,
    device: str,
    json: bool,
) -> None:
    from seriatim.checkpoints.tokenizer import load_tokenizer, read_provenance
    from seriatim.core.device import pick_device
    from seriatim.evaluation.base import check_pictures
    from seriatim.evaluation.features import open_features
    from seriatim.evaluation.tokenizers import evaluate_tokenizer as run

    made = load_tokenizer(folder)
    check_pictures(made)
    size, channels = made.size, made.channels
    extractor = None if features == "none" else open_features(features, size=size, channels=channels)
    done = run(
        made,
        only_images(open_data(data, "data", size, channels), data),
        out,
        num=num,
        features=extractor,
        real=None if real_data is None else only_images(open_data(real_data, "real-data", size, channels), real_data),
        noise=noise,
        source=folder,
        provenance=read_provenance(folder),
        seed=seed,
        share=share,
        cache=cache,
        device=pick_device(device),
        quiet=json,
    )
    if not done.figures:
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


def say_missing(out: Path, missing: int, json: bool, file: str = "results.json") -> None:
    if not missing:  # the first process prints the figures
        return
    say(f"this share is done; other processes still have {missing:,} images; the last to finish writes {file}")
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


def share_of(shard: str | None) -> Share | None:
    """The share from a text such as `1/4`; None for all blocks, which the processes of torchrun divide among them."""
    from seriatim.core.errors import UsageError
    from seriatim.evaluation.blocks import Share

    if shard is None:
        return None
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard)
    if not found or not int(found[1]) < int(found[2]):
        raise UsageError(f"shard: {shard!r} is not allowed; give number/processes, such as 0/2 for the first of two")
    return Share(int(found[1]), int(found[2]))


def fields(given: list[str], elsewhere: Collection[str] = ()) -> dict[str, Any]:
    """The settings of a request from texts such as `["solver=dpm++", "order=3,1,0,2"]`.

    `elsewhere` names settings that other options have given. Raises UsageError for a setting that is given twice, and
    for what is not a setting but an argument of an evaluation or a sweep, such as the seed.
    """
    import inspect

    from seriatim.core.errors import UsageError
    from seriatim.evaluation.run import evaluate
    from seriatim.evaluation.sweep import sweep
    from seriatim.pipeline.request import request_fields

    arguments = {*inspect.signature(evaluate).parameters, *inspect.signature(sweep).parameters}
    settings: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"set: {text!r} is not allowed; write name=value, such as guidance_scale=2")
        if name in arguments:
            raise UsageError(f"set: {name!r} is no setting of sampling; give it as an option of its own, see --help")
        if name in settings or name in elsewhere:
            raise UsageError(f"set: {name} is given twice; leave one out")
        settings[name] = field_value(name, value, request_fields())
    return settings


def field_value(name: str, text: str, known: Any) -> Any:
    """The value of a setting from its text on the command line: a name or positions for `order`, otherwise YAML."""
    from seriatim.core.errors import UsageError, nearest, shown
    from seriatim.core.reading import Unreadable, parse_yaml

    if name not in known:
        raise UsageError(f"{name}: is not a setting of a request{nearest(name, known)}")
    if name == "order":
        return name_or_numbers(text)
    try:
        return parse_yaml(text)
    except Unreadable as error:
        raise UsageError(f"{name}: {shown(text)} {error}") from error


def open_data(
    text: str, argument: str, size: tuple[int, int], channels: int, background: Colour | None = None
) -> Images | Statistics:
    """The images or statistics that `text` names.

    It is a folder, a reference `.npz`, the name of a source, or its section of a recipe: `{kind: hf, path: cifar10}`.
    `background` is the model's: what transparent parts of its training images showed.
    """
    from seriatim.core.errors import UsageError, shown
    from seriatim.core.reading import Unreadable, parse_yaml
    from seriatim.data.base import StreamData
    from seriatim.data.sources import DATASETS, build_data
    from seriatim.evaluation.reference import read_statistics

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
