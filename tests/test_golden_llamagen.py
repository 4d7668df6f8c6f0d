"""LlamaGen against the official code: every file of golden/llamagen that is there, with sizes taken from the files.

Made by the unmodified official modules on the CPU in float32. Logits 1e-5, gradients 1e-4 relative, greedy codes exact.
Samples that were drawn from torch's own generator are left out: nothing here draws from it.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import golden
from safetensors.torch import load_file
from torch import Tensor

from seriatim.checkpoints.llamagen import CLASSES, llamagen_tensors, model_from_llamagen, official_name
from seriatim.checkpoints.official import OfficialFile
from seriatim.conditions.base import Condition
from seriatim.conditions.captions import CaptionEmbedder, Captions
from seriatim.core.keys import Keys
from seriatim.core.settings import Settings
from seriatim.heads.categorical import filtered
from seriatim.models.build import build_model, parameter_count
from seriatim.models.causal_model import CausalModel
from seriatim.zoo import PRESETS

FOLDER = golden("llamagen")
LOGITS, GRADIENT = 1e-5, 1e-4
GPT = sorted(FOLDER.glob("gpt_*.safetensors"))
each_model = pytest.mark.parametrize("path", GPT, ids=[path.stem for path in GPT])


def test_there_are_golden_files() -> None:
    held = FOLDER.glob("*.safetensors") if "SERIATIM_GOLDEN" in os.environ else GPT  # another folder may lack some
    assert any(held), f"no golden tensors of LlamaGen in {FOLDER}"


# --- reading ------------------------------------------------------------------------------------------------------


class Case:
    """A small official model, what went in and what came out."""

    def __init__(self, path: Path) -> None:
        self.file = load_file(path)
        beside = path.with_suffix(".json")
        config: dict[str, Any] = json.loads(beside.read_text()) if beside.exists() else {}
        if "n_head" not in config:
            pytest.skip(f"{path.name}: no file beside it says how many attention heads there are")
        weights = {name[2:]: tensor for name, tensor in self.file.items() if name.startswith("w.")}
        official = OfficialFile(path, weights, {"dropout_p": 0.0})
        self.codes = self.file["in.idx"].long()  # (B, L)
        self.model = model_from_llamagen(official, tokens=self.codes.shape[1], heads=int(config["n_head"]))
        B = len(self.codes)
        self.condition = self.model.condition(self.inputs, B)
        self.null = self.model.null(B, like=self.condition)

    def captions(self) -> Captions | None:
        """Features (B, T, F) and their mask, whatever the file calls them."""
        embedder = self.model.conditioner
        if not isinstance(embedder, CaptionEmbedder):
            return None
        B, T, F = len(self.codes), embedder.count, embedder.dim
        S = T + self.model.tokens - 1
        inputs = {name: tensor for name, tensor in self.file.items() if name.startswith("in.")}
        features = [t for t in inputs.values() if t.shape == (B, T, F)]
        masks = [t.bool() for t in inputs.values() if t.shape == (B, T)]  # of the caption
        # of attention, in training (B, 1, S, S): what the last place may look at
        masks += [t.reshape(B, S, S)[:, -1, :T].bool() for t in inputs.values() if t.shape in ((B, 1, S, S), (B, S, S))]
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        assert features and masks, f"a caption's features or mask are not found among {shapes}"
        assert all(torch.equal(mask, masks[0]) for mask in masks), shapes
        return Captions(features[0].float(), masks[0])

    @property
    def inputs(self) -> Any:
        """Labels or captions."""
        captions = self.captions()
        return self.file["in.cls"].long() if captions is None else captions

    def logits(self, condition: Condition) -> Tensor:
        """In one pass: (B, L, V)."""
        z = self.model.backbone.sequence(condition, self.codes)
        return self.model.head.logits(z)  # type: ignore[operator]


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    worst = (ours - theirs).abs().max().item()
    assert worst <= tolerance, f"differs by {worst:.3g}, allowed {tolerance:.3g}"


# --- the network --------------------------------------------------------------------------------------------------


@each_model
@torch.no_grad()
def test_logits_in_one_pass(path: Path) -> None:
    case = Case(path)
    close(case.logits(case.condition), case.file["out.train_logits"], LOGITS)
    if "out.train_logits_null" in case.file:
        close(case.logits(case.null), case.file["out.train_logits_null"], LOGITS)


@each_model
@torch.no_grad()
def test_logits_with_a_cache(path: Path) -> None:
    """Rows with the condition, then rows without, teacher-forced."""
    case = Case(path)
    state = case.model.backbone.start(case.condition.join(case.null))
    codes = case.codes.repeat(2, 1)
    z = [case.model.backbone.step(state, codes[:, i - 1 : i] if i else None)[:, 0] for i in range(codes.shape[1])]
    ours = case.model.head.logits(torch.stack(z, dim=1))  # type: ignore[operator]
    close(ours, case.file["out.cached_logits"], LOGITS)


@each_model
def test_loss_and_gradients(path: Path) -> None:
    """Images with a weight of 0 have no share in it."""
    case = Case(path)
    weight = case.file.get("in.valid", torch.ones(len(case.codes))).flatten()
    assert weight.shape == (len(case.codes),) and bool(((weight == 0) | (weight == 1)).all()), weight
    some = weight.nonzero()[:, 0]  # the rest have no share in the loss
    inputs = case.inputs.select(some) if isinstance(case.inputs, Captions) else case.inputs[some]
    case.model.requires_grad_(True)
    loss = case.model.eval()(case.codes[some], inputs).mean
    assert float(loss.detach()) == pytest.approx(float(case.file["out.train_loss"]), rel=1e-5)
    loss.backward()
    ours = {official_name(name): parameter.grad for name, parameter in case.model.named_parameters()}
    if case.model.classes:
        parts = [case.model.conditioner.get_parameter(name) for name in ("class_embedding", "no_class")]
        ours[CLASSES] = torch.cat([torch.zeros_like(p) if p.grad is None else p.grad for p in parts])
    theirs = {name[5:]: tensor for name, tensor in case.file.items() if name.startswith("grad.")}
    assert theirs
    for name, expected in theirs.items():
        gradient = ours[name]
        assert gradient is not None, name
        close(gradient, expected, GRADIENT * expected.abs().max().item())


# --- sampling -----------------------------------------------------------------------------------------------------


def greedy_runs() -> list[tuple[Path, str]]:
    return [(path, name) for path in GPT for name in sorted(load_file(path)) if name.startswith("out.greedy")]


@pytest.mark.parametrize(("path", "name"), greedy_runs(), ids=lambda value: getattr(value, "stem", value))
@torch.no_grad()
def test_greedy_codes(path: Path, name: str) -> None:
    """Naive sampler and fast loop; `interval4`: guidance is off after decode step 4, counted from the second token."""
    case = Case(path)
    found = re.search(r"cfg([\d.]+)(?:_interval(\d+))?", name)
    assert found is not None
    L = case.model.tokens
    options: dict[str, Any] = {"guidance_scale": float(found[1]), "guidance_schedule": "constant", "temperature": 0.0}
    if found[2]:
        options |= {"guidance_schedule": "interval", "guidance_interval": (0.0, (int(found[2]) + 2) / L)}
    theirs = case.file[name].long()
    both, keys, settings = (case.condition, case.null), Keys.of_seeds(range(len(theirs))), Settings(**options)
    assert torch.equal(case.model.sample(*both, keys, settings), theirs)
    *_, last = case.model.steps(*both, keys, settings)
    assert torch.equal(last.tokens, theirs)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("sampling*.safetensors")), ids=lambda path: path.stem)
def test_filters_and_the_mix_of_guidance(path: Path) -> None:
    file = load_file(path)
    filters = [name for name in file if name.startswith("filtered_")]
    assert filters
    for name in filters:
        k, p = re.fullmatch(r"filtered_k(\d+)_p([\d.]+)", name).groups()  # type: ignore[union-attr]
        ours = filtered(file["logits"], top_k=int(k) or None, top_p=float(p))
        assert torch.equal(ours == -math.inf, file[name] == -math.inf), name
        kept = ours > -math.inf
        assert torch.equal(ours[kept], file[name][kept]), name
    for name in (name for name in file if re.fullmatch(r"cfg_[\d.]+", name)):
        scale = float(name[4:])
        mixed = file["cfg_uncond"] + scale * (file["cfg_cond"] - file["cfg_uncond"])
        close(mixed, file[name], 1e-6)


# --- full size ----------------------------------------------------------------------------------------------------

KEYS = sorted(FOLDER.glob("keys_GPT-*.json"))


@pytest.mark.parametrize("path", KEYS, ids=[path.stem for path in KEYS])
def test_presets_have_the_official_tensors(path: Path) -> None:
    """Names and shapes, without allocating one of them."""
    size, _, kind = path.stem.removeprefix("keys_GPT-").partition("_")
    if f"llamagen-{size.lower()}" not in PRESETS:
        pytest.skip(f"no preset of the size {size}")
    expected = {name: tuple(shape) for name, (shape, _) in json.loads(path.read_text()).items()}
    config = PRESETS[f"llamagen-{size.lower()}"].original()
    if kind == "t2i":
        config |= {"classes": 0, "caption_dim": 2048, "caption_tokens": 120}
    with torch.device("meta"):
        model = build_model(config)
    assert isinstance(model, CausalModel)
    ours = {name: tuple(tensor.shape) for name, tensor in llamagen_tensors(model).items()}
    assert ours == expected
    null = sum(buffer.numel() for name, buffer in model.named_buffers() if name == "conditioner.no_caption")
    assert parameter_count(model) == sum(math.prod(shape) for shape in expected.values()) - null


def test_a_fresh_model_finds_every_code_as_likely() -> None:
    """The official code begins at exactly ln V too: its head is zero."""
    model = build_model(
        {**PRESETS["llamagen-b"].model, "width": 64, "depth": 1, "heads": 2, "tokens": 4, "grid": [2, 2]}
    )
    loss = model(torch.randint(16384, (1, 4)), torch.tensor([3])).mean
    assert float(loss.detach()) == pytest.approx(9.704, abs=1e-3)
