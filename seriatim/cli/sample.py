"""`seriatim sample`: images from a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seriatim.cli.output import DeviceOption, JsonFlag, print_json, print_table

# Parameters below which one thread draws: nearly as fast on an idle machine, ninety times faster on a busy one where
# threads wait for each other (docs/log.md). A rule, not a measurement: the same command gives the same bits.
SMALL = 4_000_000


def sample(
    model: Annotated[str, typer.Argument(help="A model folder, a run, or a hub repository.")],
    label: Annotated[
        list[str] | None, typer.Option(help="A class by name or number, or none; repeat it. Default: every class.")
    ] = None,
    num_images_per_label: Annotated[int | None, typer.Option(help="Images of each class.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance; higher is more typical.")] = None,
    guidance_schedule: Annotated[str | None, typer.Option(help="linear or constant, over the image.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Steps over the image.")] = None,
    token_schedule: Annotated[str | None, typer.Option(help="cosine or linear: tokens of each step.")] = None,
    num_diffusion_steps: Annotated[int | None, typer.Option(help="Steps inside a diffusion head.")] = None,
    num_diffusion_steps_last: Annotated[
        int | None, typer.Option(help="Where they end, falling as the image gets known.")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="Of a diffusion head: ddpm, ddim or dpm++.")] = None,
    start_timestep: Annotated[int | None, typer.Option(help="First timestep; 999 is as published.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Below 1 is sharper.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same images. Default: a new one, printed.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images drawn at once.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files and grid.png.")] = Path("samples"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace images of these names in --out.")] = False,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="Of the backbone: auto, float32, bfloat16.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU. Default: all, one for small models.")] = None,
    json: JsonFlag = False,
) -> None:
    """Draw images into a folder, and all of them into one picture, grid.png. What isn't given, the model decides."""
    import time

    import torch

    from seriatim.core.errors import UsageError
    from seriatim.core.files import writable_folder
    from seriatim.core.progress import Progress
    from seriatim.evaluation.grid import grid, save_png
    from seriatim.models.build import parameter_count
    from seriatim.pipeline import load
    from seriatim.training.precision import threads as using

    pipe = load(model, device=device, dtype=dtype)
    request = pipe.request(
        class_labels=label,
        num_images_per_label=num_images_per_label,
        guidance_scale=guidance_scale,
        guidance_schedule=guidance_schedule,
        num_inference_steps=num_inference_steps,
        token_schedule=token_schedule,
        num_diffusion_steps=num_diffusion_steps,
        num_diffusion_steps_last=num_diffusion_steps_last,
        solver=solver,
        start_timestep=start_timestep,
        temperature=temperature,
        seed=seed,
    )
    steps = pipe.stream(request=request, batch_size=batch_size)  # checks everything before a folder is made
    out = writable_folder(out)
    names = [pipe.label_name(x) or "image" for x in request.image_labels()]
    files = [out / f"{i:04d}-{safe_name(name)}.png" for i, name in enumerate(names)]
    grid_file = out / "grid.png"
    taken = [file for file in (*files, grid_file) if file.exists()]
    if taken and not overwrite:
        raise UsageError(f"out: {taken[0]} exists already; choose another folder or pass --overwrite")

    count = threads or (1 if parameter_count(pipe.model) < SMALL else torch.get_num_threads())
    begin = time.monotonic()
    images = []
    with using(count), Progress(request.num_images, "sampling", "images", quiet=json) as bar:
        for step in steps:
            last_of_batch = (step.index + 1) % request.num_inference_steps == 0
            if last_of_batch:  # what is drawn is kept, whatever happens to the next batch
                for i, image in zip(step.images, step.preview(), strict=True):
                    save_png(image, files[i])
                    images.append(image)
            bar.advance(len(step.images) if last_of_batch else 0, f"step {step.index + 1} of {step.total}")
    seconds = time.monotonic() - begin
    save_png(grid(images, columns=max(request.num_images_per_label, min(8, len(images)))), grid_file)
    report = {
        "images": len(images),
        "folder": str(out),
        "grid": str(grid_file),
        "seconds": round(seconds, 3),
        "images_per_second": round(len(images) / seconds, 2),
        "seed": request.seed,
        "threads": count,
    }
    if json:
        shown = [
            {"file": str(file), "label": name, "seed": s}
            for file, name, s in zip(files, names, request.image_seeds(), strict=True)
        ]
        extra = {"request": request.model_dump(mode="json"), "model_sha256": pipe.bundle.sha256, "files": shown}
        return print_json(report | extra)
    return print_table(("sampled", ""), list(report.items()))


def safe_name(name: str) -> str:
    """A class name as part of a file name: letters, digits, - and _ of any script; at most 40."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:40] or "image"
