"""A label is a name in any Unicode form or a number, the same from Python and the command line, and never a guess."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
from helpers import make_bundle

from seriatim.checkpoints.native import save_bundle
from seriatim.cli.main import run
from seriatim.core.errors import UsageError
from seriatim.core.names import as_text, find_name, match_names, printable, twins
from seriatim.pipeline.labels import class_number, label_of
from seriatim.pipeline.pipeline import Pipeline

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
FORMS: tuple[Form, ...] = get_args(Form)
MONTHS = [str(month) for month in range(1, 13)]
SORTED = sorted(MONTHS)  # as folders are: 1, 10, 11, 12, 2, ...


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("theirs", FORMS[:2])
def test_a_name_is_found_in_any_normal_form(form: Form, theirs: Form) -> None:
    names = [unicodedata.normalize(theirs, name) for name in ("café", "ÅLAND", "thé", "fish", "가나", "zoo")]
    for place, name in enumerate(names):
        assert class_number(unicodedata.normalize(form, name), len(names), names) == place
    assert class_number("\ufb01sh", 6, names) == 3 and class_number("\u212bLAND", 6, names) == 1
    with pytest.raises(UsageError, match=r"'cafe' is not a class of this model; did you mean 'caf"):
        class_number("cafe", 6, names)


def test_names_that_differ_in_form_alone_are_told_apart_or_refused() -> None:
    names = ["e\u0301", "\u00e9", "fish"]
    assert class_number("e\u0301", 3, names) == 0 and class_number("\u00e9", 3, names) == 1
    names = ["\u1e9b\u0323", "\u017f\u0323\u0307", "s\u0323\u0307"]  # of one look each, in three spellings
    with pytest.raises(UsageError, match=r"ambiguous: the class named .*number:0\) or the class named .*number:1\)"):
        class_number("\u017f\u0307\u0323", 3, names)


@pytest.mark.parametrize("names", [MONTHS, SORTED, ["02", "01", "2b"], ["\uff12", "x"]])
def test_digits_mean_the_same_as_text_and_as_a_number(names: list[str]) -> None:
    """Where both readings are classes that differ, both are named and neither is taken."""
    for value in range(-1, 14):
        outcomes = []
        for label in (value, str(value)):
            try:
                outcomes.append(("class", class_number(label, len(names), names)))
            except UsageError as error:
                outcomes.append((str(error), -1))
        assert outcomes[0] == outcomes[1]
        named = [place for place, name in enumerate(names) if name.isdecimal() and int(name) == value]
        numbered = [value] if 0 <= value < len(names) else []
        what, place = outcomes[0]
        if len({*named, *numbered}) == 1:
            assert (what, place) == ("class", [*named, *numbered][0])
        elif named and numbered:
            assert f"the class named {names[named[0]]!r} (number:{named[0]})" in what
            assert f"class number {value}, named {names[value]!r} (number:{value})" in what
        else:
            assert "out of range; this model has classes 0 to" in what


def test_the_way_out_of_two_readings() -> None:
    for place in range(12):
        assert class_number(f"number:{place}", 12, SORTED) == place
        assert class_number(label_of(place, SORTED), 12, SORTED) == place
    assert class_number("02", 3, ["02", "01", "x"]) == 0, "nobody writes a number so"
    assert [label_of(i, [str(i) for i in range(10)]) for i in range(10)] == list(range(10))
    assert class_number("none", 2, ["none", "x"]) == 0 and class_number("none", 2, ["y", "x"]) == -1
    for label in ("number:", "number:x", "number:1.0", "number:12", "9" * 5000, "-" + "9" * 5000, 10**30, "١٢٣"):
        with pytest.raises(UsageError, match=r"^class_labels: ") as caught:
            class_number(label, 12, SORTED)
        assert len(str(caught.value)) < 200


@pytest.fixture
def months(tmp_path: Path) -> Path:
    bundle = make_bundle(classes=12)
    bundle.class_names[:] = SORTED
    return save_bundle(bundle, tmp_path / "model")


def test_python_and_the_command_line_agree(months: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from seriatim.pipeline.loading import load

    pipe = load(months, device="cpu")
    few: dict[str, Any] = {"num_inference_steps": 1, "num_diffusion_steps": 2, "seed": 1}
    shown = ["--num-inference-steps", "1", "--num-diffusion-steps", "2", "--seed", "1"]
    for label in (2, 12, "12", "2", 0, "number:4"):
        try:
            names: Any = pipe(class_labels=[label], **few).labels
        except UsageError as error:
            names = str(error)
        capsys.readouterr()
        out = tmp_path / f"out-{type(label).__name__}-{label}"
        code = run(["sample", str(months), "--label", str(label), *shown, "--out", str(out), "--json"])
        said = capsys.readouterr()
        if code == 0:
            assert json.loads(said.out)["images"] == 1 and list(out.glob(f"0000-{names[0]}.png"))
        else:
            assert code == 2 and said.err == f"error: {names}\n" and "is ambiguous" in names
    every = pipe(class_labels=[label_of(i, pipe.class_names) for i in range(12)], **few)
    assert every.labels == SORTED, "each class has a label that no other one has"
    assert pipe(**few).labels == [None], "no class, when none is named"
    file = tmp_path / "out-str-number:4" / f"0000-{SORTED[4]}.png"
    assert run(["sample", str(months), "--from", str(file), "--out", str(tmp_path / "again")]) == 0


def test_names_for_people() -> None:
    assert as_text("caf\udce9") == "caf\\xe9" and as_text("日本 é\n") == "日本 é\n"
    assert printable("a\nb\x1b[2J\x7f\u2028\u202e\udcff é日本") == "a\\nb\\x1b[2J\\x7f\\u2028\\u202e\\xff é日本"
    assert find_name("b", ["a", "b", "b"]) == [1] and find_name("x", ["a"]) == []
    assert match_names(["é", "a"], ["a", "e\u0301"]) == [1, 0] and match_names(["a", "b"], ["a", "c"]) is None
    assert match_names(["a", "a"], ["a", "b"]) is None and match_names(["a"], ["a", "b"]) is None
    assert list(twins(["a", "fish", "\ufb01sh"])) == [("fish", "\ufb01sh")] and not list(twins(["a", "b"]))


def test_a_label_of_bytes_that_are_not_utf8() -> None:
    bundle = make_bundle(classes=2)
    bundle.class_names[:] = ["b", as_text(os.fsdecode(b"caf\xe9"))]
    pipe = Pipeline(bundle, device="cpu")
    result = pipe(
        class_labels=[os.fsdecode(b"caf\xe9"), "caf\\xe9"], seed=0, num_inference_steps=1, num_diffusion_steps=1
    )
    assert result.labels == ["caf\\xe9", "caf\\xe9"]
