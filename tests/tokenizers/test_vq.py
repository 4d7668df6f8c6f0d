"""Codes: the nearest codeword, what training a codebook minimises, and a tokenizer of codes through the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from seriatim.checkpoints.tokenizer import load_tokenizer, save_tokenizer
from seriatim.core.errors import ConfigError, DataError, UsageError
from seriatim.data.caching import write_cache
from seriatim.data.loader import Loader, batches_of, to_float
from seriatim.tokenizers import quantise
from seriatim.tokenizers.kinds import build_tokenizer, tokenizer_config
from seriatim.tokenizers.pixels import Pixels
from seriatim.tokenizers.quantise import Quantiser, Usage, entropy_loss, nearest_codes
from seriatim.tokenizers.vq import VQ
from seriatim.training.config import read_recipe
from seriatim.training.setup import build_inputs

TINY: dict[str, Any] = {"vocab": 50, "code_dim": 3, "latent_channels": 4, "block_out_channels": [32, 32]}


def tiny(**more: Any) -> VQ:
    torch.manual_seed(0)
    return VQ(8, **{**TINY, "layers_per_block": 1, **more})


# --- the codebook -------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 5), st.integers(0, 10**6))
def test_the_nearest_codeword_is_found(n: int, v: int, c: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, c, generator=random, dtype=torch.float64)
    codewords = torch.randn(v, c, generator=random, dtype=torch.float64)
    distances = torch.cdist(vectors, codewords, compute_mode="donot_use_mm_for_euclid_dist")
    found = nearest_codes(vectors, codewords)
    chosen = distances.gather(1, found[:, None])[:, 0]
    assert torch.allclose(chosen, distances.min(dim=1).values, atol=1e-7)


def test_of_equal_codewords_the_first_is_taken_in_parts_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    codewords = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    vectors = torch.tensor([[2.0, 0.1], [0.1, 3.0], [0.5, 0.5]])
    assert nearest_codes(vectors, codewords).tolist() == [0, 1, 0]
    monkeypatch.setattr(quantise, "MOST_DISTANCES", 4)  # one vector at a time
    assert nearest_codes(vectors, codewords).tolist() == [0, 1, 0]
    assert nearest_codes(vectors[:0], codewords).tolist() == []


def test_lengths_count_only_without_l2() -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 5, 3)
    for l2 in (True, False):
        quantiser = Quantiser(8, 3, l2=l2)
        quantiser.codebook.data.copy_(torch.randn(8, 3))
        codes = quantiser.codes(z)
        scaled = torch.rand(8, 1) * 3 + 0.5
        quantiser.codebook.data *= scaled
        lengths = quantiser.lookup(codes).norm(dim=-1)
        assert l2 == torch.allclose(lengths, torch.ones(2, 5)), "codewords are normalised on lookup, or as stored"
        assert l2 == torch.equal(quantiser.codes(z), codes)
        assert torch.equal(quantiser.codes(7 * z), quantiser.codes(z)) or not l2


def test_gradients_go_where_they_should() -> None:
    torch.manual_seed(0)
    quantiser, z = Quantiser(6, 3, l2=False), torch.randn(7, 3, requires_grad=True)
    quantiser.entropy = True
    found = quantiser(z)
    assert torch.allclose(found.values, quantiser.lookup(found.codes))
    (straight,) = torch.autograd.grad(found.values.sum(), z, retain_graph=True)
    assert torch.equal(straight, torch.ones_like(z)), "straight through"
    gradients: dict[str, tuple[Tensor | None, ...]] = {
        name: torch.autograd.grad(loss, (z, quantiser.codebook), allow_unused=True, retain_graph=True)
        for name, loss in found.losses.items()
    }
    assert gradients["codebook"][0] is None and gradients["codebook"][1] is not None
    assert gradients["commitment"][0] is not None and gradients["commitment"][1] is None
    assert all(g is not None for g in gradients["entropy"])
    assert set(Quantiser(6, 3)(z).losses) == {"codebook", "commitment"}


def test_the_entropy_term_prefers_codes_that_are_sure_and_all_used() -> None:
    codewords = torch.eye(4)
    spread = entropy_loss(codewords * 1.0, codewords)  # each vector at a codeword of its own
    same = entropy_loss(codewords[:1].expand(4, -1), codewords)
    unsure = entropy_loss(torch.full((4, 4), 0.25), codewords)
    assert spread < same - 1 and spread < unsure - 1
    assert spread == pytest.approx(-np.log(4), abs=1e-3)


def test_training_a_codebook_finds_the_clusters() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 3.0]])
    quantiser = Quantiser(3, 2, l2=False)
    quantiser.codebook.data.copy_(centres * 0.3)
    optimiser = torch.optim.Adam(quantiser.parameters(), lr=0.05)
    for _ in range(200):
        z = centres[torch.randint(3, (64,))] + 0.1 * torch.randn(64, 2)
        optimiser.zero_grad()
        torch.stack(list(quantiser(z).losses.values())).sum().backward()
        optimiser.step()
    assert (quantiser.codebook - centres).abs().max() < 0.1


def test_usage_counts() -> None:
    usage = Usage(4)
    usage.add(torch.tensor([[0, 1], [0, 1]]))
    usage.add(torch.tensor([[0, 1, 0, 1]]))
    found = usage.summary()
    assert found == pytest.approx({"codes": 4, "used": 0.5, "perplexity": 2.0, "bits": 1.0, "largest": 0.5})
    assert Usage(3).summary()["used"] == 0


# --- the tokenizer ------------------------------------------------------------------------------------------------


def test_the_contract_of_codes() -> None:
    tokenizer, images = tiny(), torch.rand(3, 3, 8, 8) * 2 - 1
    codes = tokenizer.tokens(tokenizer.moments(images))
    assert codes.shape == (3, 16) and codes.dtype == torch.int64 and len(codes.unique()) > 1
    assert 0 <= codes.min() and codes.max() < tokenizer.vocab == 50
    embeddings = tokenizer.embeddings(codes)
    assert embeddings.shape == (3, 16, tokenizer.dim) and tokenizer.dim == 3
    decoded = tokenizer.decode(codes)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1
    assert torch.equal(decoded, tokenizer.decode_embeddings(embeddings))
    assert Pixels(4).vocab is None and tokenizer.pictures


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        (torch.zeros(2, 16), "float32 of shape (2, 16)"),
        (torch.zeros(2, 16, dtype=torch.int32), "int32"),
        (torch.zeros(16, dtype=torch.int64), "give int64 (B, 16)"),
        (torch.zeros(2, 15, dtype=torch.int64), "shape (2, 15)"),
        (torch.full((2, 16), 50), "from 50 to 50 are not all in the vocabulary, 0 to 49"),
        (torch.full((2, 16), -1), "-1 to -1"),
    ],
)
def test_codes_that_are_none_are_refused(codes: torch.Tensor, words: str) -> None:
    for call in (tiny().decode, tiny().embeddings):
        with pytest.raises(UsageError) as caught:
            call(codes)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="codes: "):
        Pixels(4).check_codes(codes)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"vocab": 0}, "vocab: 0 is not allowed"),
        ({"code_dim": 0}, "code_dim: 0 is not allowed"),
        ({"latent_channels": 0}, "latent_channels: 0"),
        ({"block_out_channels": [32, 0]}, "block_out_channels: [32, 0] is not allowed"),
        ({"block_out_channels": []}, "block_out_channels: [] is not allowed"),
        ({"decoder_block_out_channels": [32, 0]}, "give the channels of each of 2 levels"),
        ({"block_out_channels": None, "stride": 3, "width": 32}, "stride: 3 is not allowed; it must be 1, 2, 4, 8"),
        ({"block_out_channels": None, "stride": 32, "width": 32}, "stride: 32 is not allowed"),
        ({"block_out_channels": None, "stride": 4}, "width: is required beside stride"),
        ({"stride": 2, "width": 32}, "can't go with stride and width"),
        ({"decoder_block_out_channels": [32]}, "give the channels of each of 2 levels"),
        ({"channels": 2}, "channels: 2 is not allowed"),
        ({"size": [8, 8, 8]}, "size: [8, 8, 8] is not allowed; it must be a side in pixels, or [height, width]"),
        ({"size": 7}, "size: 7x7 is not allowed; both sides must be multiples of 2"),
    ],
)
def test_arguments_are_checked(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_tokenizer({"kind": "vq", "size": 8, **TINY, **more})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_moments_of_another_size_or_kind_are_refused() -> None:
    for moments in (torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 2, dtype=torch.int64)):
        with pytest.raises(DataError, match=r"is not codes \(B, 1, 4, 4\)"):
            tiny().tokens(moments)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    tokenizer = tiny()
    again = load_tokenizer(save_tokenizer(tokenizer, tmp_path / "vq"))
    assert tokenizer_config(again) == tokenizer_config(tokenizer) and again.fingerprint() == tokenizer.fingerprint()
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(again.moments(images), tokenizer.moments(images))
    larger = load_tokenizer(tmp_path / "vq", size=[8, 12])
    assert larger.grid == (4, 6)
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab: does not go with the weights"):
        load_tokenizer(tmp_path / "vq", vocab=51)
    again.get_parameter("decoder.conv_in.weight").data += 1
    assert again.moments_fingerprint() == tokenizer.moments_fingerprint(), "a cache outlives another decoder"
    again.get_parameter("quantiser.codebook").data += 1
    assert again.moments_fingerprint() != tokenizer.moments_fingerprint()


@pytest.mark.parametrize(("vocab", "dtype"), [(50, "int16"), (40_000, "int32")])
def test_a_cache_holds_codes(tmp_path: Path, vocab: int, dtype: str) -> None:
    chance = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(5):
        Image.fromarray(chance.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    save_tokenizer(tiny(vocab=vocab), tmp_path / "vq")
    words = [f"data={{kind: folder, path: {tmp_path / 'photos'}, size: 8}}", f"tokenizer={{from: {tmp_path / 'vq'}}}"]
    data, tokenizer = build_inputs(read_recipe("mar-cifar10-tiny", words))
    write_cache(data, tokenizer, tmp_path / "cache", shard_images=2, dtype="float16", quiet=True)
    words[0] = f"data={{kind: latents, path: {tmp_path / 'cache'}}}"
    cached, same = build_inputs(read_recipe("mar-cifar10-tiny", words))
    assert cached.info.dtype == dtype  # type: ignore[attr-defined]
    found = {}
    for name, source in (("images", data), ("cache", cached)):
        batches = list(Loader(batches_of(source, 3, 0, 10, 5), 0))
        moments = [b.images if source.cached else tokenizer.moments(to_float(b.images)) for b in batches]
        found[name] = torch.cat([same.tokens(m) for m in moments])
    assert torch.equal(found["images"], found["cache"]) and len(found["cache"].unique()) > 5
    save_tokenizer(tiny(vocab=vocab, l2=False), tmp_path / "vq")
    with pytest.raises(ConfigError, match=r"tokenizer\.l2"):
        build_inputs(read_recipe("mar-cifar10-tiny", words))


def test_a_recipe_with_random_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="'vq' begins with random weights"):
        build_inputs(read_recipe("mar-digits", ["tokenizer={kind: vq, block_out_channels: [32, 32]}"]))
