"""Generate images into a folder, so that the work can be stopped, resumed and shared by several processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from PIL import Image

from seriatim.core.errors import UsageError
from seriatim.core.files import no_empty_folder, writable_folder
from seriatim.core.processes import place
from seriatim.core.progress import Progress
from seriatim.core.stopping import claims
from seriatim.core.terminal import say
from seriatim.pipeline.arguments import SettingsArgs
from seriatim.pipeline.jobs import given_jobs, read_jobs, usual_settings
from seriatim.pipeline.metadata import Recorded, pixels_sha256, said_beside
from seriatim.pipeline.picture_files import check_format, check_holds, save_picture
from seriatim.pipeline.picture_names import PATTERN, check_pattern
from seriatim.pipeline.pipeline import BATCH_TOKENS, Pipeline
from seriatim.pipeline.samples_folder import (
    check_samples_folder,
    is_begun,
    is_damaged,
    is_there,
    refuse_others,
    seed_of,
    what_differs,
)
from seriatim.pipeline.sampling_plan import Job, Plan

if TYPE_CHECKING:
    from seriatim.sampling.step import Step


@dataclass(frozen=True)
class Saving:
    """How pictures are written: their format, its quality (jpg and webp only), and the pattern of their names."""

    format: str = "png"
    quality: int | None = None
    name_pattern: str = PATTERN

    def check(self, *, jobs: bool) -> None:
        """Raise UsageError if something is not allowed; `jobs` tells whether there is a file of jobs."""
        check_format(self.format, self.quality)
        check_pattern(self.name_pattern, jobs=jobs)


class FolderSampling:
    """The images of a plan, some of which may be in the folder already.

    Making one checks everything and writes nothing. `shared` means that other processes, or an earlier one, have part
    of the images. With `resume` the folder must not hold other samples.
    """

    def __init__(
        self,
        pipe: Pipeline,
        plan: Plan,
        folder: Path,
        saving: Saving,
        *,
        shared: bool,
        resume: bool,
        quiet: bool = False,
    ) -> None:
        self.pipe, self.plan, self.folder, self.saving = pipe, plan, folder, saving
        self.sha256, self.shared, self.resume = pipe.bundle.sha256, shared, resume
        self.files = [folder / name for name in plan.names]
        self.locks = [f".{batch.start:06d}.lock" for batch in plan.batches]
        self.array = saving.format == "npy"
        for first in plan.firsts[:-1]:
            check_holds(saving.format, str(plan.alone(first)))
        # Looked up before anything is read: what appears from now on, another process that shares the work has written.
        written = [*self.files, *(said_beside(file) for file in self.files if self.array)]
        self.found = {file for file in written if os.path.lexists(file)}
        self.kept: set[int] = set()
        if shared:
            with Progress(len(plan), "looking at", "images", quiet=quiet) as bar:
                for i in range(len(plan)):
                    if self.files[i] in self.found and self.there([i]):
                        self.kept.add(i)
                    bar.advance()
        rest = [i for i in range(len(plan)) if i not in self.kept]
        self.damaged = [i for i in rest if shared and self.files[i] in self.found and self.of(i, is_damaged)]
        mended = {*self.damaged, *(i for i in rest if shared and self.array and self.of(i, is_begun))}
        self.begun = {said_beside(self.files[i]).name for i in mended} if self.array else set()
        beyond = [file for i in rest if i not in mended for file in self.files_of(i)]
        self.replaced = [file for file in beyond if file in self.found]
        self.index = {file: i for i, file in enumerate(self.files)} if shared else {}

    def of(self, i: int, asked: Callable[[Path, Mapping[str, Any], str], bool]) -> bool:
        return asked(self.files[i], self.plan.alone(i), self.sha256)

    def files_of(self, i: int) -> list[Path]:
        """The files of image i."""
        return [self.files[i], said_beside(self.files[i])] if self.array else [self.files[i]]

    def there(self, images: Iterable[int]) -> set[int]:
        """Those of the images that are whole in the folder."""
        return {i for i in images if self.of(i, is_there)} if self.shared else set()

    def check_folder(self, also: Sequence[Path], *, overwrite: bool) -> list[Path]:
        """The files that will be replaced, with those of `also` that exist; raises UsageError if that is refused."""
        if self.resume:
            refuse_others(self.folder, self.plan.names, self.plan.alone, self.sha256)
        begun = {*self.locks, *self.begun}
        files = [*self.replaced, *also]
        return check_samples_folder(
            self.folder, files, overwrite=overwrite, begun=begun, why=self.why if self.shared else None
        )

    def why(self, file: Path) -> str:
        """Why an existing file is not the one that is wanted."""
        i = self.index.get(file)
        return "it is another file" if i is None else what_differs(file, self.plan.alone(i), self.sha256)

    def draw(
        self,
        bar: Progress,
        on_image: Callable[[int, Image.Image], object] = lambda _number, _image: None,
        on_step: Callable[[Step], object] = lambda _step: None,
    ) -> int:
        """Draw what is missing and save each batch at once; return the number of images that were written.

        A batch is drawn as a whole, because what is drawn together decides how numbers are rounded. Of a batch that is
        there in part only the missing images are written. `on_image` is called for each that is written.
        """
        written = 0
        plan = self.plan
        for i in self.damaged:
            say(f"mending: {self.files[i]} can't be read; drawing it again")
        new = not self.folder.exists()
        folder = writable_folder(self.folder)
        with (
            no_empty_folder(folder, new),
            contextlib.closing(claims(range(len(plan.batches)), lambda n: folder / self.locks[n])) as numbers,
        ):
            for number in numbers:
                batch = plan.batches[number]
                new_here = set(batch) - self.kept
                missing = new_here - self.there(new_here)
                if not missing:
                    bar.skip(len(new_here))
                    continue
                for step in self.pipe.stream(request=plan.request(batch), batch_size=len(batch)):
                    if step.last:
                        for i, image in zip(batch, step.preview(), strict=True):
                            if i in missing:
                                self.save(i, image)
                                on_image(i, image)
                        written += len(missing)
                    on_step(step)
                    note = f"batch {number + 1} of {len(plan.batches)}, step {step.index + 1} of {step.total}"
                    bar.advance(len(new_here) if step.last else 0, note)
        return written

    def save(self, i: int, image: Image.Image) -> None:
        says = Recorded(
            request=self.plan.alone(i),
            label=self.plan.labels[i],
            model_sha256=self.sha256,
            pixels_sha256=pixels_sha256(image),
            versions=self.pipe.versions,
        )
        save_picture(image, self.files[i], says, quality=self.saving.quality)


def is_shared(resume: bool) -> bool:
    """Whether other processes, or an earlier one, have part of the images."""
    return resume or place().size > 1


def jobs_for(
    pipe: Pipeline,
    folder: Path,
    settings: Mapping[str, Any],
    jobs: str | os.PathLike[str] | Iterable[Mapping[str, Any]] | None,
    *,
    shared: bool,
    quiet: bool = False,
) -> list[Job]:
    """What is asked for: the jobs, with `settings` as defaults, or else one request of these settings.

    A request without a seed draws another one each time; where it is shared it goes on with that of the folder.
    """
    if isinstance(jobs, (str, os.PathLike)):
        return read_jobs(jobs, pipe, settings, quiet=quiet)
    if jobs is not None:
        return given_jobs(jobs, pipe, settings, quiet=quiet)
    settings = usual_settings(pipe, settings)
    if shared and settings.get("seed") is None:
        settings["seed"] = seed_of(folder)
    return [Job(pipe.request(**settings))]


def plan_for(pipe: Pipeline, jobs: Sequence[Job], saving: Saving, batch_size: int | None) -> Plan:
    """The plan of these jobs. Raises UsageError if the names or the batch size are not allowed."""
    pipe.stream(request=jobs[0].request, batch_size=batch_size)  # checks the batch size; nothing is drawn yet
    size = batch_size or max(1, BATCH_TOKENS // pipe.model.tokens)
    return Plan(pipe, jobs, size, saving.name_pattern, saving.format)


def sample_to_folder(
    pipe: Pipeline,
    folder: str | os.PathLike[str],
    class_labels: Any = None,
    *,
    jobs: str | os.PathLike[str] | Iterable[Mapping[str, Any]] | None = None,
    format: str = "png",
    quality: int | None = None,
    name_pattern: str = PATTERN,
    batch_size: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **settings: Unpack[SettingsArgs],
) -> list[Path]:
    """Generate pictures into a folder, as `seriatim sample` does, and return their files in the order of the images.

    A picture is written when its batch is finished, with the request that repeats it. With `resume`, and where several
    processes were started by torchrun, pictures that are whole in the folder are kept, and what is missing is drawn;
    the files are those of one process that was never stopped, to the bit. Without it, a file that exists is refused, or
    replaced with `overwrite` if it is a sample.

    `jobs` is a file of JSON lines, or an iterable of mappings: each is a request of its own, for which the settings of
    this call are defaults. `format` is png, jpg, webp or npy; `quality` (1 to 100) is for jpg and webp. `name_pattern`
    may have the fields index, label, seed, job and number. Without classes, each class of the model is drawn.

    Raises UsageError, before anything is drawn, if an argument is not allowed, if the folder holds something else than
    samples, or if `resume` finds pictures of another request.
    """
    if not pipe.tokenizer.pictures:
        raise UsageError("pipe: this model generates arrays, not pictures; call it, and save() the result")
    saving, out, shared = Saving(format, quality, name_pattern), Path(folder), is_shared(resume)
    saving.check(jobs=jobs is not None)
    given = {name: value for name, value in settings.items() if value is not None}
    if class_labels is not None:
        given["class_labels"] = class_labels
    asked = jobs_for(pipe, out, given, jobs, shared=shared, quiet=not progress)
    plan = plan_for(pipe, asked, saving, batch_size)
    work = FolderSampling(pipe, plan, out, saving, shared=shared, resume=resume, quiet=not progress)
    work.check_folder([], overwrite=overwrite)
    with Progress(len(plan), "sampling", "images", done=len(work.kept), quiet=not progress) as bar:
        work.draw(bar)
    return work.files
