"""`~` in a path that a recipe or a caller gives, for users with a home and without one."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path

import pytest
from helpers import TINY_RUN
from processes import command

from seriatim import load
from seriatim.core.cache_folder import VARIABLE, cache_folder
from seriatim.core.errors import ResourceError
from seriatim.core.files import expanded

NOBODY = "~no-such-user-here/photos"


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user that the system has no entry for, as where a container is started under any number."""

    def unknown(_: object) -> None:
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME", VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("homeless")
def test_a_path_without_a_home_stays_as_it_is() -> None:
    assert expanded("~/photos") == Path("~/photos")
    assert expanded(NOBODY) == Path(NOBODY)


@pytest.mark.usefixtures("homeless")
def test_caches_of_a_user_without_a_home_are_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert cache_folder().parent == tmp_path and cache_folder().stat().st_mode & 0o077 == 0
    cache_folder().rmdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"seriatim-{os.getuid()}").symlink_to("theirs")  # what it leads to is read by whoever made it
    with pytest.raises(ResourceError, match=f"set {VARIABLE} to a folder of your own"):
        cache_folder()


def test_names_of_models_may_begin_with_the_home(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/model").model.tokens == load(model_folder).model.tokens
    shutil.copytree(model_folder, tmp_path / "run" / "model")
    assert load("~/run").model.tokens == load(model_folder).model.tokens


@pytest.mark.parametrize("setting", ["data.path", "training.init_from", "training.evaluate_features", "tokenizer.from"])
def test_a_path_of_an_unknown_user_is_one_line(setting: str, tmp_path: Path) -> None:
    more = {"data.path": ["data.kind=folder"], "training.evaluate_features": ["training.evaluate_images=100"]}
    given = [*TINY_RUN, f"{setting}={NOBODY}", *more.get(setting, [])]
    code, lines = command("train", "mar-digits", *given, "--out", str(tmp_path / "run"))
    assert code in (2, 3, 4) and "a bug" not in lines[-1] and NOBODY in lines[-1], lines
    assert not (tmp_path / "run").exists()
