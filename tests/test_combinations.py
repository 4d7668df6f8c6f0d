"""Any tokenizer x model x head x order: what makes sense trains three steps and samples, what doesn't says why.

In the suite every pair of parts that goes together is met once; all combinations are marked slow.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from seriatim.checkpoints.tokenizer import save_tokenizer
from seriatim.core.errors import ConfigError, UsageError
from seriatim.core.orders import CONFIDENCE, RANDOM, RASTER
from seriatim.models.build import seeded
from seriatim.models.registry import HEADS, MODELS
from seriatim.pipeline.loading import load
from seriatim.tokenizers.kinds import TOKENIZERS
from seriatim.tokenizers.kl import KL
from seriatim.tokenizers.vq import VQ
from seriatim.training.config import Recipe
from seriatim.training.loop import train
from seriatim.training.setup import build

INNER = {"kind": "causal", "width": 16, "depth": 1, "heads": 2}
TOKENIZER: dict[str, dict[str, Any]] = {
    "pixels": {"kind": "pixels", "patch": 2, "levels": 17},
    "pixels, 3 components": {"kind": "pixels", "patch": 2, "levels": 17, "components": 3, "whiten": 0.5},
    "kmeans": {"kind": "kmeans", "patch": 2, "vocab": 12},
    "kl": {"from": "kl"},
    "vq": {"from": "vq"},
}
MODEL: dict[str, dict[str, Any]] = {
    "masked": {"kind": "masked", "width": 16, "depth": 1, "heads": 2, "buffer": 2, "min_mask_ratio": 0.2},
    "masked, unequal": {"kind": "masked", "width": [16, 24], "depth": [1, 2], "heads": 2, "buffer": 1, "dropout": 0.1},
    "masked, one stack": {"kind": "masked", "backbone": "bidirectional", "width": 16, "depth": 2, "heads": 2,
                          "buffer": 2},
    "raster": {"kind": "causal", "width": 16, "depth": 2, "heads": 2},
    "raster, adaln": {"kind": "causal", "width": 16, "depth": 1, "heads": 2, "conditioning": "both", "norm": "layer",
                      "mlp": "gelu-tanh", "positions": "learned"},
    "random": {"kind": "causal", "order": "random", "width": 16, "depth": 2, "heads": 2, "dropout": 0.1},
}  # fmt: skip
HEAD: dict[str, dict[str, Any]] = {
    "diffusion": {"kind": "diffusion", "width": 16, "depth": 1},
    "flow": {"kind": "flow", "width": 16, "depth": 1},
    "energy": {"kind": "energy", "width": 16, "depth": 1, "noise": 8},
    "mixture": {"kind": "mixture", "components": 3, "width": 16, "depth": 1},
    "mixture, full": {"kind": "mixture", "components": 2, "width": 16, "depth": 0, "covariance": "full"},
    "bins": {"kind": "bins", "bins": 8},
    "features, mixture": {"kind": "nested", "split": {"kind": "features"}, "backbone": INNER | {"conditioning": "both"},
                          "head": {"kind": "mixture", "components": 2, "depth": 0}},
    "features, bins": {"kind": "nested", "split": {"kind": "features", "order": "reversed"}, "backbone": INNER,
                       "head": {"kind": "bins", "bins": 8}},
    "features, flow": {"kind": "nested", "split": {"kind": "features"}, "backbone": INNER | {"positions": "learned"},
                       "head": {"kind": "flow", "width": 16, "depth": 1}},
    "categorical": {"kind": "categorical"},
}  # fmt: skip
ORDER = ("random", "raster", "halton", CONFIDENCE)
CODES = {"kmeans", "vq"}
FACTORS = (tuple(TOKENIZER), tuple(MODEL), tuple(HEAD), ORDER)
Combination = tuple[str, str, str, str]


def sense(combination: Combination) -> bool:
    """Codes go with the head of codes and features with the others; a raster model has no other order."""
    tokenizer, model, head, order = combination
    if (tokenizer in CODES) != (head == "categorical"):
        return False
    if order == CONFIDENCE:
        return model.startswith("masked") and head == "categorical"
    # "random" is every model's own: of a raster one the raster
    return not model.startswith("raster") or order in (RANDOM, RASTER)


ALL: list[Combination] = [c for c in itertools.product(*FACTORS) if sense(c)]


def pairs(combination: Combination) -> set[tuple[int, str, int, str]]:
    return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(enumerate(combination), 2)}


def pairwise() -> list[Combination]:
    """As few combinations as a greedy choice finds that have every pair of parts that any of them has."""
    left = set[tuple[int, str, int, str]]().union(*map(pairs, ALL))
    chosen: list[Combination] = []
    while left:
        chosen.append(max(ALL, key=lambda c: len(pairs(c) & left)))
        left -= pairs(chosen[-1])
    return chosen


PAIRWISE = pairwise()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers with networks, their weights random: 8x8 digits as 4x4 latents of 2 features, or codes."""
    made = tmp_path_factory.mktemp("tokenizers")
    with seeded(0):
        kl = KL(size=8, channels=1, latent_channels=2, block_out_channels=(32, 32), layers_per_block=1)
        vq = VQ(size=8, channels=1, vocab=16, code_dim=4, latent_channels=8, block_out_channels=(32, 32),
                layers_per_block=1)  # fmt: skip
    save_tokenizer(kl, made / "kl")
    save_tokenizer(vq, made / "vq")
    return made


def recipe(tokenizer: str, model: str, head: str, order: str, folder: Path, **training: Any) -> Recipe:
    given = dict(TOKENIZER[tokenizer])
    if "from" in given:
        given["from"] = str(folder / given["from"])
    sampling: dict[str, Any] = {"guidance_scale": 2.0}
    sampling |= {} if order == RANDOM else {"order": order}
    sampling |= {} if MODEL[model]["kind"] == "causal" else {"num_inference_steps": 4}
    sampling |= {"num_diffusion_steps": 3} if head in ("diffusion", "flow", "features, flow") else {}
    return Recipe(
        name="combination", data={"kind": "digits"}, tokenizer=given, model={**MODEL[model], "head": HEAD[head]},
        training={"images": 24, "batch_size": 8, "learning_rate": 1e-3, "ema": 0.5, "log_images": 24, "save_images": 0,
                  "dtype": "float32", "threads": 1, **training},
        sampling=sampling,
    )  # fmt: skip


def works(combination: Combination, folder: Path, out: Path) -> None:
    """Three steps; four images of two classes from the folder it leaves, the same whatever the batch."""
    result = train(recipe(*combination, folder), out, quiet=True)
    assert result.images == 24 and 0 < result.loss < 1e6
    pipe = load(out / "model", device="cpu")
    asked: dict[str, Any] = {"class_labels": [3, 7], "num_images_per_label": 2, "seed": 5, "output_type": "tokens"}
    tokens = pipe(**asked).tokens
    assert tokens.shape[:2] == (4, pipe.model.tokens)
    assert tokens.dtype == (torch.long if combination[0] in CODES else torch.float32)
    apart = pipe(**asked, batch_size=3).tokens  # three, and one alone
    assert torch.allclose(tokens.float(), apart.float(), atol=1e-4, rtol=1e-4), "whatever the batch"
    assert len({tuple(row.flatten().tolist()) for row in tokens}) == 4, "an image each"
    images = pipe(class_labels=[3], seed=5, num_images_per_label=1).images
    assert images[0].size == (8, 8)


@pytest.mark.parametrize("combination", PAIRWISE, ids=" x ".join)
def test_every_pair_of_parts(combination: Combination, folder: Path, tmp_path: Path) -> None:
    works(combination, folder, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("combination", [c for c in ALL if c not in PAIRWISE], ids=" x ".join)
def test_every_combination(combination: Combination, folder: Path, tmp_path: Path) -> None:
    works(combination, folder, tmp_path / "run")


def test_nothing_is_left_out() -> None:
    """A part that is registered is in the table here; `arrays` has no pictures (tests/training/test_arrays.py)."""
    assert {HEAD[name]["kind"] for name in HEAD} == HEADS.keys()
    assert {MODEL[name]["kind"] for name in MODEL} == MODELS.keys()
    kinds = {value.get("kind") or value["from"] for value in TOKENIZER.values()}
    elsewhere = {"pretrained", "detok"}, {"fsq"}  # features as those of `kl`, and codes as those of `vq`
    assert kinds.union({"arrays"}, *elsewhere) == TOKENIZERS.keys()
    assert len(set().union(*map(pairs, PAIRWISE))) == len(set().union(*map(pairs, ALL)))
    assert set(map(why, FEW)) == set(WHY.values())
    assert {part for combination in FEW for part in combination} == {part for parts in FACTORS for part in parts}


SENSELESS = [c for c in itertools.product(*FACTORS) if not sense(c)]
WHY = {
    "codes": "draws real features, the tokens are codes",
    "features": "draws codes, the tokens are",
    "raster": "order: a causal model of raster order draws in no other",
    "confidence": "order: 'confidence' needs",
}


def why(combination: Combination) -> str:
    tokenizer, model, head, order = combination
    if tokenizer in CODES and head != "categorical":
        return WHY["codes"]
    if tokenizer not in CODES and head == "categorical":
        return WHY["features"]
    return WHY["confidence" if order == CONFIDENCE and model.startswith("masked") else "raster"]


FEW = SENSELESS[::23]


@pytest.mark.parametrize(
    "combination",
    [*FEW, *(pytest.param(c, marks=pytest.mark.slow) for c in SENSELESS[::7] if c not in FEW)],
    ids=" x ".join,
)
def test_what_makes_no_sense_says_why(combination: Combination, folder: Path) -> None:
    """Before any step, in one sentence."""
    with pytest.raises((ConfigError, UsageError)) as caught:
        build(recipe(*combination, folder))
    assert "\n" not in str(caught.value)
    assert why(combination) in str(caught.value) or combination[3] in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "masked", "backbone": "causal"}, "backbone"),
        ({"kind": "causal", "backbone": "masked"}, "backbone"),
        ({"kind": "masked", "order": "random"}, "order"),
        ({"kind": "causal", "min_mask_ratio": 0.5}, "min_mask_ratio"),
        ({"kind": "causal", "order": "halton"}, "order"),
        ({"head": {**HEAD["features, mixture"], "split": {"kind": "features", "group": 3}}}, "group"),
    ],
)
def test_a_model_of_parts_that_do_not_fit_says_why(changes: dict[str, Any], words: str, folder: Path) -> None:
    made = recipe("pixels", "masked", "diffusion", "random", folder)
    keep = {} if changes.get("kind") == "causal" or "backbone" in changes else made.model
    model = {**keep, "width": 16, "depth": 1, "heads": 2, "head": HEAD["diffusion"], **changes}
    with pytest.raises(ConfigError, match=words) as caught:
        build(made.model_copy(update={"model": model}))
    assert "\n" not in str(caught.value)
