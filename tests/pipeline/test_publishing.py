"""`from_pretrained`, `save_pretrained` and `push_to_hub`, with a double of the hub's client."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from helpers import make_bundle

import seriatim
from seriatim.checkpoints.native import save_bundle
from seriatim.core.errors import ResourceError, UsageError
from seriatim.pipeline.pipeline import Pipeline

FEW: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "num_diffusion_steps": 3}


class Hub:
    """Stands for huggingface_hub.HfApi: repositories are folders."""

    root: Path
    calls: list[dict[str, Any]]
    broken = False

    def __init__(self, token: str | bool | None = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, **given: Any) -> Any:
        if self.broken:
            raise OSError("401 Client Error:\nUnauthorized")
        name = repo_id if "/" in repo_id else f"me/{repo_id}"
        (self.root / name).mkdir(parents=True, exist_ok=given["exist_ok"])
        self.calls.append({"verb": "create_repo", "token": self.token, **given})
        return type("RepoUrl", (), {"repo_id": name})

    def file_exists(self, repo_id: str, filename: str, **_: Any) -> bool:
        return (self.root / repo_id / filename).exists()

    def upload_folder(self, *, repo_id: str, folder_path: Path, ignore_patterns: list[str] | None, **given: Any) -> Any:
        ignore = shutil.ignore_patterns(*(ignore_patterns or []))
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True, ignore=ignore)
        self.calls.append({"verb": "upload_folder", "token": self.token, **given})
        proposal = f"https://hub/{repo_id}/discussions/1" if given["create_pr"] else None
        return type("CommitInfo", (), {"commit_url": f"https://hub/{repo_id}/commit/1", "pr_url": proposal})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    class Mine(Hub):
        root = tmp_path / "hub"
        calls: list[dict[str, Any]] = []  # noqa: RUF012

    monkeypatch.setattr(huggingface_hub, "HfApi", Mine)
    return Mine


def same(one: Pipeline, other: Pipeline) -> bool:
    first, second = (np.asarray(pipe(["dog"], **FEW).images[0]) for pipe in (one, other))
    return np.array_equal(first, second)


def test_a_saved_model_is_the_same_and_has_a_card(tmp_path: Path) -> None:
    pipe = Pipeline(make_bundle(), device="cpu")
    folder = pipe.save_pretrained(tmp_path / "my-model")
    again = Pipeline.from_pretrained(folder, device="cpu", prepare=False)
    assert isinstance(again, Pipeline) and not again.owned and same(pipe, again)
    assert seriatim.load(folder, device="cpu").owned
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: seriatim\n") and "# my-model" in card
    assert "8x8 pixels" in card and "cat, dog, horse" in card and "- head: Diffusion" in card


def test_the_python_of_a_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    card = (Pipeline(make_bundle()).save_pretrained("m") / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].replace("path/to/this/folder", "m")
    exec(code, {})
    assert (tmp_path / "image.png").is_file()


def test_a_card_that_people_wrote_is_kept(tmp_path: Path) -> None:
    folder = save_bundle(make_bundle(), tmp_path / "m", card="# Ours\n")
    pipe = seriatim.load(folder, device="cpu")
    assert (pipe.save_pretrained(tmp_path / "copy") / "README.md").read_text() == "# Ours\n"
    (folder / "README.md").write_text("# Edited\n")
    assert (pipe.save_pretrained(folder) / "README.md").read_text() == "# Edited\n"
    assert (pipe.save_pretrained(folder, card="# New\n") / "README.md").read_text() == "# New\n"


def test_nothing_else_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "README.md").write_text("mine")
    with pytest.raises(UsageError, match="folder: "):
        Pipeline(make_bundle()).save_pretrained(tmp_path / "letters")
    assert (tmp_path / "letters" / "README.md").read_text() == "mine"


def test_pushed_models_can_be_loaded(hub: type[Hub]) -> None:
    pipe = Pipeline(make_bundle(), device="cpu")
    assert pipe.push_to_hub("me/mine", private=True) == "https://hub/me/mine/commit/1"
    made, sent = hub.calls
    assert made["private"] is True and made["token"] is None and sent["token"] is None, "no token but the user's own"
    assert sent["revision"] is None and sent["create_pr"] is False and sent["commit_message"]
    assert same(pipe, Pipeline.from_pretrained(hub.root / "me" / "mine", device="cpu"))
    assert "seriatim.load('me/mine')" in (hub.root / "me" / "mine" / "README.md").read_text()


def test_a_card_in_the_repository_is_left(hub: type[Hub]) -> None:
    card = hub.root / "me" / "mine" / "README.md"
    card.parent.mkdir(parents=True)
    card.write_text("# Written on the hub\n")
    pipe = Pipeline(make_bundle())
    assert pipe.push_to_hub("mine", token="t", branch="b", create_pr=True).endswith("/discussions/1")
    assert card.read_text() == "# Written on the hub\n" and hub.calls[-1]["revision"] == "b"
    assert {call["token"] for call in hub.calls} == {"t"}
    pipe.push_to_hub("mine", card="# Given\n")
    assert card.read_text() == "# Given\n"


@pytest.mark.parametrize("name", ["", "a/b/c", "../x", "me/mine@main", "hf://me/mine"])
def test_a_name_that_is_none_is_refused_before_anything_is_done(hub: type[Hub], name: str) -> None:
    with pytest.raises(UsageError, match="repo_id: "):
        Pipeline(make_bundle()).push_to_hub(name)
    assert not hub.calls


def test_what_the_hub_refuses_is_one_line(hub: type[Hub]) -> None:
    hub.broken = True
    with pytest.raises(ResourceError, match=r"'me/mine' could not be written .*401 Client Error: Unauthorized") as told:
        Pipeline(make_bundle()).push_to_hub("me/mine")
    assert "\n" not in str(told.value)
