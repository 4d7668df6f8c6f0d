"""Read a file of jobs: one request a line, in JSON, with the settings of a call as defaults."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seriatim.core.errors import SeriatimError, UsageError, nearest, shown
from seriatim.core.progress import Progress
from seriatim.core.reading import Unreadable, parse_json, read_or_raise, read_text
from seriatim.pipeline.labels import label_of
from seriatim.pipeline.request import MOST_IMAGES, request_fields
from seriatim.pipeline.sampling_plan import Job

if TYPE_CHECKING:
    from seriatim.pipeline.pipeline import Pipeline

MOST_BYTES = 1 << 26  # of a file of jobs
LONGEST_NAME = 200  # characters of the name of a job
NAME, LABEL = "name", "label"


def usual_settings(pipe: Pipeline, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a sampling into a folder: where nobody names classes, it draws each class of the model."""
    settings = dict(settings)
    if "class_labels" not in settings and "class_labels" not in pipe.defaults and pipe.model.classes:
        settings["class_labels"] = [label_of(i, pipe.class_names) for i in range(pipe.model.classes)]
    return settings


def read_jobs(
    path: str | os.PathLike[str], pipe: Pipeline, defaults: Mapping[str, Any], *, quiet: bool = False
) -> list[Job]:
    """The jobs in a file; blank lines are left out. The settings in `defaults` hold where a line gives no others.

    Raises UsageError that names the file and the line if something in it is wrong.
    """
    file = Path(path)
    text = read_or_raise(lambda: read_text(file, MOST_BYTES), f"jobs: {file}", UsageError, "give a file of JSON lines")
    lines = text.removeprefix("\ufeff").split("\n")
    return jobs_of(
        ((f"jobs: {file}, line {i}", str(i), line) for i, line in enumerate(lines, start=1) if line.strip()),
        pipe,
        defaults,
        total=len(lines),
        quiet=quiet,
    )


def given_jobs(
    jobs: Iterable[Mapping[str, Any]], pipe: Pipeline, defaults: Mapping[str, Any], *, quiet: bool = False
) -> list[Job]:
    """The jobs in mappings, which have the keys of a line of a file."""
    jobs = list(jobs)
    return jobs_of(((f"jobs[{i}]", str(i), job) for i, job in enumerate(jobs)), pipe, defaults, len(jobs), quiet=quiet)


def jobs_of(
    given: Iterable[tuple[str, str, Any]], pipe: Pipeline, defaults: Mapping[str, Any], total: int, *, quiet: bool
) -> list[Job]:
    """The jobs, each given by the beginning of an error message, the name it has without one, and its content."""
    jobs: list[Job] = []
    images = 0
    with Progress(total, "reading", "jobs", quiet=quiet) as bar:
        for where, name, content in given:
            try:
                values = parse_json(content, dict) if isinstance(content, str) else checked_mapping(content)
                job = job_of(values, name, len(jobs), pipe, defaults)
            except Unreadable as error:
                raise UsageError(f'{where} {error}; give an object such as {{"label": 3}}') from error
            except SeriatimError as error:
                raise type(error)(f"{where}: {error}") from error
            images += job.request.num_images
            if images > MOST_IMAGES:
                raise UsageError(f"{where}: {images:,} images in all; ask for at most {MOST_IMAGES:,} in one folder")
            jobs.append(job)
            bar.advance()
    if not jobs:
        raise UsageError('jobs: there is none; give one a line, such as {"label": 3}')
    return jobs


def checked_mapping(content: Any) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise UsageError(f"{shown(content)} is not allowed; give a mapping")
    return dict(content)


def job_of(values: dict[str, Any], name: str, number: int, pipe: Pipeline, defaults: Mapping[str, Any]) -> Job:
    """Job `number`. Its seed, where neither it nor the defaults have one, is its number: jobs draw other images."""
    own = {field.name for field in dataclasses.fields(pipe.model.head.Options)}
    allowed = {NAME, LABEL, *request_fields(), *own}
    for key in values:
        if key not in allowed:
            raise UsageError(f"unknown key {shown(key)}{nearest(str(key), sorted(allowed))}")
    name = values.pop(NAME, name)
    if not isinstance(name, str) or not 1 <= len(name) <= LONGEST_NAME:
        raise UsageError(f"name: {shown(name)} is not allowed; give a text of 1 to {LONGEST_NAME} characters")
    if LABEL in values:
        if "class_labels" in values:
            raise UsageError("label: given together with class_labels; leave one out")
        values["class_labels"] = [values.pop(LABEL)]
        if isinstance(values["class_labels"][0], (list, tuple, dict)):
            raise UsageError("label: is one class; give several as class_labels")
    elif "class_labels" in values and values["class_labels"] is None:
        values["class_labels"] = [None]
    settings = usual_settings(pipe, {"seed": number, **defaults, **values})
    if settings["seed"] is None:
        settings["seed"] = number
    return Job(pipe.request(**settings), name)
