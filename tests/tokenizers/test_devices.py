"""Every tokenizer: what it is given is moved to its device, what it returns is there, and float32 means float32.

There is no device here but the CPU: `pretend_cuda` stands for one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pretend_cuda import Pretend, pretend, pretend_cuda, real
from torch import Tensor

from seriatim.core.keys import Keys
from seriatim.models.build import seeded
from seriatim.tokenizers.arrays import Arrays
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.code_watch import CodeWatch
from seriatim.tokenizers.detok import Detok
from seriatim.tokenizers.kl import KL
from seriatim.tokenizers.kmeans import KMeans
from seriatim.tokenizers.pixels import Pixels
from seriatim.tokenizers.pretrained import Pretrained
from seriatim.tokenizers.quantise import Quantiser
from seriatim.tokenizers.vq import FSQ, VQ

NETWORK: dict[str, Any] = {"block_out_channels": (32, 32), "layers_per_block": 1, "latent_channels": 4}
VIT: dict[str, Any] = {"stride": 4, "latent_channels": 3, "width": (16, 24), "depth": 1, "heads": 2}
POINT: dict[str, Any] = {
    "_class_name": "AutoencoderTiny", "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "latent_channels": 4,
}  # fmt: skip
MAKE: dict[str, Callable[[], Tokenizer]] = {
    "pixels": lambda: Pixels((6, 8), 2),
    "pixels, components": lambda: Pixels((7, 9), 2, 1, components=3, whiten=0.5),
    "kmeans": lambda: KMeans((6, 8), 2, vocab=5),
    "arrays": lambda: Arrays((1, 5), 3),
    "arrays of codes": lambda: Arrays((1, 5), vocab=7),
    "vq": lambda: VQ(8, vocab=11, code_dim=4, **NETWORK),
    "vq, by distance": lambda: VQ(8, vocab=11, code_dim=4, l2=False, **NETWORK),
    "fsq": lambda: FSQ(8, code_levels=(5, 4), **NETWORK),
    "detok": lambda: Detok((8, 12), **VIT),
    "detok, fixed": lambda: Detok(8, statistics="fixed", mean=[0.5] * 3, std=[2, 3, 4], **VIT),
    "kl": lambda: KL((8, 12), 2, statistics="channel", **NETWORK),
    "kl, fixed": lambda: KL(8, scale=0.5, **NETWORK),
    "pretrained": lambda: Pretrained(8, statistics="scale", autoencoder=POINT),
}
every = pytest.mark.parametrize("name", MAKE)
Kit = tuple[Tokenizer, Tensor]


def images_of(name: str) -> Tensor:
    """Three images, or arrays, that fit a tokenizer."""
    draw = torch.Generator().manual_seed(1)
    if name == "arrays of codes":
        return torch.randint(7, (3, 5), generator=draw)
    shape = (3, 5, 3) if name == "arrays" else (3, tokenizers[name].channels, *tokenizers[name].size)
    return 2 * torch.rand(shape, generator=draw) - 1


tokenizers: dict[str, Tokenizer] = {}


@pytest.fixture
def kit(name: str) -> Kit:
    """A tokenizer that has seen the images, and these."""
    if name not in tokenizers:
        with seeded(0):
            tokenizers[name] = MAKE[name]()
        tokenizers[name].fit([images_of(name)])
    return copy.deepcopy(tokenizers[name]), images_of(name)


def same(found: Tensor, expected: Tensor) -> None:
    assert isinstance(found, Pretend), "what a tokenizer returns is on its device"
    assert found.dtype == expected.dtype, "and has the dtype that it has on the CPU"
    torch.testing.assert_close(real(found), expected, atol=1e-5, rtol=1e-5)


@every
def test_everything_is_moved_and_returned_on_the_tokenizers_device(kit: Kit) -> None:
    tokenizer, images = kit
    moments = tokenizer.moments(images)
    tokens = tokenizer.tokens(moments)
    drawn = tokenizer.tokens(moments, Keys.of_seeds([1, 2, 3]))
    known = torch.arange(tokens.shape[1])[None] % 2 < torch.tensor([[0], [1], [2]])
    seen = [tokenizer.decode(tokens), tokenizer.look(tokens), tokenizer.look(tokens, known)]
    codewords = tokenizer.vocab is not None and not isinstance(tokenizer, Arrays)
    words = tokenizer.embeddings(tokens) if codewords else None

    pairs: list[tuple[Tensor, Tensor]] = []
    with pretend_cuda() as device:
        there = pretend(copy.deepcopy(tokenizer))
        assert there.device == torch.device("cuda:0") and tokenizer.device == torch.device("cpu")
        for send in (lambda x: x, pretend):  # from the host, and from the device
            keys = Keys.of_seeds([1, 2, 3], "cuda" if send is pretend else "cpu")
            pairs += [
                (there.moments(send(images)), moments),
                (there.tokens(send(moments)), tokens),
                (there.tokens(send(moments), keys), drawn),
                (there.decode(send(tokens)), seen[0]),
                (there.look(send(tokens)), seen[1]),
                (there.look(send(tokens), send(known)), seen[2]),
            ]
            if words is not None:
                pairs += [(there.embeddings(send(tokens)), words), (there.decode_embeddings(send(words)), seen[0])]
    for found, expected in pairs:
        same(found, expected)
    assert not device.reduced, "what is float32 is computed in float32"


@every
@pytest.mark.parametrize(("of", "float64"), [("images", False), ("moments", True)])
def test_statistics_are_measured_on_any_device(name: str, kit: Kit, of: str, float64: bool) -> None:
    plain, images = kit
    moments = plain.moments(images)
    with seeded(0):
        there = MAKE[name]()
    with pretend_cuda(float64=float64):
        pretend(there)
        if of == "images":
            there.fit([images[:2], pretend(images[2:])])
        else:
            there.fit_moments([moments[:2], pretend(moments[2:])])
        found = there.state_dict()
    for key, tensor in plain.state_dict().items():
        same(found[key], tensor)


@every
def test_autocast_changes_nothing(kit: Kit) -> None:
    tokenizer, images = kit
    moments = tokenizer.moments(images)
    tokens, pictures = tokenizer.tokens(moments), tokenizer.decode(tokenizer.tokens(moments))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.moments(images), moments)
        assert torch.equal(tokenizer.tokens(moments), tokens)
        assert torch.equal(tokenizer.decode(tokens), pictures)
        assert torch.equal(tokenizer.look(tokens), pictures)


def test_no_code_of_many_flips_under_autocast() -> None:
    with seeded(0):
        vq, kmeans = MAKE["vq"](), KMeans(16, 2, 1, vocab=64)
    images = 2 * torch.rand(64, 1, 16, 16, generator=torch.Generator().manual_seed(2)) - 1
    kmeans.fit([images])
    colour = images[:, :, :8, :8].repeat(1, 3, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        codes = kmeans.tokens(kmeans.moments(images)), vq.moments(colour)
    assert torch.equal(codes[0], kmeans.tokens(kmeans.moments(images))) and torch.equal(codes[1], vq.moments(colour))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_become_float32(kit: Kit, dtype: torch.dtype) -> None:
    tokenizer, images = kit
    if not images.is_floating_point():
        pytest.skip("codes are whole numbers")
    moments = tokenizer.moments(images)
    tokens = tokenizer.tokens(moments)
    rounded = tokenizer.moments(images.to(dtype))
    assert rounded.dtype == moments.dtype
    assert torch.equal(rounded, tokenizer.moments(images.to(dtype).float()))
    if moments.is_floating_point():
        assert tokenizer.tokens(moments.to(dtype)).dtype == tokens.dtype
    if tokens.is_floating_point():
        assert tokenizer.decode(tokens.to(dtype)).dtype == torch.float32


@pytest.mark.parametrize("name", [name for name in MAKE if name.startswith(("detok", "fsq", "kl", "vq"))])
def test_training_is_the_same_on_a_device_and_reads_nothing_from_it(kit: Kit) -> None:
    """One step of training: codes or latents, pictures, and the gradient of each parameter."""
    tokenizer, images = kit
    kept = torch.tensor([[True, False] * (tokenizer.count // 2)] * 3) if tokenizer.masks else None

    def step(tokenizer: Any, send: Callable[[Tensor], Tensor]) -> list[Tensor]:
        tokenizer.requires_grad_(True)
        coded = tokenizer.coded(send(images), Keys.of_seeds([1, 2, 3]), kept)
        decoded = tokenizer.draw(coded.latents, kept)
        loss = decoded.square().mean() + sum(coded.losses.values())
        loss.backward()
        found = [coded.latents.detach(), decoded.detach(), *coded.losses.values(), tokenizer.last_layer.grad]
        return [x.detach() for x in found] + [p.grad for p in tokenizer.parameters() if p.grad is not None]

    expected = step(copy.deepcopy(tokenizer), lambda x: x)
    with pretend_cuda() as device:
        found = step(pretend(copy.deepcopy(tokenizer)), pretend)
    assert len(found) == len(expected) and not device.reads
    for ours, theirs in zip(found, expected, strict=True):
        assert isinstance(ours, Pretend)
        torch.testing.assert_close(real(ours), theirs, atol=1e-4, rtol=1e-4)


def test_codes_are_watched_and_revived_on_a_device() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    codes, books = torch.zeros(8, 5, dtype=torch.int64), []
    with pretend_cuda() as device:
        for send in (lambda x: x, pretend):
            with seeded(0):
                quantiser: Any = send(Quantiser(4, 4))
            watch: Any = send(CodeWatch(quantiser, 5, 16))
            for step in range(2):
                watch.begin(8 * step, 8)
                watch.add(send(codes), send(vectors), Keys.of_seeds(range(8)))
                assert not device.reads, "only the end of a window waits for the device"
                watch.end()
            books.append(quantiser.codebook.detach())
            assert watch.figures()["used"] == 0.25
            device.reset()
    assert isinstance(books[1], Pretend) and torch.equal(real(books[1]), books[0])
    assert len(books[0].unique(dim=0)) == 4
