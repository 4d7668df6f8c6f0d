"""`training.freeze`: what is frozen stays, has no optimiser state, and resumes bitwise."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from seriatim.checkpoints.unfinished import all_checkpoints
from seriatim.core.errors import ConfigError
from seriatim.training.config import Recipe, read_recipe
from seriatim.training.loop import train
from seriatim.training.setup import build

TINY = [
    "model.width=16", "model.depth=2", "model.heads=2", "model.dropout=0.1", "model.head.width=16",
    "model.head.depth=1", "training.images=64", "training.batch_size=16", "training.save_images=16",
    "training.keep=9", "training.dtype=float32", "training.threads=1",
]  # fmt: skip


def tiny(*overrides: str) -> Recipe:
    return read_recipe("mar-digits", [*TINY, *overrides])


def newest(run: Path) -> Path:
    return all_checkpoints(run / "checkpoints")[-1]


@pytest.mark.parametrize(
    "patterns", [["backbone.*"], ["head.*", "conditioner.*"], ["*.bias"], ["*"], ["backbone.token_embed.weight"]]
)
@pytest.mark.parametrize("decay", [0.02, 0.5])
def test_frozen_parameters_stay_and_the_rest_trains(tmp_path: Path, patterns: list[str], decay: float) -> None:
    recipe = tiny(f"training.freeze=[{', '.join(map(repr, patterns))}]", f"training.weight_decay={decay}")
    if patterns == ["*"]:
        with pytest.raises(ConfigError, match=r"^training\.freeze: \* match all \d+ parameters, so that nothing would"):
            train(recipe, tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()
        return
    before = {name: tensor.clone() for name, tensor in build(tiny())[2].state_dict().items()}
    train(recipe, tmp_path / "run", quiet=True)
    moments = {name.rpartition(".")[0] for name in load_file(newest(tmp_path / "run") / "optimiser.safetensors")}
    frozen = {name for name in before if any(fnmatchcase(name, pattern) for pattern in patterns)}
    assert frozen and not frozen & moments and moments
    for file in ("checkpoints", "model"):
        path = newest(tmp_path / "run") / "average.safetensors" if file == "checkpoints" else None
        after = load_file(path or tmp_path / "run" / "model" / "model.safetensors")
        for name in frozen:
            assert torch.equal(after[name], before[name]), name
        moved = {name for name in moments if not torch.equal(after[name], before[name])}
        # A fresh head ends in zeros, so while it is frozen nothing before it gets a gradient; weights still decay.
        assert moved == moments if "head.*" not in patterns else moved


def test_resuming_is_bitwise(tmp_path: Path) -> None:
    settings = ["training.freeze=['backbone.encoder*', head.*]"]
    train(tiny(*settings), tmp_path / "whole", quiet=True)
    train(tiny(*settings, "training.images=32"), tmp_path / "parts", quiet=True)
    train(tiny(*settings), tmp_path / "parts", resume=True, quiet=True)
    for name in ("model", "average", "optimiser"):
        one, two = (load_file(newest(tmp_path / run) / f"{name}.safetensors") for run in ("whole", "parts"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name
    for other in ("training.freeze=[head.*]", "training.freeze=[]"):
        with pytest.raises(ConfigError, match=r"^training\.freeze: \['backbone\.encoder\*', 'head\.\*'\] in "):
            train(tiny(other, "training.images=96"), tmp_path / "parts", resume=True, quiet=True)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("hed.*", "did you mean 'head.*'"),
        ("backbone.*.wieght.x", "'backbone."),
        ("conditioner.class_embeding", "did you mean 'conditioner.class_embedding'"),
        ("", "allowed: backbone.*, conditioner.*, head.*, "),
        ("Head.*", "did you mean 'head.*'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path, pattern: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train(tiny(f"training.freeze=[head.*, {pattern!r}]"), tmp_path / "run", quiet=True)
    message = str(caught.value)
    assert message.startswith(f"training.freeze: no parameter matches {pattern!r}; ") and hint in message
    assert "\n" not in message and not (tmp_path / "run").exists()


def test_a_dry_run_finds_it_too(seriatim: Any) -> None:
    done = seriatim("train", "mar-digits", *TINY, "training.freeze=[nothing.*]", "--dry-run")
    assert done.returncode == 2 and "training.freeze: no parameter matches 'nothing.*'" in done.stderr
    done = seriatim("train", "mar-digits", *TINY, "training.trackers=[wonder]", "--dry-run")
    assert done.returncode == 2 and "training.trackers: 'wonder' is not known" in done.stderr
    done = seriatim("train", "mar-digits", *TINY, "training.init_from=nowhere/at/all", "--dry-run")
    assert done.returncode in (2, 4) and "nowhere/at/all" in done.stderr and "\n" not in done.stderr.strip()
