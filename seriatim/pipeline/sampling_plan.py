"""Which images a folder of samples gets: those of one request, or of several jobs one after the other.

An image is known by its number in the folder. Images are drawn in batches of fixed numbers, so that a sampling that
goes on later, or that several processes share, draws the same batches and so the same bits. A batch holds images of
several jobs where their settings are equal.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from seriatim.pipeline.labels import names_of
from seriatim.pipeline.metadata import alone
from seriatim.pipeline.picture_names import Picture, names_of_pictures
from seriatim.pipeline.request import SampleRequest

if TYPE_CHECKING:
    from seriatim.pipeline.pipeline import Pipeline


class Job(NamedTuple):
    """A request, and the name of the job it belongs to; the name is empty for a request that is alone."""

    request: SampleRequest
    name: str = ""


class Plan:
    """The images of jobs: their labels, names and batches."""

    def __init__(self, pipe: Pipeline, jobs: Sequence[Job], batch_size: int, pattern: str, suffix: str) -> None:
        """Raises UsageError if the pattern doesn't give each image a name of its own."""
        self.jobs = list(jobs)
        self.firsts = [0, *accumulate(job.request.num_images for job in jobs)]  # of each job, and the number of images
        self.labels = [name for job in jobs for name in names_of(pipe.classes_of(job.request), pipe.class_names)]
        self.names = names_of_pictures(self.pictures(), pattern, suffix)
        self.batches = [
            range(first, min(first + batch_size, run.stop)) for run in self.runs() for first in run[::batch_size]
        ]

    def __len__(self) -> int:
        return self.firsts[-1]

    def pictures(self) -> list[Picture]:
        """What a name pattern may name of each image."""
        found = []
        for first, job in zip(self.firsts, self.jobs, strict=False):
            request, each = job.request, job.request.num_images_per_label
            for i in range(request.num_images):
                seed = request.seed if request.seeds is None else request.seeds[i]
                label = self.labels[first + i] or "image"
                found.append(Picture(first + i, label, seed, job.name, i % each))
        return found

    def runs(self) -> list[range]:
        """The numbers of images in a row that may be drawn together, because all their settings are equal."""
        starts = [0]
        for place, (before, job) in enumerate(pairwise(self.jobs), start=1):
            own_orders = isinstance(job.request.order, tuple) and isinstance(job.request.order[0], tuple)
            if own_orders or settings_of(before.request) != settings_of(job.request):
                starts.append(self.firsts[place])
        return [range(first, end) for first, end in pairwise([*starts, len(self)])]

    def job_of(self, i: int) -> int:
        """The number of the job of image i."""
        return bisect_right(self.firsts, i) - 1

    def alone(self, i: int) -> dict[str, Any]:
        """A request for image i alone, as plain data."""
        job = self.job_of(i)
        return alone(self.jobs[job].request, i - self.firsts[job])

    def request(self, batch: range) -> SampleRequest:
        """The request that draws the images of a batch."""
        parts = []
        at = batch.start
        while at < batch.stop:
            job = self.job_of(at)
            end = min(batch.stop, self.firsts[job + 1])
            parts.append(self.jobs[job].request.part(range(at - self.firsts[job], end - self.firsts[job])))
            at = end
        if len(parts) == 1:
            return parts[0]
        labels = tuple(label for part in parts for label in part.class_labels)
        seeds = tuple(seed for part in parts for seed in part.image_seeds())
        return parts[0].model_copy(update={"class_labels": labels, "seeds": seeds})


def settings_of(request: SampleRequest) -> SampleRequest:
    """The request without what is of each image: its label and its seed."""
    return request.model_copy(update={"class_labels": (None,), "num_images_per_label": 1, "seed": 0, "seeds": None})
