"""Is B better than A? The intervals of differences, and `compare` from Python and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import make_bundle, randomise, read_picture

from seriatim.checkpoints.native import Bundle, save_bundle
from seriatim.checkpoints.tokenizer import save_tokenizer
from seriatim.cli import main
from seriatim.core.errors import UsageError
from seriatim.core.random import derive_seed
from seriatim.evaluation import blocks, figures
from seriatim.evaluation.blocks import Share
from seriatim.evaluation.compare import Comparison, compare
from seriatim.evaluation.differences import Difference, difference_of, sentence
from seriatim.evaluation.features import PixelFeatures
from seriatim.evaluation.figures import FIGURES, Reference, Set, figures_of
from seriatim.evaluation.intervals import Interval, between_runs, paired, samples_to_tell, student, welch
from seriatim.evaluation.metrics import Figure, Spread, with_error
from seriatim.evaluation.reference import ArrayImages
from seriatim.evaluation.sheet import places_of
from seriatim.evaluation.side_by_side import shown
from seriatim.pipeline.pipeline import Pipeline
from seriatim.tokenizers.pixels import Pixels

SIZE = (8, 8)
COMMON: dict[str, Any] = {"num": 24, "features": PixelFeatures(SIZE, 1), "figures": ["kernel", "nearest"]}


def pictures(count: int, seed: int = 0) -> ArrayImages:
    arrays = np.random.default_rng(seed).integers(0, 256, (count, *SIZE, 1), dtype=np.uint8)
    return ArrayImages(arrays, f"pictures {count} {seed}")


def bundle_of(seed: int, classes: int = 3) -> Bundle:
    """A tiny model; another seed is another training."""
    bundle = make_bundle(classes)
    randomise(bundle.model, seed, scale=0.05)
    bundle.sampling |= {"num_inference_steps": 1, "num_diffusion_steps": 1}
    return bundle


def pipe_of(seed: int, classes: int = 3, **sampling: Any) -> Pipeline:
    bundle = bundle_of(seed, classes)
    bundle.sampling |= sampling
    bundle.sha256 = f"{seed:064d}"
    return Pipeline(bundle, source=f"runs/{seed}")


def compared(out: Path, a: Any, b: Any, **settings: Any) -> Comparison:
    return compare(a, b, pictures(40), out, **{"quiet": True, "real": pictures(30, 1), **COMMON, **settings})


def mean_of(values: Any) -> Callable[[Any], float]:
    """The mean of some of the values, as a figure."""
    return lambda i: float(values[i].mean())


# --- statistics -----------------------------------------------------------------------------------------------------


def test_student() -> None:
    """Known quantiles: tables of the distribution at 97.5 %."""
    for degrees, quantile in ((1, 12.7062), (2, 4.30265), (9, 2.26216), (float("inf"), 1.95996)):
        assert student(degrees) == pytest.approx(quantile, rel=1e-5)


def test_the_paired_interval_covers_a_known_difference() -> None:
    """Samples of both have a common part, which would widen the interval tenfold if it did not cancel."""
    random, truth, held, widths = np.random.default_rng(0), 0.3, 0, []
    repeats = 400
    for _ in range(repeats):
        common = 10 * random.normal(size=100)
        x, y = common + random.normal(size=100), common + random.normal(size=100) + truth
        a, b = (with_error(mean_of(z), 100) for z in (x, y))
        interval = paired(a, b)
        held += abs(interval.value - truth) <= interval.half
        widths.append(interval.half)
    assert held / repeats == pytest.approx(0.95, abs=3.5 * (0.95 * 0.05 / repeats) ** 0.5)
    assert np.mean(widths) == pytest.approx(student(9) * (2 / 100) ** 0.5, rel=0.05)


def test_the_paired_interval_of_means_is_that_of_a_paired_t_test() -> None:
    """With one image a group, the jackknife of a mean is its usual standard error."""
    x, y = np.random.default_rng(0).normal(size=(2, 10))
    a, b = (with_error(mean_of(z), 10) for z in (x, y))
    interval = paired(a, b)
    d = y - x
    assert interval.value == pytest.approx(d.mean())
    assert interval.half == pytest.approx(student(9) * d.std(ddof=1) / 10**0.5)


def test_welch() -> None:
    """The interval of scipy, and coverage where the two sides have other spreads and other numbers of runs."""
    from scipy.stats import ttest_ind

    a, b = [1.0, 2.0, 4.0], [3.0, 3.5, 5.0, 6.0, 6.5]
    interval, theirs = welch(a, b), ttest_ind(b, a, equal_var=False).confidence_interval()
    assert interval.value - interval.half == pytest.approx(theirs.low)
    assert interval.value + interval.half == pytest.approx(theirs.high)
    random, repeats = np.random.default_rng(0), 2000
    held = 0
    for _ in range(repeats):
        found = welch(list(random.normal(0, 1, 4)), list(random.normal(0.5, 3, 6)))
        held += abs(found.value - 0.5) <= found.half
    assert held / repeats == pytest.approx(0.95, abs=0.02)


def test_runs_that_agree_by_chance_have_the_error_of_their_samples() -> None:
    def figure(value: float, *groups: float) -> Figure:
        spread = Spread.jackknife(groups)
        return Figure(value, spread.error, spread)

    a = [figure(0.9, 0.9, 0.92, 0.88), figure(0.9, 0.91, 0.9, 0.89)]
    b = [figure(0.91, 0.93, 0.9, 0.9), figure(0.91, 0.91, 0.91, 0.91)]
    found = between_runs(a, b)
    errors = [paired(x, y).half / student(2) for x, y in zip(a, b, strict=True)]
    assert found.value == pytest.approx(0.01) and found.degrees == 4
    assert found.half == pytest.approx(student(4) * (errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2)
    apart = [replace_value(a[0], 0.5), replace_value(a[1], 0.9)]
    assert between_runs(apart, b) == welch([0.5, 0.9], [0.91, 0.91]), "the runs say more"


def replace_value(figure: Figure, value: float) -> Figure:
    return figure._replace(value=value)


def test_every_figure_of_samples_can_be_subtracted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a kernel distance over subsets, whose error stays what it was."""
    monkeypatch.setattr(figures, "WHOLE", 50)
    monkeypatch.setattr(figures, "SUBSET", 10)
    random = np.random.default_rng(0)
    sets = [Set(blocks.Vectors(random.normal(size=(55, 2)))) for _ in range(2)]
    reference = Reference(blocks.Vectors(random.normal(size=(40, 2))))
    a, b = (FIGURES["kernel"](each, reference)["KD"] for each in sets)
    assert isinstance(a, Figure) and isinstance(b, Figure) and a.spread is not None
    values = np.asarray(a.spread.values)
    assert a.value == pytest.approx(values.mean())
    assert a.error == pytest.approx(values.std(ddof=1) / 5.5**0.5)
    assert paired(a, b).degrees == 4.5, "as many subsets as fit side by side, less one"
    assert paired(a, a)[:2] == (0, 0)
    small = Set(blocks.Vectors(random.normal(size=(30, 2))), np.arange(30) % 3)
    reference = Reference(blocks.Vectors(random.normal(size=(40, 2))), np.arange(40) % 3, held_out=sets[0].vectors)
    for name, x in figures_of(small, reference, PixelFeatures(SIZE, 1)).items():
        assert x.spread is not None and x.error == x.spread.error and paired(x, x)[:2] == (0, 0), name


def test_so_many_samples_tell_a_difference_four_times_out_of_five() -> None:
    truth, num, random = 0.2, 50, np.random.default_rng(0)
    measured = Interval(truth, student(9) / num**0.5, 9)  # differences with a standard deviation of 1
    needed = samples_to_tell(measured, num)
    assert needed == 197  # ((1.960 + 0.8416) / 0.2)^2, the textbook's formula
    means = random.normal(truth, 1 / needed**0.5, 4000)
    assert (means > 1.96 / needed**0.5).mean() == pytest.approx(0.8, abs=0.02)


def test_sentences() -> None:
    def told(name: str, value: float, half: float, runs: int = 1) -> str:
        rest = Interval(1, 0.1, 9)
        return sentence(Difference(name, rest, rest, Interval(value, half, 9), None, runs), 1000)

    assert told("FD[x]", -1.25, 0.4) == "FD[x]: B's is lower by 1.25 ± 0.4: B is better"
    assert told("FID", 1.25, 0.4) == "FID: B's is higher by 1.25 ± 0.4: A is better"
    assert told("recall[x]", 0.2, 0.1).endswith("B is better")
    assert told("diversity[x]", 0.2, 0.1) == "diversity[x]: B's is higher by 0.2 ± 0.1", "neither way is better"
    assert told("FD[x]", 0.1, 0.5) == "FD[x]: no difference can be told, B - A is 0.1 ± 0.5"
    assert told("FD[x]", 0, 0) == "FD[x]: there is no difference at all"
    says = told("accuracy[x]", 0.01, 0.02)  # (2.8016 / 2.2622 * 2)^2 = 6.13
    assert says.endswith("; if it is as large as it seems, about 6,200 samples would tell it")
    assert "would tell" not in told("accuracy[x]", 0.0001, 0.02), "a hundred times as many are as good as none"
    assert "would tell" not in told("accuracy[x]", 0.01, 0.02, runs=2), "the spread of two runs is hardly known"


def test_over_runs_or_over_samples() -> None:
    found = [with_error(mean_of(np.arange(30) + z), 30) for z in (0.0, 1.0, 5.0, 7.0)]
    one = difference_of("KD", found[:1], found[1:2], found[3])
    assert one.difference.value == pytest.approx(1) and one.difference.half == pytest.approx(0, abs=1e-9)
    assert one.real == found[3].value and one.a.half == student(9) * found[0].error
    both = difference_of("KD", found[:2], found[2:], None)
    values = [x.value for x in found]
    assert both.difference == welch(values[:2], values[2:]) and both.runs == 2


# --- from Python ----------------------------------------------------------------------------------------------------


def test_a_model_and_itself(tmp_path: Path) -> None:
    done = compared(tmp_path, pipe_of(1), pipe_of(1))
    assert list(done.figures) == ["KD[pixels]", "nearest[pixels]"]
    for each in done.figures.values():
        assert each.difference.value == 0 and each.difference.half == 0 and not each.told and each.a == each.b
        assert each.a.half > 0
    assert done.conclusions[0] == "KD[pixels]: there is no difference at all"


def test_two_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pipe_of(1), pipe_of(2, guidance_scale=3.0)
    done = compared(tmp_path, a, b, seed=5)
    assert done.a[0].figures is not None and done.b[0].figures is not None
    for name, each in done.figures.items():
        x, y = done.a[0].figures[name], done.b[0].figures[name]
        assert each.difference.value == y.value - x.value
        assert each.difference.half == pytest.approx(paired(x, y).half) and each.real is not None
    report = json.loads((tmp_path / "compare.json").read_text())
    assert report == json.loads(json.dumps(done.report))
    assert report["settings_that_differ"] == {"guidance_scale": {"a": 1.5, "b": 3.0}}
    assert "samples of these two models" in report["interval"] and report["a"][0]["seed"] == 5
    table = (tmp_path / "compare.md").read_text()
    assert "\n| KD[pixels] | " in table and "- guidance_scale: 1.5 in A, 3.0 in B, as each has stored\n" in table
    # The picture: the same labels and seeds, those of A above those of B.
    sheet = read_picture(tmp_path / "compare.png")
    places = places_of(sheet)
    assert places is not None and places.words == ("cat: A", "B", "dog: A", "B", "horse: A", "B")
    seeds = json.loads((tmp_path / "compare.seeds.json").read_text())
    assert seeds["images"] == shown(24, 3) == [[c + 3 * j for j in range(8)] for c in range(3)]
    assert seeds["seeds"][1][2] == derive_seed(5, 7)
    for row, pipe in ((2, a), (3, b)):
        image = pipe(class_labels=["dog"], seeds=[derive_seed(5, 7)]).images[0].convert("RGB")
        there = sheet.crop(places.box(row, 2)).resize(SIZE, 0)
        assert np.abs(np.asarray(there).astype(int) - np.asarray(image)).max() <= 1

    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing is left to draw")

    monkeypatch.setattr(Pipeline, "__call__", never)
    again = compared(tmp_path, a, b, seed=5)
    assert again.figures == done.figures
    with pytest.raises(UsageError, match=r"model\.sha256: .* in .*a-0"):
        compared(tmp_path, pipe_of(3), b, seed=5)


def test_several_runs_of_each(tmp_path: Path) -> None:
    """Runs are added to what is there, and each pair has seeds of its own."""
    compared(tmp_path, pipe_of(1), pipe_of(3))
    done = compared(tmp_path, [pipe_of(1), pipe_of(2)], [pipe_of(3), pipe_of(4)])
    assert [made.settings["request"]["seed"] for made in (*done.a, *done.b)] == [0, 1, 0, 1]
    assert "over training runs, 2 of A and 2 of B" in done.report["interval"]
    for name, each in done.figures.items():
        a, b = ([made.figures[name] for made in side if made.figures] for side in (done.a, done.b))
        assert each.difference == between_runs(a, b)
        assert each.a.value == pytest.approx(np.mean([x.value for x in a])) and each.a.degrees == 1
    assert len(list((tmp_path / "real").iterdir())) == 2, "real images are read once for all"


def test_shares_and_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SIZE", 8)
    a, b = pipe_of(1, classes=0), pipe_of(2, classes=0)  # without classes
    whole = compared(tmp_path / "whole", a, b)
    first = compared(tmp_path / "shared", a, b, share=Share(1, 2))
    assert first.missing and not first.figures and not (tmp_path / "shared" / "compare.json").exists()
    second = compared(tmp_path / "shared", a, b, share=Share(0, 2))
    assert second.figures == whole.figures
    sheets = [read_picture(tmp_path / name / "compare.png") for name in ("whole", "shared")]
    assert sheets[0].tobytes() == sheets[1].tobytes()
    places = places_of(sheets[0])
    assert places is not None and places.words == ("A", "B") * 3

    draw, calls = Pipeline.__call__, []

    def stops(self: Pipeline, *given: Any, **settings: Any) -> Any:
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(self, *given, **settings)

    monkeypatch.setattr(Pipeline, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        compared(tmp_path / "stopped", a, b)
    assert compared(tmp_path / "stopped", a, b).figures == whole.figures
    assert len(calls) == 3 + 1 + 1 + 3 + 1, "two blocks of A were there; then its third, B's three, and the picture"


def test_what_is_refused(tmp_path: Path) -> None:
    a, b = pipe_of(1), pipe_of(2)
    unlike, smaller, named = pipe_of(3, guidance_scale=2.0), pipe_of(4), pipe_of(5)
    bundle = smaller.bundle
    smaller = Pipeline(replace(bundle, model=make_bundle(3, 4).model, tokenizer=Pixels(4, 2, 1)), source="small")
    named.bundle.class_names[0] = "cow"
    for left, right, settings, message in (
        (a, smaller, {}, r"^b-0: draws images of \(1, 4, 4\) .* a-0 of \(1, 8, 8\)"),
        (a, pipe_of(2, classes=2), {}, "^b-0: has 2 classes, a-0 has 3; only models of the same classes"),
        (a, pipe_of(2, classes=0), {}, "^b-0: has 0 classes"),
        (a, named, {}, "^b-0: its class 0 is 'cow', that of a-0 is 'cat'"),
        ([a, b], unlike, {}, "^b: one run can't be compared with 2"),
        ([a, a], [b, unlike], {}, "^a-1: has the same weights as a-0, so it is no other run"),
        ([a, b], [pipe_of(6), unlike], {}, "^guidance_scale: is 1.5 in b-0 and 2.0 in b-1, .* give guidance_scale"),
        ([], b, {}, "^a: 0 runs are not allowed"),
        (a, b, {"guidance_scale": -1}, "^a-0: guidance_scale"),
        (a, b, {"seeds": [1]}, "^a-0: seeds: is not for evaluation"),
        (a, b, {"figures": ["score"]}, "^a-0: figures: score needs class probabilities"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            compared(tmp_path / "out", left, right, **settings)
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "out").glob("*")), "before anything is written"
    done = compared(tmp_path / "out", [a, b], [pipe_of(6), unlike], guidance_scale=2.0)
    assert done.figures and not done.report["settings_that_differ"], "the setting for all is the remedy"


# --- the command line -----------------------------------------------------------------------------------------------


def test_compare_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        bundle = bundle_of(seed, classes=0)
        save_bundle(bundle, tmp_path / "runs" / f"{seed}" / "model")
    save_tokenizer(Pixels(8, 2, 1), tmp_path / "tokenizer")
    common = ["--data", "digits", "--num", "24", "--features", "pixels", "--figures", "kernel"]
    words = ["compare", "runs/0", "runs/1", *common]
    assert main.run(words) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    for said in ("A: 0", "B: 1", "B - A", "KD[pixels]", "± is a 95 % interval (Student's t) over samples"):
        assert said in out, out
    assert main.run([*words, "--json"]) == 0, "the same command goes on"
    report = json.loads(capsys.readouterr().out)
    assert report["figures"]["KD[pixels]"]["difference"]["degrees_of_freedom"] == 9
    assert report["b"][0]["source"] == "runs/1" and report["num"] == 24
    assert main.run([*words, "--temperature", "0.9"]) == 2
    assert "request.temperature: 1.0 in compare/a-0/settings.json, 0.9 now" in capsys.readouterr().err
    for given, message in (
        (["compare", "runs/0", "tokenizer", *common], "b-0: tokenizer is a tokenizer, and models are compared"),
        (["compare", "runs/0", "runs/1", "--a", "runs/1", *common], "b: one run can't be compared with 2"),
        (["compare", "runs/0", "nowhere", *common], "nowhere"),
        (["compare", "runs/0", "runs/1", *common, "--figures", "diversity"], "a-0: figures: diversity needs classes"),
        (["compare", "runs/0", "runs/1", *common[:3], "4", *common[4:]], "a-0: num: 4 images are too few"),
    ):
        assert main.run(given) != 0
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
