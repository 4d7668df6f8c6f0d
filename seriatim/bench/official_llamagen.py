"""The official LlamaGen code (github.com/FoundationVision/LlamaGen) as an opponent: a checkout, run as it is."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from seriatim.backbones.causal_transformer import Causal
from seriatim.bench.checkout import Official, explained, here, load_checkout
from seriatim.bench.opponent import Draws, Workload, replaced, timed
from seriatim.bench.timing import Stages, synchronise
from seriatim.checkpoints.llamagen import llamagen_tensors
from seriatim.core.errors import UsageError
from seriatim.models.base import SequenceModel
from seriatim.models.build import model_config, seeded

SOURCE = "git clone https://github.com/FoundationVision/LlamaGen"
MODULES = ("autoregressive", "utils")  # top-level names of a checkout
GPT, GENERATE = "autoregressive.models.gpt", "autoregressive.models.generate"
FEW = 24  # tokens from which its fastest dtype is chosen: its steps all cost the same


class OfficialLlamaGen(Official):
    """The official token loop on our weights; in half precision its weights are that, as in its own scripts."""

    def __init__(self, path: Path, model: SequenceModel, device: torch.device) -> None:
        super().__init__(device)
        self.code = load_checkout(path, (GPT, GENERATE), inside=MODULES, has=(GPT, "Transformer"), source=SOURCE)
        with explained(SOURCE), here(device):
            self.model: Any = self.build(model).to(device).eval()

    def build(self, model: SequenceModel) -> nn.Module:
        """Its model with our weights, strictly; or with its own, where ours is on the meta device."""
        config = model_config(model)
        side = round(config["tokens"] ** 0.5)
        if not isinstance(model.backbone, Causal) or side * side != config["tokens"] or not config.get("vocab"):
            raise UsageError("official: LlamaGen draws codes, of a square of tokens, and this model does not")
        gpt = self.code[GPT]
        with torch.random.fork_rng(devices=[]):
            official = gpt.Transformer(
                gpt.ModelArgs(
                    dim=config["width"],
                    n_layer=config["depth"],
                    n_head=config["heads"],
                    vocab_size=config["vocab"],
                    block_size=config["tokens"],
                    num_classes=config["classes"],
                    cls_token_num=config["prefix"],
                    model_type="c2i",
                    multiple_of=config["hidden"],
                )
            )
        if model.device.type != "meta":
            official.load_state_dict(llamagen_tensors(model))
        return official

    def few(self, workload: Workload) -> Workload:
        return replace(workload, steps=min(FEW, workload.steps))

    @torch.no_grad()
    @override
    def sample(self, workload: Workload, draws: Draws, stages: Stages | None = None) -> tuple[Tensor, float]:
        """Codes (B, L). At a temperature of 0 the likeliest; otherwise drawn by torch's generator, not from `draws`."""
        labels = torch.tensor(workload.labels, device=self.device)
        if min(workload.labels) < 0:
            raise UsageError("official: LlamaGen draws images of a class; this model has none")
        if workload.schedule != "constant" and workload.guidance != 1.0:
            raise UsageError("guidance_schedule: LlamaGen guides every token alike; use constant")
        self.model.to(getattr(torch, self.dtype))
        generate = self.code[GENERATE]
        pick = timed(stages, "head", generate.sample)
        step = timed(stages, "backbone", self.model.forward)
        greedy = workload.temperature == 0
        with (
            explained(SOURCE),
            seeded(0),
            here(self.device),
            replaced((generate, "sample", pick), (self.model, "forward", step)),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # its choice of attention kernels is deprecated
            synchronise(self.device)
            begin = time.perf_counter()
            codes = generate.generate(
                self.model,
                labels,
                workload.steps,
                cfg_scale=workload.guidance,
                sample_logits=not greedy,
                temperature=1.0 if greedy else workload.temperature,
                top_k=0,
                top_p=1.0,
            )
            synchronise(self.device)
            seconds = time.perf_counter() - begin
        return codes.long().cpu(), seconds
