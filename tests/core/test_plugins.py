"""Plug-ins from Python: what is registered, refused and taken back."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from plugin_tables import kept_tables

import seriatim
from seriatim.core import plugins
from seriatim.core.errors import ConfigError, UsageError
from seriatim.core.plugins import (
    TABLES,
    fault_of_plugin,
    load_installed_plugins,
    load_plugin,
    loaded_plugins,
    plugin_changes,
)
from seriatim.core.settings import Settings
from seriatim.models.build import build_model, model_config

ORDER = 'import seriatim\nseriatim.ORDERS["mine"] = lambda h, w: list(range(h * w))[::-1]\n'


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """The tables, the record of plug-ins and the modules are as before, after each test."""
    modules, path = set(sys.modules), list(sys.path)
    with kept_tables():
        yield
    for name in set(sys.modules) - modules:
        if name.startswith(("plugin_", "packaged_part")):
            del sys.modules[name]
    assert sys.path == path, "the folder of a plug-in is not left on the path"


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_is_run_once_and_again_when_it_has_changed(tmp_path: Path) -> None:
    counted = ORDER + "import os\nos.environ['RUNS'] = str(int(os.environ['RUNS']) + 1)\n"
    path = written(tmp_path / "mine.py", counted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", "0")
        first = load_plugin(path)
        assert load_plugin(str(path)) is first
        assert seriatim.ORDERS["mine"](2, 2) == [3, 2, 1, 0]
        (told,) = loaded_plugins()
        assert told["path"] == str(path) and len(told["sha256"]) == 64 and told["registers"] == ["order mine"]
        assert plugin_changes([told]) == []
        path.write_text(counted.replace("[::-1]", ""))  # in the same second
        load_plugin(path)
        assert seriatim.ORDERS["mine"](2, 2) == [0, 1, 2, 3]
        assert len(loaded_plugins()) == 1
        (change,) = plugin_changes([told])
        assert change.startswith(f"plug-in mine.py from sha256 {told['sha256'][:12]} to sha256 ")
        del seriatim.ORDERS["mine"]
        load_plugin(path)  # what it registers is gone, so it is needed again
        assert "mine" in seriatim.ORDERS
        import os

        assert os.environ["RUNS"] == "3"
    assert not (tmp_path / "__pycache__").exists()


def test_modules_beside_the_file_are_found(tmp_path: Path) -> None:
    written(tmp_path / "packaged_part_beside.py", "def backwards(h, w):\n    return list(range(h * w))[::-1]\n")
    text = 'import seriatim\nfrom packaged_part_beside import backwards\nseriatim.ORDERS["mine"] = backwards\n'
    load_plugin(written(tmp_path / "mine.py", text))
    assert seriatim.ORDERS["mine"](1, 3) == [2, 1, 0]


BAD = [
    ("raise ValueError('no\\nluck')", "failed in line 3: ValueError: no luck; SERIATIM_DEBUG=1"),
    ("def broken(:", "failed in line 3: SyntaxError"),
    ("import no_such_library_here", "failed in line 3: ModuleNotFoundError: No module named 'no_such_library_here'"),
    ("import sys; sys.exit(3)", r"failed in line 3: it calls exit\(\)"),
    ("seriatim.HEADS['diffusion'] = seriatim.HEADS['flow']", "replaces the head 'diffusion', which exists already"),
    ("del seriatim.TOKENIZERS['pixels']", "removes the tokenizer 'pixels'"),
    ("seriatim.HEADS['new'] = int", "as the head 'new'; HEADS holds subclasses of seriatim.heads.base.Head"),
    ("seriatim.GUIDANCE_SCHEDULES['new'] = 3", "registers 3 as the guidance schedule 'new'.*holds functions"),
    ("seriatim.ORDERS[3] = max", "registers the order 3 in ORDERS; its name must be a text"),
]


@pytest.mark.parametrize("line, says", BAD, ids=[says for _, says in BAD])
def test_what_is_wrong_is_one_line_and_leaves_nothing(tmp_path: Path, line: str, says: str) -> None:
    before = [dict(table.content()) for table in TABLES]
    with pytest.raises(UsageError, match=rf"^plugin: .*mine\.py .*{says}") as caught:
        load_plugin(written(tmp_path / "mine.py", ORDER + line))
    assert "\n" not in str(caught.value)
    assert [dict(table.content()) for table in TABLES] == before
    assert not loaded_plugins() and not [name for name in sys.modules if name.endswith("_mine")]


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.py does not exist; name a Python file"):
        load_plugin(tmp_path / "none.py")
    with pytest.raises(UsageError, match="is a folder; name a Python file, or install the package"):
        load_plugin(tmp_path)


def test_a_guidance_schedule_of_ones_own_is_followed() -> None:
    seriatim.GUIDANCE_SCHEDULES["late"] = lambda scale, unknown, tokens: scale if 2 * unknown < tokens else 1.0
    settings = Settings(guidance_schedule="late")
    assert [settings.guidance_at(3.0, unknown, 8) for unknown in (7, 4, 3, 0)] == [1.0, 1.0, 3.0, 3.0]


# --- conditioners -------------------------------------------------------------------------------------------------

CONDITIONER = """
import torch
import seriatim
from seriatim.conditions.base import Condition
from seriatim.conditions.classes import Classes


class Scaled(Classes):
    def __init__(self, classes, width, factor=1.0):
        super().__init__(classes, width)
        self.factor, self.config = factor, {"factor": factor}

    def forward(self, inputs, images):
        condition = super().forward(inputs, images)
        return Condition(condition.vectors * self.factor, names=condition.names)


seriatim.CONDITIONERS["scaled"] = Scaled
"""
SMALL: dict[str, Any] = {
    "kind": "masked", "tokens": 4, "dim": 2, "width": 8, "depth": 1, "heads": 2, "classes": 3,
    "head": {"kind": "mixture", "components": 2, "width": 8, "depth": 1},
}  # fmt: skip


def test_a_conditioner_of_ones_own_is_built_described_and_used(tmp_path: Path) -> None:
    module = load_plugin(written(tmp_path / "mine.py", CONDITIONER))
    model = build_model({**SMALL, "conditioner": {"kind": "scaled", "factor": 2.0}})
    assert type(model.conditioner) is module.Scaled and model.classes == 3
    config = model_config(model)
    assert config["conditioner"] == {"kind": "scaled", "factor": 2.0} and config["classes"] == 3
    again = build_model(config)
    again.load_state_dict(model.state_dict())
    labels = torch.tensor([0, 2])
    plain = torch.nn.functional.embedding(labels, model.conditioner.get_parameter("class_embedding"))
    assert torch.equal(again.condition(labels, 2).vectors[:, 0], 2 * plain)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"conditioner": {"kind": "scald"}}, "model.conditioner.kind: 'scald' is not known; .*--plugin FILE.py"),
        ({"conditioner": {"kind": "classes", "width": 4}}, "model.conditioner.width: follows from the model"),
        ({"conditioner": {"kind": "classes"}, "caption_dim": 4}, "model.conditioner: given with caption_dim"),
        ({"conditioner": 3}, "model.conditioner: 3 is not allowed; give a mapping"),
    ],
)
def test_conditioners_that_do_not_fit_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_model({**SMALL, **change})


# --- packages -----------------------------------------------------------------------------------------------------


def installed(folder: Path, module: str, text: str, value: str | None = None) -> None:
    """A package in `folder`, as an installer leaves it, whose entry point names `module`."""
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(text)
    info = folder / f"{module}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(f"[seriatim.plugins]\nparts = {value or module}\n")


def test_installed_packages_are_loaded_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path / "site", "packaged_part", ORDER)
    monkeypatch.syspath_prepend(tmp_path / "site")
    load_installed_plugins()
    load_installed_plugins()
    (told,) = loaded_plugins()
    entry = {"package": "packaged_part", "version": "1.5", "entry_point": "parts = packaged_part"}
    assert told == {**entry, "registers": ["order mine"]}
    assert plugin_changes([{**told, "version": "1.4"}]) == ["plug-in packaged_part from version 1.4 to version 1.5"]
    with pytest.raises(UsageError, match="replaces the order 'mine', which exists already"):
        load_plugin(written(tmp_path / "mine.py", ORDER))


@pytest.mark.parametrize(
    "text, value, says",
    [
        ("raise ImportError('half of it is missing')", None, "failed in line 1: ImportError: half of it is missing"),
        ("import seriatim\nseriatim.HEADS['flow'] = seriatim.HEADS['bins']", None, "replaces the head 'flow'"),
        (ORDER, "packaged_part_bad:Mine", "must name a module"),
    ],
)
def test_a_broken_package_is_a_warning_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, value: str | None, says: str
) -> None:
    installed(tmp_path / "site", "packaged_part_bad", text, value)
    monkeypatch.syspath_prepend(tmp_path / "site")
    heads = dict(seriatim.HEADS)
    for _ in range(2):  # a failure does not count as loaded the next time
        with pytest.warns(UserWarning, match=rf"^plugin: .*of the package packaged_part_bad 1\.5 .*{says}.*uninstall"):
            load_installed_plugins()
    assert seriatim.HEADS == heads and not loaded_plugins()


def test_nothing_is_looked_for_where_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda **_: ())
    monkeypatch.setattr(plugins, "registered", None)  # it imports every table, and so torch
    load_installed_plugins()


# --- faults and workers -------------------------------------------------------------------------------------------


def test_a_later_fault_names_the_file_and_line(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.py", "import seriatim\nseriatim.ORDERS['mine'] = lambda h, w: h / 0\n")
    load_plugin(path)
    with pytest.raises(ZeroDivisionError) as caught:
        seriatim.ORDERS["mine"](2, 2)
    assert fault_of_plugin(caught.value) == f"plugin: {path} failed in line 2"
    with pytest.raises(KeyError) as other:
        _ = dict[str, int]()["x"]
    assert fault_of_plugin(other.value) is None


DATA = """
import seriatim
from seriatim.data.base import Digits
from seriatim.data.sources import DATASETS


class Mine(Digits):
    pass


DATASETS["mine"] = Mine
"""


def test_a_worker_that_was_not_forked_reads_data_of_a_plugin(tmp_path: Path) -> None:
    """As on macOS and Windows, where what a worker needs is pickled before it has loaded anything."""
    from seriatim.data.loader import Batches

    module = load_plugin(written(tmp_path / "mine.py", DATA))
    batches = Batches(module.Mine(), seed=1, first=0, total=8, batch_size=4)
    (tmp_path / "sent").write_bytes(pickle.dumps(batches))
    code = "import pickle, sys; b = pickle.load(open('sent', 'rb')); print(type(b.data).__name__, int(b[1].index[0]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["Mine", str(int(batches[1].index[0]))], done.stderr
