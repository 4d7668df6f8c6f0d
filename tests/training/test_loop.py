"""The training loop: what it leaves, that it learns, and that it stops before harm."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import read_picture

import seriatim
from seriatim.core.errors import NumericsError, UsageError
from seriatim.data.base import Digits, Order
from seriatim.models.base import Loss
from seriatim.models.masked_model import MaskedModel
from seriatim.training.config import Recipe, read_recipe
from seriatim.training.log import accuracy_curve, loss_curve
from seriatim.training.loop import train
from seriatim.training.optim import averaged
from seriatim.training.precision import fastest

TINY = [
    "model.width=32", "model.depth=1", "model.heads=2", "model.head.width=32", "model.head.depth=1",
    "training.images=640", "training.log_images=128", "training.dtype=float32", "training.warmup_images=64",
    "training.learning_rate=0.005", "training.schedule=constant", "training.threads=1",
]  # fmt: skip


def tiny(*overrides: str) -> Recipe:
    return read_recipe("mar-digits", [*TINY, *overrides])


def test_curves_do_not_warn_on_a_slow_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib warns where its search for a free corner takes over a second."""
    import matplotlib.legend

    clock = itertools.count(step=2.0)
    monkeypatch.setattr(matplotlib.legend, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    rows = [{"images": i, "loss": 1 / i, "loss_mse": 0.5 / i, "accuracy": 0.5, "test_accuracy": 0.4} for i in (1, 2, 3)]
    assert loss_curve(rows, tmp_path / "loss.png").exists()
    assert accuracy_curve(rows, tmp_path / "accuracy.png").exists()


@pytest.mark.curves
def test_a_run_folder(tmp_path: Path) -> None:
    recipe = tiny("training.images=3200", "training.log_images=640")
    result = train(recipe, tmp_path / "run", quiet=True)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"recipe.yaml", "data.json", "environment.json", "metrics.jsonl", "training.png", "model", ".lock"}
    assert read_recipe(str(tmp_path / "run" / "recipe.yaml")) == recipe
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == [640, 1280, 1920, 2560, 3200]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"], "it learns"
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss_mse"] + row["loss_vb"], rel=1e-4)
        assert row["images_per_second"] > 0 and row["gradient_norm"] > 0
    assert read_picture(tmp_path / "run" / "training.png").size[0] > 300
    assert (result.images, result.dtype, result.loss) == (3200, "float32", rows[-1]["loss"])
    pipe = seriatim.load(tmp_path / "run", device="cpu")
    assert pipe.class_names == [str(d) for d in range(10)] and pipe.defaults["guidance_scale"] == 2.0
    assert pipe(class_labels=["7"], num_inference_steps=2, num_diffusion_steps=3, seed=0).labels == ["7"]
    assert pipe.bundle.provenance["images"] == 3200
    assert pipe.bundle.provenance["data"] == {"count": 1437, "fingerprint": Digits().fingerprint()}


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_recipe_gives_the_same_weights(tmp_path: Path, threads: int) -> None:
    """Bitwise, two threads included: no gradient is added up in an order that threads decide."""
    states: list[dict[str, torch.Tensor]] = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(states))  # what the caller did before must not matter
        train(
            tiny(
                "training.images=384",
                "model.width=64",
                "model.dropout=0.1",
                f"seed={seed}",
                f"training.threads={threads}",
            ),
            tmp_path / name,
            quiet=True,
        )
        states.append(seriatim.load(tmp_path / name, device="cpu").model.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["conditioner.no_class"], states[2]["conditioner.no_class"])


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    train(tiny("training.images=64"), tmp_path, quiet=True)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(UsageError, match="holds a run already"):
        train(tiny("training.images=64"), tmp_path, quiet=True)
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """At step 7: the weights are those after step 6, and the message names the batch."""
    true_loss, calls = MaskedModel.forward, [0]
    kept: dict[str, Any] = {}

    def poisoned(self: MaskedModel, *arguments: object) -> Loss:
        calls[0] += 1
        loss = true_loss(self, *arguments)  # type: ignore[arg-type]
        if calls[0] == 7:
            kept.update(model=self, weights={k: v.clone() for k, v in self.state_dict().items()})
            if what == "loss":
                return Loss(loss.sum * float("nan"), loss.count, loss.parts)
            self.conditioner.get_parameter("no_class").register_hook(lambda g: g * float("nan"))
        return loss

    monkeypatch.setattr(MaskedModel, "forward", poisoned)
    with pytest.raises(NumericsError) as caught:
        train(tiny(), tmp_path, quiet=True)
    message = str(caught.value)
    assert (
        f"the {what} is not finite (nan) after 384 images, in the batch of images " in message and "\n" not in message
    )
    batch = Order(Digits().count, 0)
    assert calls[0] == 7 and batch.count == 1437
    for name, value in kept["model"].state_dict().items():
        assert torch.equal(value, kept["weights"][name]), f"{name} was updated"
    assert not (tmp_path / "model").exists()


def test_order_is_a_permutation_of_every_epoch_and_needs_no_history() -> None:
    order = Order(10, seed=3)
    whole = order(0, 35)
    assert sorted(whole[:10].tolist()) == sorted(whole[10:20].tolist()) == list(range(10))
    assert whole[:10].tolist() != whole[10:20].tolist()
    assert torch.equal(Order(10, seed=3)(7, 20), whole[7:27]), "a run resumed at image 7 sees what it would have seen"
    assert torch.equal(torch.cat([order(i, 5) for i in range(0, 35, 5)]), whole), "whatever the batch size"
    assert Order(10, seed=4)(0, 10).tolist() != whole[:10].tolist()


def test_digits_are_split_once_and_for_all() -> None:
    train_set, held = Digits(), Digits(held_out=True)
    assert (train_set.count, held.count) == (1437, 360)
    images = train_set.images(torch.arange(train_set.count))
    assert images.shape == (1437, 1, 8, 8) and images.min() == -1 and images.max() == 1
    seen = {tuple(i.flatten().tolist()) for i in images}
    overlap = sum(tuple(i.flatten().tolist()) in seen for i in held.images(torch.arange(held.count)))
    assert overlap == 0, "no held-out digit is in the training set"
    counts = torch.bincount(held.labels(torch.arange(held.count)))
    assert counts.min() >= 34, "every class is held out in proportion"


def test_the_average_follows_its_formula() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average = averaged(model, 0.5)
    average.update_parameters(model)
    expected = 1.0
    for n, value in enumerate((3.0, 5.0, -1.0), start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update_parameters(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        assert average.module.get_parameter("weight").item() == pytest.approx(expected)


def test_auto_takes_the_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("seriatim.training.precision.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("seriatim.training.precision.slow_in_bfloat16", lambda _: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cpu, used = torch.device("cpu"), [2]
    monkeypatch.setattr(torch, "set_num_threads", lambda count: used.__setitem__(0, count))
    for fast in [("float32", 1), ("float32", 2), ("bfloat16", 1), ("bfloat16", 2)]:

        def loss_of(dtype: torch.dtype, fast: tuple[str, int] = fast) -> Loss:
            now[0] += 0.1 + (str(dtype) != f"torch.{fast[0]}") + (used[0] != fast[1])
            return Loss(torch.zeros((), requires_grad=True) * 1, torch.ones(()), {})

        choice = fastest("auto", "auto", cpu, loss_of)
        assert choice[:2] == fast
        assert fastest("bfloat16", 2, cpu, loss_of)[:3] == ("bfloat16", 2, {})
        assert fastest("auto", 1, cpu, loss_of)[:2] == (fast[0], 1)
        assert used == [2], "the caller's number of threads is restored"


@pytest.mark.parametrize(("two", "chosen"), [(0.98, 1), (0.9, 2)])
def test_a_second_thread_must_be_worth_it(monkeypatch: pytest.MonkeyPatch, two: float, chosen: int) -> None:
    """Where a pass with two threads is hardly faster, the other core is left to others."""
    now, used = [0.0], [2]
    monkeypatch.setattr("seriatim.training.precision.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: used.__setitem__(0, count))

    def loss_of(_: torch.dtype) -> Loss:
        now[0] += two if used[0] == 2 else 1.0
        return Loss(torch.zeros((), requires_grad=True) * 1, torch.ones(()), {})

    assert fastest("float32", "auto", torch.device("cpu"), loss_of).threads == chosen


def test_candidates_take_turns_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down with every pass slows the first and the last candidate alike."""
    now, used, order = [0.0], [2], list[int]()
    monkeypatch.setattr("seriatim.training.precision.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: used.__setitem__(0, count))

    def loss_of(_: torch.dtype) -> Loss:
        order.append(used[0])
        now[0] += 1.0 + 0.1 * len(order)
        return Loss(torch.zeros((), requires_grad=True) * 1, torch.ones(()), {})

    choice = fastest("float32", "auto", torch.device("cpu"), loss_of, enough=0.0)
    assert order == [2, 1, *[2, 1, 1, 2, 2, 1]], "a first pass of each, and the fewest rounds"
    assert all(len(passes) == 3 for passes in choice.passes.values()) and "(1.3 to 1.7 in 3)" in str(choice)


def test_bfloat16_is_not_tried_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seriatim.training.precision.slow_in_bfloat16", lambda _: True)
    tried = set[torch.dtype]()

    def loss_of(dtype: torch.dtype) -> Loss:
        tried.add(dtype)
        return Loss(torch.zeros((), requires_grad=True) * 1, torch.ones(()), {})

    assert fastest("auto", 1, torch.device("cpu"), loss_of)[:2] == ("float32", 1) and tried <= {torch.float32}
    assert fastest("bfloat16", 1, torch.device("cpu"), loss_of).dtype == "bfloat16", "who asks for it gets it"


@pytest.mark.parametrize("busy", [(0, 9), (8, 17), (17, 30)])
def test_a_machine_that_is_busy_for_a_while_does_not_decide(
    monkeypatch: pytest.MonkeyPatch, busy: tuple[int, int]
) -> None:
    """Passes number 8 to 16, say, take a hundred times as long: bfloat16 is six times as fast, and is taken."""
    now, calls = [0.0], [0]
    monkeypatch.setattr("seriatim.training.precision.slow_in_bfloat16", lambda _: False)
    monkeypatch.setattr("seriatim.training.precision.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def loss_of(dtype: torch.dtype) -> Loss:
        calls[0] += 1
        now[0] += (0.01 if dtype == torch.bfloat16 else 0.06) * (100 if busy[0] <= calls[0] < busy[1] else 1)
        return Loss(torch.zeros((), requires_grad=True) * 1, torch.ones(()), {})

    choice = fastest("auto", "auto", torch.device("cpu"), loss_of)
    assert choice.dtype == "bfloat16" and len(choice.seconds) == 4


def test_a_slow_model_is_not_measured_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], [0]
    monkeypatch.setattr("seriatim.training.precision.slow_in_bfloat16", lambda _: False)
    monkeypatch.setattr("seriatim.training.precision.time.perf_counter", lambda: now[0])

    def loss_of(_: torch.dtype) -> Loss:
        calls[0], now[0] = calls[0] + 1, now[0] + 60.0
        return Loss(torch.zeros((), requires_grad=True) * 1, torch.ones(()), {})

    assert fastest("auto", 1, torch.device("cpu"), loss_of).dtype == "float32"
    assert calls[0] == 2 * (1 + 3), "one pass to warm up and the fewest rounds"


def test_a_candidate_that_is_several_times_as_slow_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], Counter[torch.dtype]()
    monkeypatch.setattr("seriatim.training.precision.slow_in_bfloat16", lambda _: False)
    monkeypatch.setattr("seriatim.training.precision.time.perf_counter", lambda: now[0])

    def loss_of(dtype: torch.dtype) -> Loss:
        calls[dtype] += 1
        now[0] += 5.0 if dtype == torch.bfloat16 else 0.5
        return Loss(torch.zeros((), requires_grad=True) * 1, torch.ones(()), {})

    choice = fastest("auto", 1, torch.device("cpu"), loss_of)
    assert choice.dtype == "float32" and choice.seconds == {"float32 with 1 thread": 0.5, "bfloat16 with 1 thread": 5.0}
    assert calls == {torch.float32: 1 + 7, torch.bfloat16: 1 + 1}


def test_what_was_measured_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("seriatim.training.precision.slow_in_bfloat16", lambda _: False)
    result = train(tiny("training.images=64", "training.dtype=auto"), tmp_path, quiet=True)
    written = read_recipe(str(tmp_path / "recipe.yaml")).training
    assert (written.dtype, written.threads) == (result.dtype, 1)
    measured = json.loads((tmp_path / "environment.json").read_text())["measured"]
    assert (measured["dtype"], measured["threads"]) == (result.dtype, 1)
    assert min(measured["seconds"], key=measured["seconds"].get) == f"{result.dtype} with 1 thread"
    said = [line for line in capsys.readouterr().err.splitlines() if "median seconds of a pass" in line]
    assert len(said) == 1 and said[0].startswith(f"training in {result.dtype} with 1 thread: ")
    train(tiny("training.images=64", "training.dtype=float32"), tmp_path / "told", quiet=True)
    assert "measured" not in json.loads((tmp_path / "told" / "environment.json").read_text())


def test_foreign_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds 'model/thesis\.txt' and is no run that Seriatim wrote"):
        train(tiny("training.images=64"), tmp_path, quiet=True)
    train(tiny("training.images=64"), tmp_path / "run", quiet=True)
    (tmp_path / "run" / "model" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds 'thesis\.txt'"):
        train(tiny("training.images=64"), tmp_path / "run", overwrite=True, quiet=True)
    with pytest.raises(UsageError, match="is not a model folder"):
        seriatim.load(tmp_path / "run", device="cpu").save(tmp_path)
    assert (tmp_path / "model" / "thesis.txt").exists() and (tmp_path / "run" / "model" / "thesis.txt").exists()
