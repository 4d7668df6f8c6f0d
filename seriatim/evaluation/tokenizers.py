"""What a tokenizer loses, and what its tokens are like, or how its codes are used.

B images, L tokens of D features or L codes, F features of an extractor.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seriatim.core.errors import NumericsError, UsageError
from seriatim.core.files import writable_folder, write_json
from seriatim.core.progress import Progress
from seriatim.core.random import Noise, derive_seed
from seriatim.evaluation.base import FeatureExtractor, check_pictures
from seriatim.evaluation.blocks import Vectors, eight_bits, extract
from seriatim.evaluation.figures import Reference, Set, check_count, figures_of, named
from seriatim.evaluation.metrics import Array, Figure, frechet_distance, with_error
from seriatim.evaluation.reference import Images, Part, as_many, described, halves, whole
from seriatim.sampling.metadata import versions
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.quantise import Usage

BATCH = 32
MOST_PSNR = 100.0  # dB: what an image that comes back exactly counts, since infinity has no mean
SSIM_SIDE = 6  # its window reaches 5 pixels over the edge, into the mirror image
NOISE = (0.05, 0.1, 0.2, 0.4)  # standard deviations, in units of a token's own of about 1
RESULTS = "results.json"


@dataclass(frozen=True)
class TokenizerEvaluation:
    figures: dict[str, Figure]  # PSNR, SSIM, and with an extractor rFD[name] and FD[name]
    real: dict[str, Figure]  # FD[name] of the images themselves
    noise: dict[float, Figure]  # PSNR of what noisy tokens decode to, by the noise's standard deviation; none of codes
    latents: dict[str, float]  # statistics of the tokens; of codes, their usage
    report: dict[str, Any]


def evaluate_tokenizer(
    tokenizer: Tokenizer,
    data: Images,
    out: Path | str,
    *,
    num: int,
    features: FeatureExtractor | None = None,
    real: Images | None = None,
    noise: Sequence[float] | None = None,  # None: NOISE, and none where tokens are codes
    source: str = "",
    seed: int = 0,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> TokenizerEvaluation:
    """Encode and decode `num` images of `real` (without it: of half of `data`) and compare.

    PSNR, SSIM    of the reconstructions, in 8 bits
    rFD[name]     Frechet distance of the reconstructions to the images that they are of
    FD[name]      to the reference `data`, which doesn't hold them; beside it that of the images themselves
    Tokens are the posterior's mode.
    """
    begin = time.monotonic()
    if num < 2:
        raise UsageError(f"num: {num!r} is not allowed; it must be at least 2")
    check_pictures(tokenizer)
    if noise and tokenizer.vocab is not None:
        raise UsageError("noise: is for continuous tokens, this tokenizer's are codes; leave it out")
    noise = (NOISE if tokenizer.vocab is None else ()) if noise is None else noise
    if any(not (math.isfinite(level) and level > 0) for level in noise):
        raise UsageError(f"noise: {list(noise)!r} is not allowed; standard deviations are positive")
    for name, images in (("data", data), ("real_data", real)):
        if images is not None and (images.channels, *images.size) != (tokenizer.channels, *tokenizer.size):
            ours, theirs = (tokenizer.channels, *tokenizer.size), (images.channels, *images.size)
            raise UsageError(f"{name}: images are {theirs} (channels, H, W), the tokenizer takes {ours}; set data.size")
    reference, rest = halves(whole(data, 0, ())) if real is None else (whole(data, 0, ()), whole(real, 0, ()))
    part = as_many(rest, num, 0)
    if features is not None:
        check_count("num", len(part), features, ("frechet",))
        check_count("data", len(reference), features, ("frechet",))
    folder = writable_folder(out)
    tokenizer = tokenizer.to(device).eval()
    extractor = None if features is None else features.to(device).eval()
    seen = look(tokenizer, part, extractor, noise, seed, device, quiet)
    of_reference = None if extractor is None else originals(extractor, reference, device, quiet)

    count = len(part)
    figures = {"PSNR": spread(seen.psnr)} | ({"SSIM": spread(seen.ssim)} if len(seen.ssim) else {})
    beside: dict[str, Figure] = {}
    if extractor is not None and of_reference is not None:
        decoded, images_of = seen.decoded, seen.images
        both = [Set(Vectors(vectors)) for vectors in (decoded, images_of)]
        pairs = with_error(lambda i: frechet_distance(decoded[i], images_of[i]), count)  # both of a pair left out
        figures["rFID" if extractor.standard else f"rFD[{extractor.name}]"] = pairs
        against = Reference(Vectors(of_reference))
        made, true = (figures_of(side, against, extractor, ("frechet",)) for side in both)
        figures |= made
        beside = {name: true[name] for name in (named("FD", extractor),)}
    shaken = {level: spread(values) for level, values in zip(noise, seen.noisy, strict=True)}
    report = {
        "figures": {
            name: {"value": x.value, "error": x.error}
            | ({"real": beside[name].value, "real_error": beside[name].error} if name in beside else {})
            for name, x in figures.items()
        },
        "psnr_under_noise": {str(level): {"value": x.value, "error": x.error} for level, x in shaken.items()},
        "latents" if tokenizer.vocab is None else "codes": seen.latents,
        "num": count,
        "exact": float((seen.psnr >= MOST_PSNR).mean()),
        "error": "jackknife over 10 groups of the images",
        "settings": {
            "tokenizer": {"source": source, "sha256": tokenizer.fingerprint(), "config": tokenizer.config},
            "features": None
            if extractor is None
            else {"name": extractor.name, "sha256": extractor.fingerprint(), "config": extractor.config},
            "reference": described(data, reference),
            "real": described(real or data, part),
            "seed": seed,
        },
        "versions": versions(torch.device(device)) | {"threads": str(torch.get_num_threads())},
        "seconds": round(time.monotonic() - begin, 2),
    }
    report["markdown"] = row(source, report)
    write_json(folder / RESULTS, report)
    return TokenizerEvaluation(figures, beside, shaken, seen.latents, report)


@dataclass
class Seen:
    """What one pass over the images gives, a value or vector for each."""

    psnr: Array
    ssim: Array
    noisy: list[Array]  # PSNR at each level of noise
    decoded: Array  # (n, F); (n, 0) without an extractor
    images: Array  # the same of the images themselves
    latents: dict[str, float]


@torch.no_grad()
def look(
    tokenizer: Tokenizer,
    part: Part,
    extractor: FeatureExtractor | None,
    noise: Sequence[float],
    seed: int,
    device: torch.device | str,
    quiet: bool,
) -> Seen:
    psnr, ssim = similarity()
    collected: dict[str, list[Tensor]] = {name: [] for name in ("psnr", "ssim", "decoded", "images")}
    noisy: list[list[Tensor]] = [[] for _ in noise]
    latents = LatentStatistics(tokenizer.dim) if tokenizer.vocab is None else Usage(tokenizer.vocab)
    with Progress(len(part), "reconstructing", "images", quiet=quiet) as bar:
        for first in range(0, len(part), BATCH):
            index = part.index[first : first + BATCH]
            images = eight_bits(part.data.images(index)).to(device)
            tokens = tokenizer.tokens(tokenizer.moments(images))  # (B, L, D), or codes (B, L)
            if not bool(torch.isfinite(tokens).all()):
                raise NumericsError("tokenizer: its tokens are not finite; its weights do not fit these images")
            latents.add(tokens)
            decoded = eight_bits(tokenizer.decode(tokens))
            collected["psnr"].append(psnr(decoded, images))
            if min(tokenizer.size) >= SSIM_SIDE:
                collected["ssim"].append(ssim(decoded, images))
            if extractor is not None:
                for name, pictures in (("decoded", decoded), ("images", images)):
                    collected[name].append(extract(extractor, pictures, device).features)
            if noise:
                seeds = [derive_seed(seed, "latent noise", first + i) for i in range(len(index))]
                shift = Noise.per_image(seeds, device).normal(*tokens.shape[1:])  # (B, L, D): as all levels have it
                for values, level in zip(noisy, noise, strict=True):
                    values.append(psnr(eight_bits(tokenizer.decode(tokens + level * shift)), images))
            bar.advance(len(index))

    def joined(parts: list[Tensor]) -> Array:
        return np.asarray(torch.cat(parts).double().cpu().numpy()) if parts else np.empty((0,))

    found = {name: joined(parts) for name, parts in collected.items()}
    return Seen(**found, noisy=[joined(values) for values in noisy], latents=latents.summary())


def originals(extractor: FeatureExtractor, part: Part, device: torch.device | str, quiet: bool) -> Array:
    """Features (n, F) of real images."""
    found = []
    with Progress(len(part), "reference", "images", quiet=quiet) as bar:
        for index in part.index.split(BATCH):
            found.append(extract(extractor, eight_bits(part.data.images(index)), device).features)
            bar.advance(len(index))
    return np.asarray(torch.cat(found).double().numpy())


def similarity() -> tuple[Any, Any]:
    """PSNR and SSIM of images (B, c, H, W) in [-1, 1] with others: (B,) each."""
    try:
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    except ImportError as error:
        raise UsageError('tokenizer: PSNR and SSIM need torchmetrics; pip install "seriatim[eval]"') from error

    def psnr(decoded: Tensor, images: Tensor) -> Tensor:
        each: Tensor = peak_signal_noise_ratio(
            decoded.double(), images.double(), data_range=2.0, reduction="none", dim=(1, 2, 3)
        )
        return each.clamp(max=MOST_PSNR)

    def ssim(decoded: Tensor, images: Tensor) -> Tensor:
        x, y = ((side.double() + 1) / 2 for side in (decoded, images))  # its luminance term knows no negative values
        each = structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
        assert isinstance(each, Tensor)
        return each.view(-1)

    return psnr, ssim


class LatentStatistics:
    """Moments of tokens, added batch by batch, in float64."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.total, self.fourth = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)
        self.largest = 0.0

    def add(self, tokens: Tensor) -> None:
        x = tokens.detach().cpu().double().flatten(0, 1)  # (B L, D)
        self.count += len(x)
        self.total += x.sum(dim=0)
        self.fourth += (x**4).sum(dim=0)
        self.products += x.T @ x
        self.largest = max(self.largest, float(x.abs().max()))

    def summary(self) -> dict[str, float]:
        """mean, std             of all features together
        std_least, std_most      of a single feature
        largest                  absolute value
        fourth                   mean fourth power over the squared mean square: 3 for a Gaussian
        directions               participation ratio of the covariance's eigenvalues: D if all are alike, 1 if one rules
        """
        mean = self.total / self.count
        covariance = self.products / self.count - mean.outer(mean)
        square = self.products.diagonal() / self.count
        std = covariance.diagonal().clamp(min=0).sqrt()
        values = torch.linalg.eigvalsh(covariance).clamp(min=0)
        whole_variance = square.mean() - mean.mean().square()
        return {
            "mean": float(mean.mean()),
            "std": float(whole_variance.clamp(min=0).sqrt()),
            "std_least": float(std.min()),
            "std_most": float(std.max()),
            "largest": self.largest,
            "fourth": float((self.fourth / self.count).mean() / square.mean().square().clamp(min=1e-30)),
            "directions": float(values.sum().square() / values.square().sum().clamp(min=1e-30)),
        }


def spread(values: Array) -> Figure:
    return with_error(lambda i: float(values[i].mean()), len(values))


def row(source: str, report: dict[str, Any]) -> str:
    """A markdown table of one row."""
    figures = report["figures"]
    noise = report["psnr_under_noise"]
    names = [*figures, *(f"PSNR, noise {level}" for level in noise)]
    values = [*figures.values(), *noise.values()]
    codes = report.get("codes", {})
    names += [f"{name} of {codes['codes']:,} codes" for name in ("used", "perplexity") if codes]
    cells = [f"{x['value']:.4g} ± {x['error']:.2g}" + (f" ({x['real']:.4g})" if "real" in x else "") for x in values]
    cells += [f"{codes['used']:.1%}", f"{codes['perplexity']:.4g}"] if codes else []
    path = Path(source)
    name = (path.parent.name if path.name == "model" else path.name) or "tokenizer"
    sha = report["settings"]["tokenizer"]["sha256"][:8]
    lines = ["| tokenizer | images | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    return "\n".join([*lines, f"| {name} {sha} | {report['num']:,} | " + " | ".join(cells) + " |"])
