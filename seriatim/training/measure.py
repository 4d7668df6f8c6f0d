"""Measure the statistics of latents once over the images of a recipe, and save them in a tokenizer folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from seriatim.checkpoints.tokenizer import read_provenance, save_tokenizer, writable
from seriatim.core.device import pick_device
from seriatim.core.errors import ConfigError, UsageError
from seriatim.tokenizers.latent import Latent, Measured, Statistics
from seriatim.training.config import Recipe
from seriatim.training.setup import build_inputs, look_over

BATCH = 32  # images that are encoded at once


@dataclass(frozen=True)
class Measurement:
    folder: Path  # the tokenizer folder
    measured: Measured
    sha256: str  # the sha256 of the statistics


def measure_latents(
    recipe: Recipe,
    out: Path | str,
    *,
    images: int = 10_000,
    statistics: Statistics = "channel",
    device: str = "auto",
    quiet: bool = False,
) -> Measurement:
    """Measure the recipe's tokenizer over about `images` of its images, and write it with its statistics to `out`.

    Earlier statistics are replaced. A recipe uses the folder as `tokenizer: {from: OUT}`. Raises ConfigError if the
    tokenizer has no latents.
    """
    if images < 1:
        raise UsageError(f"num: {images!r} is not allowed; it must be at least 1")
    out = writable(out)
    data, tokenizer = build_inputs(recipe)
    if not isinstance(tokenizer, Latent):
        raise ConfigError(
            f"tokenizer.kind: {recipe.tokenizer.get('kind')!r} has no latents to measure; name kl or pretrained"
        )
    tokenizer.to(pick_device(device))
    measured = tokenizer.measure(look_over(data, images, BATCH, quiet=quiet), statistics)
    digest = statistics_sha256(tokenizer)
    provenance = {
        "statistics": {
            "kind": statistics,
            "images": measured.images,
            "scale": measured.scale,
            "sha256": digest,
            "data": {**recipe.model_dump(mode="json")["data"], "count": data.count, "fingerprint": data.fingerprint()},
        }
    }
    source = recipe.tokenizer.get("from")
    if source is not None:
        provenance["from"] = {"folder": source, **read_provenance(Path(source).expanduser())}
    return Measurement(save_tokenizer(tokenizer, out, provenance), measured, digest)


def statistics_sha256(tokenizer: Latent) -> str:
    """The sha256 of mean and std in float32."""
    digest = hashlib.sha256()
    for values in (tokenizer.mean, tokenizer.std):
        digest.update(values.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
