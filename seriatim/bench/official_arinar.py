"""The official ARINAR code (github.com/Qinyu-Allen-Zhao/Arinar) as an opponent: a checkout, run as it is.

Guided, it chooses one of 1000 candidates, and ours inverts the exact distribution: other draws of the same target. So
what is compared is all that a draw is made from. Both run the same steps over the same orders, every part that ours
drew takes the place of the one that the original would draw, and at each part of each step z, the mixtures (of both
streams), the scale and the temperature must be alike. Without that feeding a difference of rounding would grow: where
a guided distribution is thin, its quantiles lie far apart. Timed, the original draws as it does.

N tokens asked for (2 N rows where guided), D features, T parts of g features, K Gaussians.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seriatim.bench.checkout import explained, here, load_checkout
from seriatim.bench.official_mar import Gate, MARLoop, trunk_arguments
from seriatim.bench.opponent import Draws, Opponent, Pair, Workload, replaced
from seriatim.bench.timing import Stages
from seriatim.checkpoints.arinar import arinar_tensors, inner_heads_of
from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys
from seriatim.heads.base import Guidance
from seriatim.heads.gaussians import GaussianMixture
from seriatim.models.base import SequenceModel
from seriatim.models.build import model_config

SOURCE = "git clone https://github.com/Qinyu-Allen-Zhao/Arinar"
MODULES = ("backbone", "model_head", "module", "diffusion", "util")  # top-level names of a checkout
MAIN = "backbone.mar"
BUILT = 16  # attention heads inside the head, as the code has it; a file of theirs may mean another number


class OfficialARINAR(MARLoop):
    """The official sampler on our weights; in half precision under autocast, as its own scripts.

    Mixtures are then read from float32: a CPU's autocast leaves their softmax in bfloat16, where a GPU's does not, and
    weights that sum to 1 only nearly are refused by torch's `Categorical`.
    """

    source = SOURCE

    def __init__(self, path: Path, model: SequenceModel, device: torch.device) -> None:
        super().__init__(device)
        self.seen: Seen | None = None  # what it is compared with
        hint = 'pip install --no-deps "timm==0.9.12"'
        self.code = load_checkout(path, (MAIN,), inside=MODULES, has=(MAIN, "MAR"), source=SOURCE, hint=hint)
        with explained(SOURCE), here(device):
            self.model: Any = self.build(model).to(device).eval()

    def build(self, model: SequenceModel) -> nn.Module:
        """Its model with our weights, strictly; or with its own, where ours is on the meta device."""
        tensors = arinar_tensors(model)  # refused before anything is built
        config = model_config(model)
        side, inner = round(config["tokens"] ** 0.5), config["head"]["model"]
        self.group, heads_inside = config["head"]["split"]["group"], inner_heads_of(model)
        if side * side != config["tokens"]:
            raise UsageError("official: its images are squares of tokens, and those of this model are not")
        if inner["width"] % BUILT or inner["hidden"] != 4 * inner["width"]:
            raise UsageError(
                f"official: its head has {BUILT} attention heads inside and 4 times its width in the MLP, "
                f"and a width of {inner['width']} with {inner['hidden']} doesn't fit that"
            )
        with torch.random.fork_rng(devices=[]):
            official = self.code[MAIN].MAR(
                **trunk_arguments(config),
                head_type="ar_gmm",
                num_gaussians=inner["head"]["components"],
                inner_ar_width=inner["width"],
                inner_ar_depth=inner["depth"],
                feature_group=self.group,
            )
        if model.device.type != "meta":
            if not config["classes"]:  # it has a table of classes all the same, and doesn't look into it
                tensors["class_emb.weight"] = torch.zeros(1, config["width"][0])
            official.load_state_dict(tensors)
        for block in official.arhead.blocks:
            attention, each = block.attn, inner["width"] // heads_inside
            attention.num_heads, attention.head_dim = heads_inside, each
            attention.scale = inner["attention_scale"] / each**0.5
        return official

    def gate(self, workload: Workload, draws: Draws, stages: Stages | None) -> Gate:
        if self.group > 1 and workload.guidance != 1.0:
            raise UsageError("guidance_scale: the original can't guide parts of several features; use 1")
        return FeatureGate(self.model, workload, draws, stages, self.device, self.seen)

    def replay(self, ours: Opponent, workload: Workload) -> tuple[list[Pair], float, float]:
        options = {k: v for k, v in workload.head_options.items() if k != "guidance_mode"}  # the exact draw is compared
        workload = replace(workload, head_options=options)
        seen, draws = Seen(), Draws()
        with replaced(*seen.changes(ours.model.head)):
            _, seconds = ours.sample(workload, draws)
        self.seen = seen
        try:
            _, official = self.sample(workload, draws)
        finally:
            self.seen = None
        assert not seen.parts, "the official code drew fewer parts than ours"
        return seen.pairs(), seconds, official


@dataclass
class Part:
    """What a part of N tokens was drawn from, and what came."""

    mixtures: list[GaussianMixture]  # of z, and where guided of z_null
    scale: Tensor  # (N,)
    temperature: float
    x: Tensor  # (N, g)


@dataclass
class Seen:
    """What ours saw, in order; and beside it what the original did."""

    z: list[Tensor] = field(default_factory=list)  # of each step (N or 2 N, C)
    parts: list[Part] = field(default_factory=list)
    beside: dict[str, list[Pair]] = field(default_factory=dict)  # by what it is

    def put(self, **pairs: Pair) -> None:
        for name, pair in pairs.items():
            self.beside.setdefault(name, []).append(pair)

    def pairs(self) -> list[Pair]:
        """One for each kind, of all steps and parts."""
        return [
            (torch.cat([a.flatten() for a, _ in each]), torch.cat([b.flatten() for _, b in each]))
            for each in self.beside.values()
        ]

    def changes(self, head: Any) -> list[tuple[Any, str, Any]]:
        """For a nested head with a mixture inside: both say what they are given."""
        leaf = head.model.head
        whole, inner = head.sample, leaf.sample

        def of_token(z: Tensor, keys: Keys, plan: Any, z_null: Tensor | None, *more: Any) -> Tensor:
            self.z.append(z.float() if z_null is None else torch.cat([z, z_null]).float())
            tokens: Tensor = whole(z, keys, plan, z_null, *more)
            return tokens

        def of_part(
            z: Tensor, keys: Keys, plan: Any, z_null: Tensor | None, guidance: Guidance | None, temperature: float
        ) -> Tensor:
            x: Tensor = inner(z, keys, plan, z_null, guidance, temperature)
            mixtures = [leaf.mixture(rows) for rows in (z, z_null) if rows is not None]
            scale = torch.ones(len(z)) if guidance is None else guidance.host
            self.parts.append(Part(mixtures, scale, temperature, x))
            return x

        return [(head, "sample", of_token), (leaf, "sample", of_part)]


class FeatureGate(Gate):
    """The same with the head of ARINAR; what is replayed are parts."""

    def __init__(
        self,
        model: Any,
        workload: Workload,
        draws: Draws,
        stages: Stages | None,
        device: torch.device,
        seen: Seen | None,
    ) -> None:
        super().__init__(model, workload, draws, stages, device)
        self.seen, self.replays = seen, seen is not None
        self.schedule = str(workload.head_options.get("feature_schedule", "constant"))

    def changes(self) -> list[tuple[Any, str, Any]]:
        head = self.model.arhead
        extract = head.extract_gmm

        def in_float(prediction: Tensor, rows: int) -> Any:
            return extract(prediction.float(), rows)

        return [
            (head, "bilevel_schedule", self.schedule),
            (head, "extract_gmm", in_float),
            *super().changes(),
        ]

    def head(self) -> tuple[Any, str]:
        return self.model, "next_layer_sample"

    def instead(self, rows: int) -> Tensor:
        if self.replays:
            return self.left.pop(0).to(self.device)
        return torch.randn(rows, self.model.token_embed_dim, device=self.device)

    @contextlib.contextmanager
    def playing(self, z: Tensor, cfg: Any) -> Iterator[None]:
        """Inside, each part is the one that ours drew, and what it would be drawn from is put beside what ours saw."""
        if self.seen is None:
            yield
            return
        head, seen, i = self.model.arhead, self.seen, 0
        extract = head.extract_gmm
        now: list[Tensor] = []
        seen.put(z=(seen.z.pop(0), z.float()))

        def remembered(prediction: Tensor, rows: int) -> Any:
            now[:] = found = extract(prediction, rows)
            return found

        def fed(*_: Any, temperature: float = 1.0, num_samples: int = 1) -> Tensor:
            nonlocal i
            i += 1
            part = seen.parts.pop(0)
            if bool((part.scale == 1).all()):
                self.left.pop(0)  # ours drew a normal number for it
            rows = len(part.mixtures) * len(part.x)  # where a schedule brought the scale to 1, ours has the first half
            weights, means, log_variances = (t[:rows, 0].float() for t in now)
            scale = head.schedule(cfg, i, head.num_groups) if num_samples > 1 else 1.0
            seen.put(
                weights=(torch.cat([m.log_weights().exp() for m in part.mixtures]), weights),
                means=(torch.cat([m.means for m in part.mixtures]), means),
                log_std=(torch.cat([m.log_std for m in part.mixtures]), 0.5 * log_variances),
                scale=(part.scale, torch.as_tensor(scale).float().expand_as(part.scale)),
                temperature=(torch.tensor(part.temperature), torch.tensor(temperature)),
            )
            return part.x[None, :, None].to(self.device)  # the only candidate: (1, N, 1, g)

        with replaced((head, "extract_gmm", remembered), (head, "sample_from_gmm", fed)):
            yield
