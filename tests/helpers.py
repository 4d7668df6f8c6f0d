"""Used by several test files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from seriatim.backbones.masked_transformer import Masked
from seriatim.checkpoints.llamagen_vq import official_name
from seriatim.checkpoints.native import Bundle
from seriatim.checkpoints.shapes import official_autoencoder
from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys, ReplayKeys
from seriatim.core.settings import Settings
from seriatim.core.validation import parse
from seriatim.heads.base import Guidance, Head
from seriatim.heads.diffusion import Diffusion
from seriatim.models.base import SequenceModel
from seriatim.models.build import seeded
from seriatim.models.masked_model import MaskedModel
from seriatim.sampling.step import Start, Step
from seriatim.tokenizers.pixels import Pixels
from seriatim.tokenizers.vq import VQ
from seriatim.training.config import Recipe, read_recipe
from seriatim.training.not_finite import FiniteGuard


def die_at_call(fatal: int, *names: str) -> None:
    """From here on this process kills itself at call number `fatal` of the functions `names`, such as "os.replace"."""
    count = [0]

    def deadly(true: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if count[0] == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return true(*arguments, **options)

        return call

    for name in names:
        module, _, function = name.rpartition(".")
        setattr(sys.modules[module], function, deadly(getattr(sys.modules[module], function)))


def signal_in_step(monkeypatch: pytest.MonkeyPatch, steps: int, number: signal.Signals = signal.SIGTERM) -> None:
    """The process sends itself a signal in the middle of step number `steps` of a training."""
    true, calls = FiniteGuard.skips, [0]

    def counted(*arguments: Any) -> bool:
        calls[0] += 1
        if calls[0] == steps:
            signal.raise_signal(number)  # to this thread: `os.kill` may reach another one, and be late
        return true(*arguments)

    monkeypatch.setattr(FiniteGuard, "skips", counted)


def official_tensors(tokenizer: VQ) -> dict[str, torch.Tensor]:
    """The weights of LlamaGen's tokenizer under official names, of official shapes."""
    return official_autoencoder(tokenizer, official_name)


def golden(kind: str) -> Path:
    """The folder of tensors that official code made, of one kind; SERIATIM_GOLDEN names another place for all."""
    return Path(os.environ.get("SERIATIM_GOLDEN") or Path(__file__).resolve().parent / "golden") / kind


def randomise(module: torch.nn.Module, seed: int = 0, scale: float = 0.2) -> None:
    """Random weights everywhere, zero-initialised layers included, so that nothing is hidden by a zero."""
    seeded_generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=seeded_generator))


def make_bundle(classes: int = 3, tokens: int = 16, width: int = 32) -> Bundle:
    side = int(tokens**0.5)
    tokenizer = Pixels(size=2 * side, patch=2, channels=1)
    with seeded(0):
        model = MaskedModel(
            Masked(tokens=tokens, dim=4, width=width, depth=2, heads=2, buffer=3, dropout=0.0),
            Diffusion(dim=4, width=24, depth=2),
            classes=classes,
        )
    randomise(model, scale=0.05)
    names = ["cat", "dog", "horse"][:classes]
    defaults = {"num_inference_steps": 5, "num_diffusion_steps": 6, "guidance_scale": 1.5}
    return Bundle(model.eval(), tokenizer, names, defaults)


def make_masked(classes: int = 3, tokens: int = 16, width: int = 32) -> MaskedModel:
    """The model of `make_bundle`."""
    model = make_bundle(classes, tokens, width).model
    assert isinstance(model, MaskedModel)
    return model


TINY_RUN = [  # settings of a training of the recipe mar-digits that takes a fraction of a second
    "model.width=16",
    "model.depth=1",
    "model.heads=1",
    "model.head.width=16",
    "model.head.depth=1",
    "training.batch_size=16",
    "training.log_images=16",
    "training.dtype=float32",
    "training.threads=1",
]


def tiny_run(*overrides: str) -> Recipe:
    """The recipe of such a training; later overrides win."""
    return read_recipe("mar-digits", [*TINY_RUN, *overrides])


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log without what depends on the clock."""
    timed = {"images_per_second", "loader_share"}
    return [{k: v for k, v in line.items() if k not in timed} for line in metrics(run)]


def one_line(done: subprocess.CompletedProcess[str], code: int, *words: str) -> str:
    """The single line that a failed command printed, its exit code and words checked."""
    assert done.returncode == code, (done.returncode, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])
    return lines[0]


def read_picture(path: Path) -> Image.Image:
    """A picture, its file closed."""
    with Image.open(path) as image:
        image.load()
        return image


def cases(folder: Path, pattern: str, marker: str) -> list[tuple[str, Path]]:
    """(case, file) of each file that matches; the case is what comes before `marker` in its name."""
    return [(path.name.split(marker)[0], path) for path in sorted(folder.glob(pattern))]


def replay(draws: Mapping[str, torch.Tensor]) -> ReplayKeys:
    """Keys that play these draws: the name of a draw -> the draw of each row, (N, ...)."""
    rows = {f"{n}/{name}": row for name, draw in draws.items() for n, row in enumerate(draw)}
    return ReplayKeys(rows, len(next(iter(draws.values()))))


def many(seed: int, rows: int) -> Keys:
    """Keys of so many rows."""
    return Keys.of(seed).fold(torch.arange(rows))


def drawn(
    head: Head,
    z: torch.Tensor,
    keys: Keys,
    z_null: torch.Tensor | None = None,
    scale: torch.Tensor | float = 1.0,
    temperature: float | torch.Tensor = 1.0,
    **options: Any,
) -> torch.Tensor:
    """Tokens of a head at a guidance scale, with the options that the head declares."""
    guidance = Guidance.of(scale, len(z), z.device)
    null = None if guidance is None else z_null
    return head.sample(z, keys, head.plan(head.options(**options), z.device), null, guidance, temperature)


def arguments_of(model: SequenceModel, inputs: Any, keys: Keys, given: dict[str, Any]) -> dict[str, Any]:
    """What samplers take, of settings by name: `steps`, `tokens` and `known` to begin from, those of the head."""
    given = {{"steps": "num_inference_steps"}.get(name, name): value for name, value in given.items()}
    more: dict[str, Any] = {name: given.pop(name) for name in ("scale", "dtype") if name in given}
    if "known" in given:
        more["start"] = Start(given.pop("tokens"), given.pop("known"))
    if not isinstance(given.get("order"), str | None):
        more["order"] = given.pop("order")
    shared = {name: value for name, value in given.items() if name in Settings.model_fields}
    options = {name: value for name, value in given.items() if name not in shared}
    condition = model.condition(inputs, len(keys))
    settings = parse(Settings, {**shared, "head_options": options}, error=UsageError)
    return {
        "condition": condition,
        "null": model.null(len(keys), condition),
        "keys": keys,
        "settings": settings,
        **more,
    }


def naive(model: SequenceModel, inputs: Any, keys: Keys, **given: Any) -> torch.Tensor:
    """What the specification draws."""
    with torch.no_grad():
        return model.sample(**arguments_of(model, inputs, keys, given))


def fast(model: SequenceModel, inputs: Any, keys: Keys, **given: Any) -> Iterator[Step]:
    """The steps of the fast loop."""
    with torch.no_grad():
        yield from model.steps(**arguments_of(model, inputs, keys, given))
