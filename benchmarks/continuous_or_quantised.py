"""Continuous tokens against codes: tokenizers of one network, with equal tokens and equal time of training.

    python benchmarks/continuous_or_quantised.py --data tiny/train --real-data tiny/test \\
        --classifier classifier:runs/classifier --minutes 10 --out runs/quantised

One `kl` tokenizer, and one `vq` tokenizer for each of --vocabs, with the encoder, decoder and stride of the recipes
--kl and --vq. Each is trained by one thread for as many images as it manages in --minutes, by the clock of `kl` (see
equal_minutes.py), so that its learning rate falls to the end. The networks are the same but for the
convolutions next to the tokens; the table has the parameters. Judged are reconstructions of all images of
--real-data: their PSNR, and the Frechet distance to those images and to --data in the classifier's features, which no
tokenizer was trained with. Intervals are 95 % of Student's t, over ten groups of the images. What is done already in
--out is not done again, and a training goes on from its last checkpoint: stop at any time. --only NAME does one
contestant, so that several processes can share the work.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from ablation_cells import refuse_other
from equal_minutes import SAVES, Timed, minutes_worth, with_a_line_each_step
from judged_samples import cell

from seriatim.checkpoints.tokenizer import load_tokenizer, read_provenance
from seriatim.core.files import write_json
from seriatim.data.folder import Folder
from seriatim.evaluation.features import open_features
from seriatim.evaluation.tokenizers import evaluate_tokenizer
from seriatim.models.build import parameter_count
from seriatim.training.config import TokenizerRecipe, read_any
from seriatim.training.tokenizer_task import train_tokenizer


def recipe_of(name: str, given: argparse.Namespace, images: int, saves: int) -> TokenizerRecipe:
    """The recipe of a contestant, `kl` or `vq-V` for V codes, that saves `saves` checkpoints on the way."""
    kind, _, vocab = name.partition("-")
    settings = [*given.overrides, f"data.path={given.data}", "data.check=false", "training.threads=1"]
    settings += [f"training.images={images}", f"training.warmup_images={images // 50}", "training.sample_images=0"]
    settings += [f"training.dtype={given.dtype}", f"training.save_images={images // saves if saves else 0}"]
    if kind == "kl":  # the blocks of VQ-16, which has attention at the last level of encoder and decoder
        first = read_any(given.kl, settings)
        assert isinstance(first, TokenizerRecipe), f"{given.kl} is the recipe of a tokenizer"
        level = int(first.tokenizer["stride"]).bit_length() - 1
        settings += [f"tokenizer.attention=[{level}]", f"tokenizer.decoder_attention=[{level}]"]
    else:
        settings += [f"tokenizer.vocab={vocab}"]
    recipe = read_any(given.kl if kind == "kl" else given.vq, settings)
    assert isinstance(recipe, TokenizerRecipe), f"{name} is a tokenizer"
    return recipe


def timed(name: str, given: argparse.Namespace) -> Timed:
    size = recipe_of(name, given, 1, 0).training.batch_size

    def training(images: int, run: Path, saves: int) -> None:
        recipe = recipe_of(name, given, images, saves)
        recipe = recipe if saves else with_a_line_each_step(recipe)
        train_tokenizer(recipe, run, device="cpu", resume="auto", quiet=not saves)

    return Timed(name, size, training)


def row_of(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Train a contestant, judge it, and return what the table says of it."""
    folder = given.out / name
    file = folder / "row.json"
    settings = {"minutes": given.minutes, "classifier": str(given.classifier), "overrides": given.overrides}
    settings |= {"dtype": given.dtype}
    if not refuse_other(file, settings):
        contestant = timed(name, given)
        reference = contestant if name == "kl" else timed("kl", given)
        images = minutes_worth(given.minutes, contestant, folder, reference, given.out)
        contestant.training(images, folder / "run", SAVES)
        tokenizer = load_tokenizer(folder / "run")
        data, real = (Folder(str(path), tokenizer.size, check=False) for path in (given.data, given.real_data))
        made = evaluate_tokenizer(
            tokenizer,
            data,
            folder / "judged",
            num=real.count,
            features=open_features(str(given.classifier), size=tokenizer.size, channels=3),
            real=real,
            provenance=read_provenance(folder / "run"),
            cache=given.out / "real",
        )
        figures = {key.partition("[")[0]: (each.value, each.error) for key, each in made.figures.items()}
        real_distance = next(iter(made.real.values()))
        told: dict[str, Any] = {"images": images, "parameters": parameter_count(tokenizer), "tokens": tokenizer.count}
        told |= {"latents": made.latents, "figures": figures, "real": (real_distance.value, real_distance.error)}
        write_json(file, {"name": name, **told, "settings": settings})
    return dict(json.loads(file.read_text()))


def table(rows: list[dict[str, Any]]) -> str:
    """What the tokenizers lose, one in each line."""
    lines = ["| tokens | images trained on | parameters | usage | PSNR, dB | rFD | FD |", "|---" * 7 + "|"]
    for row in rows:
        used = f"{row['latents']['used']:.0%}" if "used" in row["latents"] else ""
        figures = " | ".join(cell(row["figures"][key]) for key in ("PSNR", "rFD", "FD"))
        lines.append(f"| {row['name']} | {row['images']:,} | {row['parameters']:,} | {used} | {figures} |")
    lines.append(f"| the images themselves | | | | | 0 | {cell(rows[0]['real'])} |")
    return "\n".join(lines)


def main(command: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of both recipes, such as tokenizer.stride=8")
    parser.add_argument("--out", type=Path, default=Path("runs/quantised"))
    parser.add_argument("--kl", default="kl-64", help="the recipe of continuous tokens")
    parser.add_argument("--vq", default="vq-64", help="the recipe of codes")
    parser.add_argument("--vocabs", type=int, nargs="+", default=[256, 2048, 16384])
    parser.add_argument("--data", type=Path, required=True, help="class folders of training images")
    parser.add_argument("--real-data", type=Path, required=True, help="class folders of other images")
    parser.add_argument("--classifier", required=True, help="the run of a classifier, whose features judge")
    parser.add_argument("--minutes", type=float, default=10.0, help="of one thread, for each training")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"], help="of training")
    parser.add_argument("--only", nargs="+", help="contestants, such as kl and vq-256")
    given = parser.parse_args(command)
    torch.set_num_threads(1)
    names = given.only or ["kl", *(f"vq-{vocab}" for vocab in given.vocabs)]
    rows = [row_of(name, given) for name in names]
    print(table(rows))  # noqa: T201


if __name__ == "__main__":
    main()
