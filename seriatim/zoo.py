"""Presets as data: a paper's model, or ours, under a name.

`parameters` counts the model without its tokenizer. `published` holds the authors' own figures; `proven` says what was
shown with this code, and how. Nothing is proven for a preset that doesn't say so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from seriatim.core.errors import check_known

MAR = "Li et al. 2024, arXiv 2406.11838, table 4 (by the authors, not measured here)"

LLAMAGEN = "Sun et al. 2024, arXiv 2406.06525, appendix (by the authors, not measured here)"


@dataclass(frozen=True)
class Preset:
    name: str
    summary: str
    model: dict[str, Any]
    parameters: int
    tokens: int
    image: str  # what one image is
    published: dict[str, Any] | None = None
    proven: tuple[str, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None  # the packaged recipe that trains it
    theirs: dict[str, Any] = field(default_factory=dict)  # where the authors' own models differ from `model`

    def original(self) -> dict[str, Any]:
        """The config of the authors' code and weights; a model of one's own begins with `model`."""
        return self.model | self.theirs


LATENTS = "ImageNet 256x256 as 16x16 latents of a KL autoencoder"


def _masked(width: int, depth: int, heads: int, head: dict[str, Any]) -> dict[str, Any]:
    """The config of a masked model of those latents."""
    size = {"width": width, "depth": depth, "heads": heads}
    return {"kind": "masked", "tokens": 256, "dim": 16, **size, "buffer": 64, "classes": 1000, "head": head}


def _mar(
    size: str,
    *,
    width: int,
    depth: int,
    heads: int,
    head: dict[str, int],
    parameters: int,
    guidance: float,
    guided: tuple[float, float],
    free: tuple[float, float],
    measured: tuple[str, ...] = (),
) -> Preset:
    return Preset(
        name=f"mar-{size}",
        summary=f"MAR-{size.upper()}: {depth}+{depth} blocks of {width}, head {head['depth']} x {head['width']}",
        model=_masked(width, depth, heads, {"kind": "diffusion", **head}),
        parameters=parameters,
        tokens=256,
        image=LATENTS,
        published={
            "FID": guided[0],
            "IS": guided[1],
            "FID_without_guidance": free[0],
            "IS_without_guidance": free[1],
            "source": MAR,
        },
        proven=(
            "names, shapes and counts of the official checkpoint; parity on golden tensors of small official models",
            *measured,
        ),
        sampling={
            "guidance_scale": guidance,
            "guidance_schedule": "linear",
            "num_inference_steps": 256,
            "num_diffusion_steps": 100,
        },
    )


# The form of a block of VAR (Tian et al. 2024), which ARINAR's head uses.
VAR_BLOCK = {
    "conditioning": "both",
    "norm": "layer",
    "mlp": "gelu-tanh",
    "positions": "learned",
    "start_token": True,
    "bias": True,
    "attention_scale": 0.25,
}
ARINAR = "Zhao et al. 2025, arXiv 2503.02883, and its README (by the authors, not measured here)"


def _arinar(
    size: str,
    *,
    width: int,
    depth: int,
    heads: int,
    parameters: int,
    published: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    note: str = "",
    measured: tuple[str, ...] = (),
) -> Preset:
    return Preset(
        name=f"arinar-{size}",
        summary=f"ARINAR-{size.upper()}: {depth}+{depth} blocks of {width}, feature by feature, 4 Gaussians each{note}",
        model=_masked(
            width,
            depth,
            heads,
            {
                "kind": "nested",
                "split": {"kind": "features", "group": 1, "order": "natural"},
                "model": {
                    "kind": "causal",
                    "width": width,
                    "depth": 1,
                    "heads": 4,  # as first published; the authors' later code has 16 (docs/official-weights.md)
                    **VAR_BLOCK,
                    "head": {"kind": "mixture", "components": 4, "depth": 0},
                },
            },
        ),
        parameters=parameters,
        tokens=256,
        image=LATENTS,
        published=published,
        proven=(
            "names, shapes and counts of the official model; parity on golden tensors of small official models",
            *measured,
        ),
        sampling={"guidance_schedule": "linear", "num_inference_steps": 64, **(sampling or {})},
    )


def _ear(size: str, *, width: int, depth: int, heads: int, head: dict[str, int], parameters: int) -> Preset:
    return Preset(
        name=f"ear-{size}",
        summary=f"EAR-{size.upper()}: {depth} blocks of {width}, an energy head of {head['depth']} x {head['width']}",
        model=_masked(width, depth, heads, {"kind": "energy", **head, "draws": 2}) | {"backbone": "bidirectional"},
        parameters=parameters,
        tokens=256,
        image=LATENTS,
        proven=("names, shapes and counts of the official model; parity on golden tensors of small official models",),
        sampling={
            "guidance_scale": 3.0,
            "guidance_schedule": "linear",
            "num_inference_steps": 64,
            "temperature": 0.7,
        },
    )


def _llamagen(
    size: str,
    *,
    width: int,
    depth: int,
    heads: int,
    parameters: int,
    guidance: float,
    guided: tuple[float, float],
    epochs: int,
    measured: tuple[str, ...] = (),
) -> Preset:
    return Preset(
        name=f"llamagen-{size}",
        summary=f"LlamaGen-{size.upper()}: {depth} causal blocks of {width}, {heads} heads, codes of 16384",
        model={
            "kind": "causal",
            "tokens": 256,
            "vocab": 16384,
            "width": width,
            "depth": depth,
            "heads": heads,
            "dropout": 0.1,
            "classes": 1000,
            "head": {"kind": "categorical", "bias": False},
        },
        parameters=parameters,
        tokens=256,
        image="ImageNet 256x256 as 16x16 codes of a VQ autoencoder",
        published={"FID": guided[0], "IS": guided[1], "epochs": epochs, "source": LLAMAGEN},
        proven=(
            "names, shapes and counts of the official models; parity on golden tensors of small official models",
            *measured,
        ),
        sampling={"guidance_scale": guidance, "guidance_schedule": "constant"},
        theirs={"rotate_prefix": False},  # the prefix is looked at, but asks for nothing
    )


_PRESETS = (
    Preset(
        name="mar-digits",
        summary="the demo: 8x8 handwritten digits, 2x2 pixel tokens, trained in about a minute on two CPU cores",
        model={
            "kind": "masked",
            "tokens": 16,
            "dim": 4,
            "width": 128,
            "depth": 2,
            "heads": 4,
            "buffer": 4,
            "dropout": 0.0,
            "min_mask_ratio": 0.05,
            "mask_ratio_std": 1.0,
            "classes": 10,
            "head": {"kind": "diffusion", "width": 128, "depth": 2, "draws": 2},
        },
        parameters=1_085_960,
        tokens=16,
        image="digits of scikit-learn, 8x8, one channel",
        proven=("seriatim demo trains it and reports recognition, Frechet distance and variance against real digits",),
        sampling={"guidance_scale": 2.0, "num_inference_steps": 16, "num_diffusion_steps": 50},
        recipe="mar-digits",
    ),
    _mar(
        "b",
        width=768,
        depth=12,
        heads=12,
        head={"width": 1024, "depth": 6},
        parameters=207_924_768,
        guidance=2.9,
        guided=(2.31, 281.7),
        free=(3.48, 192.4),
        measured=("beside the official code, full size, random weights, same draws: within 1.9e-6 of the largest",),
    ),
    _mar(
        "l",
        width=1024,
        depth=16,
        heads=16,
        head={"width": 1280, "depth": 8},
        parameters=478_326_304,
        guidance=3.0,
        guided=(1.78, 296.0),
        free=(2.60, 221.4),
    ),
    _mar(
        "h",
        width=1280,
        depth=20,
        heads=16,
        head={"width": 1536, "depth": 12},
        parameters=942_403_104,
        guidance=3.2,
        guided=(1.55, 303.7),
        free=(2.35, 227.8),
    ),
    _arinar(
        "b",
        width=768,
        depth=14,
        heads=12,
        parameters=212_949_516,
        published={"FID": 2.75, "source": ARINAR},
        sampling={"guidance_scale": 4.5},
        measured=("beside the official code, full size, random weights: what parts are drawn from within 1.6e-6",),
    ),
    _arinar(
        "l",
        width=1024,
        depth=18,
        heads=16,
        parameters=478_550_028,
        sampling={"guidance_scale": 3.7},
        note="; the size of their code, nothing published",
    ),
    _ear("b", width=768, depth=24, heads=12, head={"width": 1024, "depth": 6}, parameters=205_608_720),
    _ear("l", width=1024, depth=32, heads=16, head={"width": 1280, "depth": 8}, parameters=474_755_088),
    _ear("h", width=1280, depth=40, heads=16, head={"width": 1536, "depth": 12}, parameters=937_314_576),
    _llamagen(
        "b",
        width=768,
        depth=12,
        heads=12,
        parameters=110_888_448,
        guidance=2.0,
        guided=(5.46, 193.6),
        epochs=300,
        measured=("beside the official code, full size, random weights: the same 2,048 likeliest codes of 8 images",),
    ),
    _llamagen(
        "l", width=1024, depth=24, heads=16, parameters=342_910_976, guidance=1.75, guided=(3.80, 248.3), epochs=300
    ),
    _llamagen(
        "xl", width=1280, depth=36, heads=20, parameters=774_699_520, guidance=1.75, guided=(3.39, 227.1), epochs=50
    ),
    _llamagen(
        "xxl", width=1536, depth=48, heads=24, parameters=1_410_972_672, guidance=1.75, guided=(3.09, 253.6), epochs=50
    ),
    _llamagen(
        "3b", width=3200, depth=24, heads=32, parameters=3_096_659_200, guidance=1.75, guided=(3.06, 279.7), epochs=50
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _PRESETS}


def preset(name: str) -> Preset:
    check_known(PRESETS, preset=name)
    return PRESETS[name]
