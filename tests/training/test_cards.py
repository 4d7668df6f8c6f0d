"""Names and texts of others in pages, tables, figures and suggested commands stay text."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from seriatim.cli.output import print_json, print_table
from seriatim.core.markdown import block, inline
from seriatim.core.terminal import say
from seriatim.evaluation.rows import safe
from seriatim.training.config import read_recipe
from seriatim.training.data import ImageData
from seriatim.training.log import MetricsLog, loss_curve, model_card

NASTY = [
    "`rm -rf ~`", "$(touch canary)", "a; touch canary", "a' && touch canary '", 'a" && touch canary "', "--out=/etc",
    "<script>alert(1)</script>", "[x](javascript:1)", "![x](http://a/b.png)", "# heading", "| a | b |", "```\nend",
    "a\nb", "\x1b[31mred", "\x9b2J", "\u202egnp.exe", "*b* _i_ ~s~", "-x", "&lt;", "$x_$", "{{jinja}}", "---",
]  # fmt: skip


class Data(ImageData):
    count, size, channels = 3, (8, 8), 1

    def __init__(self, names: list[str]) -> None:
        self.class_names = names

    def labels(self, index: Tensor) -> Tensor:
        return index


@pytest.mark.parametrize("name", NASTY)
def test_a_model_card_holds_names_as_text(name: str) -> None:
    recipe = read_recipe("mar-digits").model_copy(update={"description": f"{name}\n\n# more {name}"})
    card = model_card(recipe, 10, 20, [{"images": 10, "loss": 1.5}], Data([name, "other"]))
    header, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert set(yaml.safe_load(header)) == {"library_name", "pipeline_tag", "tags"}
    prose = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", body, flags=re.S | re.M)  # without the blocks of code
    assert prose.count("\n#") == 2, "a title and one heading"
    unescaped = re.sub(r"\\.", "", prose)
    assert not set("`<>|*[]") & set(unescaped), unescaped
    assert "\x1b" not in card and "\x9b" not in prose and "\u202e" not in prose
    command = next(line for line in card.splitlines() if line.startswith("seriatim sample"))
    words = shlex.split(command if "\n" not in name else card[card.index(command) : card.index(" --out samples")])
    assert words[3] == f"--label={name if name.isprintable() else 'other'}" and len(words) in (4, 6)
    python = re.search(r"class_labels=\[(.*?)\], seed=0\)", card)
    assert python is not None
    compile(python[1], "card", "eval")


@pytest.mark.parametrize("name", NASTY)
def test_tables_and_lines(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "\n" not in safe(name) and not re.search(r"(?<!\\)[|`<]", safe(name)), "a cell that nothing in it ends"
    print_table(("a", "b"), [(name, "x")])
    print_json({"a": name})
    say(name)
    said = capsys.readouterr()
    assert not set("\x1b\x9b\u202e") & set(said.out + said.err) and len(said.err.splitlines()) == 1
    assert json.loads(said.out[said.out.index("{\n") :]) == {"a": name}


def test_markdown_of_ordinary_text_is_that_text() -> None:
    assert inline("A small model, 8x8 (digits); 3.5 M.") == "A small model, 8x8 (digits); 3.5 M."
    assert block("a: 1\n", "yaml") == "```yaml\na: 1\n```"
    assert block("a ```` b", "").splitlines()[0] == "`````"


def test_figures_take_any_title(tmp_path: Path) -> None:
    loss_curve([{"images": 1, "loss": 2.0}], tmp_path / "a.png", "$x_$ and $\\nosuch{$")
    rows: list[dict[str, Any]] = [{"images": 1}, {"images": 2, "loss": 1.0}, {"images": 3, "loss": 0.5, "loss_vb": 0.1}]
    loss_curve(rows, tmp_path / "b.png")  # lines of several versions
    loss_curve([], tmp_path / "c.png")


def test_damaged_lines_of_metrics_are_kept_aside(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [{"images": 10 * i, "loss": 1.0} for i in range(1, 4)]
    good = [json.dumps(row) for row in rows]
    file.write_bytes("\n".join([good[0], "[1]", good[1], "\\xff", good[2], '{"images": 4']).encode())
    raw = file.read_bytes()
    with pytest.warns(UserWarning, match="2 damaged lines are left out"):
        log = MetricsLog(file, seen=20)
    assert log.rows == rows[:2] and (tmp_path / "metrics.damaged.jsonl").read_bytes() == raw
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows[:2]
