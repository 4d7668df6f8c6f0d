"""Patches as codes without a network: centres are found, the same each time, and their codes train a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import seriatim
from seriatim.checkpoints.tokenizer import load_tokenizer, save_tokenizer
from seriatim.cli.main import run
from seriatim.core.errors import ConfigError, DataError, UsageError
from seriatim.data.base import Digits
from seriatim.nn.patch import patchify
from seriatim.tokenizers import kmeans
from seriatim.tokenizers.kinds import build_tokenizer
from seriatim.tokenizers.kmeans import KMeans


def tiles(count: int = 40, kinds: int = 5) -> tuple[Tensor, Tensor]:
    """Images of 6 x 6 made of 2 x 2 patches of so many kinds, hardly changed; and which kinds (n, 9)."""
    random = torch.Generator().manual_seed(0)
    patches = torch.linspace(-0.8, 0.8, kinds)[:, None] + 0.3 * torch.randn(kinds, 4, generator=random).clamp(-0.5, 0.5)
    which = torch.randint(kinds, (count, 9), generator=random)
    tokens = patches[which] + 0.01 * torch.randn(count, 9, 4, generator=random)
    rows = tokens.view(count, 3, 3, 2, 2).permute(0, 1, 3, 2, 4)
    return rows.reshape(count, 1, 6, 6), which


def test_the_kinds_of_patches_are_found() -> None:
    images, which = tiles()
    tokenizer = KMeans(6, 2, 1, vocab=5)
    tokenizer.fit(images.split(16))
    codes = tokenizer.tokens(tokenizer.moments(images))
    assert codes.shape == (40, 9) and codes.dtype == torch.int64
    pairs = {(int(a), int(b)) for a, b in zip(which.flatten(), codes.flatten(), strict=True)}
    assert len(pairs) == 5, "a code for each kind"
    assert (tokenizer.decode(codes) - images).abs().max() < 0.06
    assert bool((tokenizer.centres.mean(dim=1).diff() > 0).all()), "sorted from dark to light"
    assert torch.equal(tokenizer.decode(codes), tokenizer.decode_embeddings(tokenizer.embeddings(codes)))
    nearest = torch.cdist(patchify(images, 2), tokenizer.centres).argmin(dim=-1)
    assert torch.equal(codes, nearest)


def test_the_same_images_give_the_same_centres(tmp_path: Path) -> None:
    images = Digits().images(torch.arange(300))
    made = []
    for seed in (0, 0, 1):
        tokenizer = KMeans(8, 2, 1, vocab=32, seed=seed)
        state = torch.get_rng_state()
        tokenizer.fit(images.split(100))
        assert torch.equal(state, torch.get_rng_state()), "no global random state"
        made.append(tokenizer)
    assert torch.equal(made[0].centres, made[1].centres) and not torch.equal(made[0].centres, made[2].centres)
    again = load_tokenizer(save_tokenizer(made[0], tmp_path / "t"))
    assert again.fingerprint() == made[0].fingerprint()
    again.fit([images[:5]])
    assert again.fingerprint() == made[0].fingerprint(), "found once"
    assert again.moments_fingerprint() == made[2].moments_fingerprint() == KMeans(8, 2, 1).moments_fingerprint()


def test_few_patches_stand_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    images, _ = tiles(200)
    monkeypatch.setattr(kmeans, "MOST_PATCHES", 100)
    kept, different = kmeans.sample_of((patchify(part, 2).flatten(0, 1) for part in images.split(30)), 0)
    assert kept.shape == (100, 4) and torch.equal(different, torch.unique(kept, dim=0))
    everything = {tuple(row) for row in patchify(images, 2).flatten(0, 1).tolist()}
    places = [i for i, row in enumerate(patchify(images, 2).flatten(0, 1).tolist()) if row in kept.tolist()]
    assert {tuple(row) for row in kept.tolist()} <= everything and len(places) == 100
    assert 700 < sum(places) / 100 < 1100, "from all over the data"


def pictures_of(patches: Tensor, which: Tensor) -> Tensor:
    """Images (n, 3, 8, 8) of the 2 x 2 patches (K, 12) that `which` (n, 16) names."""
    rows = patches[which].view(-1, 4, 4, 3, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return rows.reshape(-1, 3, 8, 8)


def drawn(kinds: int, images: int = 200, seed: int = 0, flat: bool = False) -> Tensor:
    """Images of patches of so many kinds, all of which occur, the first often and the last rarely."""
    random = torch.Generator().manual_seed(seed)
    patches = torch.rand(kinds, 12, generator=random) * 2 - 1
    if flat:  # of one colour each
        patches = patches[:, ::4].repeat_interleave(4, dim=1)
    often = 1 / torch.arange(1.0, kinds + 1) ** 2
    which = torch.multinomial(often, images * 16, replacement=True, generator=random)
    which[:kinds] = torch.arange(kinds)
    return pictures_of(patches, which.view(images, 16))


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("vocab", [2, 7, 48, 200])
def test_as_many_codes_as_kinds_of_patches_are_exact(vocab: int, flat: bool) -> None:
    images = drawn(vocab, flat=flat)
    tokenizer = KMeans(8, 2, 3, vocab=vocab)
    tokenizer.fit(images.split(30))
    codes = tokenizer.tokens(tokenizer.moments(images))
    assert len(codes.unique()) == vocab and torch.equal(tokenizer.decode(codes), images)
    other = KMeans(8, 2, 3, vocab=vocab)
    other.fit(images.split(30))
    assert torch.equal(other.centres, tokenizer.centres)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spare", [1, 5, 30])
def test_no_code_is_left_unused(spare: int, seed: int) -> None:
    """Also where there are hardly more kinds of patches than codes, most of them rare."""
    images = drawn(60, seed=seed)
    tokenizer = KMeans(8, 2, 3, vocab=60 - spare, seed=seed)
    tokenizer.fit(images.split(30))
    codes = tokenizer.tokens(tokenizer.moments(images))
    assert len(codes.unique()) == len(torch.unique(tokenizer.centres, dim=0)) == 60 - spare
    assert bool(tokenizer.centres.isfinite().all())


def test_centres_that_nothing_is_nearest_to_move_to_what_is_farthest() -> None:
    patches = torch.tensor([[0.0], [0.1], [5.0], [9.0]])
    for begin in ([0.0, 0.0, 0.0], [0.05, 100.0, -100.0], [4.0, 4.0, 9.0], [0.0, 0.1, 0.1]):
        moved = kmeans.all_used(torch.tensor(begin)[:, None], patches)
        codes = torch.cdist(patches, moved).argmin(dim=1)
        assert len(codes.unique()) == 3, (begin, moved)


def test_a_patch_too_rare_to_be_drawn_has_a_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3,200 patches 100 are drawn to learn from, and the rare ones are hardly among them."""
    monkeypatch.setattr(kmeans, "MOST_PATCHES", 100)
    images = drawn(40)
    tokenizer = KMeans(8, 2, 3, vocab=40)
    tokenizer.fit(images.split(30))
    assert torch.equal(tokenizer.decode(tokenizer.tokens(tokenizer.moments(images))), images)


def test_a_side_that_the_patch_does_not_divide() -> None:
    images = Digits().images(torch.arange(50))
    tokenizer = KMeans(8, 3, 1, vocab=20)
    tokenizer.fit([images])
    codes = tokenizer.tokens(tokenizer.moments(images))
    assert codes.shape == (50, 9) and tokenizer.decode(codes).shape == images.shape


def test_what_cannot_be_is_one_line() -> None:
    images, _ = tiles(2)
    with pytest.raises(UsageError, match="vocab: 19 codes are more than the 18 different patches") as caught:
        KMeans(6, 2, 1, vocab=19).fit([images])
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="vocab: 3 codes are more than the 1 different patches"):
        KMeans(6, 2, 1, vocab=3).fit([torch.zeros(4, 1, 6, 6)])
    with pytest.raises(DataError, match="no images to measure"):
        KMeans(6, 2, 1).fit([])
    with pytest.raises(UsageError, match="has no centres yet"):
        KMeans(6, 2, 1).tokens(images)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"vocab": 1}, "vocab: 1 is not allowed"),
        ({"patch": 9}, "patch: 9 is not allowed"),
        ({"channels": 2}, "channels: 2"),
        ({"levels": 1}, "levels: 1"),
        ({"seed": -1}, "seed: -1"),
        ({"size": [8, 8, 8]}, "size: [8, 8, 8] is not allowed; it must be a side in pixels, or [height, width]"),
    ],
)
def test_arguments_are_checked(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_tokenizer({"kind": "kmeans", "size": 8, **more})
    assert words in str(caught.value)


TRAIN = ["tokenizer={kind: kmeans, patch: 2, levels: 17, vocab: 32}", "model.head={kind: categorical}"]
TRAIN += ["model.width=32", "model.depth=1", "model.heads=2", "training.images=256", "training.save_images=0"]
TRAIN += ["training.dtype=float32", "training.threads=1", "sampling={num_inference_steps: 4}"]


def test_a_model_of_codes_is_trained_and_sampled_from_a_cache_too(tmp_path: Path) -> None:
    assert run(["train", "mar-digits", *TRAIN, "--out", str(tmp_path / "run")]) == 0
    assert run(["sample", str(tmp_path / "run"), "--label", "3", "--seed", "1", "--out", str(tmp_path / "s")]) == 0
    assert len(list((tmp_path / "s").glob("*-3.png"))) == 1
    assert run(["cache", "mar-digits", *TRAIN, "--out", str(tmp_path / "cache")]) == 0
    words = ["train", "mar-digits", f"data={{kind: latents, path: {tmp_path / 'cache'}, flip: false}}", *TRAIN]
    assert run([*words, "--out", str(tmp_path / "cached")]) == 0
    one, two = (seriatim.load(tmp_path / name, device="cpu") for name in ("run", "cached"))
    assert torch.equal(one.tokenizer.state_dict()["centres"], two.tokenizer.state_dict()["centres"])
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, two.model.state_dict()[name]), name
