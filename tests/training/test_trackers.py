"""Trackers: each point once, also after a crash; what is missing or fails is one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from seriatim.core.errors import ConfigError
from seriatim.training import trackers
from seriatim.training.config import Recipe, read_recipe
from seriatim.training.loop import train
from seriatim.training.trackers import TRACKERS, RunConfig

TINY = [
    "model.width=16", "model.depth=1", "model.heads=2", "model.head.width=16", "model.head.depth=1",
    "training.images=96", "training.batch_size=16", "training.log_images=16", "training.save_images=32",
    "training.dtype=float32", "training.threads=1",
]  # fmt: skip
AFTER = 48  # images after which the first process is killed, 16 more than its last checkpoint has


def tiny(*overrides: str) -> Recipe:
    return read_recipe("mar-digits", [*TINY, *overrides])


class Memory:
    """A tracker that keeps everything, and may fail."""

    def __init__(self, fail: Callable[[int], None] = lambda _: None) -> None:
        self.config: RunConfig | None = None
        self.points: list[tuple[int, dict[str, float]]] = []
        self.closed, self.fail = 0, fail

    def start(self, config: RunConfig) -> None:
        self.config = config

    def log(self, images: int, values: Mapping[str, float]) -> None:
        self.fail(images)
        self.points.append((images, dict(values)))

    def close(self) -> None:
        self.closed += 1


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def kill(images: int) -> None:
    if images == AFTER:
        raise Killed


def killed_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict[str, Any]]:
    """The lines of metrics of a run that was killed and resumed."""
    monkeypatch.setitem(TRACKERS, "kill", lambda: Memory(kill))
    with pytest.raises(Killed):
        train(tiny(f"training.trackers=[{name}, kill]"), tmp_path / "run", quiet=True)
    train(tiny(f"training.trackers=[{name}]"), tmp_path / "run", resume=True, quiet=True)
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_tracker_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Memory()
    monkeypatch.setitem(TRACKERS, "mine", lambda: mine)
    recipe = tiny("training.trackers=[mine]")
    train(recipe, tmp_path / "run", quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [{"images": images, **values} for images, values in mine.points] == rows and len(rows) == 6
    assert mine.config is not None and mine.config.name == "mar-digits" and mine.closed == 1
    assert (mine.config.folder, mine.config.seen, mine.config.logged) == (tmp_path / "run", 0, 0)
    assert mine.config.recipe["training"]["batch_size"] == 16
    assert len(mine.config.id) == 8 and mine.config.id == mine.config.id


def test_tensorboard_shows_no_point_twice_after_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = killed_and_resumed(tmp_path, monkeypatch, "tensorboard")
    files = str(tmp_path / "run" / "tensorboard")
    for name in ("loss", "learning_rate", "gradient_norm"):
        points = [(point.step, point.value) for point in accumulator.EventAccumulator(files).Reload().Scalars(name)]
        assert [step for step, _ in points] == [row["images"] for row in rows] == [16, 32, 48, 64, 80, 96]
        assert [value for _, value in points] == pytest.approx([row[name] for row in rows], rel=1e-6)
    doubled = accumulator.EventAccumulator(files, purge_orphaned_data=False).Reload().Scalars("loss")
    assert [point.step for point in doubled].count(AFTER) == 2, "the first process did log it"


def library(name: str, begun: list[Any], points: list[Any], ended: list[Any]) -> SimpleNamespace:
    """A double of a library, which takes the arguments of ours that the real one has, under the same names."""

    def wandb(*, project: str, config: dict[str, Any], resume: str, id: str, name: str, dir: str) -> None:
        begun.append({"project": project, "config": config, "resume": resume, "id": id, "name": name, "dir": dir})

    def trackio(project: str, *, name: str, config: dict[str, Any], resume: str) -> None:
        begun.append({"project": project, "config": config, "resume": resume, "name": name})

    def log(values: dict[str, float], step: int | None = None) -> None:
        points.append((step, values))

    init = wandb if name == "wandb" else trackio
    return SimpleNamespace(init=init, log=log, finish=lambda: ended.append(True))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_that_is_killed_twice_shows_no_point_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The second process ends before it has logged all that the first one did, and its log is shorter."""
    points: list[tuple[int, dict[str, float]]] = []
    monkeypatch.setitem(sys.modules, name, library(name, [], points, []))
    for last, resume in ((80, False), (32, True)):

        def killed(images: int, last: int = last) -> None:
            if images == last:
                raise Killed

        monkeypatch.setitem(TRACKERS, "kill", partial(Memory, killed))
        recipe = tiny(f"training.trackers=[{name}, kill]", "training.save_images=0")
        with pytest.raises(Killed):
            train(recipe, tmp_path / "run", resume=resume, quiet=True)
    train(tiny(f"training.trackers=[{name}]", "training.save_images=0"), tmp_path / "run", resume=True, quiet=True)
    assert [images for images, _ in points] == [16, 32, 48, 64, 80, 96]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_is_the_same_run_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    begun: list[dict[str, Any]] = []
    points: list[tuple[int, dict[str, float]]] = []
    ended: list[bool] = []
    monkeypatch.setitem(sys.modules, name, library(name, begun, points, ended))
    monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    rows = killed_and_resumed(tmp_path, monkeypatch, name)
    assert [{"images": step, **values} for step, values in points] == [
        {**row, **{key: points[i][1][key] for key in ("images_per_second", "loader_share")}}
        for i, row in enumerate(rows)
    ], "each point once"
    assert begun[0] == {**begun[1], "config": begun[0]["config"]} and len(ended) == 2
    identity = json.loads((tmp_path / "run" / "trackers" / "run.json").read_text())["id"]
    assert begun[0]["project"] == "seriatim" and begun[0]["resume"] == "allow"
    assert begun[0]["config"]["training"]["batch_size"] == 16
    if name == "wandb":
        assert (begun[0]["id"], begun[0]["name"]) == (identity, "mar-digits")
        assert begun[0]["dir"] == str(tmp_path / "run" / "trackers") and Path(begun[0]["dir"]).is_dir()
    else:
        assert begun[0]["name"] == f"mar-digits-{identity}"
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "flowers")
    train(tiny(f"training.trackers=[{name}]"), tmp_path / "run", overwrite=True, quiet=True)
    assert begun[2]["project"] == "flowers"
    assert identity not in str(begun[2]), "another run"


@pytest.mark.parametrize(
    ("name", "lacking", "remedy"),
    [
        ("tensorboard", "torch.utils.tensorboard", 'pip install "seriatim[log]"'),
        ("wandb", "wandb", "pip install wandb"),
        ("trackio", "trackio", "pip install trackio"),
    ],
)
def test_a_missing_library_is_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, lacking: str, remedy: str
) -> None:
    monkeypatch.setitem(sys.modules, lacking, None)
    with pytest.raises(ConfigError) as caught:
        train(tiny(f"training.trackers=[{name}]"), tmp_path / "run", quiet=True)
    assert str(caught.value) == f"training.trackers: {name} is not installed; {remedy}"
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^training\.trackers: 'tensorbord' is not known; did you mean 'tensorboard'"
    ):
        train(tiny("training.trackers=[tensorbord]"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "tensorboard", Memory)
    for settings in (["training.tensorboard=true"], ["training.tensorboard=true", "training.trackers=[tensorboard]"]):
        assert list(trackers.build_trackers(tiny(*settings).training)) == ["tensorboard"]
    assert trackers.build_trackers(tiny().training) == {}


def test_a_tracker_that_fails_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(images: int) -> None:
        if images == 32:
            raise OSError("the network\nis gone")

    bad, good = Memory(fail), Memory()
    monkeypatch.setitem(TRACKERS, "bad", lambda: bad)
    monkeypatch.setitem(TRACKERS, "good", lambda: good)
    assert train(tiny("training.trackers=[bad, good]"), tmp_path / "run", quiet=True).images == 96
    said = "training.trackers: bad failed (the network is gone); training goes on without it\n"
    assert capfd.readouterr().err == said
    assert len(good.points) == 6 and len(bad.points) == 1 and (good.closed, bad.closed) == (1, 0)


def test_a_tracker_that_can_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(Memory):
        def start(self, _: RunConfig) -> None:
            raise RuntimeError("no key")

    good = Memory()
    monkeypatch.setitem(TRACKERS, "bad", Closed)
    monkeypatch.setitem(TRACKERS, "good", lambda: good)
    with pytest.raises(
        ConfigError, match=r"^training\.trackers: bad can't start \(no key\); mend it, or leave it out$"
    ):
        train(tiny("training.trackers=[good, bad]"), tmp_path / "run", quiet=True)
    assert good.closed == 1


@pytest.mark.parametrize("content", ["", "{", '{"id": 3}', '{"id": "../../x"}', "[]"])
def test_a_damaged_id_is_made_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers" / "run.json").write_text(content)
    config = RunConfig("a", tmp_path, {}, 0, 0)
    assert trackers.ID.fullmatch(config.id) and config.id == RunConfig("b", tmp_path, {}, 5, 5).id
