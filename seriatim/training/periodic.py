"""What a run does between two steps: figures on other images, lines of metrics, previews, checkpoints, and stopping."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from seriatim.core.errors import Stopped
from seriatim.core.progress import Progress
from seriatim.core.schedules import crossed
from seriatim.core.stopping import StopRequest
from seriatim.training import state as checkpoints
from seriatim.training.distributed import World
from seriatim.training.heap import return_heap
from seriatim.training.log import MetricsLog
from seriatim.training.optim import rate_after
from seriatim.training.state import RunState
from seriatim.training.task import Task

CURVE_SECONDS = 20.0  # curves are drawn at most so often, because a drawing takes as long as many small steps


class Periodic:
    """The work of a run between two steps. All processes do it together, and the first one writes the files."""

    def __init__(
        self, task: Task, run: RunState, out: Path, world: World, stop: StopRequest, log: MetricsLog, bar: Progress
    ) -> None:
        self.task, self.run, self.out, self.world = task, run, out, world
        self.stop, self.log, self.bar = stop, log, bar
        self.settings = task.recipe.training
        self.began = run.seen  # the images that earlier processes trained on
        self.seconds = 0.0  # the seconds of all steps since the last line of metrics, without this work
        self.waited = 0.0  # the seconds of these in which the loop waited for images
        self.ended = time.monotonic()  # the time when this work was last done
        self.drawn = self.ended  # the time when curves were last drawn, or training began

    def work(self, *, stopping: bool = False) -> None:
        """Do everything that has become due since this was last done.

        If the run is `stopping`, or is asked to stop while figures are computed, none of it is done: a checkpoint is
        saved and Stopped is raised, and the resumed run does the work before its first step.
        """
        self.seconds += time.monotonic() - self.ended
        task, run = self.task, self.run
        before, last = run.reported, run.seen >= task.total
        figures = None if stopping else task.judged(before, run, self.stop, last=last)
        if figures is None:
            raise self.stopped()
        if run.seen - run.since >= self.settings.log_images or last or figures:
            self.write_line(figures, last=last)
        run.reported = run.seen
        task.look(before, run, self.stop, last=last)
        if self.world.size == 1 and self.stop.requested and not last:  # several processes agree at the next step
            raise self.stopped()
        if crossed(before, run.seen, self.settings.save_images) or (last and self.settings.save_images > 0):
            self.save()
            if not last and time.monotonic() - self.drawn >= CURVE_SECONDS:  # the engine draws them at the end
                self.world.first(lambda: task.curves(self.log))
                self.drawn = time.monotonic()
        self.ended = time.monotonic()

    def write_line(self, figures: Mapping[str, float], *, last: bool) -> None:
        """Write a line of metrics: means since the last line, and the figures."""
        run, seconds = self.run, max(1e-9, self.seconds)
        means = {name: value / run.steps_since for name, value in run.sums.items()}  # empty if all were skipped
        trained_on = run.seen - max(run.since, self.began)
        speed = {"images_per_second": trained_on / seconds, "loader_share": self.waited / seconds}
        self.log.write(
            images=run.seen,
            **means,
            **self.task.tested(run, last=last),
            **figures,
            learning_rate=rate_after(self.settings, run.seen, self.task.total),
            **({} if run.gradient_norm is None else {"gradient_norm": run.gradient_norm}),
            **({"skipped": run.skipped} if run.skipped else {}),
            **(speed if trained_on > 0 else {}),
        )
        self.bar.note = ", ".join(f"{name} {means[name]:.3f}" for name in ("loss", "accuracy") if name in means)
        run.loss = self.task.standard(means, run.loss)
        run.since, run.steps_since, run.sums = run.seen, 0, {}
        self.seconds, self.waited = 0.0, 0.0
        return_heap()

    def save(self) -> Path:
        """Save a checkpoint, delete those that are kept no longer, and return its path."""
        tensors = checkpoints.tensors_of(self.task.parts, keep=self.world.main)

        def write() -> Path:
            folder = self.out / "checkpoints"
            path = checkpoints.save(folder, self.task.parts, self.run, self.task.config(self.run), tensors)
            checkpoints.prune(folder, self.settings.keep, path)
            return path

        return self.world.first(write)

    def stopped(self) -> Stopped:
        """Save a checkpoint, and return the error that all processes raise."""
        path = self.save()
        error = Stopped(
            f"{self.stop.requested or 'signal'}: stopped after {self.run.seen} images, saved {path}; go on with "
            "--resume"
        )
        self.world.told(error)
        return error
