"""Blocks that are compiled or recomputed in the backward pass compute what they compute without."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY_RUN, many, randomise
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from seriatim.core.errors import ResourceError
from seriatim.core.keys import Keys
from seriatim.models.build import build_model, seeded
from seriatim.training import wrapping as blocks
from seriatim.training.config import read_recipe
from seriatim.training.loop import train
from seriatim.training.wrapping import blocks_of, wrapped_blocks

SHAPE: dict[str, Any] = {"tokens": 16, "dim": 4, "width": 16, "heads": 2, "dropout": 0.2, "classes": 3}
DIFFUSION = {"kind": "diffusion", "width": 16, "depth": 2, "draws": 2}
NESTED = {
    "kind": "nested",
    "split": {"kind": "features"},
    "model": {
        "kind": "causal",
        "width": 8,
        "depth": 2,
        "heads": 1,
        "dropout": 0.2,
        "conditioning": "adaln",
        "head": {"kind": "mixture", "components": 2, "depth": 1, "width": 8},
    },
}
MODELS: dict[str, dict[str, Any]] = {
    "masked": {"kind": "masked", "depth": 2, "buffer": 2, "head": DIFFUSION},
    "causal": {"kind": "causal", "depth": 2, "conditioning": "both", "head": {**DIFFUSION, "kind": "flow"}},
    "nested": {"kind": "masked", "depth": 2, "buffer": 2, "head": NESTED},
    "energy": {
        "kind": "masked",
        "backbone": "bidirectional",
        "depth": 2,
        "buffer": 2,
        "head": {"kind": "energy", "width": 16, "depth": 2, "noise": 4},
    },
}
BLOCKS = {"masked": 2 + 2 + 2, "causal": 2 + 2, "nested": 2 + 2 + 2 + 1, "energy": 2 + 2}


def make(name: str) -> nn.Module:
    with seeded(0):
        model = build_model({**SHAPE, **MODELS[name]})
    randomise(model)
    return model.train()


def gradients(model: Any, images: int = 2) -> dict[str, torch.Tensor]:
    """The loss and its gradients; dropout draws from torch's generator, as in training."""
    model.zero_grad()
    tokens = torch.randn(images, 16, 4, generator=torch.Generator().manual_seed(2))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        loss = model(tokens, torch.arange(images) % 3, many(1, images), Keys.of(1)).sum
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("name", MODELS)
def test_recomputing_gives_the_same_gradients_bitwise(name: str) -> None:
    model = make(name)
    plain = gradients(model)
    with wrapped_blocks(model, recompute=True):
        recomputed = gradients(model)
    assert plain.keys() == recomputed.keys() and len(plain) > 10
    assert all(torch.equal(plain[key], recomputed[key]) for key in plain)


def test_dropout_would_show_if_it_were_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    true = blocks.checkpoint

    def forgetful(*arguments: Any, preserve_rng_state: bool, **options: Any) -> Any:  # noqa: ARG001
        return true(*arguments, preserve_rng_state=False, **options)

    monkeypatch.setattr(blocks, "checkpoint", forgetful)
    model = make("masked")
    plain = gradients(model)
    with wrapped_blocks(model, recompute=True):
        recomputed = gradients(model)
    assert not all(torch.equal(plain[key], recomputed[key]) for key in plain)


def saved_bytes(model: Any, images: int) -> int:
    """The bytes of all tensors that a loss of so many images keeps for its backward pass, weights aside."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        tokens = torch.zeros(images, 16, 4)
        kept = model(tokens, torch.zeros(images, dtype=torch.long), many(1, images), Keys.of(1))
    del kept
    return sum(sizes.values())


@pytest.mark.parametrize("name", MODELS)
def test_recomputing_keeps_less_for_the_backward_pass(name: str) -> None:
    model = make(name)
    plain = saved_bytes(model, 8)
    with wrapped_blocks(model, recompute=True):
        assert saved_bytes(model, 8) < 0.5 * plain


@pytest.mark.parametrize("name", MODELS)
def test_all_blocks_are_wrapped_and_only_for_gradients(name: str) -> None:
    model = make(name).eval()
    found = blocks_of(model)
    assert len(found) == BLOCKS[name] == len({id(block) for block in found})
    names, plain = list(model.state_dict()), gradients(model)["loss"]
    with wrapped_blocks(model, recompute=True):
        assert all("forward" in vars(block) for block in found)
        copied = copy.deepcopy(model)
        assert all(not isinstance(block.forward, blocks.BlockForward) for block in blocks_of(copied))
        assert torch.equal(gradients(copied)["loss"], plain) and list(model.state_dict()) == names
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(gradients(copied)["loss"], plain), "the copy has weights of its own"
    assert not any("forward" in vars(block) for block in found)


class Counting:
    """A compiler that counts the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of dynamo, which looks at inputs that are no leaves
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_give_the_same_gradients(recompute: bool) -> None:
    """Each kind of block is compiled once for each shape that it meets, however many blocks there are of it."""
    model, compiler = make("masked").eval(), Counting()
    plain = gradients(model)
    with wrapped_blocks(model, compiled=True, recompute=recompute, backend=compiler):
        compiled = gradients(model)
        graphs = compiler.graphs
        gradients(model)
    assert graphs == compiler.graphs and 0 < graphs <= 4, "encoder, decoder, its last block, head"
    assert all(torch.allclose(plain[key], compiled[key], atol=1e-5) for key in plain)


def test_a_machine_that_cannot_compile_says_so_in_one_line() -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler\nsecond line")

    model = make("masked")
    with wrapped_blocks(model, compiled=True, backend=broken), pytest.raises(ResourceError) as caught:
        gradients(model)
    told = str(caught.value)
    assert told.startswith("training.compile: torch could not compile a ") and "\n" not in told
    assert "set training.compile=false" in told


TINY = [*TINY_RUN, "model.heads=2", "model.dropout=0.1", "training.save_images=0", "training.images=64"]


def losses(folder: Path, *words: str) -> list[float]:
    train(read_recipe("mar-digits", [*TINY, *words]), folder, quiet=True)
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_recomputes_is_the_same_run(tmp_path: Path) -> None:
    plain = losses(tmp_path / "a")
    assert losses(tmp_path / "b", "training.checkpoint_activations=true") == plain
    one, two = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in "ab")
    assert one == two


def test_a_run_with_buckets_is_the_same_run_but_for_rounding(tmp_path: Path) -> None:
    plain = losses(tmp_path / "a", "training.buckets=0", "model.dropout=0")
    padded = losses(tmp_path / "b", "training.buckets=4", "model.dropout=0")
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(plain, padded, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_run_hands_its_blocks_to_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true, compiler = torch.compile, Counting()
    monkeypatch.setattr(torch, "compile", lambda f, *, backend, **rest: true(f, backend=compiler, **rest))  # noqa: ARG005
    plain = losses(tmp_path / "a")
    before = compiler.graphs
    compiled = losses(tmp_path / "b", "training.compile=true")
    assert before == 0 < compiler.graphs
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(plain, compiled, strict=True))
