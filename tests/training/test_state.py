"""Checkpoints of a run: the optimiser's state goes by the names of parameters, and format 1 is still read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from seriatim.core.errors import CheckpointError
from seriatim.core.files import write_manifest
from seriatim.models.build import build_model, seeded
from seriatim.training.optim import adamw, averaged
from seriatim.training.state import FILES, STATE, RunState, Trainables, load, save

CONFIG = {
    "kind": "masked", "tokens": 4, "dim": 4, "width": 8, "depth": 1, "heads": 1, "classes": 2, "dropout": 0.0,
    "head": {
        "kind": "nested", "split": {"kind": "features"},
        "model": {"kind": "causal", "width": 8, "depth": 1, "heads": 1, "conditioning": "adaln",
                  "head": {"kind": "mixture", "components": 2, "depth": 0}},
    },
}  # fmt: skip


def parts(seed: int, updates: int) -> Trainables:
    """A model that nests, after so many updates."""
    with seeded(seed):
        model = build_model(CONFIG)
        tokens = torch.randn(3, 4, 4)
    optimiser = adamw(model, 0.01, (0.9, 0.95), 0.02)
    average = averaged(model, 0.9)
    for _ in range(updates):
        loss: torch.Tensor = model(tokens).mean
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        average.update_parameters(model)
    return Trainables(model, average, optimiser)


def by_name(of: Trainables) -> dict[str, torch.Tensor]:
    names = {id(p): name for name, p in of.model.named_parameters()}
    return {f"{names[id(p)]}.{k}": v for p, state in of.optimiser.state.items() for k, v in state.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_optimisers_state_is_kept_by_name(tmp_path: Path) -> None:
    trained, fresh = parts(0, 2), parts(1, 0)
    path = save(tmp_path, trained, RunState(seen=6, steps=2))
    assert same(load_file(path / "optimiser.safetensors"), by_name(trained))
    assert load(path, fresh) == RunState(seen=6, steps=2)
    assert same(by_name(fresh), by_name(trained)) and same(fresh.model.state_dict(), trained.model.state_dict())
    assert same(fresh.average.module.state_dict(), trained.average.module.state_dict())


def old_name(name: str) -> str:
    """As release 0.1 called a parameter of this model."""
    return name.replace("conditioner.", "").replace("head.model.", "head.")


def old_numbers(of: Trainables) -> dict[str, int]:
    """Release 0.1: parameters that decay, then the rest; inside the head first `head.head`, then `head.backbone`."""
    names = [name for name, _ in of.model.named_parameters()]
    names.sort(key=lambda name: name.startswith("head.model.backbone."))
    shapes = dict(of.model.named_parameters())
    names.sort(key=lambda name: shapes[name].ndim < 2 or name.startswith("head."))
    return {name: number for number, name in enumerate(names)}


def as_format_1(path: Path, of: Trainables) -> None:
    """Rewrite a checkpoint as release 0.1 would have written it."""
    numbers = old_numbers(of)
    for file in ("model", "average"):
        tensors = load_file(path / f"{file}.safetensors")
        save_file({old_name(name): tensor for name, tensor in tensors.items()}, path / f"{file}.safetensors")
    moments = {}
    for key, tensor in load_file(path / "optimiser.safetensors").items():
        name, _, moment = key.rpartition(".")
        moments[f"{numbers[name]}.{moment}"] = tensor
    save_file(moments, path / "optimiser.safetensors")
    state = json.loads((path / STATE).read_text())
    (path / STATE).write_text(json.dumps(state | {"format": 1}))
    write_manifest(path, FILES)


def test_a_checkpoint_of_format_1_is_read(tmp_path: Path) -> None:
    trained, fresh = parts(0, 2), parts(1, 0)
    path = save(tmp_path, trained, RunState(seen=6, steps=2))
    as_format_1(path, trained)
    load(path, fresh)
    assert same(by_name(fresh), by_name(trained)) and same(fresh.model.state_dict(), trained.model.state_dict())
    assert same(fresh.average.module.state_dict(), trained.average.module.state_dict())


def of_no_version(path: Path) -> None:
    state = json.loads((path / STATE).read_text())
    (path / STATE).write_text(json.dumps(state | {"format": 99}))


def moments_changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = load_file(path / "optimiser.safetensors")
        change(tensors)
        save_file(tensors, path / "optimiser.safetensors")

    return apply


NAME = "conditioner.no_class"
FAULTS: dict[str, tuple[int, Callable[[Path], None], str]] = {  # the format, what is done to it, what the line says
    "format": (2, of_no_version, "format 99"),
    "no such parameter": (
        2,
        moments_changed(lambda t: t.update({"backbone.nothing.step": torch.ones(())})),
        "an unknown tensor 'backbone.nothing.step'",
    ),
    "no such moment": (
        2,
        moments_changed(lambda t: t.update({f"{NAME}.momentum": torch.ones(1, 8)})),
        f"an unknown tensor '{NAME}.momentum'",
    ),
    "no moment": (2, moments_changed(lambda t: t.update({NAME: torch.ones(1, 8)})), f"an unknown tensor '{NAME}'"),
    "a number in format 2": (
        2,
        moments_changed(lambda t: t.update({"0.step": t.pop(f"{NAME}.step")})),
        "an unknown tensor '0.step'",
    ),
    "lacking": (2, moments_changed(lambda t: t.pop(f"{NAME}.exp_avg_sq")), f"lacks tensor '{NAME}.exp_avg_sq'"),
    "shape": (
        2,
        moments_changed(lambda t: t.update({f"{NAME}.exp_avg": torch.ones(8)})),
        f"tensor '{NAME}.exp_avg' has shape (8,)",
    ),
    "shape of the step": (
        2,
        moments_changed(lambda t: t.update({f"{NAME}.step": torch.ones(3)})),
        f"tensor '{NAME}.step' has shape (3,)",
    ),
    "dtype": (2, moments_changed(lambda t: t.update({f"{NAME}.exp_avg": torch.ones(1, 8).long()})), "is int64"),
    "not finite": (2, moments_changed(lambda t: t[f"{NAME}.exp_avg"].fill_(float("nan"))), "not finite"),
    "no such number": (1, moments_changed(lambda t: t.update({"999.step": torch.ones(())})), "'999.step'"),
    "no such moment of a number": (
        1,
        moments_changed(lambda t: t.update({"0.momentum": torch.ones(1, 8)})),
        "an unknown tensor '0.momentum'",
    ),
    "lacking of a number": (1, moments_changed(lambda t: t.pop("0.exp_avg")), f"lacks tensor '{NAME}.exp_avg'"),
    "shape of a number": (
        1,
        moments_changed(lambda t: t.update({"0.exp_avg": torch.ones(8)})),
        "tensor '0.exp_avg' has shape (8,)",
    ),
    "a digit that is none": (1, moments_changed(lambda t: t.update({"\u00b2.step": torch.ones(())})), "unknown tensor"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_does_not_fit_changes_nothing(tmp_path: Path, case: str) -> None:
    trained, fresh = parts(0, 1), parts(1, 0)
    path = save(tmp_path, trained, RunState(seen=3, steps=1))
    written, change, words = FAULTS[case]
    if written == 1:
        as_format_1(path, trained)
    change(path)
    write_manifest(path, FILES)
    before = {name: tensor.clone() for name, tensor in fresh.model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load(path, fresh)
    told = str(caught.value)
    assert words in told and "\n" not in told and str(path) in told
    assert same(fresh.model.state_dict(), before) and not fresh.optimiser.state
