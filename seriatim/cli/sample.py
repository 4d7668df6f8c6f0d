"""`seriatim sample` generates images with a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seriatim.cli.output import DeviceOption, JsonFlag, print_json, print_table
from seriatim.cli.repeating import compared, read_repeatable, request_of
from seriatim.cli.threads import ThreadsOption, threads_of
from seriatim.core.terminal import say

if TYPE_CHECKING:
    from PIL import Image

    from seriatim.pipeline.folder_sampling import FolderSampling
    from seriatim.pipeline.pipeline import Pipeline
    from seriatim.pipeline.request import SampleRequest
    from seriatim.pipeline.sampling_plan import Plan
    from seriatim.sampling.step import Step

MOST_SHOWN = 1024  # pictures in grid.png


def sample(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model folder, a run, RUN@latest or the like, or a hub repository.")],
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="A class by name or number, or `none` for no class. Repeat it for several. Default: every class."
        ),
    ] = None,
    jobs: Annotated[
        Path | None,
        typer.Option(
            help="A file with one request a line, in JSON: label or class_labels, a name, and any setting. Options of "
            "this command hold for the lines that have none of their own."
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="The number of images generated at once.")] = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="A file made by this command, which is generated again and compared by pixels."),
    ] = None,
    animate: Annotated[
        bool, typer.Option("--animate", help="Also write animation.gif, which shows the tokens as they appear.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="The folder for the pictures and grid.png, or samples.npy if they are not pictures.")
    ] = Path("samples"),
    format_: Annotated[
        str, typer.Option("--format", help="The format of the pictures: png, jpg, webp or npy.")
    ] = "png",
    quality: Annotated[
        int | None, typer.Option(help="The quality of jpg and webp, 1 to 100. Default: 90.", show_default=False)
    ] = None,
    name_pattern: Annotated[
        str | None,
        typer.Option(
            help="The names of the files, such as {index:05d}-{label}-{seed}. Fields: index, label, seed, job (its "
            "name), number (within its label). Default: {index:04d}-{label}.",
            show_default=False,
        ),
    ] = None,
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
    from seriatim.core.processes import place
    from seriatim.core.progress import Progress
    from seriatim.evaluation.grid import grid
    from seriatim.pipeline.animation import save_animation
    from seriatim.pipeline.folder_sampling import FolderSampling, Saving, is_shared, jobs_for, plan_for
    from seriatim.pipeline.loading import load
    from seriatim.pipeline.metadata import read_recorded
    from seriatim.pipeline.picture_files import LOSSY
    from seriatim.pipeline.picture_names import PATTERN
    from seriatim.pipeline.samples_folder import ANIMATION, GRID, is_grid, save_grid
    from seriatim.pipeline.sampling_plan import Job
    from seriatim.training.precision import threads as using

    saving = Saving(format_, quality, PATTERN if name_pattern is None else name_pattern)
    saving.check(jobs=jobs is not None)
    refuse_with_jobs(jobs, animate=animate, from_=from_)
    original = None if from_ is None else read_repeatable(from_)
    pipe = load(model, device=device, dtype=dtype)
    settings: dict[str, Any] = {**({} if label is None else {"class_labels": label}), **context.obj}
    shared = is_shared(resume)  # other processes, or an earlier one, have part of the images
    if shared:
        refuse_alone(animate=animate, from_=from_, arrays=not pipe.tokenizer.pictures)
    if original is None:
        asked = jobs_for(pipe, out, settings, jobs, shared=shared, quiet=json)
    else:
        asked = [Job(request_of(original[1], from_, pipe, list(settings)))]
    request = asked[0].request
    plan = plan_for(pipe, asked, saving, batch_size)  # everything is checked before the folder is created
    if not pipe.tokenizer.pictures:
        refuse_for_arrays(animate=animate, jobs=jobs, format_=format_, name_pattern=name_pattern)
        return sample_arrays(pipe, request, out, batch_size, threads, overwrite=overwrite, json=json)
    grid_file, animation = out / GRID, out / ANIMATION
    if from_ is not None and any((out / name).resolve() == from_.resolve() for name in (*plan.names, GRID)):
        raise UsageError(f"out: {out} is where {from_} is, which would be replaced; choose another folder")
    also = [file for file in (grid_file, *[animation] * animate) if os.path.lexists(file)]
    work = FolderSampling(pipe, plan, out, saving, shared=shared, resume=resume, quiet=json)
    ours = [grid_file] if work.kept and is_grid(grid_file) else []
    say_replaced(work.check_folder([file for file in also if file not in ours], overwrite=overwrite))
    count = threads_of(pipe, threads)
    begin = time.monotonic()
    shown, columns = overview(plan)
    set_shown = set(shown)
    pictures: dict[int, Image.Image] = {}  # those of grid.png that were drawn here
    frames: dict[int, list[Image.Image]] = {}  # the pictures of all images at each step

    def keep(i: int, image: Image.Image) -> None:
        # Of lossy files the grid shows what is in them, whether they were drawn now or earlier.
        if i in set_shown and (format_ not in LOSSY or original is not None):
            pictures[i] = image

    def look(step: Step) -> None:
        if animate:
            frames.setdefault(step.index, []).extend(step.preview())

    with using(count), Progress(len(plan), "sampling", "images", done=len(work.kept), quiet=json) as bar:
        drawn = work.draw(bar, keep, look)
    seconds = time.monotonic() - begin
    if place().rank == 0:
        save_grid(grid([pictures.get(i) or read_recorded(work.files[i])[0] for i in shown], columns), grid_file)
    if animate:
        side = 128 if len(plan) == 1 else 64
        save_animation([grid(frames[i], columns, side=side) for i in sorted(frames)], animation, overwrite=overwrite)
    report = {
        "images": len(plan),
        **({"jobs": len(asked)} if jobs is not None else {}),
        **({"drawn_here": drawn} if shared else {}),
        "folder": str(out),
        "grid": str(grid_file),
        "seconds": round(seconds, 3),
        "images_per_second": round(drawn / seconds, 2),
        **({"seed": request.seed} if jobs is None else {}),
        "threads": count,
    }
    if animate:
        report["animation"] = str(animation)
    if original is not None:
        report["pixels"] = compared(original, pictures[0], pipe.versions)
    if json:
        return print_json(report | {"model_sha256": pipe.bundle.sha256} | listed(work, with_jobs=jobs is not None))
    return print_table(("sampled", ""), list(report.items()))


def listed(work: FolderSampling, *, with_jobs: bool) -> dict[str, Any]:
    """What `--json` tells of the request, or of the jobs, and of each file."""
    plan = work.plan
    seeds = [seed for job in plan.jobs for seed in job.request.image_seeds()]
    files = [
        {"file": str(file), "label": label or "image", "seed": seed}
        for file, label, seed in zip(work.files, plan.labels, seeds, strict=True)
    ]
    if not with_jobs:
        return {"request": plan.jobs[0].request.model_dump(mode="json"), "files": files}
    return {"files": [each | {"job": plan.jobs[plan.job_of(i)].name} for i, each in enumerate(files)]}


def refuse_with_jobs(jobs: Path | None, *, animate: bool, from_: Path | None) -> None:
    """Raise UsageError for what is of one request."""
    from seriatim.core.errors import UsageError

    for name, given in (("animate", animate), ("from", from_)):
        if jobs is not None and given:
            raise UsageError(f"{name}: given together with --jobs; it is for one request; leave one of them out")


def refuse_for_arrays(*, animate: bool, jobs: Path | None, format_: str, name_pattern: str | None) -> None:
    """Raise UsageError for what a model that generates no pictures can't do."""
    from seriatim.core.errors import UsageError

    given = {"animate": animate, "jobs": jobs, "name_pattern": name_pattern, "format": format_ not in ("png", "npy")}
    for name, value in given.items():
        if value:
            raise UsageError(f"{name}: this model generates no pictures but one samples.npy; leave it out")


def overview(plan: Plan) -> tuple[list[int], int]:
    """The numbers of the images in grid.png, which shows at most MOST_SHOWN, and the number in a row."""
    request = plan.jobs[0].request
    per, labels = request.num_images_per_label, len(request.class_labels)
    if len(plan.jobs) > 1:
        return list(range(min(len(plan), MOST_SHOWN))), max(1, min(8 if len(plan) <= 64 else 32, len(plan)))
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
    overwrite: bool,
    json: bool,
) -> None:
    """`sample` for a model that does not generate pictures: write one array, samples.npy, and its samples.json."""
    import time

    from seriatim.core.progress import Progress
    from seriatim.pipeline.samples_folder import SAMPLES, SAYS, check_samples_folder
    from seriatim.training.precision import threads as using

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
