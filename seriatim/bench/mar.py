"""The official MAR code (github.com/LTH14/mar) as an opponent: a checkout that the user points at, run as it is.

It calls `.cuda()` everywhere, and imports timm, which imports torchvision. On another device the first does nothing;
where torchvision can't be imported, an empty stand-in takes its place: sampling uses none of it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seriatim.bench.opponent import Draws, Opponent, Workload, replaced, timed
from seriatim.bench.timing import Stages, synchronise
from seriatim.checkpoints.mar import mar_tensors
from seriatim.core.errors import ConfigError, SeriatimError, UsageError, nearest, one_line
from seriatim.heads.diffusion import Diffusion
from seriatim.models.base import Model
from seriatim.models.build import model_config, seeded

SOURCE = "git clone https://github.com/LTH14/mar"
MODULES = ("models", "diffusion", "util")  # top-level names of a checkout
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}  # under autocast, as its scripts


class OfficialMAR(Opponent):
    """The official sampler on our weights, timesteps and, where draws are given, our orders and noise."""

    name = "official"

    def __init__(self, path: Path, model: Model, device: torch.device, head_steps: int) -> None:
        self.device, self.dtype = device, "float32"
        self.tried: dict[str, float] = {}  # seconds by dtype, from a few steps
        self.code = load_checkout(path)
        with explained(), self.here():
            self.model: Any = self.build(model, head_steps).to(device).eval()

    def build(self, model: Model, head_steps: int) -> nn.Module:
        """Its model with our weights, strictly; or with its own, where ours is on the meta device."""
        config = model_config(model)
        side = round(config["tokens"] ** 0.5)
        if not isinstance(model.head, Diffusion) or side * side != config["tokens"]:
            raise UsageError("official: its MAR has a diffusion head and a square of tokens, and this model has not")
        chain = model.head.chain(head_steps)  # refused before anything is built
        (encoder, decoder), (blocks, more) = config["width"], config["depth"]
        heads, head = config["heads"], config["head"]
        with torch.random.fork_rng(devices=[]):
            official = self.code["models.mar"].MAR(
                img_size=side, vae_stride=1, patch_size=1, vae_embed_dim=config["dim"],
                encoder_embed_dim=encoder, encoder_depth=blocks, encoder_num_heads=heads[0],
                decoder_embed_dim=decoder, decoder_depth=more, decoder_num_heads=heads[1],
                mlp_ratio=config["mlp_ratio"], norm_layer=partial(nn.LayerNorm, eps=1e-6),
                class_num=max(1, config["classes"]), buffer_size=config["buffer"],
                diffloss_d=head["depth"], diffloss_w=head["width"], num_sampling_steps=str(head_steps),
            )  # fmt: skip
        if not model.no_class.is_meta:
            tensors = mar_tensors(model)
            if not config["classes"]:  # it has a table of classes all the same, and doesn't look into it
                tensors["class_emb.weight"] = torch.zeros(1, encoder)
            official.load_state_dict(tensors)
        # The stable start, for both: the official chain through our timesteps
        respace, gaussian = self.code["diffusion.respace"], self.code["diffusion.gaussian_diffusion"]
        official.diffloss.gen_diffusion = respace.SpacedDiffusion(
            use_timesteps=chain.timesteps.tolist(),
            betas=gaussian.get_named_beta_schedule("cosine", head["train_steps"]),
            model_mean_type=gaussian.ModelMeanType.EPSILON,
            model_var_type=gaussian.ModelVarType.LEARNED_RANGE,
            loss_type=gaussian.LossType.MSE,
        )
        return official

    def here(self) -> contextlib.AbstractContextManager[None]:
        """Inside, `.cuda()` stays on this device."""
        if self.device.type == "cuda":
            return contextlib.nullcontext()
        stay = lambda tensor, *_, **__: tensor  # noqa: E731
        return replaced((torch.Tensor, "cuda", stay), (nn.Module, "cuda", stay))

    def choose(self, dtype: str | None, workload: Workload) -> str:
        """The dtype to be timed in: the one named, or that in which it is fastest, from a few steps of each."""
        if dtype is not None:
            self.dtype = dtype
            return dtype
        few = replace(workload, every=max(workload.every, -(-workload.steps // 3)))
        for candidate in dtypes(self.device):
            self.dtype = candidate
            self.tried[candidate] = min(self.sample(few, Draws())[1] for _ in range(2))
        self.dtype = min(self.tried, key=lambda name: self.tried[name])
        return self.dtype

    @torch.no_grad()
    def sample(self, workload: Workload, draws: Draws, stages: Stages | None = None) -> tuple[Tensor, float]:
        B = len(workload.labels)
        dtype = getattr(torch, self.dtype)
        labels = torch.tensor(workload.labels, device=self.device) if max(workload.labels) >= 0 else None
        gate = Gate(self.model, workload, draws, stages, self.device)
        whole = workload.every == 1 and stages is None
        with (
            explained(),
            seeded(0),
            numpy_left_alone(),
            self.here(),
            replaced(*gate.changes()),
            torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32),
        ):
            synchronise(self.device)
            begin = time.perf_counter()
            tokens = self.model.sample_tokens(
                B, workload.steps, workload.guidance, workload.schedule, labels, workload.temperature
            )
            synchronise(self.device)
            seconds = time.perf_counter() - begin
        tokens = tokens.float().cpu().flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, L, D)
        return tokens, seconds if whole else gate.seconds * workload.factor


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Inside, what the checkout raises is one line that says where it comes from."""
    try:
        yield
    except (SeriatimError, MemoryError, AssertionError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):
            raise
        raise ConfigError(
            f"official: the checkout fails ({type(error).__name__}: {one_line(error)[:200]}); use {SOURCE}"
        ) from error


class Gate:
    """Replays draws, skips the steps that a workload doesn't compute, times the rest."""

    def __init__(
        self, model: Any, workload: Workload, draws: Draws, stages: Stages | None, device: torch.device
    ) -> None:
        self.model, self.draws, self.device = model, draws, device
        self.computed, self.step, self.seconds, self.begin = set(workload.computed()), -1, 0.0, 0.0
        self.skips, self.stages = workload.every > 1, stages
        self.left = list(draws.normal)
        self.guided = workload.guidance != 1.0

    @property
    def open(self) -> bool:
        return self.step in self.computed

    def changes(self) -> list[tuple[Any, str, Any]]:
        model = self.model
        changes: list[tuple[Any, str, Any]] = []
        orders = self.draws.orders
        if orders is not None:
            changes.append((model, "sample_orders", lambda bsz: orders.to(self.device)))
        encoder, decoder, sample = (
            timed(self.stages, stage, function)
            for stage, function in (
                ("encoder", model.forward_mae_encoder),
                ("decoder", model.forward_mae_decoder),
                ("head", model.diffloss.sample),
            )
        )

        def gated_encoder(tokens: Tensor, mask: Tensor, condition: Tensor) -> Tensor:
            self.step += 1
            synchronise(self.device)
            self.begin = time.perf_counter()
            return encoder(tokens, mask, condition) if self.open else condition

        def gated_decoder(x: Tensor, mask: Tensor) -> Tensor:
            if self.open:
                return decoder(x, mask)
            return x.new_zeros(*mask.shape, model.decoder_norm.normalized_shape[0])

        def gated_sample(z: Tensor, temperature: float, cfg: Any) -> Tensor:
            rows = len(z) // 2 if self.guided else len(z)
            drawn = self.left.pop(0).to(self.device) if self.left else None  # (T+1, N, D)
            if self.open:
                with self.playing(drawn):
                    tokens: Tensor = sample(z, temperature, cfg)
                synchronise(self.device)
                self.seconds += time.perf_counter() - self.begin
                return tokens
            tokens = torch.randn(rows, model.diffloss.in_channels, device=self.device) if drawn is None else drawn[0]
            return tokens.repeat(2, 1) if self.guided else tokens

        if self.skips or self.stages or self.left:
            changes += [
                (model, "forward_mae_encoder", gated_encoder),
                (model, "forward_mae_decoder", gated_decoder),
                (model.diffloss, "sample", gated_sample),
            ]
        return changes

    def playing(self, drawn: Tensor | None) -> contextlib.AbstractContextManager[None]:
        """Inside, torch's normal numbers are those of `drawn` (T+1, N, D): the start, then one for each step."""
        if drawn is None:
            return contextlib.nullcontext()
        steps = iter(drawn[1:])

        def start(*shape: int, **_: Any) -> Tensor:
            assert tuple(shape) == tuple(drawn[0].shape), f"the official code draws {shape}, ours {drawn[0].shape}"
            return drawn[0]

        def like(x: Tensor, **_: Any) -> Tensor:
            step = next(steps)
            return step if len(step) == len(x) else step.repeat(2, 1)  # the guided half draws noise that has no effect

        return replaced((torch, "randn", start), (torch, "randn_like", like))


@contextlib.contextmanager
def numpy_left_alone() -> Iterator[None]:
    """NumPy's own generator, which draws the original's orders, is afterwards as it was."""
    before = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(before)


def dtypes(device: torch.device) -> tuple[str, ...]:
    return DTYPES.get(device.type, ("float32",))


def check_dtype(dtype: str, device: torch.device) -> None:
    if dtype not in dtypes(device):
        raise UsageError(f"official_dtype: {dtype!r} is not known{nearest(dtype, dtypes(device))}")


# --- a checkout -----------------------------------------------------------------------------------------------------


def load_checkout(path: Path) -> dict[str, types.ModuleType]:
    """The modules of a checkout, under no name of Python's own: nothing of it stays on the path."""
    if not (path / "models" / "mar.py").is_file():
        raise UsageError(f"official: {path} holds no models/mar.py; give a checkout of the original ({SOURCE})")
    names = ("models.mar", "models.diffloss", "diffusion.respace", "diffusion.gaussian_diffusion")
    with set_aside(*MODULES):
        sys.path.insert(0, str(path.resolve()))
        for name in MODULES:  # folders without __init__.py: one of that name elsewhere on the path would be preferred
            if (path / name).is_dir() and not (path / name / "__init__.py").exists():
                sys.modules[name] = types.ModuleType(name)
                sys.modules[name].__path__ = [str(path.resolve() / name)]
        try:
            with stand_ins():
                code = {name: importlib.import_module(name) for name in names}
        except Exception as error:  # whatever importing a stranger's code may raise
            hint = '; pip install --no-deps "timm==0.9.12"' if "timm" in str(error) else ""
            raise ConfigError(f"official: {path} can't be imported ({one_line(error)}){hint}") from error
        finally:
            sys.path.remove(str(path.resolve()))
    if not hasattr(code["models.mar"], "MAR"):
        raise UsageError(f"official: {path}/models/mar.py has no MAR; give a checkout of the original ({SOURCE})")
    return code


@contextlib.contextmanager
def set_aside(*names: str) -> Iterator[None]:
    """Inside, these modules and all in them are not imported yet; outside, they are what they were."""

    def take() -> dict[str, types.ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in names}

    before = take()
    try:
        yield
    finally:
        take()
        sys.modules.update(before)


class Anything(type):
    """A class that has every attribute: what is looked up at import, and never used."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class Hollow(types.ModuleType):
    """A module in which every name is a class that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name == "__path__":  # a package: what is inside it can be imported too
            return []
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {"__module__": self.__name__})


class HollowFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `torchvision` and all inside it, hollow."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Hollow(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Inside, `torchvision` can be imported: itself, or a hollow one where it is missing or broken."""
    try:
        importlib.import_module("torchvision")
    except Exception:  # a broken one raises anything
        finder = HollowFinder()
        with set_aside("torchvision"):
            sys.meta_path.insert(0, finder)
            try:
                yield
            finally:
                sys.meta_path.remove(finder)
    else:
        yield
