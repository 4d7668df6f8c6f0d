"""What a tokenizer loses, and what its tokens are like, or how its codes are used.

B images, L tokens of D features or L codes, F features of an extractor.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from seriatim.core.errors import NumericsError, UsageError
from seriatim.core.files import atomic_write, writable_folder, write_json
from seriatim.core.keys import Keys
from seriatim.core.processes import place
from seriatim.core.progress import Progress
from seriatim.evaluation.base import FeatureExtractor, check_pictures
from seriatim.evaluation.blocks import SIZE, Blocks, Share, Vectors, eight_bits, extract, features_of
from seriatim.evaluation.figures import Reference, Set, check_count, figures_of, named
from seriatim.evaluation.grid import grid, save_png
from seriatim.evaluation.identity import SETTINGS, check_folders, same_settings
from seriatim.evaluation.impartial import check_impartial
from seriatim.evaluation.metrics import Array, Figure, frechet_distance, with_error
from seriatim.evaluation.reference import Images, Part, as_many, described, halves, whole
from seriatim.evaluation.rows import tokenizer_row
from seriatim.evaluation.run import MOST_IMAGES, features_folder, pictures
from seriatim.pipeline.metadata import versions
from seriatim.pipeline.result import as_pil
from seriatim.tokenizers.base import Tokenizer, to_uint8
from seriatim.tokenizers.latent import Latent
from seriatim.tokenizers.quantise import Usage

BATCH = 32
MOST_PSNR = 100.0  # dB: what an image that comes back exactly counts, since infinity has no mean
SSIM_SIDE = 6  # its window reaches 5 pixels over the edge, into the mirror image
NOISE = (0.05, 0.1, 0.2, 0.4)  # standard deviations, in units of a token's own of about 1
RESULTS, PICTURES = "results.json", "reconstructions.png"
SHOWN, COLUMNS, SHOWN_SIDE = 16, 8, 64  # images in reconstructions.png, images of a row, and the side in pixels


@dataclass(frozen=True)
class TokenizerEvaluation:
    """What `evaluate_tokenizer` gives; empty until all shares are done, and in all processes but the first."""

    figures: dict[str, Figure]  # PSNR, SSIM, and with an extractor rFD[name] and FD[name]
    real: dict[str, Figure]  # FD[name] of the images themselves
    noise: dict[float, Figure]  # PSNR of what noisy tokens decode to, by the noise's standard deviation; none of codes
    latents: dict[str, float]  # statistics of the tokens; of codes, their usage
    report: dict[str, Any]
    missing: int = 0  # images that other processes still owe


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
    provenance: Mapping[str, Any] = MappingProxyType({}),
    seed: int = 0,
    share: Share | None = None,
    cache: Path | str | None = None,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> TokenizerEvaluation:
    """Encode and decode `num` images of `real` (without it: of half of `data`) and compare.

    PSNR, SSIM    of the reconstructions, in 8 bits, from which the mean over images is taken
    rFD[name]     Frechet distance of the reconstructions to the images that they are of
    FD[name]      to the reference `data`, which doesn't hold them; beside it that of the images themselves
    `provenance` is what `read_provenance` says of the tokenizer: features that it was trained with are refused.
    Tokens are the posterior's mode. Stopped, shared and cached as `evaluate` is. The folder holds these besides:

        results.json          the figures, with mean and std of each feature of a token, and of each latent channel
        reconstructions.png   rows of originals, of their reconstructions, and of reconstructions from noisy tokens
        noise.png             the PSNR over the noise on tokens, if tokens are no codes
    """
    begin = time.monotonic()
    folder = Path(out)
    check_folders(folder, None if cache is None else Path(cache))
    if not 2 <= num <= MOST_IMAGES:
        raise UsageError(f"num: {num!r} is not allowed; it must be from 2 to {MOST_IMAGES:,}")
    check_pictures(tokenizer)
    if features is not None:
        check_impartial(provenance, features)
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
    similarity()  # torchmetrics is there, or said to be missing now
    writable_folder(folder)
    tokenizer = tokenizer.to(device).eval()
    extractor = None if features is None else features.to(device).eval()
    settings: dict[str, Any] = {
        "tokenizer": {"source": source, "sha256": tokenizer.fingerprint(), "config": tokenizer.config},
        "features": None
        if extractor is None
        else {"name": extractor.name, "sha256": extractor.fingerprint(), "config": extractor.config},
        "reference": described(data, reference),
        "real": described(real or data, part),
        "noise": list(noise),
        "block": SIZE,
        "seed": seed,
    }
    same_settings(folder / SETTINGS, settings, {"reference": reference, "real": part})

    stores = [Blocks(folder / "reconstructions", len(part))]
    stores[0].fill(look(tokenizer, part, extractor, noise, seed, device), "reconstructing", share=share, quiet=quiet)
    if extractor is not None:
        cached = Path(cache) if cache is not None else folder
        stores.append(Blocks(features_folder(cached, extractor, reference), len(reference)))
        work = features_of(partial(pictures, reference), extractor, "reference", device)
        stores[1].fill(work, "reference", share=share, quiet=quiet)
    missing = sum(len(block) for store in stores for block in store.missing())
    if missing or place().rank:  # the first process computes the figures
        return TokenizerEvaluation({}, {}, {}, {}, {}, missing)
    seen = stores[0].arrays()

    count, psnr = len(part), seen["psnr"]
    figures = {"PSNR": spread(psnr)} | ({"SSIM": spread(seen["ssim"])} if "ssim" in seen else {})
    beside: dict[str, Figure] = {}
    reference_pixels = ""
    if extractor is not None:
        decoded, images_of = seen["decoded"], seen["images"]
        both = [Set(Vectors(vectors)) for vectors in (decoded, images_of)]
        pairs = with_error(lambda i: frechet_distance(decoded[i], images_of[i]), count)  # both of a pair left out
        figures["rFID" if extractor.standard else f"rFD[{extractor.name}]"] = pairs
        vectors = stores[1].read()
        against, reference_pixels = Reference(vectors), vectors.pixels
        made, true = (figures_of(side, against, extractor, ("frechet",)) for side in both)
        figures |= made
        beside = {name: true[name] for name in (named("FD", extractor),)}
    shaken = {level: spread(seen["noisy"][:, i]) for i, level in enumerate(noise)}
    tally = together(tally_of(tokenizer), seen)
    latents = tally.summary()
    if not (folder / PICTURES).exists():
        write_pictures(tokenizer, part, max(noise, default=0.0), seed, device, folder / PICTURES)
    if shaken:
        draw_noise({0.0: figures["PSNR"], **shaken}, folder / "noise.png")
    report = {
        "figures": {
            name: {"value": x.value, "error": x.error}
            | ({"real": beside[name].value, "real_error": beside[name].error} if name in beside else {})
            for name, x in figures.items()
        },
        "psnr_under_noise": {str(level): {"value": x.value, "error": x.error} for level, x in shaken.items()},
        "latents" if tokenizer.vocab is None else "codes": latents,
        **({"features": tally.by_feature()} if isinstance(tally, LatentStatistics) else {}),
        **(channels_of(tokenizer, tally) if isinstance(tally, LatentStatistics) else {}),
        "num": count,
        "exact": float((psnr >= MOST_PSNR).mean()),
        "error": "jackknife over 10 groups of the images",
        "pixels_sha256": {"reference": reference_pixels},
        "settings": settings,
        "versions": versions(torch.device(device)) | {"threads": str(torch.get_num_threads())},
        "seconds": round(time.monotonic() - begin, 2),
    }
    report["markdown"] = tokenizer_row(report)
    write_json(folder / RESULTS, report)
    return TokenizerEvaluation(figures, beside, shaken, latents, report)


def look(
    tokenizer: Tokenizer,
    part: Part,
    extractor: FeatureExtractor | None,
    noise: Sequence[float],
    seed: int,
    device: torch.device | str,
) -> Callable[[range, Progress], dict[str, Tensor]]:
    """Of a block of images, for `Blocks.fill`: psnr, ssim (b,); noisy (b, levels), PSNR at each level of noise;
    decoded, images (b, F), features of both; and what is known of the tokens.
    """
    psnr, ssim = similarity()

    @torch.no_grad()
    def tensors_of(block: range, bar: Progress) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        tally = tally_of(tokenizer)
        for first in range(block.start, block.stop, BATCH):
            index = part.index[first : min(first + BATCH, block.stop)]
            images = eight_bits(part.data.images(index)).to(device)
            tokens = tokenizer.tokens(tokenizer.moments(images))  # (B, L, D), or codes (B, L)
            if not bool(torch.isfinite(tokens).all()):
                raise NumericsError("tokenizer: its tokens are not finite; its weights do not fit these images")
            tally.add(tokens)
            decoded = eight_bits(tokenizer.decode(tokens))
            values = {"psnr": psnr(decoded, images)}
            if min(tokenizer.size) >= SSIM_SIDE:
                values["ssim"] = ssim(decoded, images)
            if extractor is not None:
                for name, shown in (("decoded", decoded), ("images", images)):
                    values[name] = extract(extractor, shown, device).features
            if noise:
                keys = Keys.of(seed, "latent noise").fold(torch.arange(first, first + len(index)))
                shift = keys.to(device).normal(*tokens.shape[1:])  # (B, L, D): as all levels have it
                shaken = [psnr(eight_bits(tokenizer.decode(tokens + level * shift)), images) for level in noise]
                values["noisy"] = torch.stack(shaken, dim=1)  # (B, levels)
            for name, value in values.items():
                found.setdefault(name, []).append(value.cpu())
            bar.advance(len(index))
        return {name: torch.cat(parts) for name, parts in found.items()} | rows_of(tally)

    return tensors_of


@torch.no_grad()
def write_pictures(
    tokenizer: Tokenizer, part: Part, level: float, seed: int, device: torch.device | str, path: Path
) -> None:
    """Write originals, each row above its reconstructions and, with a `level` of noise on tokens, above noisy ones."""
    images = eight_bits(part.data.images(part.index[:SHOWN])).to(device)
    tokens = tokenizer.tokens(tokenizer.moments(images))
    sets = [images, tokenizer.decode(tokens)]
    if level:
        keys = Keys.of(seed, "latent noise").fold(torch.arange(len(images))).to(device)  # as in the figures
        sets.append(tokenizer.decode(tokens + level * keys.normal(*tokens.shape[1:])))
    rows = [as_pil(to_uint8(some)) for some in sets]
    columns = min(COLUMNS, len(images))
    shown = [image for i in range(0, len(images), columns) for row in rows for image in padded(row, i, columns)]
    save_png(grid(shown, columns, side=SHOWN_SIDE), path)


def padded(row: list[Image.Image], first: int, columns: int) -> list[Image.Image]:
    """A row of a grid, filled up with grey."""
    some = row[first : first + columns]
    return some + [Image.new(some[0].mode, some[0].size, "grey")] * (columns - len(some))


def draw_noise(found: Mapping[float, Figure], path: Path) -> None:
    """Draw the PSNR over the standard deviation of the noise on tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=(6, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.errorbar(list(found), [x.value for x in found.values()], [x.error for x in found.values()], marker="o")
    axes.set(xlabel="standard deviation of the noise on tokens", ylabel="PSNR of the reconstructions, dB")
    axes.grid(alpha=0.3)
    atomic_write(path, lambda file: figure.savefig(file, format="png"))


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
        self.count, self.largest = torch.tensor(0), torch.tensor(0.0, dtype=torch.float64)
        self.total, self.fourth = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, tokens: Tensor) -> None:
        x = tokens.detach().cpu().double().flatten(0, 1)  # (B L, D)
        self.count += len(x)
        self.total += x.sum(dim=0)
        self.fourth += (x**4).sum(dim=0)
        self.products += x.T @ x
        self.largest = torch.maximum(self.largest, x.abs().max())

    def by_feature(self) -> dict[str, list[float]]:
        """The mean and the standard deviation of each feature of a token."""
        mean = self.total / self.count
        variance = self.products.diagonal() / self.count - mean.square()
        return {"mean": mean.tolist(), "std": variance.clamp(min=0).sqrt().tolist()}

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
            "largest": float(self.largest),
            "fourth": float((self.fourth / self.count).mean() / square.mean().square().clamp(min=1e-30)),
            "directions": float(values.sum().square() / values.square().sum().clamp(min=1e-30)),
        }


def channels_of(tokenizer: Tokenizer, tally: LatentStatistics) -> dict[str, dict[str, list[float]]]:
    """The mean and standard deviation of each latent channel before it is normalised, as the entry "channels".

    Empty for tokens that are no latents.
    """
    if not isinstance(tokenizer, Latent):
        return {}
    mean, std = (torch.tensor(values) for values in tally.by_feature().values())  # (D,) = (z p p,)
    scale, shift = tokenizer.std.cpu(), tokenizer.mean.cpu()  # (z,)
    first = mean.view(len(scale), -1).mean(dim=1)  # (z,), of normalised latents
    second = (std.square() + mean.square()).view(len(scale), -1).mean(dim=1)
    spread = (second - first.square()).clamp(min=0).sqrt()
    return {"channels": {"mean": (first * scale + shift).tolist(), "std": (spread * scale).tolist()}}


Tally = LatentStatistics | Usage


def tally_of(tokenizer: Tokenizer) -> Tally:
    """What counts a tokenizer's tokens, or codes, as long as there are none."""
    return LatentStatistics(tokenizer.dim) if tokenizer.vocab is None else Usage(tokenizer.vocab)


def rows_of(tally: Tally) -> dict[str, Tensor]:
    """Its tensors as one row each, for a block's file."""
    return {name: value[None] for name, value in vars(tally).items()}


def together(tally: Tally, arrays: Mapping[str, Array]) -> Tally:
    """Fill it with the rows of all blocks."""
    for name, value in vars(tally).items():
        rows = torch.from_numpy(arrays[name])
        setattr(tally, name, (rows.amax(dim=0) if name == "largest" else rows.sum(dim=0)).to(value.dtype))
    return tally


def spread(values: Array) -> Figure:
    return with_error(lambda i: float(values[i].mean()), len(values))
