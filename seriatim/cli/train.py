"""`seriatim train` trains a recipe, with overrides, into a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seriatim.cli.output import DeviceOption, JsonFlag, print_json, print_table

if TYPE_CHECKING:
    from seriatim.training.classifier import ClassifierResult
    from seriatim.training.config import ClassifierRecipe, Recipe
    from seriatim.training.loop import TrainingResult


def train(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe (seriatim recipes list) or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, such as training.images=5000 model.depth=4.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder to create. Default: runs/NAME.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest complete checkpoint of the run.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out, which is kept until the new one is finished.")
    ] = False,
    device: DeviceOption = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and build the model, but don't train.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Train a recipe into a run folder, which `seriatim sample` takes, or `--features` if it is a classifier."""
    from seriatim.training.config import Recipe, read_any
    from seriatim.training.trackers import build_trackers

    chosen = read_any(recipe, overrides or ())
    out = out or Path("runs") / chosen.name
    if dry_run:
        build_trackers(chosen.training)  # a missing library is reported before the data are read
        plan = generator_plan(chosen) if isinstance(chosen, Recipe) else classifier_plan(chosen, quiet=json)
        plan = {"recipe": chosen.name, **plan, "images": chosen.training.images, "out": str(out)}
        return print_json(plan) if json else print_table(("plan", ""), list(plan.items()))
    if isinstance(chosen, Recipe):
        from seriatim.training.loop import train as run

        report = reported(run(chosen, out, device=device, resume=resume, overwrite=overwrite, quiet=json))
    else:
        from seriatim.training.classifier import train_classifier

        trained = train_classifier(chosen, out, device=device, resume=resume, overwrite=overwrite, quiet=json)
        report = {
            **reported(trained),
            "test_accuracy": trained.accuracy.plain,
            "test_accuracy_with_mirror_images": trained.accuracy.mirrored,
            "test_images": trained.test_images,
        }
    return print_json(report) if json else print_table(("trained", ""), list(report.items()))


def generator_plan(recipe: Recipe) -> dict[str, Any]:
    from seriatim.models.build import parameter_count
    from seriatim.training.initialise import matching
    from seriatim.training.setup import build

    data, tokenizer, model = build(recipe)
    if recipe.training.init_from:
        matching(recipe.training.init_from, model, tokenizer)
    return {
        "parameters": parameter_count(model),
        "tokens": tokenizer.count,
        **({"features": tokenizer.dim} if tokenizer.vocab is None else {"codes": tokenizer.vocab}),
        "classes": len(data.class_names),
        "training_images": data.count,
    }


def classifier_plan(recipe: ClassifierRecipe, quiet: bool) -> dict[str, Any]:
    from seriatim.models.build import parameter_count
    from seriatim.training.classifier import build

    data, test, net = build(recipe, quiet=quiet)
    return {
        "parameters": parameter_count(net),
        "features": net.dim,
        "classes": len(data.class_names),
        "training_images": data.count,
        "test_images": test.count,
    }


def reported(result: TrainingResult | ClassifierResult) -> dict[str, Any]:
    return {
        "folder": str(result.folder),
        "model": str(result.folder / "model"),
        "parameters": result.parameters,
        "images": result.images,
        "seconds": round(result.seconds, 2),
        "images_per_second": round(result.images_per_second, 1),
        "loss": result.loss,
        "dtype": result.dtype,
    }
