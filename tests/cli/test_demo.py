"""The demo's page: packaged models are drawn, every picture is inside, and words can't become markup."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from helpers import make_bundle
from PIL import Image

from seriatim.checkpoints import packaged
from seriatim.checkpoints.native import save_bundle
from seriatim.cli.demo import PACKAGED_EACH
from seriatim.cli.demo_page import Section, page
from seriatim.cli.main import run
from seriatim.core.images import read_png
from seriatim.evaluation.grid import save_png
from seriatim.evaluation.sheet import places_of
from seriatim.training.run_folder import OURS

INSIDE = re.compile(r'src="data:image/png;base64,([^"]+)"')


def pictures_in(text: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in INSIDE.findall(text)]


def test_packaged_models_are_drawn_into_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle()
    bundle.provenance["summary"] = "a toy of <b>three</b> classes"
    bundle.sampling = {"num_inference_steps": 2}
    save_bundle(bundle, tmp_path / "weights" / "toy")
    monkeypatch.setattr(packaged, "WEIGHTS", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    assert run(["demo", "--images", "64", "--out", "demo", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packaged"] == ["demo/packaged-toy.png"]
    places = places_of(read_png(tmp_path / "demo" / "packaged-toy.png"))
    assert places is not None and places.words == tuple(bundle.class_names) and len(places.lefts) == PACKAGED_EACH
    text = (tmp_path / "demo" / "index.html").read_text(encoding="utf-8")
    files = ("packaged-toy.png", "grid.png")  # so short a training has no curve
    assert [each.size for each in pictures_in(text)] == [read_png(Path("demo") / name).size for name in files]
    assert "a toy of &lt;b&gt;three&lt;/b&gt; classes" in text and "seriatim sample toy --label" in text
    assert all(OURS.fullmatch(name) for name in ("index.html", *files)), "the next demo may replace them"
    assert "recognised as the class asked for" in text and "http" not in text, "nothing is fetched"


def test_words_cannot_become_markup(tmp_path: Path) -> None:
    save_png(Image.new("RGB", (3, 2), "red"), tmp_path / "a.png")
    wild = '"><script>alert(1)</script>'
    text = page(wild, wild, [Section(wild, wild, tmp_path / "a.png", [(wild, wild)], wild)])
    assert "<script" not in text and text.count("&lt;script&gt;") == 9 and len(pictures_in(text)) == 1
