"""Send the metrics of a run to TensorBoard, Weights & Biases, trackio, or a tracker of your own.

A tracker has the three methods of `Tracker`. `TRACKERS["mine"] = Mine` registers a class that is built without
arguments, and `training.trackers: [mine]` uses it. The libraries are imported only if they are used.
"""

from __future__ import annotations

import importlib
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from seriatim.core.errors import ConfigError, nearest, one_line
from seriatim.core.files import write_json
from seriatim.core.ownership import json_of
from seriatim.core.terminal import say
from seriatim.training.config import Common

PROJECT = "seriatim"  # the project of runs, unless WANDB_PROJECT or TRACKIO_PROJECT names another
ID = re.compile("[0-9a-f]{8}")


@dataclass(frozen=True)
class RunConfig:
    """What a tracker is told about a run."""

    name: str
    folder: Path  # the run folder; files of a tracker belong in `folder / "trackers"`
    recipe: Mapping[str, Any]  # with every default filled in
    seen: int  # the images seen so far; 0 for a new run
    logged: int  # the images of the last line that was logged before; it may exceed `seen` if the run was killed

    @property
    def id(self) -> str:
        """A random name for the run that stays the same when it is resumed."""
        known = json_of(self.record).get("id")
        if not isinstance(known, str) or not ID.fullmatch(known):
            known = secrets.token_hex(4)
            write_json(self.record, {**json_of(self.record), "id": known})
        return known

    @property
    def record(self) -> Path:
        return self.folder / "trackers" / "run.json"

    def most_logged(self) -> int:
        """`logged`, or more if an earlier process that was killed logged more; kept for the processes to come.

        The log itself can't tell: each resumed run begins with its lines up to the checkpoint.
        """
        known = json_of(self.record).get("logged")
        most = max(self.logged, known if isinstance(known, int) else 0)
        write_json(self.record, {**json_of(self.record), "logged": most})
        return most


class Tracker(Protocol):
    """A place to which metrics are sent."""

    def start(self, config: RunConfig) -> None:
        """Begin a run, or go on with the same run when training is resumed."""

    def log(self, images: int, values: Mapping[str, float]) -> None:
        """Record the metrics after so many images."""

    def close(self) -> None:
        """Finish sending. It is called once, also if training fails."""


class TensorBoard:
    """Event files in `RUN/tensorboard`."""

    def __init__(self) -> None:
        self.writer_of: Callable[..., Any] = module("torch.utils.tensorboard", '"seriatim[log]"').SummaryWriter

    def start(self, config: RunConfig) -> None:
        # Points after `seen` images come from a process that was killed, and TensorBoard drops them.
        self.writer = self.writer_of(str(config.folder / "tensorboard"), purge_step=config.seen + 1)

    def log(self, images: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, images)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Remote(ABC):
    """A library with `init`, `log` and `finish`, which can't take back points that were logged before."""

    name: str

    def __init__(self) -> None:
        self.library = module(self.name, self.name)

    def start(self, config: RunConfig) -> None:
        self.logged = config.most_logged()
        project = os.environ.get(f"{self.name.upper()}_PROJECT") or PROJECT
        self.library.init(project=project, config=dict(config.recipe), resume="allow", **self.of(config))

    @abstractmethod
    def of(self, config: RunConfig) -> dict[str, Any]:
        """The arguments of `init` that identify the run."""

    def log(self, images: int, values: Mapping[str, float]) -> None:
        if images > self.logged:  # a resumed run computes the same points again
            self.library.log(dict(values), step=images)

    def close(self) -> None:
        self.library.finish()


class WandB(Remote):
    """Weights & Biases; its own files lie in `RUN/trackers/wandb`."""

    name = "wandb"

    def of(self, config: RunConfig) -> dict[str, Any]:
        return {"id": config.id, "name": config.name, "dir": str(config.folder / "trackers")}


class Trackio(Remote):
    """trackio, which knows a run by its name."""

    name = "trackio"

    def of(self, config: RunConfig) -> dict[str, Any]:
        return {"name": f"{config.name}-{config.id}"}


TRACKERS: dict[str, Callable[[], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def module(name: str, package: str) -> Any:
    """An imported library. Raises ConfigError, which says how to install it, if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"training.trackers: {name.split('.')[-1]} is not installed; pip install {package}"
        ) from error


def build_trackers(settings: Common) -> dict[str, Tracker]:
    """The trackers that a recipe names, not started yet.

    Raises ConfigError for an unknown name or a missing library.
    """
    made: dict[str, Tracker] = {}
    for name in [*settings.trackers, *(["tensorboard"] if settings.tensorboard else [])]:
        if name not in TRACKERS:
            raise ConfigError(f"training.trackers: {name!r} is not known{nearest(name, TRACKERS)}")
        if name not in made:
            made[name] = TRACKERS[name]()
    return made


class Tracking:
    """The trackers of a run. One that fails while training goes on is dropped, and one line says so."""

    def __init__(self) -> None:
        self.trackers: dict[str, Tracker] = {}

    def start(self, trackers: Mapping[str, Tracker], config: RunConfig) -> None:
        """Start the trackers. Raises ConfigError, which names the one that can't start."""
        for name, tracker in trackers.items():
            try:
                tracker.start(config)
            except Exception as error:  # a library or a class of the user's own may fail in any way
                self.close()
                raise ConfigError(
                    f"training.trackers: {name} can't start ({one_line(error)[:300]}); mend it, or leave it out"
                ) from error
            self.trackers[name] = tracker

    def log(self, images: int, values: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log(images, values))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self.trackers = {}

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                do(tracker)
            except Exception as error:
                del self.trackers[name]
                say(f"training.trackers: {name} failed ({one_line(error)[:300]}); training goes on without it")
