"""`seriatim sample`: images from a model folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seriatim.cli.output import DeviceOption, JsonFlag, print_json, print_table
from seriatim.cli.threads import ThreadsOption, threads_of
from seriatim.core.terminal import say

if TYPE_CHECKING:
    from PIL import Image

    from seriatim.pipeline import Pipeline
    from seriatim.sampling.metadata import Recorded
    from seriatim.sampling.request import SampleRequest

NEARLY = 2  # levels of 255 by which rounding in another batch, thread count or version may move a pixel


def sample(
    model: Annotated[str, typer.Argument(help="A model folder, a run, or a hub repository.")],
    label: Annotated[
        list[str] | None, typer.Option(help="A class by name or number, or none; repeat it. Default: every class.")
    ] = None,
    num_images_per_label: Annotated[int | None, typer.Option(help="Images of each class.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance; higher is more typical.")] = None,
    guidance_schedule: Annotated[
        str | None, typer.Option(help="linear, constant, interval or power-cosine, over the image.")
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None, typer.Option(help="Known shares, low and high, of the schedule interval.")
    ] = None,
    guidance_power: Annotated[
        float | None, typer.Option(help="Of the schedule power-cosine: the larger, the later.")
    ] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Steps over the image.")] = None,
    token_schedule: Annotated[str | None, typer.Option(help="cosine or linear: tokens of each step.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Tokens that each step draws at least.")] = None,
    order: Annotated[
        str | None,
        typer.Option(help="random, raster, halton, spiral, of codes confidence; or positions as drawn: 3,1,0,2"),
    ] = None,
    choice_temperature: Annotated[float | None, typer.Option(help="Noise on the order confidence.")] = None,
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
    start_timestep: Annotated[int | None, typer.Option(help="First timestep; 999 is as published.")] = None,
    guidance_mode: Annotated[str | None, typer.Option(help="Of a mixture: exact or resample.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Below 1 is sharper.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of codes, or bins: the likeliest alone.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Of codes, bins or Gaussians: the likeliest that together reach this.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same images. Default: a new one, printed.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images drawn at once.")] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", help="A PNG drawn before: repeat it, and compare the pixels.")
    ] = None,
    animate: Annotated[bool, typer.Option("--animate", help="Also write animation.gif: tokens appearing.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files and grid.png; for samples.npy of arrays.")] = Path(
        "samples"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace images of these names in --out.")] = False,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="Of the backbone: auto, float32, bfloat16.")] = "auto",
    threads: ThreadsOption = None,
    json: JsonFlag = False,
) -> None:
    """Draw images into a folder, and all of them into one picture, grid.png. What isn't given, the model decides."""
    import time

    from seriatim.core.errors import UsageError
    from seriatim.core.files import no_empty_folder, writable_folder
    from seriatim.core.progress import Progress
    from seriatim.evaluation.grid import grid, save_png
    from seriatim.pipeline import load
    from seriatim.sampling.animation import save_animation
    from seriatim.sampling.metadata import versions
    from seriatim.sampling.result import file_names, recorded, save_image
    from seriatim.sampling.samples_folder import ANIMATION, GRID, check_samples_folder
    from seriatim.training.precision import threads as using

    original = None if from_ is None else read_repeatable(from_)
    pipe = load(model, device=device, dtype=dtype)
    settings = dict(
        class_labels=label,
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
        feature_schedule=feature_schedule,
        start_timestep=start_timestep,
        guidance_mode=guidance_mode,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    if original is None:
        request = pipe.request(**settings)
    else:
        request = request_of(original[1], from_, pipe, [k for k, v in settings.items() if v is not None])
    steps = pipe.stream(request=request, batch_size=batch_size)  # checks everything before a folder is made
    if not pipe.tokenizer.pictures:
        return sample_arrays(pipe, request, out, batch_size, threads, animate=animate, overwrite=overwrite, json=json)
    names = [pipe.label_name(x) or "image" for x in request.image_labels()]
    files = [out / name for name in file_names(names)]
    grid_file, animation = out / GRID, out / ANIMATION
    if from_ is not None and any(file.resolve() == from_.resolve() for file in (*files, grid_file)):
        raise UsageError(f"out: {out} is where {from_} is, which would be replaced; choose another folder")
    say_replaced(check_samples_folder(out, [*files, grid_file, *[animation] * animate], overwrite=overwrite))
    new = not out.exists()
    out = writable_folder(out)
    count = threads_of(pipe, threads)
    begin = time.monotonic()
    made = versions(pipe.device, pipe.dtype)
    columns = max(request.num_images_per_label, min(8, request.num_images))
    images: list[Image.Image] = []
    frames: dict[int, list[Image.Image]] = {}  # of each step over the images
    bar = Progress(request.num_images, "sampling", "images", quiet=json)
    with no_empty_folder(out, new), using(count), bar:
        for step in steps:
            last_of_batch = (step.index + 1) % request.num_inference_steps == 0
            if last_of_batch:  # what is drawn is kept, whatever happens to the next batch
                for i, image in zip(step.images, step.preview(), strict=True):
                    label_name = pipe.label_name(request.image_labels()[i])
                    save_image(image, files[i], recorded(image, request, i, label_name, pipe.bundle.sha256, made))
                    images.append(image)
            if animate:
                frames.setdefault(step.index % request.num_inference_steps, []).extend(step.preview())
            bar.advance(len(step.images) if last_of_batch else 0, f"step {step.index + 1} of {step.total}")
    seconds = time.monotonic() - begin
    save_png(grid(images, columns), grid_file)
    if animate:
        side = 128 if len(images) == 1 else 64
        save_animation([grid(frames[i], columns, side=side) for i in sorted(frames)], animation, overwrite=overwrite)
    report = {
        "images": len(images),
        "folder": str(out),
        "grid": str(grid_file),
        "seconds": round(seconds, 3),
        "images_per_second": round(len(images) / seconds, 2),
        "seed": request.seed,
        "threads": count,
    }
    if animate:
        report["animation"] = str(animation)
    if original is not None:
        report["pixels"] = compared(original, images[0], made)
    if json:
        shown = [
            {"file": str(file), "label": name, "seed": s}
            for file, name, s in zip(files, names, request.image_seeds(), strict=True)
        ]
        extra = {"request": request.model_dump(mode="json"), "model_sha256": pipe.bundle.sha256, "files": shown}
        return print_json(report | extra)
    return print_table(("sampled", ""), list(report.items()))


def say_replaced(files: list[Path]) -> None:
    """Say what `--overwrite` is going to replace; each file is kept until the new one is whole."""
    if files:
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        say(f"replacing {files[0]}{more}")


def order_or_positions(text: str | None) -> str | list[int] | None:
    """A name, or positions with commas between them."""
    if text is None or not re.fullmatch(r"\s*-?[0-9]{1,18}\s*(,\s*-?[0-9]{1,18}\s*)*", text):
        return text
    return [int(position) for position in text.split(",")]


def sample_arrays(
    pipe: Pipeline,
    request: SampleRequest,
    out: Path,
    batch_size: int | None,
    threads: int | None,
    *,
    animate: bool,
    overwrite: bool,
    json: bool,
) -> None:
    """The same of what is no picture: samples.npy, one array of all, and samples.json, their request."""
    import time

    from seriatim.core.errors import UsageError
    from seriatim.core.progress import Progress
    from seriatim.sampling.samples_folder import SAMPLES, SAYS, check_samples_folder
    from seriatim.training.precision import threads as using

    if animate:
        raise UsageError("animate: this model's tokens are no pictures; leave it out")
    say_replaced(check_samples_folder(out, [out / SAMPLES, out / SAYS], overwrite=overwrite))
    count = threads_of(pipe, threads)
    begin, before = time.monotonic(), 0
    with using(count), Progress(request.num_images, "sampling", "sequences", quiet=json) as bar:

        def show(_: Pipeline, index: int, total: int, __: object) -> None:
            nonlocal before
            share = request.num_images * (index + 1) // total
            bar.advance(share - before, f"step {index + 1} of {total}")
            before = share

        result = pipe(request=request, batch_size=batch_size, callback_on_step_end=show)
    files = result.save(out, overwrite=overwrite)
    report = {
        "sequences": len(result.images),
        "shape": list(result.images.shape),
        "file": str(files[0]),
        "seconds": round(time.monotonic() - begin, 3),
        "seed": request.seed,
        "threads": count,
    }
    if json:
        extra = {"request": request.model_dump(mode="json"), "model_sha256": pipe.bundle.sha256}
        return print_json(report | extra)
    return print_table(("sampled", ""), list(report.items()))


# --- repeating ----------------------------------------------------------------------------------------------------


def read_repeatable(path: Path) -> tuple[Image.Image, Recorded]:
    """A picture and its request; refuses one that its request alone does not make."""
    from seriatim.core.errors import DataError
    from seriatim.sampling.metadata import pixels_sha256, read_recorded

    image, says = read_recorded(path)
    if says.edited:
        raise DataError(f"from: {path} was made from another picture; edit that one again with the same seed")
    if pixels_sha256(image) != says.pixels_sha256:
        raise DataError("from: the picture's pixels were changed after it was drawn; there is nothing to compare with")
    return image, says


def request_of(says: Recorded, path: Path | None, pipe: Pipeline, given: list[str]) -> SampleRequest:
    """The request that a picture carries, for the model that drew it."""
    from seriatim.core.errors import CheckpointError, UsageError
    from seriatim.sampling.labels import label_of

    if given:
        raise UsageError(f"{given[0]}: given together with --from, which repeats a picture as it was; leave it out")
    if says.model_sha256 != pipe.bundle.sha256:
        ours, theirs = pipe.bundle.sha256[:12], says.model_sha256[:12]
        raise CheckpointError(
            f"model: its weights have sha256 {ours}..., {path} was drawn by {theirs}...; name the model that drew it"
        )
    request = says.sample_request()
    if says.label in pipe.class_names:  # a number that was drawn before names in digits were told from numbers
        number = pipe.class_names.index(says.label)
        request = request.model_copy(update={"class_labels": (label_of(number, pipe.class_names),)})
    return pipe.checked(request)  # not `request`: the model's own defaults have no say


def compared(original: tuple[Image.Image, Recorded], image: Image.Image, made: dict[str, str]) -> str:
    """How the repeated picture's pixels compare; raises NumericsError where they are another picture's."""
    import numpy as np

    from seriatim.core.errors import NumericsError
    from seriatim.sampling.metadata import pixels_sha256

    before, says = original
    if pixels_sha256(image) == says.pixels_sha256:
        return "identical"
    other = [f"{key} {says.versions.get(key)} then, {value} now" for key, value in made.items()
             if says.versions.get(key) != value]  # fmt: skip
    if before.size != image.size or before.mode != image.mode:
        raise NumericsError(f"from: drawn again it is {image.size}, {image.mode}, not {before.size}, {before.mode}")
    difference = np.abs(np.asarray(before).astype(int) - np.asarray(image).astype(int))
    found = f"largest difference {difference.max()} of 255, in {(difference > 0).mean():.1%} of the values"
    if difference.max() > NEARLY:
        raise NumericsError(f"from: drawn again it differs: {found} ({'; '.join(other) or 'another batch or threads'})")
    return found
