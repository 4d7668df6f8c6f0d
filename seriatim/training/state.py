"""Checkpoints of a run: all that resuming needs, whole or absent.

    RUN/checkpoints/000000123456/     one for each save, named by the images seen
        config.json                   of a generator: what a model folder's says
        model.safetensors             weights
        average.safetensors           averaged weights
        optimiser.safetensors         the optimiser's moments, by the names of the parameters
        tokenizer.safetensors         statistics of the tokens
        state.json                    images seen, updates, loss, running sums of the metrics
        manifest.json                 bytes and sha256 of these

Random state is not among them: every draw of a run is a function of its seed and the number of images seen.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from seriatim.checkpoints.native import check_finite_weights, fill, read_tensors, write_config, write_tensors
from seriatim.checkpoints.renames import FORMAT, READABLE, in_order_of_format_1
from seriatim.checkpoints.unfinished import CONFIG, FILES, STATE, all_checkpoints
from seriatim.core.errors import CheckpointError, one_line
from seriatim.core.files import atomic_folder, verify_manifest, write_json, write_manifest


@dataclass
class RunState:
    """Where a run stands."""

    seen: int = 0  # images
    steps: int = 0
    loss: float | None = None  # of the last line of metrics
    dtype: str = "float32"  # of the autocast
    threads: int = 1  # of the CPU
    sums: dict[str, float] = field(default_factory=dict)  # of the metrics since their last line
    since: int = 0  # images seen at that line
    steps_since: int = 0
    recent: float | None = None  # logarithm of the loss, a mean over about the last hundred steps
    position: list[int] = field(default_factory=lambda: [0, 0])  # of a stream: passes, rows since


@dataclass(frozen=True)
class Trainables:
    """What a checkpoint holds besides numbers."""

    model: nn.Module
    average: AveragedModel
    optimiser: torch.optim.Optimizer
    tokenizer: nn.Module = field(default_factory=nn.Identity)  # a classifier has none


def save(folder: Path, parts: Trainables, state: RunState, config: Mapping[str, Any] | None = None) -> Path:
    """Write the checkpoint of `state.seen` images; with the `config` of its model it can be used without the run."""
    check_finite_weights(parts.model, "model")
    check_finite_weights(parts.average.module, "average")
    path = folder / f"{state.seen:012d}"
    with atomic_folder(path) as temporary:
        write_tensors(temporary / "model.safetensors", parts.model.state_dict())
        write_tensors(temporary / "average.safetensors", parts.average.module.state_dict())
        write_tensors(temporary / "optimiser.safetensors", moments(parts))
        write_tensors(temporary / "tokenizer.safetensors", parts.tokenizer.state_dict())
        write_json(temporary / STATE, {"format": FORMAT, **vars(state)})
        if config is not None:
            write_config(temporary, config)
        write_manifest(temporary, FILES if config is None else (CONFIG, *FILES))
    return path


def names_of(parts: Trainables, written: int = FORMAT) -> list[str]:
    """The name of each parameter of the optimiser, in the order that it had when `written` was the format."""
    name_of = {id(parameter): name for name, parameter in parts.model.named_parameters()}
    groups = [[name_of[id(p)] for p in group["params"]] for group in parts.optimiser.param_groups]
    return [name for group in groups for name in (in_order_of_format_1(group) if written == 1 else group)]


def moments(parts: Trainables) -> dict[str, Tensor]:
    """The optimiser's tensors as `<parameter>.<moment>`."""
    names, state = names_of(parts), parts.optimiser.state_dict()["state"]
    return {
        f"{names[number]}.{moment}": torch.as_tensor(value)
        for number, values in state.items()
        for moment, value in values.items()
    }


def read_moments(path: Path, parts: Trainables, written: int) -> dict[int, dict[str, Tensor]]:
    """The optimiser's state as `load_state_dict` takes it, from a file of format `written`."""
    now, then = {name: number for number, name in enumerate(names_of(parts))}, names_of(parts, written)
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(path).items():
        name, _, moment = key.rpartition(".")
        if written == 1:
            name = then[int(name)] if name.isdigit() and int(name) < len(then) else key
        if name not in now:
            raise CheckpointError(f"{path} has an unknown tensor {key!r}: it is another model's optimiser")
        state.setdefault(now[name], {})[moment] = tensor
    return state


def load(path: Path, parts: Trainables) -> RunState:
    """Read a checkpoint into `parts`; raises CheckpointError, before anything changes, where a file is not whole."""
    verify_manifest(path, FILES)
    try:
        values = json.loads((path / STATE).read_text(encoding="utf-8"))
        written = values.pop("format")
        if written not in READABLE:
            raise ValueError(f"format {written!r} is not {FORMAT}: it was written by another version")
        state = RunState(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path / STATE} cannot be used: {one_line(error)}") from error
    optimiser_state = parts.optimiser.state_dict()
    state_of_each = read_moments(path / "optimiser.safetensors", parts, written)
    fill(parts.model, path / "model.safetensors", assign=False, written=written)
    fill(parts.average.module, path / "average.safetensors", assign=False, written=written)
    fill(parts.tokenizer, path / "tokenizer.safetensors", assign=False)
    parts.average.n_averaged.fill_(state.steps)
    parts.optimiser.load_state_dict({"state": state_of_each, "param_groups": optimiser_state["param_groups"]})
    return state


def best_of(folder: Path) -> Path | None:
    """The checkpoint with the lowest loss."""
    losses = []
    for path in all_checkpoints(folder):
        try:
            loss = json.loads((path / STATE).read_text(encoding="utf-8")).get("loss")
        except (OSError, ValueError):
            continue
        if isinstance(loss, float):
            losses.append((loss, path))
    return min(losses)[1] if losses else None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best; call it after the new one is on the disk."""
    checkpoints = all_checkpoints(folder)
    kept = {*checkpoints[-max(1, keep) :], best_of(folder)}
    for path in checkpoints:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete what a killed run left half-written."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(".") and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
