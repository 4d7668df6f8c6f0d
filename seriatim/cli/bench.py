"""`seriatim bench` measures how fast a model generates images, where the time goes, and how the original compares."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer

from seriatim.cli.output import DeviceOption, JsonFlag, print_json, print_table


def bench(
    model: Annotated[
        str, typer.Argument(help="A preset (random weights), a model folder, a run, or RUN@latest or the like.")
    ],
    official: Annotated[
        str | None,
        typer.Option(help="A checkout of the original code, which is then timed on the same weights and noise."),
    ] = None,
    batch: Annotated[int, typer.Option(help="The number of images generated at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="The dtype of our backbone: auto, float32, bfloat16, or best.")] = "auto",
    official_dtype: Annotated[
        str | None,
        typer.Option(help="The autocast dtype of the original code. Default: whichever is measured to be the fastest."),
    ] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="The number of sampling steps of an image.")] = None,
    num_diffusion_steps: Annotated[
        int | None, typer.Option(help="The number of denoising steps of a diffusion head.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="The classifier-free guidance scale; 1 is no guidance.")
    ] = None,
    guidance_schedule: Annotated[
        str | None, typer.Option(help="How guidance changes over the steps: linear or constant.")
    ] = None,
    guidance_mode: Annotated[
        str | None, typer.Option(help="How a mixture head guides: exact or resample. Default: the head's own mode.")
    ] = None,
    device: DeviceOption = "auto",
    threads: Annotated[
        int | None, typer.Option(help="The number of CPU threads. Default: the number that torch uses.")
    ] = None,
    repetitions: Annotated[int, typer.Option(help="The number of timed runs; the median is reported.")] = 3,
    every: Annotated[
        int,
        typer.Option(
            help="Compute only one of this many steps and scale the time: a quick look, not a figure to quote."
        ),
    ] = 1,
    decode: Annotated[bool, typer.Option(help="Also time the decoding of the tokens, separately.")] = True,
    json: JsonFlag = False,
) -> None:
    """Measure a model's seconds, memory, stages and share of the machine's peak, and the original code beside it."""
    from seriatim.bench.race import bench as run

    with contextlib.redirect_stdout(sys.stderr):  # the original code may print
        result = run(
            model,
            official=official,
            batch=batch,
            dtype=dtype,
            official_dtype=official_dtype,
            num_inference_steps=num_inference_steps,
            num_diffusion_steps=num_diffusion_steps,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            guidance_mode=guidance_mode,
            device=device,
            threads=threads,
            repetitions=repetitions,
            every=every,
            decode=decode,
            quiet=json,
        )
    if json:
        return print_json(result)
    steps = f"{result['num_inference_steps']} steps"
    if result["start_timestep"] is not None:
        steps += f" x {result['num_diffusion_steps']} inside the head"
    guidance = f"guidance {result['guidance_scale']:g} {result['guidance_schedule']}"
    typer.echo(f"{model}, {steps}, {guidance}, batch {batch}")
    print_table(("", *columns(result)), rows(result))
    notes = [f"{result['device']}, {result['threads']} threads, torch {result['versions']['torch']}"]
    notes += [f"{result['weights']} weights, median of {repetitions} runs"]
    if result["every"] > 1:
        notes += [f"one step of {result['every']} computed and scaled: a quick look"]
    typer.echo("; ".join(notes))


def columns(result: dict[str, Any]) -> tuple[str, ...]:
    return ("seriatim", "original", "ratio") if "ratio" in result else ("seriatim",)


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table: a measurement of ours, of the original, and their ratio."""
    both = "ratio" in result
    table: list[tuple[str, ...]] = []

    def row(name: str, ours: str, theirs: str = "", ratio: str = "") -> None:
        table.append((name, ours, theirs, ratio) if both else (name, ours))

    seconds, official = result["seconds"], result.get("official_seconds")
    row("seconds", f"{seconds:.2f}", f"{official:.2f}" if both else "", f"{result['ratio']:.2f} x" if both else "")
    row(
        "images per second",
        f"{result['images_per_second']:.3f}",
        f"{result['official_images_per_second']:.3f}" if both else "",
    )
    if not both and result["batch"] > 1:
        row("seconds of one image", f"{result['latency_seconds']:.2f}")
    row("dtype", result["dtype"] + ", head float32", result.get("official_dtype", ""))
    if "equal_codes" in result:
        row("equal codes, greedy", f"{result['equal_codes']:.4%}")
    elif both:
        row(
            "largest difference",
            f"{result['max_abs_difference']:.2e}",
            f"of {result['largest_value']:.3g}",
            f"{result['max_rel_difference']:.1e}",
        )
    peak, other = result.get("peak_bytes"), result.get("official_peak_bytes")
    if peak:
        row(
            "peak memory, GiB",
            f"{peak / 2**30:.2f}",
            f"{other / 2**30:.2f}" if other else "",
            f"{peak / other:.2f}" if other else "",
        )
    for stage, value in result["stages"].items():
        theirs = result.get("official_stages", {}).get(stage)
        row(
            f"  {stage}, seconds",
            f"{value:.2f}",
            f"{theirs:.2f}" if theirs is not None else "",
            f"{theirs / value:.2f} x" if theirs and value else "",
        )
    row("GFLOP", f"{result['flops'] / 1e9:,.0f}")
    peaks = ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in sorted(result["peak_flops"].items()))
    row("share of the matrix peak", f"{result['share_of_peak']:.0%}", f"({peaks} GFLOP/s)" if both else "")
    return table
