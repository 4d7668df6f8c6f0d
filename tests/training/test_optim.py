"""The optimisers that a recipe names: which weights Muon takes, what it computes, and that runs resume bitwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY_RUN, many
from pretend_cuda import pretend, pretend_cuda
from torch import nn

from seriatim.core.errors import CheckpointError, ConfigError
from seriatim.core.keys import Keys
from seriatim.models.build import build_model, seeded
from seriatim.training import muon as muon_module
from seriatim.training.config import read_recipe
from seriatim.training.loop import train
from seriatim.training.muon import MuonAndAdamW, Orthogonal, orthogonal, trunk_matrices
from seriatim.training.optim import OPTIMISERS, adamw, averaged, is_fused, make_optimiser, muon, set_rate
from seriatim.training.state import RunState, Trainables, load, save

MASKED: dict[str, Any] = {
    "kind": "masked",
    "tokens": 4,
    "dim": 4,
    "width": [8, 16],
    "depth": 1,
    "heads": 1,
    "classes": 2,
    "dropout": 0.0,
    "head": {"kind": "diffusion", "width": 8, "depth": 1},
}
CAUSAL: dict[str, Any] = {
    "kind": "causal",
    "tokens": 4,
    "vocab": 6,
    "width": 8,
    "depth": 1,
    "heads": 1,
    "classes": 2,
    "head": {"kind": "categorical"},
}


def names_of(model: nn.Module, chosen: list[nn.Parameter]) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in chosen}


def test_muon_takes_the_matrices_of_the_trunk() -> None:
    model = build_model(MASKED)
    found = names_of(model, trunk_matrices(model))
    inside = {"attention.qkv.weight", "attention.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
    blocks = {f"backbone.{part}.0.{name}" for part in ("encoder", "decoder") for name in inside}
    assert found == blocks | {"backbone.decoder_embed.weight"}
    causal = build_model(CAUSAL)
    found = names_of(causal, trunk_matrices(causal))
    assert found and all(name.startswith("backbone.blocks.") and name.endswith(".weight") for name in found)


@pytest.mark.parametrize("config", [MASKED, CAUSAL], ids=["masked", "causal"])
def test_every_parameter_has_one_optimiser_and_its_decay(config: dict[str, Any]) -> None:
    model = build_model(config)
    made = muon(model, 0.1, (0.9, 0.95), 0.02)
    held = [id(p) for group in made.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    decay = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    usual = adamw(model, 0.1, (0.9, 0.95), 0.02)
    assert decay == {id(p): group["weight_decay"] for group in usual.param_groups for p in group["params"]}


def test_a_model_without_matrices_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"training\.optimiser: 'muon' needs a backbone with matrices"):
        muon(nn.Sequential(nn.Linear(2, 2)), 0.1, (0.9, 0.95), 0.0)


def test_an_unknown_optimiser_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.optimiser: 'moun' is not known.*muon"):
        train(read_recipe("mar-digits", ["training.optimiser=moun"]), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_muon_has_a_rate_of_its_own() -> None:
    """A first update has the size of the rate, whatever the gradient: 0.2 of it for Muon, all of it for AdamW."""
    model = build_model(MASKED)
    made = make_optimiser({"kind": "muon", "matrix_rate": 0.04}, model, 0.02, (0.9, 0.95), 0.0)
    set_rate(made, 0.01)  # as a schedule does
    assert [group["lr"] for group in made.param_groups] == pytest.approx([0.02, 0.01, 0.01])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    numbers = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=numbers)
    made.step()
    moved = {name: (p.detach() - before[name]).square().mean().sqrt().item() for name, p in model.named_parameters()}
    matrices = names_of(model, trunk_matrices(model))
    assert all(
        value == pytest.approx(0.2 * 0.02 if name in matrices else 0.01, rel=0.4) for name, value in moved.items()
    )


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"kind": "muon", "matrix_rat": 0.1}, r"training\.optimiser: muon has no option 'matrix_rat'.*matrix_rate"),
        ({"kind": "adamw", "matrix_rate": 0.1}, r"training\.optimiser: adamw has no option 'matrix_rate'"),
        ({"kind": "muon", "matrix_rate": 0}, r"training\.optimiser\.matrix_rate: 0.* is not allowed"),
        ({"kind": "muon", "matrix_rate": True}, r"training\.optimiser\.matrix_rate: must be a number"),
        ({"matrix_rate": 0.1}, r"training\.optimiser: must be a name such as adamw, or a mapping"),
        ("", r"training\.optimiser: must be a name such as adamw, or a mapping"),
    ],
)
def test_a_wrong_optimiser_is_named(chosen: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settings = read_recipe("mar-digits", [f"training.optimiser={json.dumps(chosen)}"]).training
        make_optimiser(settings.optimiser, build_model(MASKED), 0.1, (0.9, 0.95), 0.0)


def test_an_optimiser_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMISERS, "plain", lambda model, rate, *_: torch.optim.SGD(model.parameters(), lr=rate))
    assert isinstance(make_optimiser("plain", build_model(MASKED), 0.1, (0.9, 0.95), 0.0), torch.optim.SGD)


@pytest.mark.parametrize("cls", [torch.optim.NAdam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.SGD])
def test_a_run_with_an_optimiser_of_ones_own_resumes_bitwise(
    cls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it keeps: numbers, and tensors of the parameters' shapes."""
    monkeypatch.setitem(OPTIMISERS, "mine", lambda model, rate, *_: cls(model.parameters(), lr=rate))
    words = [
        *TINY_RUN,
        "training.optimiser=mine",
        "training.images=64",
        "training.batch_size=16",
        "training.schedule=constant",
    ]
    train(read_recipe("mar-digits", words), tmp_path / "whole", quiet=True)
    words.append("training.save_images=16")
    train(read_recipe("mar-digits", [*words, "training.images=32"]), tmp_path / "parts", quiet=True)
    train(read_recipe("mar-digits", words), tmp_path / "parts", resume=True, quiet=True)
    one, two = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == two


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_an_orthogonal_update_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = orthogonal(matrix, (3.4445, -4.775, 2.0315), 5)
    values = torch.linalg.svdvals(made)
    assert made.shape == shape and values.min() > 0.3 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ made @ right.T  # diagonal, because the iteration keeps the singular vectors
    assert torch.allclose(turned, turned.diag().diag(), atol=1e-9)


@pytest.mark.parametrize("slow", [True, False])
def test_both_ways_to_compute_muon_agree(monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    """In float32 and in PyTorch's bfloat16: the same momentum, and updates that differ by bfloat16's rounding."""
    monkeypatch.setattr(muon_module, "slow_in_bfloat16", lambda _: slow)
    numbers = torch.Generator().manual_seed(0)
    start = torch.randn(6, 10, generator=numbers)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    one, two = Orthogonal([ours], **settings), torch.optim.Muon([theirs], **settings)
    for _ in range(3):
        gradient = torch.randn(6, 10, generator=numbers)
        for parameter, optimiser in ((ours, one), (theirs, two)):
            parameter.grad = gradient.clone()
            optimiser.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved, "a wrong scale or momentum is off by far more"
    assert torch.allclose(one.state[ours]["momentum_buffer"], two.state[theirs]["momentum_buffer"], atol=1e-6)
    assert torch.equal(ours, theirs) != slow


def parts(seed: int, updates: int, make: Any = muon) -> Trainables:
    with seeded(seed):
        model = build_model(MASKED)
        tokens = torch.randn(3, 4, 4)
    made = Trainables(model, averaged(model, 0.9), make(model, 0.01, (0.9, 0.95), 0.02))
    for _ in range(updates):
        step(made, tokens)
    return made


def step(of: Trainables, tokens: torch.Tensor) -> None:
    torch.manual_seed(len(of.optimiser.state))
    loss: torch.Tensor = of.model(tokens).mean
    loss.backward()
    of.update()


def test_a_saved_muon_goes_on_bitwise(tmp_path: Path) -> None:
    trained, fresh = parts(0, 2), parts(1, 1)
    load(save(tmp_path, trained, RunState(seen=6, steps=2)), fresh)
    assert isinstance(fresh.optimiser, MuonAndAdamW)
    assert all(each.state is fresh.optimiser.state for each in fresh.optimiser.both)
    tokens = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(5))
    for of in (trained, fresh):
        for group in of.optimiser.param_groups:
            group["lr"] = 0.003  # as the engine sets it
        step(of, tokens)
    one, two = trained.model.state_dict(), fresh.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_muon_fits_a_batch() -> None:
    made = parts(0, 0)
    tokens, keys = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(5)), many(0, 3)
    losses = []
    for _ in range(40):
        loss: torch.Tensor = made.model(tokens, None, keys, Keys.of(0)).mean
        loss.backward()
        made.update()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_moments_of_another_optimiser_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, parts(0, 1, adamw), RunState(seen=3, steps=1))
    with pytest.raises(CheckpointError, match="it is not this optimiser's"):
        load(path, parts(1, 0))


def test_a_resumed_run_with_muon_is_the_same_bitwise(tmp_path: Path) -> None:
    def run(name: str, optimiser: str, images: int, resume: bool = False) -> bytes:
        words = [*TINY_RUN, f"training.optimiser={optimiser}", "training.save_images=32", f"training.images={images}"]
        train(read_recipe("mar-digits", words), tmp_path / name, resume=resume, quiet=True)
        return (tmp_path / name / "model/model.safetensors").read_bytes()

    own_rate = "{kind: muon, matrix_rate: 0.02}"
    whole = run("whole", own_rate, 128)
    run("parts", own_rate, 64)
    assert run("parts", own_rate, 128, resume=True) == whole
    assert run("other", "muon", 128) != whole, "the engine gives matrices the rate of the rest"
    words = [*TINY_RUN, "training.save_images=32", "training.images=128"]
    with pytest.raises(ConfigError, match=r"training\.optimiser\.kind: 'muon' in .* 'adamw' now"):
        train(read_recipe("mar-digits", [*words, "training.optimiser=adamw"]), tmp_path / "parts", resume=True)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_adamw_is_fused_on_cuda_and_cpus(name: str) -> None:
    def fused(model: nn.Module) -> set[bool | None]:
        made = make_optimiser(name, model, 0.1, (0.9, 0.95), 0.02)
        return {group["fused"] for group in made.param_groups if "betas" in group}

    assert fused(build_model(MASKED)) == {True}
    with pretend_cuda():
        assert fused(pretend(build_model(MASKED))) == {True}
    assert is_fused(build_model(MASKED).to("meta")) is None
