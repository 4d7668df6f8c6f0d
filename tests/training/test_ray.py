"""Ray Train starts the processes of a training; its run is that of one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from seriatim.core.errors import ResourceError, UsageError
from seriatim.training.config import read_recipe
from seriatim.training.loop import train as train_here
from seriatim.training.ray import train

RECIPE = ["model.width=16", "model.depth=1", "model.heads=2", "model.head.width=16", "model.head.depth=1",
          "training.batch_size=8", "training.images=80", "training.log_images=40", "training.save_images=40",
          "training.threads=1", "training.dtype=float32"]  # fmt: skip


def test_bad_arguments_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe("mar-digits", RECIPE)
    with monkeypatch.context() as patched:
        patched.setitem(__import__("sys").modules, "ray.train", None)
        with pytest.raises(ResourceError, match=r'pip install "seriatim\[ray\]"'):
            train(recipe, tmp_path / "run", workers=2)
    pytest.importorskip("ray", reason="needs Ray")
    with pytest.raises(UsageError, match="workers: 0 is not allowed"):
        train(recipe, tmp_path / "run", workers=0)
    (tmp_path / "thesis").write_text("mine")
    with pytest.raises(UsageError, match="thesis"):
        train(recipe, tmp_path, workers=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_workers_of_a_local_cluster_train_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="needs Ray")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")
    recipe = read_recipe("mar-digits", RECIPE)
    alone = train_here(recipe, tmp_path / "alone", quiet=True)
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=True)
    try:
        from ray.train import RunConfig

        config = RunConfig(storage_path=str(tmp_path / "ray"))
        done = train(recipe, tmp_path / "run", workers=2, run_config=config)
        assert (done.images, done.folder) == (80, tmp_path / "run")
        assert done.loss == pytest.approx(alone.loss, rel=1e-4)
        with pytest.raises(UsageError, match="run"):
            train(recipe, tmp_path / "run", workers=2, run_config=config)
        longer = read_recipe("mar-digits", [*RECIPE, "training.images=120"])
        assert train(longer, tmp_path / "run", workers=2, resume=True, run_config=config).images == 120
    finally:
        ray.shutdown()
    ours, theirs = (load_file(tmp_path / name / "checkpoints" / "000000000080" / "model.safetensors")
                    for name in ("alone", "run"))  # fmt: skip
    for name, tensor in ours.items():
        assert float((tensor - theirs[name]).norm()) <= 1e-4 * float(tensor.norm()) + 1e-7, name
