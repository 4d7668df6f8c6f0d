"""The processes against closed forms; the scores against a model that knows the truth; the script itself, tiny."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import known_contestants as kc
import known_density as kd
import known_density_tables as kt
from known_processes import TASKS, Field, Modes, Order, Process

from seriatim.core.errors import NumericsError


class Flat(Field):
    dim = 2


PLANAR: dict[str, type[Process]] = {"mixture": Modes, "field": Flat, "order": Order}


def drawn(process: Process, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(process.classes, (count,), generator=g)
    return process.sample(labels, g), labels


def orders(count: int, tokens: int) -> Tensor:
    return torch.rand(count, tokens, generator=torch.Generator().manual_seed(9)).argsort(dim=1)


def lattice(reach: float = 5.0, side: int = 101) -> tuple[Tensor, float]:
    """Points of the plane (N, 2), and the area of each."""
    line = torch.linspace(-reach, reach, side)
    return torch.cartesian_prod(line, line), (2 * reach / (side - 1)) ** 2


@pytest.mark.parametrize("name", PLANAR)
@pytest.mark.parametrize("at", [0, 1, 6, 15])
def test_conditionals_integrate_to_one(name: str, at: int) -> None:
    process = PLANAR[name]()
    points, area = lattice()
    x, labels = drawn(process, 1, seed=at)
    many = x.repeat(len(points), 1, 1)
    order = None if name == "order" else orders(1, process.tokens)
    many[:, at if order is None else int(order[0, at])] = points
    every = None if order is None else order.expand(len(points), -1)
    log_p = process.log_conditionals(many, labels.expand(len(points)), every)[:, at]
    assert math.isclose(float(log_p.exp().sum()) * area, 1.0, abs_tol=1e-4)


@pytest.mark.parametrize("name", ["mixture", "field"])
def test_conditionals_are_ratios_of_the_joint_density(name: str) -> None:
    process = PLANAR[name]()
    x, labels = drawn(process, 1, seed=3)
    order = orders(1, process.tokens)
    points, area = lattice()
    many = x.repeat(len(points), 1, 1)
    many[:, int(order[0, -1])] = points
    without = float(process.log_density(many, labels.expand(len(points))).exp().sum()) * area
    expected = float(process.log_density(x, labels)) - math.log(without)
    assert math.isclose(float(process.log_conditionals(x, labels, order)[0, -1]), expected, abs_tol=1e-4)


@pytest.mark.parametrize("name", ["mixture", "field"])
def test_every_order_adds_up_to_the_same(name: str) -> None:
    process = TASKS[name]()
    x, labels = drawn(process, 20)
    along = process.log_conditionals(x, labels, orders(20, process.tokens)).sum(dim=1)
    torch.testing.assert_close(along, process.log_density(x, labels))


def test_the_order_process_has_raster_conditionals_only() -> None:
    process = Order()
    x, labels = drawn(process, 2)
    with pytest.raises(ValueError, match="raster"):
        process.log_conditionals(x, labels, orders(2, process.tokens))


def test_one_field_is_a_gaussian_of_a_kronecker_product() -> None:
    process = Field(fields=1)
    x, labels = drawn(process, 2000)
    whole = torch.kron(process.spatial[0], process.features[0])
    normal = torch.distributions.MultivariateNormal(torch.zeros(len(whole), dtype=torch.float64), whole)
    log_p = process.log_density(x, labels)
    torch.testing.assert_close(log_p, normal.log_prob(x.double().flatten(1)))
    error = float(log_p.std()) / math.sqrt(len(x))
    assert abs(float(log_p.mean() + normal.entropy())) < 4 * error  # the sampler draws from that density


def test_one_mode_has_the_entropy_of_its_noise() -> None:
    process = Modes(modes=1)
    process.weights = torch.ones(4, 1, dtype=torch.float64)
    x, labels = drawn(process, 2000)
    log_p = process.log_density(x, labels)
    entropy = process.tokens * (math.log(2 * math.pi * math.e) + math.log(0.5 * 0.2))
    assert abs(float(log_p.mean()) + entropy) < 4 * float(log_p.std()) / math.sqrt(len(x))


@pytest.mark.parametrize(("name", "c", "other"), [("mixture", 0, 1), ("mixture", 0, 2), ("field", 0, 1)])
def test_samples_of_one_class_weighed_by_another(name: str, c: int, other: int) -> None:
    """E_p [q / p] = 1, and of these q / p is bounded."""
    process = TASKS[name]()
    labels = torch.full((4000,), c)
    x = process.sample(labels, torch.Generator().manual_seed(0))
    ratio = (process.log_density(x, torch.full_like(labels, other)) - process.log_density(x, labels)).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / math.sqrt(len(x))


def test_the_order_process_has_the_entropy_of_its_steps() -> None:
    process = Order()
    x, labels = drawn(process, 4000)
    log_p = process.log_conditionals(x, labels)
    error = log_p.std(dim=0) / math.sqrt(len(x))
    # one parent alone: the two places are 10 standard deviations apart
    coin = -sum(p * math.log(p) for p in (process.likely, 1 - process.likely))
    two = math.log(2 * math.pi * math.e * process.sigma**2) + coin
    assert abs(float(log_p[:, 1].mean()) + two) < 4 * float(error[1])
    points, area = lattice(reach=2.5)
    first = torch.zeros(len(points), process.tokens, 2)
    first[:, 0] = points
    ring = process.log_conditionals(first, torch.zeros(len(points), dtype=torch.long))[:, 0]
    assert abs(float(log_p[:, 0].mean()) - float((ring.exp() * ring).sum()) * area) < 4 * float(error[0])


# --- the scores -----------------------------------------------------------------------------------------------------


class Oracle:
    """A model whose z is all that is known, and whose head has the process's own conditionals."""

    one_by_one = False

    def __init__(self, process: Process) -> None:
        self.process, self.tokens, self.backbone, self.head, self.has_density = (
            process,
            process.tokens,
            self,
            self,
            True,
        )

    def condition(self, labels: Tensor, _images: int) -> Tensor:
        return labels

    def z(self, state: Tensor, tokens: Tensor, known: Tensor, ask: Tensor) -> tuple[Tensor, ...]:
        rows, at = ask.nonzero().unbind(dim=1)
        return tokens.masked_fill(~known[..., None], 7.0)[rows], state[rows], known[rows], at

    def log_prob(self, z: Any, target: Tensor) -> Tensor:
        x, labels, known, at = z
        rows = torch.arange(len(x))
        x[rows, at] = target
        rank = 2 - 2 * known.long()  # known, then the one asked for, then the others
        rank[rows, at] = 1
        order = rank.argsort(dim=1, stable=True)
        return self.process.log_conditionals(x, labels, order)[rows, known.sum(dim=1)]

    def null(self, _images: int, like: Tensor) -> Tensor:
        return like

    def sample(self, condition: Tensor, *_more: Any, **_options: Any) -> Tensor:
        return self.process.sample(condition, torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", ["mixture", "field"])
def test_a_model_that_knows_the_truth_has_no_gap(name: str) -> None:
    process, contestant = TASKS[name](), kc.Contestant({}, scored=(32, 16))
    scores = kd.gap(contestant, Oracle(process), process, 0)  # type: ignore[arg-type]
    assert abs(scores["gap"]) < 1e-6 and scores["gap_error"] < 1e-6


def test_the_gap_is_the_divergence_of_what_the_model_believes() -> None:
    process, contestant = Modes(modes=1), kc.Contestant({}, scored=(1000, 16))
    believed = Modes(modes=1, wide=1.0, narrow=0.2)
    for made in (process, believed):
        made.weights = torch.ones(4, 1, dtype=torch.float64)
    scores = kd.gap(contestant, Oracle(believed), process, 0)  # type: ignore[arg-type]
    divergence = math.log(1.0 / 0.5) + 0.5 * (0.25 - 1)  # KL(N(0, 0.5^2) || N(0, 1))
    assert abs(scores["gap"] - divergence) < 4 * scores["gap_error"]


def test_tokens_of_one_step_count_as_independent() -> None:
    process = Modes()
    x, labels = drawn(process, 8)
    order = orders(8, process.tokens)
    once = kd.log_likelihood(Oracle(process), x, labels, order, [process.tokens])  # type: ignore[arg-type]
    alone = [process.log_conditionals(x, labels, order.roll(-i, dims=1))[:, 0] for i in range(process.tokens)]
    torch.testing.assert_close(once, torch.stack(alone).sum(dim=0))


@pytest.mark.parametrize("name", TASKS)
def test_true_samples_are_at_the_floor(name: str) -> None:
    process = TASKS[name]()
    ruler = kd.Ruler(process, samples=512, truth=4000)
    scores = ruler(process.sample(ruler.labels, torch.Generator().manual_seed(1)))
    # what two such sets are apart by chance: E int 2 (F_n - F)^2 is near 2 / 6 of a standard deviation's scale over n
    assert scores["distance"] < 1.3 * math.sqrt(1.2 / ruler.each)
    assert abs(scores["excess"]) < 0.1
    assert 0.003 < scores["outside"] < 0.02
    off = process.sample(ruler.labels, torch.Generator().manual_seed(1)).flip(1)  # all tokens in another's place
    moved = ruler(off + 0.3)
    assert moved["distance"] > 1.5 * scores["distance"]
    assert moved["excess"] < -0.1 and moved["outside"] > 0.03


def test_classes_are_told_apart() -> None:
    process = Modes()
    ruler = kd.Ruler(process, samples=512, truth=4000)
    g = torch.Generator().manual_seed(1)
    right, wrong = process.sample(ruler.labels, g), process.sample(ruler.labels.flip(0), g)
    assert ruler(wrong)["distance"] > 2 * ruler(right)["distance"]


def test_codes_are_the_nearest_centres() -> None:
    process = Modes()
    codes = kd.Codes(process, 32, seed=0, sequences=100)
    x, _ = drawn(process, 50)
    coded = codes.decode(codes.encode(x))
    assert coded.shape == x.shape
    torch.testing.assert_close(codes.decode(codes.encode(coded)), coded)
    assert float((coded - x).square().mean()) < 0.1 * float(x.var())


def test_intervals_and_differences() -> None:
    mean, half = kt.interval([1.0, 2.0, 3.0]) or (0, 0)
    assert mean == 2.0 and half is not None
    assert math.isclose(half, 4.302653 / math.sqrt(3), rel_tol=1e-5)
    assert kt.interval([]) is None and kt.interval([4.0]) == (4.0, None)
    assert kt.show((0.12345, 0.0213)) == "0.123 ± 0.021"
    assert kt.show((math.nan, None)) == "diverged" and kt.show(None) == "-"
    rows = [
        {"task": "field", "name": n, "seed": s, "budget": "images", "scores": {"gap": g + s}}
        for n, g in (("a", 1.0), ("b", 1.5))
        for s in range(3)
    ]
    assert kt.Results(rows).difference("field", "b", "a", "images", "gap") == (0.5, 0.0)


def test_the_average_is_of_the_last_updates() -> None:
    """Of weights that are the number of the update, it lags a ninth behind, whenever one looks."""
    average = 0.0
    for n in range(1, 2001):
        average += (1 - (1 - 1 / n) ** kd.AVERAGE) * (n - average)
        if n in (500, 2000):
            assert math.isclose(average / n, 8 / 9, rel_tol=2e-3)


# --- the script -----------------------------------------------------------------------------------------------------

TINY = {"width": 16, "depth": 1, "heads": 2}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd, "TRUTH", 500)
    monkeypatch.setattr(kd, "BATCH", 16)
    kd.ruler_of.cache_clear()
    codes = kc.Contestant({**kc.MASKED, **TINY, "head": {"kind": "categorical"}}, codes=16)
    absent = kc.Contestant({**kc.MASKED, "head": {"kind": "no such head"}})
    head = {"kind": "diffusion", "width": 16, "depth": 1}
    some = kc.Contestant({**kc.MASKED, **TINY, "head": head}, sampling={"num_diffusion_steps": 3})
    for name, contestant in (("tiny", some), ("codes", codes), ("absent", absent)):
        monkeypatch.setitem(kd.CONTESTANTS, name, contestant)


@pytest.mark.usefixtures("tiny")
def test_it_trains_judges_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ["--out", str(tmp_path), "--tasks", "mixture", "--only", "tiny", "codes", "absent", "--seeds", "0"]
    call += ["--images", "40", "--seconds", "0.02", "--samples", "64", "--against", "tiny", "tiny"]
    assert kd.main(call) == 0
    printed = capsys.readouterr().out
    assert "left out, since this package has no no such head: absent" in printed
    assert "| truth |" in printed and "| codes |" in printed and "less that of tiny" in printed
    row = json.loads((tmp_path / "mixture-tiny-0-images.json").read_text())
    assert row["images"] == 48 and row["updates"] == 3  # the first of whole batches that reach 40
    assert row["scores"]["distance"] > 0 and "gap" not in row["scores"]
    assert json.loads((tmp_path / "mixture-tiny-0-seconds.json").read_text())["train_seconds"] >= 0.02
    assert (tmp_path / "known_density.png").stat().st_size > 1000
    monkeypatch.setattr(kd, "figure", lambda *_a: None)  # once is enough

    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    (tmp_path / "mixture-tiny-0-images.json").unlink()
    assert kd.main(call) == 0
    again = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    assert {n for n in again if again[n] != kept[n]} == {"mixture-tiny-0-images.json"}
    same = json.loads((tmp_path / "mixture-tiny-0-images.json").read_text())["scores"]
    assert same == row["scores"]  # of the seed alone
    capsys.readouterr()
    assert kd.main([*call, "--report"]) == 0
    assert "| tiny |" in capsys.readouterr().out
    assert kd.main([*call, "--images", "50"]) == 3
    assert "images 40, not 50" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_a_training_that_diverges_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> dict[str, float]:
        raise NumericsError("a mean is not finite")

    monkeypatch.setattr(kd, "judge", broken)
    work = kd.Work("mixture", "tiny", 0, kd.BUDGETS, 16, 0.001, 64, tmp_path)
    kd.run(work)
    rows = [json.loads(work.file(budget).read_text()) for budget in kd.BUDGETS]
    assert all(math.isnan(r["scores"]["distance"]) and r["why"] == "a mean is not finite" for r in rows)
    assert "diverged" in "".join(kt.tables(rows, ["mixture"], ["tiny"], ["tiny", "tiny"]))
    monkeypatch.setattr(kd, "figure", lambda *_a: None)
    (tmp_path / "other.json").write_text("[]")
    assert kd.main(["--out", str(tmp_path), "--report"]) == 3
    assert "other.json is no result of this script" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (["--only", "masked-difusion"], "did you mean 'masked-diffusion'?"),
        (["--tasks", "fields"], "did you mean 'field'?"),
        (["--images", "0"], "images: 0 is not allowed"),
        (["--seconds", "nan"], "seconds: nan is not allowed"),
    ],
)
def test_wrong_arguments_are_a_line(call: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert kd.main(call) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0]


def test_contestants_build_and_draw() -> None:
    process = Modes()
    for name, contestant in kd.CONTESTANTS.items():
        if contestant.missing():
            continue
        model = contestant.build(process, 0).eval()
        labels = torch.tensor([0, 3])
        drawn = contestant.sample(model, labels, kd.Keys.of_seeds([0, 1]))
        assert drawn.shape == ((2, 16) if contestant.codes else (2, 16, 2)), name
        if model.head.has_density and not contestant.codes:
            x = process.sample(labels, torch.Generator().manual_seed(0))
            order = None if contestant.order == "raster" else orders(2, 16)
            assert kd.log_likelihood(model, x, labels, order, [1] * 16).isfinite().all(), name
