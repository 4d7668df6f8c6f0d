"""`seriatim compare` tells whether model B is better than model A."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    fields,
    is_tokenizer,
    only_images,
    open_data,
    say_missing,
    share_of,
)
from seriatim.cli.output import DeviceOption, JsonFlag, print_json, print_table
from seriatim.cli.threads import ThreadsOption, drawing_with
from seriatim.core.terminal import say

if TYPE_CHECKING:
    from seriatim.evaluation.compare import Opener
    from seriatim.pipeline.pipeline import Pipeline

KINDS = "a model folder, a run, RUN@latest or the like, a packaged model, or a hub repository"


def compare(
    context: typer.Context,
    model_a: Annotated[str, typer.Argument(metavar="A", help=f"The first model: {KINDS}.")],
    model_b: Annotated[str, typer.Argument(metavar="B", help="The second model, named in the same ways.")],
    data: DataOption,
    num: Annotated[
        int, typer.Option(*NUM, help="The number of samples to generate of each model, spread over the classes.")
    ],
    more_a: Annotated[
        list[str] | None,
        typer.Option("--a", help="Another run of A: the same training with another seed. Repeat it for several."),
    ] = None,
    more_b: Annotated[list[str] | None, typer.Option("--b", help="Another run of B. Repeat it for several.")] = None,
    real_data: RealOption = None,
    features: FeaturesOption = "inception",
    figures: Annotated[
        list[str] | None,
        typer.Option(
            help="A figure to compare: frechet, kernel, manifold, score, accuracy, diversity or nearest. Repeat it for "
            "several. Default: all that the features allow."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another sampling setting for all models, such as solver=dpm++. Repeatable."),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="The seed, the same for A and B; further runs have seed + 1, seed + 2, ...")
    ] = 0,
    batch_size: BatchSizeOption = None,
    out: Annotated[
        Path,
        typer.Option(help="The folder for the evaluations, compare.json and compare.png. Name it again to continue."),
    ] = Path("compare"),
    cache: CacheOption = None,
    shard: ShardOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    json: JsonFlag = False,
) -> None:
    """Tell whether model B is better than model A: figures of both, and their differences with 95 % intervals.

    Both draw the same labels from the same seeds. Give several runs of each (--a, --b) for intervals over trainings. It
    can be resumed and shared out.
    """
    from seriatim.core.errors import UsageError

    share = share_of(shard)
    settings = {**context.obj, **fields(set_ or [], context.obj)}
    sides = {"a": [model_a, *(more_a or [])], "b": [model_b, *(more_b or [])]}
    for side, names in sides.items():
        for i, name in enumerate(names):
            if is_tokenizer(Path(name)):
                raise UsageError(
                    f"{side}-{i}: {name} is a tokenizer, and models are compared; evaluate each tokenizer by itself "
                    f"with `seriatim evaluate {name}`"
                )

    from seriatim.evaluation.compare import check_runs, compare_opened
    from seriatim.evaluation.differences import heads_of, rows_of, settings_that_differ
    from seriatim.evaluation.features import open_features
    from seriatim.evaluation.identity import COMPARISON
    from seriatim.evaluation.side_by_side import PICTURE

    check_runs(len(sides["a"]), len(sides["b"]))
    openers = {side: [opener(name, device, dtype, threads) for name in names] for side, names in sides.items()}
    with openers["a"][0]() as first:  # whose images the data has to have
        size, channels, background = first.tokenizer.size, first.tokenizer.channels, first.bundle.background
    opened = partial(open_data, size=size, channels=channels, background=background)
    done = compare_opened(
        openers["a"],
        openers["b"],
        opened(data, argument="data"),
        out,
        num=num,
        features=open_features(features, size=size, channels=channels),
        real=None if real_data is None else only_images(opened(real_data, argument="real-data"), real_data),
        figures=figures or (),
        seed=seed,
        batch_size=batch_size,
        share=share,
        cache=cache,
        quiet=json,
        **settings,
    )
    if not done.figures:
        return say_missing(out, done.missing, json, COMPARISON)
    if json:
        return print_json(done.report)
    print_table(heads_of(done.report), rows_of(done.figures))
    for line in (*settings_that_differ(done.report), *done.conclusions, done.report["interval"]):
        typer.echo(line)
    say(f"look at {out / PICTURE}; the table for a page is {out / 'compare.md'}")
    return None


def opener(name: str, device: str, dtype: str, threads: int | None) -> Opener:
    """Opens a model on the threads that suit it."""

    @contextlib.contextmanager
    def opened() -> Iterator[Pipeline]:
        from seriatim.pipeline.loading import load

        pipe = load(name, device=device, dtype=dtype)
        with drawing_with(pipe, threads):
            yield pipe

    return opened
