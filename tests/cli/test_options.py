"""`sample` and `edit` take every field of a request, and say so in one line where the model can't."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
import typer
from helpers import TINY_RUN
from PIL import Image
from typer.core import TyperOption

from seriatim.checkpoints.native import Bundle, save_bundle
from seriatim.cli.app import app
from seriatim.cli.evaluate import fields
from seriatim.cli.main import run
from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys
from seriatim.heads.categorical import Categorical, CodeOptions
from seriatim.models.build import build_model, seeded
from seriatim.models.registry import HEADS
from seriatim.pipeline.metadata import read_recorded
from seriatim.pipeline.request import request_fields
from seriatim.tokenizers.kmeans import KMeans
from seriatim.tokenizers.pixels import Pixels

SMALL = {"tokens": 16, "width": 16, "depth": 1, "heads": 2}


def save(folder: Path, **config: Any) -> Path:
    """A model of 8x8 pixels with random weights: of codes where the config has a vocabulary."""
    with seeded(0):
        model = build_model({**SMALL, **config})
    tokenizer: Any = Pixels(size=8, patch=2, channels=1)
    if "vocab" in config:
        tokenizer = KMeans(8, 2, 1, vocab=config["vocab"])
        tokenizer.centres.uniform_(-1, 1)
        tokenizer.measured.fill_(True)
    return save_bundle(Bundle(model.eval(), tokenizer, []), folder)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    codes = {"kind": "categorical"}
    save(tmp_path / "codes", kind="masked", vocab=9, buffer=2, head=codes)
    save(tmp_path / "raster", kind="causal", vocab=9, head=codes)
    save(tmp_path / "random", kind="causal", dim=4, order="random", head={"kind": "mixture", "components": 2})
    Image.new("L", (8, 8), 90).save("image.png")
    mask = Image.new("L", (8, 8), 0)
    mask.paste(255, (4, 0, 8, 8))
    mask.save("mask.png")
    return tmp_path


@pytest.mark.parametrize("verb", ["sample", "edit"])
def test_every_field_of_a_request_is_an_option(verb: str) -> None:
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    parameters = command.get_params(typer.Context(command))
    options = {parameter.name for parameter in parameters}
    assert set(request_fields()) - {"class_labels", "seeds", "head_options"} <= options and "label" in options
    assert all(parameter.help for parameter in parameters if isinstance(parameter, TyperOption))


class Shifted(Categorical):
    """A head of one's own, with an option of its own."""

    @dataclass(frozen=True)
    class Options(CodeOptions):
        shift: Annotated[int, "How far codes are moved."] = 0

    def sample(self, z: torch.Tensor, keys: Keys, plan: Any = None, *more: Any, **others: Any) -> torch.Tensor:
        return (super().sample(z, keys, plan, *more, **others) + plan.options.shift) % self.output


def test_the_options_of_a_head_of_ones_own_reach_it(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(HEADS, "shifted", Shifted)
    save(work / "own", kind="causal", vocab=9, head={"kind": "shifted"})
    assert run(["sample", "--help"]) == 0 and "--shift" in capsys.readouterr().out
    for shift in (0, 2):
        assert run(["sample", "own", "--seed", "1", "--shift", str(shift), "--out", f"by{shift}"]) == 0
    drawn = [read_recorded(work / f"by{shift}" / "0000-image.png") for shift in (0, 2)]
    assert drawn[1][1].sample_request().head_options["shift"] == 2
    assert not np.array_equal(np.asarray(drawn[0][0]), np.asarray(drawn[1][0]))
    capsys.readouterr()
    assert run(["sample", "codes", "--shift", "2", "--out", "never"]) == 2
    assert "shift: the Categorical head has no such option" in capsys.readouterr().err


def test_codes_are_filtered_and_chosen_from_the_command_line(work: Path) -> None:
    words = ["sample", "codes", "--seed", "3", "--num-inference-steps", "4", "--temperature", "0.9"]
    filters = ["--top-k", "3", "--top-p", "0.8"]
    order = ["--order", "confidence", "--choice-temperature", "2"]
    assert run([*words, *filters, *order, "--out", "out"]) == 0
    request = read_recorded(work / "out" / "0000-image.png")[1].sample_request()
    assert (*request.head_options.values(), request.order, request.choice_temperature) == (3, 0.8, "confidence", 2.0)
    assert run(["edit", "codes", "image.png", "--mask", "mask.png", "--num-inference-steps", "4", *filters]) == 0
    assert run(["sample", "random", "--guidance-mode", "resample", "--out", "mixture"]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sample", "random", "--top-k", "3"], "top_k: the Mixture head has no such option; did you mean"),
        (["sample", "codes", "--top-k", "0"], "top_k"),
        (["sample", "codes", "--guidance-mode", "exact"], "guidance_mode: the Categorical head has no such option"),
        (["edit", "raster", "image.png", "--mask", "mask.png"], "to repaint, use a masked model, or a causal one"),
        (["sample", "raster", "--num-inference-steps", "32"], "32 steps asked of a causal model of 16 tokens"),
    ],
)
def test_what_a_model_cannot_do_is_one_line(
    work: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert run([*words, "--out", "never"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0], lines
    assert not (work / "never").exists()


@pytest.mark.usefixtures("work")
def test_a_plan_of_codes_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    codes = ["tokenizer={kind: kmeans, patch: 2, vocab: 24}", "model.head={kind: categorical}"]
    for words, key, count in ((codes, "codes", 24), ([], "features", 4)):
        assert run(["train", "mar-digits", *TINY_RUN, *words, "--dry-run", "--json", "--out", "never"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan[key] == count and len(plan.keys() & {"codes", "features"}) == 1


def test_arrays_need_no_cache(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(work / "waves.npy", np.zeros((4, 3, 2), dtype=np.float32))
    assert run(["cache", "mar-waves", "data.path=waves.npy", "--out", "never"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "arrays hold tokens already and need no cache" in lines[0], lines


NOT_SETTINGS = ("seed", "num", "data", "out", "features", "figures", "batch_size", "cache", "quiet", "fields", "pipe")


@pytest.mark.parametrize("name", NOT_SETTINGS)
def test_an_argument_of_an_evaluation_is_no_setting(name: str) -> None:
    with pytest.raises(UsageError, match=f"^set: '{name}' is no setting of sampling"):
        fields(["guidance_scale=2", f"{name}=1"])


def test_a_setting_is_given_once() -> None:
    assert fields(["guidance_scale=2", "order=halton"], ["temperature"]) == {"guidance_scale": 2, "order": "halton"}
    for given, elsewhere in ((["temperature=1", "temperature=2"], []), (["temperature=1"], ["temperature"])):
        with pytest.raises(UsageError, match=r"^set: temperature is given twice; leave one out$"):
            fields(given, elsewhere)


def test_an_evaluation_refuses_its_own_arguments_in_one_line(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of both verbs, before anything is written."""
    end = ["--data", "digits", "--num", "100", "--features", "pixels", "--out", "never"]
    for words in (["evaluate", "random", "--set", "seed=3"], ["sweep", "random", "temperature=1,2", "--set", "seed=3"]):
        assert run([*words, *end]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: set: 'seed' is no setting"), lines
        assert not (work / "never").exists()


@pytest.mark.usefixtures("work")
def test_an_empty_name_of_a_tokenizer_is_not_the_current_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "mar-digits", "tokenizer={from: ''}", "--dry-run", "--out", "never"]) == 2
    assert "tokenizer.from: '' is not allowed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["demo", "--out", "never"],
        ["edit", "codes", "image.png", "--mask", "mask.png", "--out", "never"],
        ["convert", "kl16", "kl16.ckpt", "never"],
        ["export", "mar", "random", "never.safetensors"],
    ],
)
def test_what_one_process_does_is_refused_in_several(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """They would all write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert run(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {words[0]}: is the work of one process, and 3 were started")
    assert not list(work.glob("never*"))
