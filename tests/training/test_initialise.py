"""`training.init_from` begins only with weights that mean the same in the recipe's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from seriatim.checkpoints.native import Bundle, save_bundle
from seriatim.core.errors import ConfigError
from seriatim.core.keys import Keys
from seriatim.models.base import SequenceModel
from seriatim.models.build import build_model, seeded
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.kmeans import KMeans
from seriatim.tokenizers.pixels import Pixels
from seriatim.training.config import read_recipe
from seriatim.training.initialise import initialise_from
from seriatim.training.loop import train

MASKED: dict[str, Any] = {
    "kind": "masked", "tokens": 16, "dim": 4, "width": 32, "depth": 1, "heads": 2, "buffer": 4, "classes": 3,
    "head": {"kind": "diffusion", "width": 16, "depth": 1},
}  # fmt: skip
CAUSAL: dict[str, Any] = {
    "kind": "causal", "tokens": 16, "dim": 4, "width": 32, "depth": 1, "heads": 2, "classes": 3, "grid": [4, 4],
    "head": {"kind": "diffusion", "width": 16, "depth": 1},
}  # fmt: skip
NESTED: dict[str, Any] = {
    **MASKED,
    "head": {
        "kind": "nested", "split": {"kind": "features"},
        "model": {"kind": "causal", "width": 16, "depth": 1, "heads": 2, "head": {"kind": "mixture", "components": 2}},
    },
}  # fmt: skip
NAMES = ["cat", "dog", "horse"]


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {**config, first: changed(config[first], rest, value) if rest else value}


def made(config: dict[str, Any], seed: int = 0) -> SequenceModel:
    with seeded(seed):
        return build_model(config).eval()


def pixels(**changes: Any) -> Tokenizer:
    return Pixels(8, **{"patch": 2, "channels": 1, **changes})


def begin(folder: Path, theirs: dict[str, Any], ours: dict[str, Any], *tokenizers: Tokenizer) -> SequenceModel:
    one, other = tokenizers or (pixels(), pixels())
    save_bundle(Bundle(made(theirs), one, NAMES), folder)
    model = made(ours, 1)
    initialise_from(str(folder), model, other, NAMES)
    return model


@pytest.mark.parametrize(
    ("config", "key", "theirs", "ours"),
    [
        (CAUSAL, "rotate_prefix", False, True),
        (CAUSAL, "attention_scale", 2.0, 1.0),
        (CAUSAL, "heads", 4, 2),
        (CAUSAL, "norm", "layer", "rms"),
        (CAUSAL, "mlp", "gelu-tanh", "swiglu"),
        (CAUSAL, "order", "random", "raster"),
        (CAUSAL, "positions", "learned", "rope"),
        (CAUSAL, "conditioning", "adaln", "prefix"),
        (MASKED, "heads", [2, 4], [2, 2]),
        (MASKED, "buffer", 8, 4),
        (MASKED, "width", [32, 64], [32, 32]),
        (MASKED, "mlp_ratio", 2.0, 4.0),
        (MASKED, "head.train_steps", 500, 1000),
        (MASKED, "head.kind", "flow", "diffusion"),
        (MASKED, "head.depth", 2, 1),
        (NESTED, "head.split.order", "reversed", "natural"),
        (NESTED, "head.model.heads", 4, 2),
        (NESTED, "head.model.attention_scale", 0.5, 1.0),
        (NESTED, "head.model.head.components", 3, 2),
    ],
)
def test_what_computes_something_else_is_named(
    tmp_path: Path, config: dict[str, Any], key: str, theirs: Any, ours: Any
) -> None:
    with pytest.raises(ConfigError) as caught:
        begin(tmp_path / "model", changed(config, key, theirs), changed(config, key, ours))
    message, (before, now) = str(caught.value), (str(x).replace(" ", "").lower() for x in (theirs, ours))
    assert f"model.{key} ({before} there, {now} in the recipe)" in message, message
    assert f"model.{key}={before}" in message.split("; set ")[1] and "\n" not in message
    again = begin(tmp_path / "again", changed(config, key, theirs), changed(config, key, theirs))
    assert torch.equal(next(again.parameters()), next(made(changed(config, key, theirs)).parameters()))


def test_the_silent_trap_of_llamagens_weights(tmp_path: Path) -> None:
    """Every difference is in the one line, and what it says to set is enough."""
    other = {**CAUSAL, "rotate_prefix": False, "attention_scale": 2.0}
    with pytest.raises(ConfigError) as caught:
        begin(tmp_path / "model", other, CAUSAL)
    assert str(caught.value) == (
        f"training.init_from: {tmp_path / 'model'} holds a model that computes something else with its weights: "
        "model.rotate_prefix (false there, true in the recipe), model.attention_scale (2.0 there, 1.0 in the recipe); "
        "set model.rotate_prefix=false model.attention_scale=2.0"
    )


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (pixels(levels=16), pixels(), r"tokenizer\.levels \(16 there, 256 in the recipe\); set tokenizer\.levels=16$"),
        (pixels(components=3), pixels(), r"tokenizer\.components \(3 there, none in the recipe\), .*whiten=0"),
        (pixels(), pixels(components=3), r"components \(none there, 3 in the recipe\), .*; leave out tokenizer\.comp"),
    ],
)
def test_another_tokenizer(tmp_path: Path, theirs: Tokenizer, ours: Tokenizer, words: str) -> None:
    before, now = (changed(MASKED, "dim", tokenizer.dim) for tokenizer in (theirs, ours))
    with pytest.raises(ConfigError, match=words):
        begin(tmp_path / "model", before, now, theirs, ours)


def test_another_kind_of_tokenizer_is_taken_whole(tmp_path: Path) -> None:
    codes = {**{k: v for k, v in CAUSAL.items() if k != "dim"}, "vocab": 4, "head": {"kind": "categorical"}}
    with pytest.raises(ConfigError) as caught:
        begin(tmp_path / "model", codes, CAUSAL, KMeans(8, patch=2, channels=1, vocab=4), pixels())
    message = str(caught.value)
    assert "tokenizer.kind (kmeans there, pixels in the recipe), model.head.kind (categorical there" in message
    assert f"; set 'tokenizer={{from: {tmp_path / 'model'}}}' model.head.kind=categorical" in message


@pytest.mark.parametrize(
    ("config", "key", "theirs", "ours"),
    [
        (MASKED, "dropout", 0.3, 0.0),
        (MASKED, "label_dropout", 0.5, 0.1),
        (MASKED, "min_mask_ratio", 0.1, 0.7),
        (MASKED, "head.draws", 1, 4),
        (CAUSAL, "dropout", 0.2, 0.0),
    ],
)
def test_what_only_training_uses_may_differ(
    tmp_path: Path, config: dict[str, Any], key: str, theirs: Any, ours: Any
) -> None:
    model = begin(tmp_path / "model", changed(config, key, theirs), changed(config, key, ours))
    source = made(changed(config, key, theirs))
    tokens, labels, keys = torch.randn(2, 16, 4), torch.tensor([0, 2]), Keys.of(0).fold(torch.arange(2))
    z = [m.condition(labels, 2).vectors for m in (model, source)]
    assert torch.equal(*z)
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert torch.isfinite(model(tokens, labels, keys, Keys.of(1)).mean)


def test_the_command_that_the_message_gives_works(tmp_path: Path) -> None:
    small = ["training.images=8", "training.batch_size=8", "model.width=16", "model.heads=2", "model.depth=1"]
    first = [*small, "model.rotate_prefix=false", "model.attention_scale=2.0", "model.mlp=gelu-tanh"]
    train(read_recipe("gpt-digits", first), tmp_path / "first", quiet=True)
    second = [*small, f"training.init_from={tmp_path / 'first'}"]
    with pytest.raises(ConfigError) as caught:
        train(read_recipe("gpt-digits", second), tmp_path / "second", quiet=True)
    more = str(caught.value).split("; set ")[1].split()
    assert train(read_recipe("gpt-digits", [*second, *more]), tmp_path / "second", quiet=True).images == 8
