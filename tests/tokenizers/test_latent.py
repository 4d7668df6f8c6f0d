"""Latents as tokens: closed forms on an autoencoder whose numbers are known, and diffusers' own classes."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seriatim.checkpoints.tokenizer import load_tokenizer, save_tokenizer
from seriatim.core.errors import CheckpointError, ConfigError, DataError, NumericsError, UsageError
from seriatim.core.keys import Keys
from seriatim.nn.patch import patchify
from seriatim.tokenizers.kinds import build_tokenizer, tokenizer_config
from seriatim.tokenizers.kl import KL
from seriatim.tokenizers.latent import STD_FLOOR, Latent, Statistics, kl_divergence
from seriatim.tokenizers.pretrained import Pretrained

TINY: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1), "latent_channels": 4,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "scaling_factor": 0.5,
    "shift_factor": 0.25, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
DEEP: dict[str, Any] = {
    "latent_channels": 4, "attention_head_dim": 4, "scaling_factor": 2.0,
    "encoder_block_types": ("ResBlock",) * 2, "decoder_block_types": ("ResBlock",) * 2,
    "encoder_block_out_channels": (8, 16), "decoder_block_out_channels": (8, 16),
    "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ()),
}  # fmt: skip
ASYMMETRIC: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2, "down_block_out_channels": (8, 8),
    "up_block_types": ("UpDecoderBlock2D",) * 2, "up_block_out_channels": (8, 16), "layers_per_up_block": 2,
    "norm_num_groups": 4, "latent_channels": 4, "scaling_factor": 0.25,
}  # fmt: skip
FLUX2: dict[str, Any] = {k: v for k, v in SMALL.items() if not k.endswith("_factor")}
HUNYUAN: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 32), "layers_per_block": 1,
    "spatial_compression_ratio": 2, "sample_size": 16, "scaling_factor": 0.5,
}  # fmt: skip


class Fake(nn.Module):
    """Two latent channels at half the resolution: a grey pixel of each 2x2 block, and ten times another plus 3."""

    def __init__(self, logvar: tuple[float, float] | None = (0.0, 2.0)) -> None:
        super().__init__()
        self.logvar, self.dtypes, self.most = logvar, set[torch.dtype](), 0
        self.weight = nn.Parameter(torch.ones(()))

    def encode(self, x: Tensor, **_: bool) -> tuple[Any]:
        self.dtypes.add((x @ x.transpose(-1, -2)).dtype)  # an autocast would show in a product
        self.most = max(self.most, len(x))
        mean = torch.cat([x[:, :, ::2, ::2], 10 * x[:, :, 1::2, 1::2] + 3], dim=1) * self.weight
        if self.logvar is None:
            return (mean,)
        logvar = torch.tensor(self.logvar).view(1, 2, 1, 1).expand_as(mean)
        return (SimpleNamespace(parameters=torch.cat([mean, logvar], dim=1)),)

    def decode(self, z: Tensor, **_: bool) -> tuple[Tensor]:
        x = torch.zeros(len(z), 1, 2 * z.shape[2], 2 * z.shape[3])
        x[:, :, ::2, ::2], x[:, :, 1::2, 1::2] = z[:, :1], (z[:, 1:] - 3) / 10
        return (x,)


def fake(statistics: Statistics = "channel", patch: int = 1, logvar: tuple[float, float] | None = (0.0, 2.0)) -> Latent:
    return Latent(
        Fake(logvar),
        8,
        patch,
        1,
        stride=2,
        latent_channels=2,
        gaussian=logvar is not None,
        statistics=statistics,
        given=([0.0, 0.0], [4.0, 4.0]),
    )


def save(kind: str, folder: Path, **settings: Any) -> Any:
    """An autoencoder of diffusers with random weights, saved as diffusers does."""
    import diffusers.models as models

    torch.manual_seed(0)
    network = getattr(models, kind)(**settings).eval()
    network.save_pretrained(folder)
    return network


# --- closed forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logvar", [(0.0, 2.0), (-99.0, 50.0), None])
def test_fit_measures_the_distribution_of_samples(logvar: tuple[float, float] | None) -> None:
    """Variance = variance of the means + mean of the variances, log-variances clamped; per channel, and for all."""
    tokenizer, images = fake(logvar=logvar), torch.rand(50, 1, 8, 8) * 2 - 1
    tokenizer.fit(images.split(7))
    means = torch.stack([images[:, :, ::2, ::2], 10 * images[:, :, 1::2, 1::2] + 3]).flatten(1).double()
    noise = torch.tensor([0.0 if logvar is None else min(max(v, -30), 20) for v in logvar or (0, 0)]).double().exp()
    noise = noise if logvar is not None else torch.zeros(2).double()
    std = (means.var(dim=1, correction=0) + noise).sqrt()
    assert torch.allclose(tokenizer.mean.double(), means.mean(dim=1), atol=1e-5)
    whole = (means.flatten().var(correction=0) + noise.mean()).sqrt()
    assert torch.allclose(tokenizer.std.double(), std.clamp(min=STD_FLOOR * float(whole)), rtol=1e-5)

    one = fake("scale", logvar=logvar)
    one.fit(images.split(50))
    assert torch.equal(one.mean, torch.zeros(2)), "nothing is subtracted"
    assert torch.allclose(one.std.double(), whole.expand(2), rtol=1e-5)
    found = one.measure(images.split(9), "scale")
    assert found.images == 50 and found.scale == pytest.approx(1 / float(whole), rel=1e-5)
    assert torch.allclose(found.std.double(), std, rtol=1e-5)


def test_samples_have_zero_mean_and_unit_variance() -> None:
    tokenizer, images = fake(), torch.rand(400, 1, 8, 8) * 2 - 1
    tokenizer.fit([images])
    tokens = tokenizer.tokens(tokenizer.moments(images), Keys.of_seeds(range(400)))
    assert tokens.shape == (400, 16, 2)
    assert tokens.mean(dim=(0, 1)).abs().max() < 0.03 and (tokens.std(dim=(0, 1)) - 1).abs().max() < 0.03


def test_statistics_are_measured_once_and_fixed_ones_never() -> None:
    tokenizer, other = fake(), torch.rand(3, 1, 8, 8)
    tokenizer.fit([torch.rand(9, 1, 8, 8)])
    again = fake()
    again.load_state_dict(tokenizer.state_dict())  # as from a checkpoint or a tokenizer folder
    again.fit([other])
    assert torch.equal(again.std, tokenizer.std) and torch.equal(again.mean, tokenizer.mean)
    again.forget_statistics()
    assert again.std.tolist() == [4.0, 4.0] and not again.measured
    fixed = fake("fixed")
    fixed.fit([other])
    assert fixed.std.tolist() == [4.0, 4.0] and not fixed.measured
    with pytest.raises(UsageError, match="can't be measured"):
        fixed.measure([other], "fixed")


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(DataError, match="no images to measure"):
        fake().fit([])
    with pytest.raises(NumericsError, match="latents are not finite"):
        fake().fit([torch.full((1, 1, 8, 8), float("nan"))])
    tokenizer = fake(logvar=None)
    tokenizer.fit([torch.zeros(4, 1, 8, 8)])
    assert torch.isfinite(tokenizer.tokens(tokenizer.moments(torch.zeros(1, 1, 8, 8)))).all()


@pytest.mark.parametrize("patch", [1, 2])
def test_decode_is_the_inverse_of_the_mode(patch: int) -> None:
    tokenizer = fake(patch=patch)
    images = tokenizer.decode(torch.randn(5, tokenizer.count, tokenizer.dim))  # images that this autoencoder can make
    tokenizer.fit([images])
    tokens = tokenizer.tokens(tokenizer.moments(images))
    assert tokens.shape == (5, (4 // patch) ** 2, 2 * patch * patch)
    assert torch.allclose(tokenizer.decode(tokens), images, atol=1e-5)
    latents = tokenizer.posterior(tokenizer.moments(images))[0]
    first = (latents[:, :, :patch, :patch] - tokenizer.mean.view(-1, 1, 1)) / tokenizer.std.view(-1, 1, 1)
    assert torch.allclose(tokens[:, 0], first.flatten(1)), "a token is channel-major"
    assert tokenizer.decode(tokens * 1e3).abs().max() <= 1


def test_a_sample_is_one_draw_for_each_image() -> None:
    tokenizer, images = fake("fixed"), torch.rand(3, 1, 8, 8)
    moments = tokenizer.moments(images)
    tokens = tokenizer.tokens(moments, Keys.of_seeds([5, 6, 7]))
    alone = tokenizer.tokens(moments[1:2], Keys.of_seeds([6]))
    assert torch.equal(tokens[1:2], alone)
    latents = tokens.transpose(1, 2).reshape(3, 2, 4, 4) * 4
    mean, std = tokenizer.posterior(moments)
    assert torch.allclose((latents - mean) / std, Keys.of_seeds([5, 6, 7]).normal(2, 4, 4), atol=1e-5)
    point = fake("fixed", logvar=None)
    moments = point.moments(images)
    assert torch.equal(point.tokens(moments, Keys.of_seeds([1, 2, 3])), point.tokens(moments)), "it is a point"


def test_frozen_in_float32_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = fake("fixed")
    tokenizer.train()
    assert tokenizer.training and not tokenizer.autoencoder.training
    assert not any(p.requires_grad for p in tokenizer.parameters())
    monkeypatch.setattr("seriatim.tokenizers.base.CHUNK", 3 * 64)
    images = torch.rand(10, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = tokenizer.moments(images)
        assert tokenizer.decode(tokenizer.tokens(moments)).dtype == torch.float32
    assert tokenizer.autoencoder.dtypes == {torch.float32} and tokenizer.autoencoder.most == 3
    assert not moments.requires_grad
    monkeypatch.undo()
    assert torch.equal(moments, tokenizer.moments(images))


def test_what_does_not_fit_is_refused() -> None:
    tokenizer = fake(patch=2)
    with pytest.raises(DataError, match=r"images: shape \(1, 1, 8, 12\) is not \(B, 1, 8, 8\)"):
        tokenizer.moments(torch.zeros(1, 1, 8, 12))
    with pytest.raises(DataError, match=r"moments: shape \(1, 2, 4, 4\) is not \(B, 4, 4, 4\)"):
        tokenizer.tokens(torch.zeros(1, 2, 4, 4))
    with pytest.raises(UsageError, match=r"both sides must be multiples of 6 \(stride 2 of the autoencoder, patch 3\)"):
        fake(patch=3)


# --- KL -----------------------------------------------------------------------------------------------------------


def test_the_default_is_kl16() -> None:
    with torch.device("meta"):
        tokenizer = KL()
    assert sum(p.numel() for p in tokenizer.autoencoder.parameters()) == 66_456_019
    assert len(tokenizer.autoencoder.state_dict()) == 312
    assert (tokenizer.grid, tokenizer.dim) == ((16, 16), 16)
    assert tokenizer.std.tolist() == pytest.approx([1 / 0.2325] * 16) and not tokenizer.mean.any()
    encoder, decoder = tokenizer.autoencoder.encoder, tokenizer.autoencoder.decoder
    assert [hasattr(block, "attentions") for block in encoder.down_blocks] == [False] * 4 + [True]
    assert not any(hasattr(block, "attentions") for block in decoder.up_blocks)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 24}, "tokenizer.size: 24x24"),
        ({"size": [16, 32, 16]}, "tokenizer.size"),
        ({"size": 32, "patch": 4}, "multiples of 64"),
        ({"patch": 0}, "tokenizer.patch: 0"),
        ({"scale": 0}, "tokenizer.scale: 0"),
        ({"statistics": "all"}, "tokenizer.statistics"),
        ({"block_out_channels": [0]}, "the channels of each level"),
        ({"attention": [5]}, "levels are 0 to 4"),
        ({"latent_channels": 0}, "tokenizer.latent_channels: 0"),
        ({"channels": 2}, "tokenizer.channels: 2"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught, torch.device("meta"):
        build_tokenizer({"kind": "kl", "size": 256, **settings})
    assert words in str(caught.value) and "\n" not in str(caught.value)


# --- pretrained ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "mean", "std"),
    [
        ("AutoencoderKL", SMALL, 0.25, 2.0),
        ("AutoencoderKL", {**SMALL, "latents_mean": [1.0] * 4, "latents_std": [3.0] * 4}, 1.0, 6.0),
        ("AutoencoderTiny", TINY, 0.0, 1.0),
        ("AutoencoderDC", DEEP, 0.0, 0.5),
        ("AsymmetricAutoencoderKL", ASYMMETRIC, 0.0, 4.0),
        ("AutoencoderKLFlux2", FLUX2, 0.0, (1 + 1e-4) ** 0.5),
        ("AutoencoderKLHunyuanImage", HUNYUAN, 0.0, 2.0),
    ],
)
@torch.no_grad()
def test_any_autoencoder_of_diffusers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, settings: dict[str, Any], mean: float, std: float
) -> None:
    network, images = save(kind, tmp_path / "vae", **settings), torch.rand(2, 3, 16, 16) * 2 - 1
    capfd.readouterr()
    tokenizer = Pretrained(16, 2, path=str(tmp_path), subfolder="vae")
    assert capfd.readouterr() == ("", ""), "diffusers keeps its advice to itself"
    assert tokenizer.mean.tolist() == [mean] * 4 and tokenizer.std.tolist() == pytest.approx([std] * 4)
    assert (tokenizer.grid, tokenizer.dim) == ((4, 4), 16)
    out = network.encode(images)
    latents: Any = (
        out.latent_dist.mean if hasattr(out, "latent_dist") else getattr(out, "latents", getattr(out, "latent", None))
    )
    tokens = tokenizer.tokens(tokenizer.moments(images))
    assert torch.allclose(tokenizer.posterior(tokenizer.moments(images))[0], latents, atol=1e-6)
    assert torch.allclose(tokenizer.decode(tokens), network.decode(latents).sample.clamp(-1, 1), atol=1e-5)

    config = json.loads(json.dumps(tokenizer_config(tokenizer)))
    assert str(tmp_path) not in json.dumps(config), "what is saved does not need the folder"
    with torch.device("meta"):
        again = build_tokenizer(config)
    again.load_state_dict(tokenizer.state_dict(), assign=True)
    assert again.config == tokenizer.config
    assert torch.equal(again.tokens(again.moments(images)), tokens)


@torch.no_grad()
def test_statistics_that_flux2_keeps_in_a_batch_norm(tmp_path: Path) -> None:
    """By channel and place in a 2x2 patch of latents; ours are by channel, and travel with the config."""
    network = save("AutoencoderKLFlux2", tmp_path, **FLUX2)
    samples = 3 * torch.randn(400, 4, 2, 2) + torch.arange(16.0).view(4, 2, 2)  # (N, z, p, p)
    network.bn.running_mean.copy_(samples.flatten(1).mean(dim=0))
    network.bn.running_var.copy_(samples.flatten(1).var(dim=0, unbiased=False) - network.bn.eps)
    network.save_pretrained(tmp_path)
    tokenizer = Pretrained(8, path=str(tmp_path))
    assert torch.allclose(tokenizer.mean, samples.mean(dim=(0, 2, 3)), atol=1e-4)
    assert torch.allclose(tokenizer.std, samples.std(dim=(0, 2, 3), unbiased=False), atol=1e-4)
    with torch.device("meta"):
        again = build_tokenizer(json.loads(json.dumps(tokenizer_config(tokenizer))))
    assert isinstance(again, Latent) and again.config == tokenizer.config
    assert torch.equal(again.mean, tokenizer.mean) and torch.equal(again.std, tokenizer.std)
    folder = save_tokenizer(tokenizer, tmp_path / "kept")
    loaded = load_tokenizer(folder)
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(loaded.tokens(loaded.moments(images)), tokenizer.tokens(tokenizer.moments(images)))


def test_a_hub_repositorys_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline's repository as the hub's own cache keeps it: config and weights of the subfolder, no pickles."""
    asked: dict[str, Any] = {}

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(tmp_path)

    network = save("AutoencoderTiny", tmp_path / "vae", **TINY)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    tokenizer = Pretrained(8, path="somebody/a-pipeline", subfolder="vae")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tokenizer.autoencoder.state_dict()[name], tensor), name
    assert asked["repository"] == "somebody/a-pipeline"
    names = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors"]
    names += ["vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.safetensors"]
    chosen = [
        name
        for name in names
        if any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])
        and not any(fnmatch(name, pattern) for pattern in asked["ignore_patterns"])
    ]
    assert chosen == names[:2]


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    save("AutoencoderTiny", tmp_path, **TINY).half().save_pretrained(tmp_path)
    assert {p.dtype for p in Pretrained(8, path=str(tmp_path)).parameters()} == {torch.float32}


def test_scale_and_statistics_replace_the_autoencoders_own(tmp_path: Path) -> None:
    save("AutoencoderKL", tmp_path, **SMALL)
    tokenizer = Pretrained(8, path=str(tmp_path), scale=4.0)
    assert tokenizer.mean.tolist() == [0.0] * 4 and tokenizer.std.tolist() == [0.25] * 4
    tokenizer = Pretrained(8, path=str(tmp_path), statistics="channel")
    tokenizer.fit([torch.rand(8, 3, 8, 8)])
    assert tokenizer.measured and tokenizer.std.unique().numel() == 4


def spoil(folder: Path, case: str) -> None:
    weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    said, tensors = json.loads(config.read_text()), load_file(weights)
    name = "encoder.layers.0.bias"
    if case == "class":
        config.write_text(json.dumps({**said, "_class_name": "VQModel"}))
    elif case == "no class":
        config.write_text("[]")
    elif case == "no config":
        config.unlink()
    elif case == "pickle":
        weights.rename(folder / "diffusion_pytorch_model.bin")
    elif case == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif case == "missing":
        save_file({k: v for k, v in tensors.items() if k != name}, weights)
    elif case == "extra":
        save_file({**tensors, "encoder.pool.0.weight": torch.ones(1)}, weights)
    elif case == "shape":
        save_file({**tensors, name: torch.ones(5)}, weights)
    elif case == "nan":
        save_file({**tensors, name: torch.full((8,), float("nan"))}, weights)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("class", ("'VQModel' is not an image autoencoder", "AutoencoderKL")),
        ("no class", ("config.json holds a list",)),
        ("no config", ("config.json is missing",)),
        ("pickle", ("can't be loaded as AutoencoderTiny",)),
        ("truncated", ("can't be loaded as AutoencoderTiny",)),
        ("missing", ("lacks tensor 'encoder.layers.0.bias'",)),
        ("extra", ("unknown tensor 'encoder.pool.0.weight'",)),
        ("shape", ("encoder.layers.0.bias",)),
        ("nan", ("'encoder.layers.0.bias' has values that are not finite",)),
    ],
)
def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, case: str, words: tuple[str, ...]) -> None:
    save("AutoencoderTiny", tmp_path, **TINY)
    spoil(tmp_path, case)
    with pytest.raises(CheckpointError) as caught:
        build_tokenizer({"kind": "pretrained", "size": 8, "path": str(tmp_path)})
    assert all(word in str(caught.value) for word in (*words, str(tmp_path))), caught.value
    assert "\n" not in str(caught.value)


def test_a_path_that_leads_nowhere_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="could not be fetched as a hub repository") as caught:
        Pretrained(path="nobody/nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="there is no folder"):
        Pretrained(path=str(tmp_path / "nothing"))
    save("AutoencoderTiny", tmp_path / "pipe" / "vae", **TINY)
    with pytest.raises(CheckpointError, match=r"set tokenizer\.subfolder=vae"):
        Pretrained(path=str(tmp_path / "pipe"))
    with pytest.raises(UsageError, match="path: is required"):
        Pretrained()
    with pytest.raises(UsageError, match="this autoencoder takes 3"):
        Pretrained(8, channels=1, path=str(tmp_path / "pipe"), subfolder="vae")


# --- what training needs ----------------------------------------------------------------------------------------------


def test_the_short_form_is_a_width_for_each_level() -> None:
    made = KL(16, stride=8, width=16, groups=8, latent_channels=2, layers_per_block=1)
    assert made.config["block_out_channels"] == [16, 32, 64, 64] and made.stride == 8 and made.grid == (2, 2)
    assert tokenizer_config(build_tokenizer(tokenizer_config(made))) == tokenizer_config(made)
    assert KL(4, stride=1, width=32, layers_per_block=1).grid == (4, 4)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stride": 3, "width": 32}, "tokenizer.stride: 3 is not allowed; it must be 1, 2, 4, 8 or 16"),
        ({"stride": 4}, "tokenizer.width: is required beside stride"),
        ({"width": 32}, "tokenizer.stride: is required beside width"),
        ({"stride": 2, "width": 40, "groups": 32}, "tokenizer.groups: 32 is not allowed; it must divide"),
        ({"stride": 2, "width": 32, "groups": 0}, "tokenizer.groups: 0 is not allowed"),
        ({"stride": 2, "width": 32, "block_out_channels": [32, 32]}, "leave out either"),
        ({"stride": 16, "width": 32}, "multiples of 16"),
        ({"stride": 2, "width": 32, "latent_channels": 0}, "tokenizer.latent_channels: 0 is not allowed"),
    ],
)
def test_a_wrong_short_form_is_one_line(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_tokenizer({"kind": "kl", "size": 8, **given})
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_kl_term_is_that_of_torch_and_what_training_codes_is_the_posterior() -> None:
    torch.manual_seed(0)
    mean, std = torch.randn(3, 2, 4, 4), torch.rand(3, 2, 4, 4) + 0.1
    theirs = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std), torch.distributions.Normal(0, 1))
    assert torch.allclose(kl_divergence(mean, std), theirs.sum(dim=(1, 2, 3)).mean(), atol=1e-4)
    tokenizer = KL(8, stride=2, width=32, layers_per_block=1, latent_channels=2).requires_grad_(True)
    images, keys = torch.rand(3, 3, 8, 8) * 2 - 1, Keys.of_seeds([1, 2, 3])
    found = tokenizer.coded(images, keys)
    tokens = tokenizer.tokens(tokenizer.moments(images), keys)
    assert torch.allclose(tokens, patchify(found.latents / tokenizer.std.view(-1, 1, 1), 1), atol=1e-4)
    (tokenizer.draw(found.latents).sum() + found.losses["kl"]).backward()
    assert all(p.grad is not None for p in tokenizer.parameters())
    assert tokenizer.last_layer.shape == (3, 32, 3, 3)
