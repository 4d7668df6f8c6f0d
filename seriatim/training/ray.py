"""The same training on a Ray cluster: Ray Train starts the processes, as torchrun does elsewhere.

Needs the extra `ray`: pip install "seriatim[ray]". `out` must be on a file system that all machines share.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seriatim.core.errors import ResourceError, UsageError, one_line
from seriatim.core.plugins import load_plugin, plugin_files
from seriatim.training.config import Recipe
from seriatim.training.engine import TrainingResult
from seriatim.training.loop import train as train_here
from seriatim.training.run_folder import RECIPE, check_out, is_run


def train(
    recipe: Recipe,
    out: Path | str,
    *,
    workers: int,
    gpus: bool = False,
    resume: bool = False,
    max_failures: int = 0,
    run_config: Any = None,
) -> TrainingResult:
    """Train a recipe into the folder `out` with Ray Train, by `workers` processes, each with a GPU if `gpus`.

    The folder and the weights are those of `seriatim.training.loop.train`. Ray starts all processes again after at
    most `max_failures` failures, and they go on from the newest checkpoint. `run_config`, a `ray.train.RunConfig`, says
    instead what Ray does after failures and where it keeps its own files.

    Raises UsageError as `train` does, and ResourceError if Ray is not installed or a process fails.
    """
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise ResourceError('Ray Train is not installed; pip install "seriatim[ray]"') from error
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise UsageError(f"workers: {workers!r} is not allowed; give the number of processes, at least 1")
    out = Path(out).absolute()
    check_out(out, resume=resume, overwrite=False)
    trainer = TorchTrainer(
        work,
        train_loop_config={"recipe": recipe, "out": str(out), "plugins": plugin_files()},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus),
        run_config=run_config or RunConfig(failure_config=FailureConfig(max_failures=max_failures)),
    )
    try:
        found = trainer.fit().metrics or {}
    except Exception as error:  # Ray has an exception of its own for each stage that can fail
        again = "; go on with resume=True" if is_run(out) else ""
        raise ResourceError(f"Ray Train: {one_line(error)[:300]}{again}") from error
    return TrainingResult(**{**found, "folder": out})


def work(config: dict[str, Any]) -> None:
    """What each process does. A run that processes before it have begun is resumed."""
    import ray.train
    from ray.train.torch import get_device

    for file in config["plugins"]:  # on file systems that all machines share, as `out` is
        load_plugin(file)
    done = train_here(config["recipe"], config["out"], device=str(get_device()), resume="auto", quiet=True)
    report = {**asdict(done), "folder": str(done.folder)}
    with tempfile.TemporaryDirectory() as folder:
        kept = None  # Ray keeps a report only if a process gives a checkpoint with it; weights stay in `out`
        if ray.train.get_context().get_world_rank() == 0:
            shutil.copy(done.folder / RECIPE, folder)
            kept = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(report, checkpoint=kept)
