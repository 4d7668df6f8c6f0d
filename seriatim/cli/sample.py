"""`seriatim sample` generates images with a model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seriatim.cli.output import DeviceOption, JsonFlag, print_json, print_table
from seriatim.cli.threads import ThreadsOption, threads_of
from seriatim.core.terminal import say

if TYPE_CHECKING:
    from PIL import Image

    from seriatim.pipeline.metadata import Recorded
    from seriatim.pipeline.pipeline import Pipeline
    from seriatim.pipeline.request import SampleRequest

MOST_SHOWN = 1024  # pictures in grid.png
NEARLY = 2  # a repeated pixel may differ by this much, because another batch, thread count or version rounds otherwise


def sample(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model folder, a run, RUN@latest or the like, or a hub repository.")],
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="A class by name or number, or `none` for no class. Repeat it for several. Default: every class."
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="The number of images generated at once.")] = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="A PNG made by this command, which is generated again and compared by its pixels."),
    ] = None,
    animate: Annotated[
        bool, typer.Option("--animate", help="Also write animation.gif, which shows the tokens as they appear.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="The folder for the PNG files and grid.png, or samples.npy if they are not pictures.")
    ] = Path("samples"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace earlier images of the same names in --out.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on where the same command was stopped: images that are there are kept."),
    ] = False,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="The dtype of the backbone: auto, float32 or bfloat16.")] = "auto",
    threads: ThreadsOption = None,
    json: JsonFlag = False,
) -> None:
    """Generate images into a folder, with an overview in grid.png. The model has defaults for all settings.

    Under torchrun several processes share the images of one folder.
    """
    import time

    from seriatim.core.errors import UsageError
    from seriatim.core.files import no_empty_folder, writable_folder
    from seriatim.core.images import read_png
    from seriatim.core.processes import place
    from seriatim.core.progress import Progress
    from seriatim.core.stopping import claims
    from seriatim.evaluation.grid import grid
    from seriatim.pipeline.animation import save_animation
    from seriatim.pipeline.labels import label_of, names_of
    from seriatim.pipeline.loading import load
    from seriatim.pipeline.pipeline import BATCH_TOKENS
    from seriatim.pipeline.result import file_names, recorded, save_image
    from seriatim.pipeline.samples_folder import (
        ANIMATION,
        GRID,
        check_samples_folder,
        is_damaged,
        is_grid,
        is_there,
        save_grid,
        seed_of,
    )
    from seriatim.training.precision import threads as using

    original = None if from_ is None else read_repeatable(from_)
    pipe = load(model, device=device, dtype=dtype)
    settings: dict[str, Any] = {**({} if label is None else {"class_labels": label}), **context.obj}
    shared = resume or place().size > 1  # other processes, or an earlier one, have part of the images
    if shared:
        refuse_alone(animate=animate, from_=from_, arrays=not pipe.tokenizer.pictures)
        if settings.get("seed") is None:
            settings["seed"] = seed_of(out)
    if original is None:
        if label is None and pipe.model.classes and "class_labels" not in pipe.defaults:
            settings["class_labels"] = [label_of(i, pipe.class_names) for i in range(pipe.model.classes)]
        request = pipe.request(**settings)
    else:
        request = request_of(original[1], from_, pipe, list(settings))
    pipe.stream(request=request, batch_size=batch_size)  # everything is checked before the folder is created
    if not pipe.tokenizer.pictures:
        return sample_arrays(pipe, request, out, batch_size, threads, animate=animate, overwrite=overwrite, json=json)
    names = names_of(pipe.classes_of(request), pipe.class_names)
    files = [out / name for name in file_names(names)]
    grid_file, animation = out / GRID, out / ANIMATION
    if from_ is not None and any(file.resolve() == from_.resolve() for file in (*files, grid_file)):
        raise UsageError(f"out: {out} is where {from_} is, which would be replaced; choose another folder")
    size = batch_size or max(1, BATCH_TOKENS // pipe.model.tokens)
    batches = [range(first, min(first + size, len(files))) for first in range(0, len(files), size)]
    locks = [f".{batch.start:06d}.lock" for batch in batches]

    def there(images: Iterable[int]) -> set[int]:
        return {i for i in images if is_there(files[i], request, i, pipe.bundle.sha256)} if shared else set()

    # Looked up before anything is read: what appears from now on, another process that shares the work has written.
    found = {file for file in (*files, grid_file, animation) if os.path.lexists(file)}
    kept = there(range(len(files)))
    rest = [i for i in range(len(files)) if i not in kept and files[i] in found]
    damaged = [i for i in rest if shared and is_damaged(files[i], request, i, pipe.bundle.sha256)]
    ours = [files[i] for i in rest if i not in damaged]
    ours += [*[grid_file] * (not (kept and is_grid(grid_file))), *[animation] * animate]
    ours = [file for file in ours if file in found]
    say_replaced(check_samples_folder(out, ours, overwrite=overwrite, begun=set(locks), resumed=shared))
    for i in damaged:
        say(f"mending: {files[i]} can't be read; drawing it again")
    new = not out.exists()
    out = writable_folder(out)
    count = threads_of(pipe, threads)
    begin = time.monotonic()
    shown, columns = overview(request)
    pictures: dict[int, Image.Image] = {}  # those of grid.png that were drawn here
    frames: dict[int, list[Image.Image]] = {}  # the pictures of all images at each step
    drawn = 0
    bar = Progress(request.num_images, "sampling", "images", done=len(kept), quiet=json)
    with (
        no_empty_folder(out, new),
        using(count),
        bar,
        contextlib.closing(claims(range(len(batches)), lambda number: out / locks[number])) as numbers,
    ):
        for number in numbers:
            batch = batches[number]
            if len(there(batch)) == len(batch):
                bar.skip(len(set(batch) - kept))
                continue
            at = 0  # the current step of the batch
            for step in pipe.stream(request=request.part(batch), batch_size=size):
                if step.last:  # finished images are saved at once, so that a failure in a later batch doesn't lose them
                    for i, image in zip(batch, step.preview(), strict=True):
                        says = recorded(image, request, i, names[i], pipe.bundle.sha256, pipe.versions)
                        save_image(image, files[i], says)
                        if i in shown:
                            pictures[i] = image
                    drawn += len(batch)
                if animate:
                    frames.setdefault(at, []).extend(step.preview())
                    at += 1
                done = len(set(batch) - kept) if step.last else 0
                bar.advance(done, f"batch {number + 1} of {len(batches)}, step {step.index + 1} of {step.total}")
    seconds = time.monotonic() - begin
    if place().rank == 0:
        save_grid(grid([pictures.get(i) or read_png(files[i]) for i in shown], columns), grid_file)
    if animate:
        side = 128 if len(files) == 1 else 64
        save_animation([grid(frames[i], columns, side=side) for i in sorted(frames)], animation, overwrite=overwrite)
    report = {
        "images": len(files),
        **({"drawn_here": drawn} if shared else {}),
        "folder": str(out),
        "grid": str(grid_file),
        "seconds": round(seconds, 3),
        "images_per_second": round(drawn / seconds, 2),
        "seed": request.seed,
        "threads": count,
    }
    if animate:
        report["animation"] = str(animation)
    if original is not None:
        report["pixels"] = compared(original, pictures[0], pipe.versions)
    if json:
        listed = [
            {"file": str(file), "label": name or "image", "seed": s}
            for file, name, s in zip(files, names, request.image_seeds(), strict=True)
        ]
        extra = {"request": request.model_dump(mode="json"), "model_sha256": pipe.bundle.sha256, "files": listed}
        return print_json(report | extra)
    return print_table(("sampled", ""), list(report.items()))


def overview(request: SampleRequest) -> tuple[list[int], int]:
    """The numbers of the images in grid.png, which shows at most MOST_SHOWN, and the number in a row."""
    per, labels = request.num_images_per_label, len(request.class_labels)
    if request.num_images <= MOST_SHOWN:
        return list(range(request.num_images)), max(per, min(8, request.num_images))
    kept = min(per, max(1, MOST_SHOWN // labels))  # of each label
    shown = [label * per + i for label in range(min(labels, MOST_SHOWN)) for i in range(kept)]
    return shown, min(32, max(kept, 8))


def refuse_alone(*, animate: bool, from_: Path | None, arrays: bool) -> None:
    """Raise UsageError for what one process does from beginning to end."""
    from seriatim.core.errors import UsageError

    for name, given in (("animate", animate), ("from", from_), ("model: it generates arrays, not pictures,", arrays)):
        if given:
            raise UsageError(f"{name}: can't be shared or resumed; start one process, without torchrun and --resume")


def say_replaced(files: list[Path]) -> None:
    """Report which files `--overwrite` will replace; each is kept until the new one is completely written."""
    if files:
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        say(f"replacing {files[0]}{more}")


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
    """`sample` for a model that does not generate pictures: write one array, samples.npy, and its samples.json."""
    import time

    from seriatim.core.errors import UsageError
    from seriatim.core.progress import Progress
    from seriatim.pipeline.samples_folder import SAMPLES, SAYS, check_samples_folder
    from seriatim.training.precision import threads as using

    if animate:
        raise UsageError("animate: this model generates no pictures; leave it out")
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
    """A picture and its metadata. Raises DataError if the picture can't be generated from its request alone."""
    from seriatim.core.errors import DataError
    from seriatim.pipeline.metadata import pixels_sha256, read_recorded

    image, says = read_recorded(path)
    if says.edited:
        raise DataError(f"from: {path} was edited from another picture; edit that one again with the same seed")
    if pixels_sha256(image) != says.pixels_sha256:
        raise DataError(
            f"from: the pixels of {path} were changed later, so no comparison is possible; name an original"
        )
    return image, says


def request_of(says: Recorded, path: Path | None, pipe: Pipeline, given: list[str]) -> SampleRequest:
    """The request in a picture's metadata, checked for the model that generated the picture."""
    from seriatim.core.errors import CheckpointError, UsageError
    from seriatim.pipeline.labels import label_of

    if given:
        raise UsageError(f"{given[0]}: given together with --from, which repeats a picture as it was; leave it out")
    if says.model_sha256 != pipe.bundle.sha256:
        ours, theirs = pipe.bundle.sha256[:12], says.model_sha256[:12]
        raise CheckpointError(
            f"model: its weights have sha256 {ours}..., {path} was drawn by {theirs}...; name the model that drew it"
        )
    request = says.sample_request()
    if says.label in pipe.class_names:  # the name decides: in old metadata a number may also be a class's name
        number = pipe.class_names.index(says.label)
        request = request.model_copy(update={"class_labels": (label_of(number, pipe.class_names),)})
    return pipe.request(request)  # it is complete, so the model's defaults do not apply


def compared(original: tuple[Image.Image, Recorded], image: Image.Image, made: dict[str, str]) -> str:
    """A text that compares the pixels of the repeated picture with the original's.

    Raises NumericsError if they differ by more than rounding explains.
    """
    import numpy as np

    from seriatim.core.errors import NumericsError
    from seriatim.pipeline.metadata import pixels_sha256

    before, says = original
    if pixels_sha256(image) == says.pixels_sha256:
        return "identical"
    other = [
        f"{key} {says.versions.get(key)} then, {value} now"
        for key, value in made.items()
        if says.versions.get(key) != value
    ]
    if before.size != image.size or before.mode != image.mode:
        raise NumericsError(
            f"from: the repeated picture is {image.size}, {image.mode}, not {before.size}, {before.mode}"
        )
    difference = np.abs(np.asarray(before).astype(int) - np.asarray(image).astype(int))
    found = f"largest difference {difference.max()} of 255, in {(difference > 0).mean():.1%} of the values"
    if difference.max() > NEARLY:
        raise NumericsError(
            f"from: the repeated picture differs: {found} ({'; '.join(other) or 'another batch or threads'})"
        )
    return found
