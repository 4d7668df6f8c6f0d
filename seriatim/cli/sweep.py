"""`seriatim sweep` evaluates a model at several values of its sampling settings and draws curves."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from seriatim.cli.evaluate import (
    NUM,
    BatchSizeOption,
    CacheOption,
    DataOption,
    DtypeOption,
    FeaturesOption,
    RealOption,
    ShardOption,
    field_value,
    fields,
    only_images,
    open_data,
    say_missing,
    share_of,
)
from seriatim.cli.output import DeviceOption, JsonFlag, print_table
from seriatim.cli.threads import ThreadsOption, drawing_with
from seriatim.core.terminal import say


def sweep(
    model: Annotated[str, typer.Argument(help="A model folder, a run, RUN@latest or the like, or a hub repository.")],
    values: Annotated[
        list[str],
        typer.Argument(help="One or more sampling settings, each with its values: guidance_scale=1,1.5,2,3."),
    ],
    data: DataOption,
    num: Annotated[
        int, typer.Option(*NUM, help="The number of samples to generate at each point, spread over the classes.")
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
        typer.Option(
            "--set", help="A setting with one value at all points, such as solver=dpm++. Repeat it for several."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed; image i has the seed hash(seed, i) at every point.")] = 0,
    batch_size: BatchSizeOption = None,
    out: Annotated[Path, typer.Option(help="The folder for the points, sweep.json and curves.png.")] = Path("sweep"),
    cache: CacheOption = None,
    shard: ShardOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    json: JsonFlag = False,
) -> None:
    """Evaluate a model at every value of a setting, with the same seeds. It can be resumed and shared out."""
    share = share_of(shard)
    swept = {name: several(name, text) for name, text in map(parted, values)}

    from seriatim.evaluation.features import open_features
    from seriatim.evaluation.sweep import CURVES, JSON, TABLE
    from seriatim.evaluation.sweep import sweep as run
    from seriatim.pipeline.loading import load

    pipe = load(model, device=device, dtype=dtype)
    size, channels = pipe.tokenizer.size, pipe.tokenizer.channels
    opened = partial(open_data, size=size, channels=channels, background=pipe.bundle.background)
    others = None if real_data is None else only_images(opened(real_data, argument="real-data"), real_data)
    with drawing_with(pipe, threads):
        done = run(
            pipe,
            opened(data, argument="data"),
            out,
            swept,
            num=num,
            features=open_features(features, size=size, channels=channels),
            real=others,
            figures=figures or (),
            seed=seed,
            batch_size=batch_size,
            share=share,
            cache=cache,
            quiet=json,
            **fields(set_ or []),
        )
    if done.missing:
        return say_missing(out, done.missing, json, JSON)
    if json:
        return typer.echo((out / JSON).read_text(encoding="utf-8"), nl=False)
    names = list(done.points[0][1].figures or {})
    rows = []
    for point, made in done.points:
        shown = [(made.figures or {})[name] for name in names]
        rows.append((*point.values(), *(f"{x.value:.4g} ± {x.error:.2g}" for x in shown)))
    real = done.points[0][1].real or {}
    beside = [f"{real[name].value:.4g}" if name in real else "" for name in names]
    rows.append(("real images", *[""] * (len(done.values) - 1), *beside))
    print_table((*done.values, *names), rows)
    say(f"look at {out / CURVES}; the table for a page is {out / TABLE}")
    return None


def parted(text: str) -> tuple[str, str]:
    from seriatim.core.errors import UsageError

    name, equals, rest = text.partition("=")
    if not equals or not rest:
        raise UsageError(f"values: {text!r} is not allowed; write field=value,value, such as guidance_scale=1,1.5,2,3")
    return name, rest


def several(name: str, text: str) -> list[Any]:
    """The values in a text, separated by commas outside of brackets: guidance_interval=[0.1,0.8],[0.2,1]."""
    import re

    from seriatim.core.errors import UsageError
    from seriatim.pipeline.request import request_fields

    if name == "order" and re.search(r"\d", text):
        raise UsageError(f"order: {text!r} can't be swept; orders are swept by name")
    parts = re.split(r",(?![^\[]*\])", text)
    return [field_value(name, part, request_fields()) for part in parts]
