"""Does a tokenizer help a generator? The same trunk, head and minutes of training on different tokens of 4x4 pixels.

    python benchmarks/tokens_for_generators.py --data cifar10/train --real-data cifar10/test \\
        --classifier classifier:runs/classifier --minutes 30 --out runs/tokens \\
        --tokenizer kl-f2='{from: runs/kl-32-f2, patch: 2}' --tokenizer kl-f4='{from: runs/kl-32}'

Contestants are `pixels` (patches of pixels), `pca` (their 16 principal components) and every --tokenizer, each with the
trunk `raster` (causal, row by row, flow head) and `masked` (MAR's order, flow head). Latents of trained tokenizers are
cached first. Each training has one thread and as many images as it manages in --minutes, by the clock of
`raster-pixels` (see equal_minutes.py), so that its learning rate falls to the end. Judged are samples at each
--guidance by the classifier: the Frechet distance to --data, accuracy, precision and recall. Intervals are 95 % of
Student's t over the seeds, where there are several, and else over ten groups of the samples. What is done already in
--out is not done again, and a training goes on from its last checkpoint: stop at any time. --only TRUNK-TOKENS does
some of the work, so that several processes can share it.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from ablation_cells import refuse_other
from equal_minutes import cache_latents, generator, train_for
from judged_samples import Judge, cell, draw
from known_density_tables import interval, show

from seriatim.core.files import write_json, write_text
from seriatim.models.build import parameter_count
from seriatim.pipeline.loading import load
from seriatim.training.config import Recipe, read_recipe

HEAD = {"kind": "flow", "width": 256, "depth": 3, "draws": 2}
TRUNKS: dict[str, dict[str, Any]] = {
    "raster": {"kind": "causal", "width": 256, "depth": 6, "heads": 4, "dropout": 0.0, "head": HEAD},
    "masked": {
        "kind": "masked", "width": 256, "depth": 6, "heads": 4, "buffer": 4, "dropout": 0.0,
        "min_mask_ratio": 0.1, "mask_ratio_std": 0.6, "head": HEAD,
    },
}  # fmt: skip
SAMPLING: dict[str, dict[str, Any]] = {
    "raster": {"num_diffusion_steps": 25, "guidance_schedule": "constant"},
    "masked": {"num_diffusion_steps": 25, "guidance_schedule": "constant", "num_inference_steps": 32},
}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "pixels": {"kind": "pixels", "patch": 4},
    "pca": {"kind": "pixels", "patch": 4, "components": 16, "whiten": 0.5},
}
TRAINING: dict[str, Any] = {
    "batch_size": 64, "learning_rate": 1.0e-3, "warmup_images": 5000, "schedule": "cosine", "ema": 0.999,
    "threads": 1, "sample_images": 0,
}  # fmt: skip


def recipe_of(trunk: str, tokens: str, seed: int, given: argparse.Namespace, images: int, save: int) -> Recipe:
    """The recipe of a contestant; latents of a trained tokenizer come from its cache."""
    tokenizer = given.tokenizers[tokens]
    cached = given.out / "cache" / tokens
    data = {"kind": "folder", "path": str(given.data), "size": given.size, "check": False}
    told = {
        "name": f"{trunk}-{tokens}",
        "seed": seed,
        "data": {"kind": "latents", "path": str(cached)} if "from" in tokenizer and cached.exists() else data,
        "tokenizer": tokenizer,
        "model": TRUNKS[trunk],
        "training": {**TRAINING, "dtype": given.dtype, "images": images, "save_images": save},
    }
    file = given.out / "recipes" / f"{trunk}-{tokens}-{seed}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, yaml.safe_dump(told))
    return read_recipe(str(file), given.overrides)


def rows_of(trunk: str, tokens: str, seed: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Train a contestant and judge its samples at each guidance scale."""
    folder = given.out / f"{trunk}-{tokens}-{seed}"
    if "from" in given.tokenizers[tokens] and not (given.out / "cache" / tokens).exists():
        cache_latents(recipe_of(trunk, tokens, seed, given, 1, 0), given.out / "cache" / tokens)
    reference = generator(partial(recipe_of, "raster", "pixels", 0, given))
    train_for(given.minutes, partial(recipe_of, trunk, tokens, seed, given), folder, reference, given.out)
    return [judged(trunk, tokens, seed, guidance, given, folder) for guidance in given.guidance]


def judged(
    trunk: str, tokens: str, seed: int, guidance: float, given: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    file = folder / f"row-{guidance:g}.json"
    told = {"minutes": given.minutes, "tokenizer": given.tokenizers[tokens], "overrides": given.overrides}
    told |= {"classifier": str(given.classifier), "samples": given.samples, "sampling": given.sampling}
    told |= {"dtype": given.dtype}
    if not refuse_other(file, told):
        pipe = load(folder / "run", device="cpu", dtype="float32")
        settings = {**SAMPLING[trunk], **given.sampling, "guidance_scale": guidance}
        figures = given.judge(pipe, folder / f"judged-{guidance:g}", seed, **settings)
        draw(pipe, given.out / f"{folder.name}-{guidance:g}.png", seed, settings)
        row = {"trunk": trunk, "tokens": tokens, "seed": seed, "guidance": guidance, **figures}
        row |= {"images": pipe.bundle.provenance["images"], "parameters": parameter_count(pipe.model)}
        write_json(file, row | {"settings": told})
    return dict(json.loads(file.read_text()))


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each trunk, kind of tokens and guidance; the mean over seeds where there are several."""
    names = list(rows[0]["figures"])
    lines = [
        f"| trunk | tokens | guidance | images trained on | {' | '.join(names)} |",
        "|---" * (4 + len(names)) + "|",
    ]
    kinds = {(row["trunk"], row["tokens"], row["guidance"]): None for row in rows}
    for kind in kinds:
        mine = [row for row in rows if (row["trunk"], row["tokens"], row["guidance"]) == kind]
        images = " ".join(f"{row['images']:,}" for row in mine)
        cells = [
            cell(mine[0]["figures"][name]) if len(mine) == 1 else show(interval([r["figures"][name][0] for r in mine]))
            for name in names
        ]
        lines.append(f"| {kind[0]} | {kind[1]} | {kind[2]:g} | {images} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(command: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of all recipes, such as model.width=128")
    parser.add_argument("--out", type=Path, default=Path("runs/tokens"))
    parser.add_argument("--tokenizer", action="append", default=[], metavar="NAME={from: RUN}", help="a trained one")
    parser.add_argument("--data", type=Path, required=True, help="class folders of training images")
    parser.add_argument("--real-data", type=Path, required=True, help="class folders of other images")
    parser.add_argument("--classifier", required=True, help="the run of a classifier, which judges")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=30.0, help="of one thread, for each training")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of training")
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.0])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--sampling", default="{}", help="other settings of a request, as YAML")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="contestants, such as raster-pca")
    given = parser.parse_args(command)
    torch.set_num_threads(1)
    named = dict(text.split("=", 1) for text in given.tokenizer)
    given.tokenizers = TOKENIZERS | {name: yaml.safe_load(told) for name, told in named.items()}
    given.sampling = yaml.safe_load(given.sampling)
    paths = {"data": given.data, "real": given.real_data, "classifier": given.classifier, "size": given.size}
    given.judge = Judge(**paths, samples=given.samples, cache=given.out / "real")
    contestants = [(trunk, tokens) for trunk in TRUNKS for tokens in given.tokenizers]
    rows = [
        row
        for trunk, tokens in contestants
        if not given.only or f"{trunk}-{tokens}" in given.only
        for seed in given.seeds
        for row in rows_of(trunk, tokens, seed, given)
    ]
    print(table(rows))  # noqa: T201


if __name__ == "__main__":
    main()
