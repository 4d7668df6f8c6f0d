"""Checkpoints of a run, which hold all that resuming needs and are written completely or not at all.

    RUN/checkpoints/000000123456/     one for each save, named by the images seen; damaged ones end in `.damaged`
        config.json                   the same as in a model folder; generators only
        model.safetensors             weights
        average.safetensors           averaged weights
        optimiser.safetensors         the optimiser's moments, by the names of the parameters
        tokenizer.json                the tokenizer's file beside the checkpoints, which all of them share
        state.json                    images seen, updates, loss, running sums of the metrics
        manifest.json                 bytes and sha256 of these

There is no random state, because every random number of a run is a function of its seed and the images seen.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import shutil
from collections.abc import Mapping
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
    read_finite,
    write_config,
    write_tensors,
)
from seriatim.checkpoints.renames import FORMAT, READABLE, in_order_of_format_1
from seriatim.checkpoints.shared_tokenizer import REFERENCE, SHARED, drop_unused, share, tokenizer_file
from seriatim.checkpoints.unfinished import (
    CONFIG,
    FILES,
    STATE,
    all_checkpoints,
    best_of,
    verify_checkpoint,
    why_not_whole,
)
from seriatim.core import files
from seriatim.core.construct import MOST_THREADS
from seriatim.core.device import DTYPES
from seriatim.core.errors import CheckpointError, shown
from seriatim.core.files import PREVIOUS, atomic_folder, is_written, put_back, write_json, write_manifest
from seriatim.core.reading import read_json, read_or_raise
from seriatim.core.validation import Strict, parse
from seriatim.training.distributed import placed, whole
from seriatim.training.muon import MuonAndAdamW

MOMENTS: dict[type[torch.optim.Optimizer], set[str]] = {  # the tensors that each optimiser keeps for a parameter
    torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"},  # AdamW is a subclass
    torch.optim.SGD: {"momentum_buffer"},
    torch.optim.Muon: {"momentum_buffer"},
}
CHECKPOINT = re.compile(r"(\.[0-9]+\.previous|[0-9]+(\.damaged(-[0-9]+)?)?)")  # the name of a checkpoint's folder

Count = Annotated[StrictInt, Field(ge=0, lt=2**63)]


class RunState(Strict):
    """The state of a run besides its tensors."""

    model_config = ConfigDict(frozen=False)

    seen: Count = 0  # the number of images seen
    steps: Count = 0  # the number of updates of the weights
    loss: float | None = None  # the loss in the last line of metrics
    validation_loss: float | None = None  # the loss on held-out images after `validated` images
    validated: Count = 0
    dtype: str = Field("float32", pattern=f"^({'|'.join(DTYPES)})$")  # the dtype of autocast
    threads: StrictInt = Field(1, ge=1, le=MOST_THREADS)  # the number of CPU threads
    micro_batch: Annotated[StrictInt, Field(ge=1)] | None = None  # how many images a process computes at once, if found
    sums: dict[str, float] = Field(default_factory=dict)  # the sums of the metrics since their last line
    since: Count = 0  # the number of images seen at that line
    reported: Count = 0  # the number of images seen when everything that was due had been done
    steps_since: Count = 0
    gradient_norm: float | None = None  # before clipping, in the last step; None if its batch was skipped
    skipped: Count = 0  # the number of batches that were skipped because their loss or gradient was not finite
    skipped_in_a_row: Count = 0  # how many of them came directly before this state
    recent: float | None = None  # the logarithm of the loss, averaged over about the last hundred steps
    position: list[Count] = Field([0, 0], min_length=2, max_length=2)  # a stream's complete passes, and rows since


@dataclass(frozen=True)
class Trainables:
    """The modules and the optimiser whose tensors a checkpoint holds."""

    model: nn.Module
    average: AveragedModel
    optimiser: torch.optim.Optimizer
    tokenizer: nn.Module = field(default_factory=nn.Identity)  # a classifier has none

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that the optimiser updates."""
        return [parameter for group in self.optimiser.param_groups for parameter in group["params"]]

    @property
    def opponent(self) -> list[nn.Parameter]:
        """Those of them that are trained against the others, as a discriminator is: groups marked `opponent`."""
        groups = [group for group in self.optimiser.param_groups if group.get("opponent")]
        return [parameter for group in groups for parameter in group["params"]]

    def update(self) -> None:
        """Update the weights by the gradients, drop the gradients, and update the average."""
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.average.update_parameters(self.model)


Tensors = dict[str, dict[str, Tensor]]  # the name of a file without its suffix -> the tensors in it, by name


def tensors_of(parts: Trainables, *, keep: bool = True) -> Tensors:
    """The tensors of a checkpoint but those of the tokenizer, the same from any number of processes.

    Where the model is sharded, all processes must call this together; it returns them only with `keep`.
    """
    given = {
        "model": parts.model.state_dict(),
        "average": parts.average.module.state_dict(),
        "optimiser": moments(parts),
    }
    found: Tensors = {}
    for file, tensors in given.items():
        for name, tensor in tensors.items():
            full = whole(tensor)
            if keep:  # a gathered tensor must leave the device at once, which may not hold all of them
                found.setdefault(file, {})[name] = full if full is tensor else full.cpu()
        found.setdefault(file, {})
    return found


def save(
    folder: Path,
    parts: Trainables,
    state: RunState,
    config: Mapping[str, Any] | None = None,
    tensors: Tensors | None = None,
) -> Path:
    """Write a checkpoint for `state.seen` images and return its path.

    With the `config` of its model, the checkpoint can be used without the run. `tensors` are those of `tensors_of`, if
    they were gathered already.
    """
    tensors = tensors_of(parts) if tensors is None else tensors
    for name in ("model", "average"):
        check_finite_weights(tensors[name], name)
    path = folder / f"{state.seen:012d}"
    tokenizer = share(folder, parts.tokenizer.state_dict())
    with atomic_folder(path) as temporary:
        for name, values in tensors.items():
            write_tensors(temporary / f"{name}.safetensors", values)
        write_json(temporary / REFERENCE, tokenizer)
        write_json(temporary / STATE, {"format": FORMAT, **vars(state)})
        if config is not None:
            write_config(temporary, config)
        write_manifest(temporary, FILES if config is None else (CONFIG, *FILES))
    return path


def names_of(parts: Trainables, written: int = FORMAT) -> list[str]:
    """The names of the optimiser's parameters in the order of format `written`."""
    name_of = {id(parameter): name for name, parameter in parts.model.named_parameters()}
    groups = [[name_of[id(p)] for p in group["params"]] for group in parts.optimiser.param_groups]
    return [name for group in groups for name in (in_order_of_format_1(group) if written == 1 else group)]


def moments(parts: Trainables) -> dict[str, Tensor]:
    """The optimiser's tensors, named `<parameter>.<moment>`."""
    names, state = names_of(parts), parts.optimiser.state_dict()["state"]
    return {
        f"{names[number]}.{moment}": torch.as_tensor(value)
        for number, values in state.items()
        for moment, value in values.items()
        if value is not None
    }


def load(path: Path, parts: Trainables) -> RunState:
    """Read a checkpoint into `parts` and return its state.

    Raises CheckpointError, before anything changes, if a file is damaged or does not fit.
    """
    verify_checkpoint(path)
    state, written = read_state(path / STATE)
    moments = read_moments(path / "optimiser.safetensors", parts, written)
    found = [
        (parts.model, fitting(parts.model, path / "model.safetensors", written)),
        (parts.average.module, fitting(parts.average.module, path / "average.safetensors", written)),
        (parts.tokenizer, fitting(parts.tokenizer, tokenizer_file(path))),
    ]
    for module, tensors in found:
        now = module.state_dict()
        module.load_state_dict({key: placed(tensor, now[key]) for key, tensor in tensors.items()})
    parts.average.n_averaged.fill_(state.steps)
    parts.optimiser.load_state_dict({"state": moments, "param_groups": parts.optimiser.state_dict()["param_groups"]})
    return state


def read_state(path: Path) -> tuple[RunState, int]:
    """The state of the run and the format of its files. Raises CheckpointError if the file is damaged or unknown."""
    values = read_or_raise(lambda: read_json(path, dict), path, CheckpointError, "delete this checkpoint")
    written = values.pop("format", None)
    if type(written) is not int or written not in READABLE:
        raise CheckpointError(
            f"{path}: format {shown(written)} is not known; resume with the version of seriatim that wrote it"
        )
    values.setdefault("reported", values.get("seen", 0))  # earlier versions did everything before they saved
    state = parse(RunState, values, where=str(path), error=CheckpointError)
    if f"{state.seen:012d}" != path.parent.name:
        raise CheckpointError(
            f"{path} states {state.seen} images, but its folder is named {path.parent.name}; delete this checkpoint"
        )
    return state, written


def read_moments(path: Path, parts: Trainables, written: int) -> dict[int, dict[str, Tensor]]:
    """The optimiser's state from a file of format `written`, in the form that `load_state_dict` takes.

    Raises CheckpointError if a parameter has only some of the optimiser's tensors, or in another shape.
    """
    kept = moments_of(parts.optimiser)
    now, then = {name: number for number, name in enumerate(names_of(parts))}, names_of(parts, written)
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in read_finite(path).items():
        name, _, moment = key.rpartition(".")
        if written == 1 and re.fullmatch(r"[0-9]{1,9}", name) and int(name) < len(then):
            name = then[int(name)]
        known = kept[now[name]] if name in now else set()
        if known is not None and moment not in known:
            raise CheckpointError(f"{path} has an unknown tensor {key!r}: it is not this optimiser's")
        parameter = parts.trained[now[name]]
        scalar = moment == "step" if known is not None else not tensor.shape
        shape = torch.Size() if scalar else parameter.shape
        tensor = as_wanted(tensor, torch.empty(shape, dtype=torch.float32, device="meta"), key, path)
        found.setdefault(now[name], {})[moment] = tensor if scalar else placed(tensor, parameter)
    for number, given in found.items():
        lacking = sorted((kept[number] or set()) - given.keys())
        if lacking:
            raise CheckpointError(
                f"{path} lacks tensor '{names_of(parts)[number]}.{lacking[0]}': it is not this optimiser's"
            )
    return found


def moments_of(optimiser: torch.optim.Optimizer) -> list[set[str] | None]:
    """The names of the tensors that an optimiser keeps for each of its parameters, in their order.

    None for an optimiser that MOMENTS does not list: it may keep numbers and tensors of the parameter's shape.
    """
    every = optimiser.both if isinstance(optimiser, MuonAndAdamW) else (optimiser,)
    kept = [next((names for kind, names in MOMENTS.items() if isinstance(each, kind)), None) for each in every]
    return [kept[i] for i, each in enumerate(every) for group in each.param_groups for _ in group["params"]]


def set_damaged_aside(folder: Path) -> list[str]:
    """Rename the damaged checkpoints that are newer than the newest whole one, and return a message for each.

    They are kept, since people may want to inspect them, but they never count as checkpoints again.
    """
    says = []
    for path in reversed(all_checkpoints(folder)):
        reason = why_not_whole(path)
        if reason is None:
            break
        says.append(f"{reason}; the checkpoint is kept as {as_damaged(path).name}")
    return says


def as_damaged(path: Path) -> Path:
    """Rename a checkpoint so that its name says that it is damaged, and return the new path."""
    names = (path.with_name(f"{path.name}.damaged{f'-{n}' if n > 1 else ''}") for n in itertools.count(1))
    target = next(name for name in names if not name.exists())
    os.replace(path, target)
    return target


def prune(folder: Path, keep: int, saved: Path | None = None) -> None:
    """Delete all but the newest `keep` whole checkpoints, the best one and the one just `saved`.

    A damaged checkpoint among the newest is set aside and does not count, so that `keep` whole ones remain.
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
        drop_unused(folder)


def delete(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a crash leaves nothing that looks like a damaged checkpoint."""
    doomed = path.with_name(f".{path.name}.~{secrets.token_hex(4)}")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete half-written files of a killed run, and put back a checkpoint whose replacement was interrupted."""
    if folder.is_dir():
        for path in list(folder.iterdir()):
            found = re.fullmatch(rf"\.([0-9]+)\.{PREVIOUS}(-[0-9]+)?", path.name)
            if found and is_written(path):
                put_back(folder / found[1])
                shutil.rmtree(path, ignore_errors=True)  # it still exists only if the new one is whole
        files.sweep(folder, lambda name: name.isdigit() or SHARED.fullmatch(name) is not None)
