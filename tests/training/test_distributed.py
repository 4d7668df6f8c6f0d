"""Several processes train as one: same images, same draws, same gradients, same weights; and they end together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from processes import command, together
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from seriatim import load
from seriatim.checkpoints.unfinished import all_checkpoints
from seriatim.core.keys import Keys
from seriatim.core.processes import place
from seriatim.core.stopping import only_trainer
from seriatim.data.loader import Batch
from seriatim.models.base import Loss
from seriatim.training import engine, muon
from seriatim.training import wrapping as blocks
from seriatim.training.config import Recipe, read_recipe
from seriatim.training.distributed import joined, whole
from seriatim.training.loop import GeneratorTask
from seriatim.training.state import RunState, Trainables, tensors_of
from seriatim.training.updates import gradients

BATCH = 7  # of 29 images, of 15 or of 8 the last batch has one, so that all but one process have none
SMALL = ["model.width=16", "model.depth=1", "model.heads=2", f"training.batch_size={BATCH}", "training.threads=1",
         "training.dtype=float32", "training.images=29"]  # fmt: skip
KINDS = {
    "masked": ["mar-digits", "model.head.width=16", "model.head.depth=1"],
    "causal": ["gpt-digits", "model.dropout=0"],
    "nested": ["mar-digits", "model.head={kind: nested, split: {kind: features}, model: {kind: causal, width: 16, "
               "depth: 1, heads: 2, head: {kind: mixture, components: 2, width: 16, depth: 1}}}"],
}  # fmt: skip


class InFloat64(GeneratorTask):
    """Computes everything in float64, so that only rounding of float64 depends on how a batch is split."""

    def __init__(self, recipe: Recipe, out: Path, where: torch.device) -> None:
        super().__init__(recipe, out, where, quiet=True)
        self.model.double()
        self.parts.average.double()

    def tokens(self, images: Tensor, keys: Keys) -> Tensor:
        found = super().tokens(images, keys)
        return found.double() if found.is_floating_point() else found


def recipe_of(kind: str, *more: str) -> Recipe:
    name, *settings = KINDS[kind]
    return read_recipe(name, [*SMALL, *settings, *more])


def trained(recipe: Recipe, out: Path, cls: Any = InFloat64) -> tuple[dict[str, Tensor], list[float], list[int]]:
    """The weights and averages after all steps, the losses, and the images that this process saw."""
    with joined("cpu") as world, ExitStack() as stack:
        task = cls(recipe, out, world.device)
        stack.enter_context(task.settings_in_force())
        task.begin(None)
        task.spread(world)
        losses: list[float] = []
        seen: list[int] = []
        for batch in task.batches(RunState()):
            seen += [] if batch.spare else batch.index.tolist()
            found = gradients(
                task.parts.trained, task.losses(batch, torch.float32), task.nominal(batch), recipe.training.clip, world
            )
            losses.append(found.means["loss"])
            task.parts.update()
        assert len(losses) == math.ceil(recipe.training.images / BATCH)
        tensors = tensors_of(task.parts)
    return {f"{file}/{name}": t for file in ("model", "average") for name, t in tensors[file].items()}, losses, seen


@pytest.mark.fresh_process
@pytest.mark.parametrize("kind", KINDS)
def test_one_process_is_two_is_three(kind: str, tmp_path: Path) -> None:
    """After five steps, replicated and sharded, with one pass a step and with two."""
    (alone,) = together(1, lambda: trained(recipe_of(kind), tmp_path), tmp_path / "1")
    for size, more in ((2, []), (3, ["training.accumulate=2"]), (2, ["training.shard=true", "training.micro_batch=2"])):
        changed = recipe_of(kind, *more)
        found = together(size, partial(trained, changed, tmp_path), tmp_path / f"{size}{more}")
        for weights, losses, _ in found:
            assert losses == pytest.approx(alone[1], rel=1e-9)
            for name, tensor in weights.items():
                scale = float(alone[0][name].abs().max()) + 1e-12
                assert float((tensor - alone[0][name]).abs().max()) <= 1e-9 * scale, (name, size, more)
        assert sorted(i for _, _, seen in found for i in seen) == sorted(alone[2])


def first_gradients(recipe: Recipe, out: Path) -> dict[str, Tensor]:
    """The gradients of the first step in float32, whole and not clipped."""
    with joined("cpu") as world:
        task = GeneratorTask(recipe, out, world.device, quiet=True)
        task.begin(None)  # type: ignore[arg-type]
        task.spread(world)
        batch = next(task.batches(RunState()))
        gradients(task.parts.trained, task.losses(batch, torch.float32), task.nominal(batch), 1e9, world)
        return {name: whole(p.grad) for name, p in task.parts.model.named_parameters() if p.grad is not None}


@pytest.mark.fresh_process
def test_gradients_in_float32_differ_by_rounding_alone(tmp_path: Path) -> None:
    for kind in KINDS:
        (alone,) = together(1, partial(first_gradients, recipe_of(kind), tmp_path), tmp_path / f"{kind}1")
        for size, more in ((2, []), (3, []), (2, ["training.shard=true"])):
            found = together(
                size, partial(first_gradients, recipe_of(kind, *more), tmp_path), tmp_path / f"{kind}{size}{more}"
            )
            for one in found:
                assert one.keys() == alone.keys() and len(alone) > 10
                for name, tensor in one.items():
                    assert float((tensor - alone[name]).norm()) <= 1e-5 * float(alone[name].norm()) + 1e-9, (
                        name,
                        kind,
                        size,
                        more,
                    )


class Muon(InFloat64):
    """Trains in float64 with Muon, which computes in bfloat16 where the processor has products in it."""

    def trainables(self, average: AveragedModel) -> Trainables:
        muon.slow_in_bfloat16 = Mock(return_value=True)  # this process ends soon
        return super().trainables(average)


class Compiled(InFloat64):
    """Hands its blocks to torch.compile, which runs them as they are, since a compiler would take long."""

    @contextmanager
    def settings_in_force(self) -> Iterator[None]:
        with blocks.wrapped_blocks(self.model, compiled=True, recompute=True, backend="eager"):
            yield


OPTIONS: dict[str, tuple[type[InFloat64], list[str]]] = {
    "muon": (Muon, ["training.optimiser=muon", "training.images=15"]),
    "recomputed": (InFloat64, ["training.checkpoint_activations=true", "training.buckets=4", "training.images=15"]),
    "compiled": (Compiled, ["training.images=8"]),  # every step has a length of its own, which is compiled anew
}


@pytest.mark.fresh_process
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of dynamo, which looks at inputs that are no leaves
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_training_are_the_same_with_two_processes(name: str, tmp_path: Path) -> None:
    """Replicated and sharded. Muon needs whole matrices, of which each process holds a part where they are sharded."""
    cls, options = OPTIONS[name]
    (alone,) = together(1, partial(trained, recipe_of("masked", *options), tmp_path, cls), tmp_path / "1")
    for more in ([], ["training.shard=true"]):
        both = together(2, partial(trained, recipe_of("masked", *options, *more), tmp_path, cls), tmp_path / f"2{more}")
        for weights, losses, _ in both:
            assert losses == pytest.approx(alone[1], rel=1e-9)
            for key, tensor in weights.items():
                scale = float(alone[0][key].abs().max()) + 1e-12
                assert float((tensor - alone[0][key]).abs().max()) <= 1e-9 * scale, (key, more)


# --- whole runs -------------------------------------------------------------------------------------------------------

TRAIN = ["train", "mar-digits", *SMALL, *KINDS["masked"][1:], "training.images=140", "training.log_images=35",
         "training.save_images=35", "training.keep=9", "--out"]  # fmt: skip


def content(folder: Path) -> dict[str, Tensor]:
    return {f"{name}/{key}": tensor
            for name in ("model", "average", "optimiser")
            for key, tensor in load_file(folder / f"{name}.safetensors").items()}  # fmt: skip


def stopped_at(images: int, out: Path, *more: str) -> tuple[int, list[str]]:
    """Begin or resume the run; its last process is asked to stop in the step after which `images` images were seen."""
    true, seen = engine.gradients, [images - 28]  # this starts at the images that the first step will have seen

    def counted(*arguments: Any, **options: Any) -> Any:
        if place().rank == place().size - 1 and seen[0] == images:
            options["stop"] = True
        seen[0] += 7
        return true(*arguments, **options)

    engine.gradients = counted  # this process ends soon
    return command(*TRAIN, str(out), *more)


@pytest.mark.fresh_process
def test_a_run_goes_on_with_any_number_of_processes(tmp_path: Path) -> None:
    """Two processes, then one, then three, one of them stopped by a signal that it alone got: as one alone."""
    assert command(*TRAIN, str(tmp_path / "alone"))[0] == 0
    run = tmp_path / "run"
    for size, images, more in ((2, 35, ["--resume=auto"]), (1, 70, ["--resume"]), (3, 105, ["--resume=auto"])):
        found = together(size, partial(stopped_at, images, run, *more), tmp_path / str(size))
        assert [code for code, _ in found] == [143] * size
        said = [line for _, lines in found for line in lines]
        assert len([line for line in said if f"stopped after {images} images" in line]) == 1, said
        begun = len([line for line in said if f"there is no run in {run} yet" in line])
        assert begun == (images == 35), said
    more = ["--resume", "training.shard=true"]
    last = together(2, lambda: command(*TRAIN, str(run), *more), tmp_path / "last")
    assert [code for code, _ in last] == [0, 0], last
    for one, other in ((content(tmp_path / name / "checkpoints" / "000000000140") for name in ("alone", "run")),):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert float((tensor - other[name]).norm()) <= 1e-4 * float(tensor.norm()) + 1e-7, name
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("alone", "run")]  # fmt: skip
    assert [row["images"] for row in rows[1]] == [35, 70, 105, 140]
    for a, b in zip(*rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert load(run).model.tokens == 16


@pytest.mark.fresh_process
def test_a_number_that_is_not_finite_on_one_process_stops_all(tmp_path: Path) -> None:
    def work() -> tuple[int, list[str]]:
        true = GeneratorTask.tokens

        def damaged(self: GeneratorTask, images: Tensor, keys: Keys) -> Tensor:
            found = true(self, images, keys)
            calls.append(1)
            return found * float("nan") if place().rank == 1 and len(calls) > 6 else found

        calls: list[int] = []
        GeneratorTask.tokens = damaged  # type: ignore[method-assign]
        return command(*TRAIN, str(tmp_path / "run"))

    found = together(2, work, tmp_path / "found")
    assert [code for code, _ in found] == [5, 5]
    said = [line for _, lines in found for line in lines if "not finite" in line]
    assert len(said) == 1 and "nothing was updated" in said[0]
    assert [path.name for path in all_checkpoints(tmp_path / "run" / "checkpoints")] == ["000000000035"]


@pytest.mark.fresh_process
def test_a_batch_that_is_not_finite_on_one_process_is_skipped_by_all(tmp_path: Path) -> None:
    """The first run is of one process, which skips the same batch; the weights are the same but for rounding."""

    def work(out: Path, *more: str) -> tuple[int, list[str]]:
        true = GeneratorTask.loss

        def damaged(self: GeneratorTask, batch: Batch, part: slice, dtype: torch.dtype) -> Loss:
            loss = true(self, batch, part, dtype)
            bad = batch.whole.start == 35 and place().rank == place().size - 1
            return Loss(loss.sum * float("nan"), loss.count, loss.parts) if bad else loss

        GeneratorTask.loss = damaged  # type: ignore[method-assign]
        return command(*TRAIN, str(out), "training.on_nan=skip", *more)

    for name, size, more in (("alone", 1, []), ("run", 2, []), ("shard", 2, ["training.shard=true"])):
        found = together(size, partial(work, tmp_path / name, *more), tmp_path / "found" / name)
        said = [line for _, lines in found for line in lines if "skipped a batch" in line]
        assert [code for code, _ in found] == [0] * size and len(said) == 1, found
        assert "the loss is not finite (nan) after 35 images" in said[0]
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [row.get("skipped", 0) for row in rows] == [0, 1, 1, 1]
    one, *others = (content(tmp_path / name / "checkpoints" / "000000000140") for name in ("alone", "run", "shard"))
    for other in others:
        for name, tensor in one.items():
            assert float((tensor - other[name]).norm()) <= 1e-4 * float(tensor.norm()) + 1e-7, name


@pytest.mark.fresh_process
def test_a_run_is_judged_alike_by_any_number_of_processes(tmp_path: Path) -> None:
    judged = ["data.validation=0.2", "training.images=56", "training.save_images=28", "training.evaluate_images=80",
              "training.evaluate_features=pixels", "sampling.num_inference_steps=2",
              "sampling.num_diffusion_steps=2"]  # fmt: skip
    lines = {}
    for name, size, more in (("alone", 1, []), ("run", 2, []), ("shard", 2, ["training.shard=true"])):
        run = tmp_path / name
        work = partial(command, *TRAIN, str(run), *judged, *more)
        found = together(size, work, tmp_path / "found" / name)
        assert [code for code, _ in found] == [0] * size, found
        lines[name] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["images"] for line in lines[name]] == [28, 56]
        states = [json.loads((path / "state.json").read_text()) for path in all_checkpoints(run / "checkpoints")]
        assert [state["validation_loss"] for state in states] == [line["validation_loss"] for line in lines[name]]
    for name in ("run", "shard"):
        for one, other in zip(lines["alone"], lines[name], strict=True):
            for figure, close in (("validation_loss", 1e-4), ("FD[pixels]", 1e-2)):
                assert other[figure] == pytest.approx(one[figure], rel=close), (name, figure)


@pytest.mark.fresh_process
def test_two_launchers_in_one_folder(tmp_path: Path) -> None:
    """The second one ends with one line, and leaves the first one alone."""
    run = tmp_path / "run"
    run.mkdir()
    with only_trainer(run):
        found = together(2, lambda: command(*TRAIN, str(run)), tmp_path / "found")
    assert [code for code, _ in found] == [2, 2]
    assert len([line for _, lines in found for line in lines]) == 1, found


@pytest.mark.fresh_process
def test_what_the_first_process_refuses_all_refuse_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    found = together(3, lambda: command(*TRAIN, str(tmp_path / "run")), tmp_path / "found")
    assert [code for code, _ in found] == [2, 2, 2] and len([line for _, lines in found for line in lines]) == 1
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("setting", ["WORLD_SIZE=2", "RANK=1", "WORLD_SIZE=two", "LOCAL_RANK=3"])
def test_an_environment_that_says_nonsense_is_one_line(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*setting.split("="))
    code, lines = command(*TRAIN, str(tmp_path / "run"))
    assert code == 2 and len(lines) == 1 and setting.split("=")[0] in lines[0] and "torchrun" in lines[0]
    assert not (tmp_path / "run").exists()
