"""`seriatim edit`: repaint a part of a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seriatim.cli.output import DeviceOption, JsonFlag, print_json, print_table
from seriatim.cli.sample import order_or_positions, say_replaced
from seriatim.cli.threads import ThreadsOption, drawing_with


def edit(
    model: Annotated[str, typer.Argument(help="A model folder, a run, or a hub repository.")],
    image: Annotated[Path, typer.Argument(help="The picture, of the size that the model draws.")],
    mask: Annotated[Path, typer.Option(help="A picture of the same size: white is repainted.")],
    label: Annotated[
        list[str] | None, typer.Option(help="The class to paint, by name or number; repeat it. Default: none.")
    ] = None,
    num_images_per_label: Annotated[int | None, typer.Option(help="Variations of each.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance; higher is more typical.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Steps over the image.")] = None,
    num_diffusion_steps: Annotated[int | None, typer.Option(help="Steps inside a diffusion head.")] = None,
    num_diffusion_steps_last: Annotated[
        int | None, typer.Option(help="Where they end, falling as the image gets known.")
    ] = None,
    solver: Annotated[
        str | None, typer.Option(help="Diffusion: ddpm, sde-dpm++, ddim or dpm++; flow: euler or heun.")
    ] = None,
    feature_schedule: Annotated[
        str | None, typer.Option(help="Of a nested head, over its parts: constant, linear or cosine.")
    ] = None,
    guidance_mode: Annotated[str | None, typer.Option(help="Of a mixture: exact or resample.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Below 1 is sharper.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of codes, or bins: the likeliest alone.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Of codes, bins or Gaussians: the likeliest that together reach this.")
    ] = None,
    guidance_schedule: Annotated[str | None, typer.Option(help="Of the known share; see docs/sampling.md.")] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None, typer.Option(help="Known shares, of the schedule interval.")
    ] = None,
    guidance_power: Annotated[float | None, typer.Option(help="Of the schedule power-cosine.")] = None,
    token_schedule: Annotated[str | None, typer.Option(help="cosine or linear: tokens of each step.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="What a step draws at least.")] = None,
    order: Annotated[
        str | None, typer.Option(help="random, raster, halton, spiral, of codes confidence; or positions: 3,1,0,2.")
    ] = None,
    choice_temperature: Annotated[float | None, typer.Option(help="Noise on the order confidence.")] = None,
    start_timestep: Annotated[int | None, typer.Option(help="First timestep; 999 is as published.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images drawn at once.")] = None,
    threads: ThreadsOption = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same images. Default: a new one, printed.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files and grid.png.")] = Path("edited"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace images of these names in --out.")] = False,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="Of the backbone: auto, float32, bfloat16.")] = "auto",
    json: JsonFlag = False,
) -> None:
    """Inpaint, outpaint inside the frame, change the class of a region: black pixels of the mask stay as they are."""
    from seriatim.core.errors import UsageError
    from seriatim.core.files import writable_folder
    from seriatim.core.flatten import BLACK
    from seriatim.core.images import BadImage, read_image
    from seriatim.evaluation.grid import grid, save_png
    from seriatim.pipeline import load
    from seriatim.sampling.result import file_names
    from seriatim.sampling.samples_folder import GRID, check_samples_folder

    pipe = load(model, device=device, dtype=dtype)
    try:
        argument, file = "image", image
        picture = read_image(image, pipe.tokenizer.channels, pipe.bundle.background)
        argument, file = "mask", mask
        white = read_image(mask, 1, BLACK)
    except BadImage as error:
        raise UsageError(f"{argument}: {file} can't be read: {error}") from error
    asked = pipe.request(class_labels=label or [None], num_images_per_label=num_images_per_label)
    names = file_names([pipe.label_name(x) for x in asked.image_labels()])
    say_replaced(check_samples_folder(out, [*(out / name for name in names), out / GRID], overwrite=overwrite))
    with drawing_with(pipe, threads):
        result = pipe.edit(
            picture,
            mask=white,
            class_labels=label or [None],
            batch_size=batch_size,
            num_images_per_label=num_images_per_label,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            guidance_interval=guidance_interval,
            guidance_power=guidance_power,
            num_inference_steps=num_inference_steps,
            token_schedule=token_schedule,
            min_tokens=min_tokens,
            order=order_or_positions(order),
            choice_temperature=choice_temperature,
            num_diffusion_steps=num_diffusion_steps,
            num_diffusion_steps_last=num_diffusion_steps_last,
            solver=solver,
            start_timestep=start_timestep,
            feature_schedule=feature_schedule,
            guidance_mode=guidance_mode,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
    out = writable_folder(out)
    files = result.save(out, overwrite=overwrite)
    shown = [picture, white.convert(picture.mode), *result.images]
    save_png(grid(shown, min(8, len(shown)), side=64), out / GRID)
    report = {"images": len(files), "folder": str(out), "grid": str(out / GRID), "seed": result.request.seed}
    return print_json(report) if json else print_table(("edited", ""), list(report.items()))
