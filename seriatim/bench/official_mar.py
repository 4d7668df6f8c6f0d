"""The official MAR code (github.com/LTH14/mar) as an opponent: a checkout that the user points at, run as it is.

It needs timm, which imports torchvision; sampling uses none of that.
"""

from __future__ import annotations

import contextlib
import time
import types
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seriatim.bench.checkout import Official, explained, here, load_checkout, numpy_left_alone
from seriatim.bench.opponent import Draws, Workload, replaced, timed
from seriatim.bench.timing import Stages, synchronise
from seriatim.checkpoints.mar import mar_tensors
from seriatim.core.errors import UsageError
from seriatim.heads.diffusion import Diffusion
from seriatim.models.base import SequenceModel
from seriatim.models.build import model_config, seeded

SOURCE = "git clone https://github.com/LTH14/mar"
MODULES = ("models", "diffusion", "util")  # top-level names of a checkout


def official_mar(path: Path) -> dict[str, types.ModuleType]:
    names = ("models.mar", "models.diffloss", "diffusion.respace", "diffusion.gaussian_diffusion")
    hint = 'pip install --no-deps "timm==0.9.12"'
    return load_checkout(path, names, inside=MODULES, has=("models.mar", "MAR"), source=SOURCE, hint=hint)


class MARLoop(Official):
    """An original that samples by MAR's loop, with a head of its own; in half precision under autocast."""

    source: str  # the command that gets it
    model: Any

    def gate(self, workload: Workload, draws: Draws, stages: Stages | None) -> Gate:
        return Gate(self.model, workload, draws, stages, self.device)

    def few(self, workload: Workload) -> Workload:
        return replace(workload, every=max(workload.every, -(-workload.steps // 3)))

    @torch.no_grad()
    def sample(self, workload: Workload, draws: Draws, stages: Stages | None = None) -> tuple[Tensor, float]:
        B = len(workload.labels)
        dtype = getattr(torch, self.dtype)
        labels = torch.tensor(workload.labels, device=self.device) if max(workload.labels) >= 0 else None
        gate = self.gate(workload, draws, stages)
        whole = workload.every == 1 and stages is None
        with (
            explained(self.source),
            seeded(0),
            numpy_left_alone(),
            here(self.device),
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


def trunk_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the official `MAR`, which ARINAR's code takes too, for the backbone of a model's config."""
    (encoder, decoder), (blocks, more), heads = config["width"], config["depth"], config["heads"]
    return {
        "img_size": round(config["tokens"] ** 0.5),
        "vae_stride": 1,
        "patch_size": 1,
        "vae_embed_dim": config["dim"],
        "encoder_embed_dim": encoder,
        "encoder_depth": blocks,
        "encoder_num_heads": heads[0],
        "decoder_embed_dim": decoder,
        "decoder_depth": more,
        "decoder_num_heads": heads[1],
        "mlp_ratio": config["mlp_ratio"],
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        "class_num": max(1, config["classes"]),
        "buffer_size": config["buffer"],
    }


class OfficialMAR(MARLoop):
    """The official sampler on our weights, timesteps and, where draws are given, our orders and noise.

    In half precision under autocast, as its own scripts.
    """

    source = SOURCE

    def __init__(self, path: Path, model: SequenceModel, device: torch.device, head_options: Mapping[str, Any]) -> None:
        super().__init__(device)
        self.code = official_mar(path)
        with explained(SOURCE), here(device):
            self.model: Any = self.build(model, head_options).to(device).eval()

    def build(self, model: SequenceModel, head_options: Mapping[str, Any]) -> nn.Module:
        """Its model with our weights, strictly; or with its own, where ours is on the meta device."""
        config = model_config(model)
        side = round(config["tokens"] ** 0.5)
        if not isinstance(model.head, Diffusion) or side * side != config["tokens"]:
            raise UsageError("official: its MAR has a diffusion head and a square of tokens, and this model has not")
        chain = model.head.chain(model.head.options(**head_options))  # refused before anything is built
        head = config["head"]
        with torch.random.fork_rng(devices=[]):
            official = self.code["models.mar"].MAR(
                **trunk_arguments(config),
                diffloss_d=head["depth"],
                diffloss_w=head["width"],
                num_sampling_steps=str(len(chain)),
            )
        if model.device.type != "meta":
            tensors = mar_tensors(model)
            if not config["classes"]:  # it has a table of classes all the same, and doesn't look into it
                tensors["class_emb.weight"] = torch.zeros(1, config["width"][0])
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


class Gate:
    """Replays draws, skips the steps that a workload doesn't compute, times the rest.

    Of MAR's loop, which others took over with a head of their own.
    """

    def __init__(
        self, model: Any, workload: Workload, draws: Draws, stages: Stages | None, device: torch.device
    ) -> None:
        self.model, self.draws, self.device = model, draws, device
        self.computed, self.step, self.seconds, self.begin = set(workload.computed()), -1, 0.0, 0.0
        self.skips, self.stages = workload.every > 1, stages
        self.left, self.replays = list(draws.normal), bool(draws.normal)
        self.guided = workload.guidance != 1.0

    @property
    def open(self) -> bool:
        return self.step in self.computed

    def changes(self) -> list[tuple[Any, str, Any]]:
        model = self.model
        changes: list[tuple[Any, str, Any]] = []
        orders = self.draws.orders
        if orders is not None:
            changes.append((model, "sample_orders", lambda _bsz: orders.to(self.device)))
        head, name = self.head()
        encoder, decoder, sample = (
            timed(self.stages, stage, function)
            for stage, function in (
                ("encoder", model.forward_mae_encoder),
                ("decoder", model.forward_mae_decoder),
                ("head", getattr(head, name)),
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

        def gated_sample(z: Tensor, temperature: float = 1.0, cfg: Any = 1.0, **more: Any) -> Tensor:
            if self.open:
                with self.playing(z, cfg):
                    tokens: Tensor = sample(z, temperature, cfg, **more)
                synchronise(self.device)
                self.seconds += time.perf_counter() - self.begin
                return tokens
            tokens = self.instead(len(z) // 2 if self.guided else len(z))
            return tokens.repeat(2, 1) if self.guided else tokens

        if self.skips or self.stages or self.replays:
            changes += [
                (model, "forward_mae_encoder", gated_encoder),
                (model, "forward_mae_decoder", gated_decoder),
                (head, name, gated_sample),
            ]
        return changes

    def head(self) -> tuple[Any, str]:
        """What draws tokens, and under which name."""
        return self.model.diffloss, "sample"

    def instead(self, rows: int) -> Tensor:
        """Tokens (N, D) of a step that is skipped."""
        if self.left:
            return self.left.pop(0)[0].to(self.device)
        return torch.randn(rows, self.model.diffloss.in_channels, device=self.device)

    def playing(self, _z: Tensor, _cfg: Any) -> contextlib.AbstractContextManager[None]:
        """Inside, torch's normal numbers are the next that were drawn (T+1, N, D): the start, then one a step."""
        if not self.left:
            return contextlib.nullcontext()
        drawn = self.left.pop(0).to(self.device)
        steps = iter(drawn[1:])

        def start(*shape: int, **_: Any) -> Tensor:
            assert tuple(shape) == tuple(drawn[0].shape), f"the official code draws {shape}, ours {drawn[0].shape}"
            return drawn[0]

        def like(x: Tensor, **_: Any) -> Tensor:
            step = next(steps)
            return step if len(step) == len(x) else step.repeat(2, 1)  # the guided half draws noise that has no effect

        return replaced((torch, "randn", start), (torch, "randn_like", like))
