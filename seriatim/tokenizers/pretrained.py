"""Image autoencoders of diffusers as tokenizers: read from a folder or the hub, or rebuilt from a saved config.

Shapes: c channels, z channels of a latent.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seriatim.core.errors import CheckpointError, UsageError, nearest, one_line, shown
from seriatim.core.files import expanded
from seriatim.core.hub import fetch, repository
from seriatim.core.reading import Unreadable, read_json
from seriatim.tokenizers.latent import Latent, Statistics, given_scale

AUTOENCODERS = {  # class -> module; each encodes one image as one grid of continuous latents
    "AsymmetricAutoencoderKL": "diffusers.models.autoencoders.autoencoder_asym_kl",
    "AutoencoderDC": "diffusers.models.autoencoders.autoencoder_dc",
    "AutoencoderKL": "diffusers.models.autoencoders.autoencoder_kl",
    "AutoencoderKLFlux2": "diffusers.models.autoencoders.autoencoder_kl_flux2",
    "AutoencoderKLHunyuanImage": "diffusers.models.autoencoders.autoencoder_kl_hunyuanimage",
    "AutoencoderTiny": "diffusers.models.autoencoders.autoencoder_tiny",
}
POINTS = ("AutoencoderDC", "AutoencoderTiny")  # the classes whose posterior has no variance
CLASS, CONFIG = "_class_name", "config.json"
MEAN, STD = "latents_mean", "latents_std"
WEIGHTS = "diffusion_pytorch_model*.safetensors*"  # includes the index of weights in several files


class Pretrained(Latent):
    """The autoencoder in `path`, which is a folder or a hub repository, or in its folder `subfolder`.

    A token is (latent - shift_factor) * scaling_factor with the numbers of the autoencoder's config, unless `scale` or
    `statistics` say otherwise. `config` holds the autoencoder's config and not the path, so that a saved tokenizer does
    not need the path again.
    """

    def __init__(
        self,
        size: int | Sequence[int] = 256,
        patch: int = 1,
        channels: int = 3,
        *,
        path: str | None = None,
        subfolder: str | None = None,
        scale: float | None = None,  # None takes the factor of the autoencoder's config
        statistics: Statistics = "fixed",
        autoencoder: Mapping[str, Any] | None = None,  # its config, from which it is built with random weights
    ) -> None:
        if (path is None) == (autoencoder is None):
            what = "is required" if path is None else "is given together with autoencoder"
            raise UsageError(f"path: {what}; name a folder or a hub repository that holds an autoencoder of diffusers")
        if autoencoder is not None:
            network = build(autoencoder)
        else:
            network = read(str(path), subfolder)
        described = describe(network)
        described |= {key: value for key, value in (autoencoder or {}).items() if key in (MEAN, STD)}
        takes, z = int(described["in_channels"]), int(described["latent_channels"])
        if channels != takes:
            raise UsageError(
                f"channels: {channels!r} is not allowed; this autoencoder takes {takes}: set data.channels"
            )
        super().__init__(
            network,
            size,
            patch,
            channels,
            stride=stride_of(described),
            latent_channels=z,
            gaussian=described[CLASS] not in POINTS,
            statistics=statistics,
            given=own_statistics(described) if scale is None else given_scale(scale, z),
        )
        self.config |= {"scale": scale, "autoencoder": described}


def class_of(config: Mapping[str, Any], where: str) -> Any:
    """The class of diffusers that a config names. Raises CheckpointError if it is not in AUTOENCODERS."""
    name = config.get(CLASS)
    if not isinstance(name, str) or name not in AUTOENCODERS:
        raise CheckpointError(f"{where}: {shown(name)} is not an image autoencoder{nearest('', AUTOENCODERS)}")
    return getattr(importlib.import_module(AUTOENCODERS[name]), name)


def build(config: Mapping[str, Any]) -> nn.Module:
    """An autoencoder with random weights from a config that `describe` made."""
    cls = class_of(config, "autoencoder")
    taken = inspect.signature(cls).parameters.keys()
    arguments = {name: value for name, value in config.items() if name in taken or name not in (CLASS, MEAN, STD)}
    unknown = sorted(arguments.keys() - taken)
    if unknown:
        raise UsageError(f"autoencoder: {config[CLASS]} takes no {unknown[0]!r}; another version of diffusers wrote it")
    network: nn.Module = cls(**arguments)
    return network


def describe(network: Any) -> dict[str, Any]:
    """The class and arguments of an autoencoder as plain data, and the statistics of its batch norm if it has one."""
    taken = inspect.signature(type(network)).parameters
    arguments = {name: value for name, value in network.config.items() if name in taken}
    if (norm := getattr(network, "bn", None)) is not None and not norm.running_mean.is_meta:
        arguments |= channel_statistics(norm, int(arguments["latent_channels"]))
    plain: dict[str, Any] = json.loads(json.dumps({CLASS: type(network).__name__, **arguments}))
    return plain


def channel_statistics(norm: Any, z: int) -> dict[str, list[float]]:
    """The mean and std of each channel from FLUX.2's batch norm over patches of latents, channel-major (z p p,)."""
    means, variances = (t.double().view(z, -1) for t in (norm.running_mean, norm.running_var + norm.eps))
    variance = variances.mean(dim=1) + means.var(dim=1, unbiased=False)  # within and between the places of a patch
    return {MEAN: means.mean(dim=1).tolist(), STD: variance.sqrt().tolist()}


def read(path: str, subfolder: str | None) -> nn.Module:
    """An autoencoder with its weights. Raises CheckpointError if there is none or it is incomplete."""
    if subfolder and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise UsageError(f"subfolder: {shown(subfolder)} leads out of {path}; name a folder inside of it")
    root = expanded(path)
    root = root if root.is_dir() else download(path, subfolder)
    folder = root / subfolder if subfolder else root
    try:
        config = read_json(folder / CONFIG, dict)
    except Unreadable as error:
        inner = sorted(p.parent.name for p in root.glob(f"*vae*/{CONFIG}"))
        hint = f"; set tokenizer.subfolder={inner[0]}" if inner else "; is it a folder that diffusers saved?"
        raise CheckpointError(f"path: {folder / CONFIG} {error}{hint}") from error
    cls = class_of(config, f"path: {folder / CONFIG}")
    try:
        with quiet():
            network, report = cls.from_pretrained(
                str(folder),
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # diffusers raises a dozen kinds: no safetensors, truncated, another shape, ...
        raise CheckpointError(f"path: {folder} can't be loaded as {cls.__name__} ({one_line(error)[:200]})") from error
    # These must be errors, because diffusers only warns of them and the images would be silently wrong.
    for verb, key in (("lacks", "missing_keys"), ("has an unknown", "unexpected_keys"), ("misfits", "mismatched_keys")):
        if report[key]:
            name = report[key][0]
            raise CheckpointError(f"path: {folder} {verb} tensor {name!r}: its weights don't belong to its {CONFIG}")
    for name, tensor in network.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"path: {folder}: tensor {name!r} has values that are not finite")
    return network


def download(path: str, subfolder: str | None) -> Path:
    """The folder of a hub repository's autoencoder, which is downloaded into the hub's cache."""
    prefix = f"{subfolder}/" if subfolder else ""
    return fetch(repository(path, "path"), [prefix + CONFIG, prefix + WEIGHTS], "path", ["*.fp16.*", "*non_ema*"])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context in which diffusers does not print advice; errors are still raised."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def stride_of(config: Mapping[str, Any]) -> int:
    """The side of one latent in pixels."""
    if config[CLASS] == "AutoencoderKLHunyuanImage":
        return int(config["spatial_compression_ratio"])
    if config[CLASS] == "AsymmetricAutoencoderKL":
        levels = [len(config[f"{way}_block_out_channels"]) for way in ("down", "up")]
    elif config[CLASS].startswith("AutoencoderKL"):
        levels = [len(config["block_out_channels"])] * 2
    else:
        levels = [len(config[f"{half}_block_out_channels"]) for half in ("encoder", "decoder")]
    down, up = 2 ** (levels[0] - 1), int(config.get("upsampling_scaling_factor", 2) ** (levels[1] - 1))
    if up != down:
        raise CheckpointError(f"autoencoder: it shrinks images by {down} and enlarges latents by {up}")
    return down


def own_statistics(config: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """The mean and std, (z,) each, by which diffusers normalises the latents of this autoencoder."""
    z, scale = int(config["latent_channels"]), config.get("scaling_factor") or 1.0
    if config.get(MEAN) and config.get(STD):
        return list(config[MEAN]), [std / scale for std in config[STD]]
    return [config.get("shift_factor") or 0.0] * z, given_scale(scale, z)[1]
