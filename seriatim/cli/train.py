"""`seriatim train`: a recipe, overridden, into a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seriatim.cli.output import DeviceOption, JsonFlag, print_json, print_table


def train(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe (seriatim recipes list) or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, such as training.images=5000 model.depth=4.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to make; default runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest whole checkpoint.")] = False,
    device: DeviceOption = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, build the model, stop.")] = False,
    json: JsonFlag = False,
) -> None:
    """Train a recipe into a run folder; `seriatim sample` takes that folder."""
    from seriatim.training.config import read_recipe

    chosen = read_recipe(recipe, overrides or ())
    out = out or Path("runs") / chosen.name

    from seriatim.models.build import parameter_count
    from seriatim.training.loop import train as run
    from seriatim.training.setup import build

    if dry_run:
        data, tokenizer, model = build(chosen)
        plan = {
            "recipe": chosen.name,
            "parameters": parameter_count(model),
            "tokens": tokenizer.count,
            "features": tokenizer.dim,
            "classes": len(data.class_names),
            "training_images": data.count,
            "images": chosen.training.images,
            "out": str(out),
        }
        return print_json(plan) if json else print_table(("plan", ""), list(plan.items()))
    result = run(chosen, out, device=device, resume=resume, quiet=json)
    report = {
        "folder": str(result.folder),
        "model": str(result.folder / "model"),
        "parameters": result.parameters,
        "images": result.images,
        "seconds": round(result.seconds, 2),
        "images_per_second": round(result.images_per_second, 1),
        "loss": result.loss,
        "dtype": result.dtype,
    }
    return print_json(report) if json else print_table(("trained", ""), list(report.items()))
