"""Checkpoints of a run: all that resuming needs, whole or absent.

    RUN/checkpoints/000000123456/     one for each save, named by the images seen; damaged ones end in `.damaged`
        config.json                   of a generator: what a model folder's says
        model.safetensors             weights
        average.safetensors           averaged weights
        optimiser.safetensors         the optimiser's moments
        tokenizer.safetensors         statistics of the tokens
        state.json                    images seen, updates, loss, running sums of the metrics
        manifest.json                 bytes and sha256 of these

Random state is not among them: every draw of a run is a function of its seed and the number of images seen.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, StrictInt
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from seriatim.checkpoints.native import (
    as_wanted,
    check_finite_weights,
    fitting,
    read_tensors,
    write_config,
    write_tensors,
)
from seriatim.checkpoints.unfinished import CONFIG, FILES, STATE, all_checkpoints, why_not_whole
from seriatim.core import files
from seriatim.core.construct import MOST_THREADS
from seriatim.core.device import DTYPES
from seriatim.core.errors import CheckpointError
from seriatim.core.files import PREVIOUS, atomic_folder, put_back, verify_manifest, write_json, write_manifest
from seriatim.core.reading import Unreadable, read_json, read_or_raise
from seriatim.core.validation import Strict, parse

MOMENTS = {  # what each optimiser keeps of a parameter
    torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"},  # AdamW is a kind of it
    torch.optim.SGD: {"momentum_buffer"},
}
CHECKPOINT = re.compile(r"(\.[0-9]+\.previous|[0-9]+(\.damaged(-[0-9]+)?)?)")  # the names of their folders

Count = Annotated[StrictInt, Field(ge=0, lt=2**63)]


class RunState(Strict):
    """Where a run stands."""

    model_config = ConfigDict(frozen=False)

    seen: Count = 0  # images
    steps: Count = 0
    loss: float | None = None  # of the last line of metrics
    dtype: str = Field("float32", pattern=f"^({'|'.join(DTYPES)})$")  # of the autocast
    threads: StrictInt = Field(1, ge=1, le=MOST_THREADS)  # of the CPU
    sums: dict[str, float] = Field(default_factory=dict)  # of the metrics since their last line
    since: Count = 0  # images seen at that line
    steps_since: Count = 0
    recent: float | None = None  # logarithm of the loss, a mean over about the last hundred steps
    position: list[Count] = Field([0, 0], min_length=2, max_length=2)  # of a stream: passes, and rows since


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
        write_tensors(temporary / "optimiser.safetensors", dict(moments(parts.optimiser)))
        write_tensors(temporary / "tokenizer.safetensors", parts.tokenizer.state_dict())
        write_json(temporary / STATE, {"format": 1, **vars(state)})
        if config is not None:
            write_config(temporary, config)
        write_manifest(temporary, FILES if config is None else (CONFIG, *FILES))
    return path


def moments(optimiser: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The optimiser's tensors as `<parameter>.<name>`."""
    for number, values in optimiser.state_dict()["state"].items():
        for name, value in values.items():
            yield f"{number}.{name}", torch.as_tensor(value)


def load(path: Path, parts: Trainables) -> RunState:
    """Read a checkpoint into `parts`; raises CheckpointError, before anything changes, where a file is not whole."""
    verify_manifest(path, FILES)
    state = read_state(path / STATE)
    tensors = read_moments(path / "optimiser.safetensors", parts.optimiser)
    modules = {"model": parts.model, "average": parts.average.module, "tokenizer": parts.tokenizer}
    found = {name: fitting(module, path / f"{name}.safetensors") for name, module in modules.items()}
    for name, module in modules.items():
        module.load_state_dict(found[name])
    parts.average.n_averaged.fill_(state.steps)
    parts.optimiser.load_state_dict({"state": tensors, "param_groups": parts.optimiser.state_dict()["param_groups"]})
    return state


def read_state(path: Path) -> RunState:
    """Where the run stood; raises CheckpointError where the file does not say so."""
    values = read_or_raise(lambda: read_json(path, dict), path, CheckpointError, "delete this checkpoint")
    if values.pop("format", None) != 1:
        raise CheckpointError(f"{path} was written by another version of seriatim; resume with that one")
    state = parse(RunState, values, where=str(path), error=CheckpointError)
    if f"{state.seen:012d}" != path.parent.name:
        raise CheckpointError(f"{path} is of {state.seen} images, its folder of {path.parent.name}; delete this one")
    return state


def read_moments(path: Path, optimiser: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """The optimiser's tensors by parameter: for each that it has any of, all of them, in the parameter's shape."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    names = next(kept for kind, kept in MOMENTS.items() if isinstance(optimiser, kind))
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(path).items():
        number, _, name = key.partition(".")
        if not re.fullmatch(r"[0-9]{1,9}", number) or int(number) >= len(parameters) or name not in names:
            raise CheckpointError(f"{path} has an unknown tensor {key!r}: it is not this optimiser's")
        shape = torch.Size() if name == "step" else parameters[int(number)].shape
        wanted = torch.empty(shape, dtype=torch.float32, device="meta")
        found.setdefault(int(number), {})[name] = as_wanted(tensor, wanted, key, path)
    for index, given in found.items():
        lacking = sorted(names - given.keys())
        if lacking:
            raise CheckpointError(f"{path} lacks tensor '{index}.{lacking[0]}': it is not this optimiser's")
    return found


def best_of(folder: Path) -> Path | None:
    """The whole checkpoint with the lowest loss."""
    losses = []
    for path in all_checkpoints(folder):
        try:
            loss = read_json(path / STATE, dict).get("loss")
        except Unreadable:
            continue
        if isinstance(loss, float):
            losses.append((loss, path))
    return next((path for _, path in sorted(losses) if why_not_whole(path) is None), None)


def set_damaged_aside(folder: Path) -> list[str]:
    """Rename the checkpoints that are newer than the newest whole one; return what is to be said of each.

    They are kept, since people may want to look at them, but they never count as checkpoints again.
    """
    says = []
    for path in reversed(all_checkpoints(folder)):
        reason = why_not_whole(path)
        if reason is None:
            break
        says.append(f"{reason}; the checkpoint is kept as {as_damaged(path).name}")
    return says


def as_damaged(path: Path) -> Path:
    """Rename a checkpoint so that its name says that it is damaged."""
    names = (path.with_name(f"{path.name}.damaged{f'-{n}' if n > 1 else ''}") for n in itertools.count(1))
    target = next(name for name in names if not name.exists())
    os.replace(path, target)
    return target


def prune(folder: Path, keep: int, saved: Path | None = None) -> None:
    """Delete all but the newest `keep` whole checkpoints, the best one and the one just `saved`.

    A damaged one among the newest counts for nothing: it is set aside, and the whole ones behind it are kept.
    """
    kept: list[Path] = [] if saved is None else [saved]
    surplus = []
    for path in reversed(all_checkpoints(folder)):
        if path == saved:
            continue
        if len(kept) >= max(1, keep):
            surplus.append(path)
        elif why_not_whole(path) is None:
            kept.append(path)
        else:
            as_damaged(path)
    if surplus:
        best = best_of(folder)
        for path in surplus:
            if path != best:
                delete(path)


def delete(path: Path) -> None:
    """Delete a checkpoint: renamed first, so that a crash leaves nothing that looks like a damaged one."""
    doomed = path.with_name(f".{path.name}.~{secrets.token_hex(4)}")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete what a killed run left half-written; put back a checkpoint whose replacement was interrupted."""
    if folder.is_dir():
        for path in list(folder.iterdir()):
            found = re.fullmatch(rf"\.([0-9]+)\.{PREVIOUS}", path.name)
            if found and path.is_dir():
                put_back(folder / found[1])
                shutil.rmtree(path, ignore_errors=True)  # it is still there only where the new one is whole
        files.sweep(folder, str.isdigit)
