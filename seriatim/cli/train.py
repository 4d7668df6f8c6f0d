"""`seriatim train` trains a recipe, with changed settings, into a run folder, or resumes a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from seriatim.cli.output import DeviceOption, JsonFlag, print_json, print_table

if TYPE_CHECKING:
    from seriatim.training.budget import Budget
    from seriatim.training.config import AnyRecipe
    from seriatim.training.engine import TrainingResult
    from seriatim.training.folder_plan import FolderPlan
    from seriatim.training.run_folder import Resume


AUTO, ALWAYS = "auto", "always"


class TrainVerb(TyperCommand):
    """A command whose `--resume` is a flag, and also takes a value: `--resume=auto` or `--resume auto`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        flags = [i for i, word in enumerate(args[:end]) if word == "--resume"]
        for i in flags:
            if args[i + 1 : i + 2] != [AUTO]:
                args[i] = f"--resume={ALWAYS}"
        return super().parse_args(ctx, args)


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A packaged recipe (seriatim recipes list), a YAML file, or a folder of pictures, for which a recipe "
            "is chosen. --resume --out needs none."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, such as training.images=5000 model.depth=4.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder to create. Default: runs/NAME.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="[=auto]",
            help="Continue from the newest complete checkpoint of the run. With --resume=auto, begin if there is none.",
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            help="With --resume: a setting that changes, such as training.learning_rate=1e-4; all others are the run's "
            "own, whatever RECIPE says. Repeat it for several."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out, which is kept until the new one is finished.")
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            help="Train for about so long, on the clock from now to the finished model: the number of images, the "
            "warm-up, previews and checkpoints are chosen for it, once.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and measure a few steps, but write nothing.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Train a recipe into a run folder, or a model of the pictures in a folder.

    `seriatim sample` takes the run of a generator, `--features` that of a classifier, `tokenizer.from=` that of a
    tokenizer.
    """
    from seriatim.core.errors import UsageError
    from seriatim.training.config import ClassifierRecipe, Recipe, packaged
    from seriatim.training.trackers import build_trackers

    if resume not in (None, ALWAYS, AUTO):
        raise UsageError(f"resume: {resume!r} is not known; write --resume or --resume={AUTO}")
    how: Resume = "auto" if resume == AUTO else resume is not None
    words, overrides = settings or [], override or []
    budget = budget_for(minutes, [*words, *overrides])
    plan: FolderPlan | None = None
    if recipe is not None and Path(recipe).is_dir() and recipe not in packaged():
        budget, out, plan = planned(recipe, words, overrides, out, how, budget, device, overwrite=overwrite, quiet=json)
        recipe = None
    if plan is not None and out is not None:
        chosen: AnyRecipe = plan.recipe
    else:
        chosen, out = chosen_recipe(recipe, words, overrides, out, how, own=budget is not None)
    if dry_run:
        build_trackers(chosen.training)  # a missing library is reported before the data are read
        found = plan_of(chosen, out, device, how, budget, quiet=json)
        found = {"recipe": chosen.name, "images": chosen.training.images, **found, "out": str(out)}
        return print_json(found) if json else print_table(("plan", ""), list(readable(found).items()))
    options: dict[str, Any] = {
        "device": device,
        "resume": how,
        "overwrite": overwrite,
        "quiet": json,
        "minutes": budget,
    }
    if isinstance(chosen, Recipe):
        from seriatim.training.loop import train as run

        report = reported(run(chosen, out, on_begin=None if plan is None else plan.write, **options))
    elif isinstance(chosen, ClassifierRecipe):
        from seriatim.training.classifier import train_classifier

        trained = train_classifier(chosen, out, **options)
        report = {
            **reported(trained),
            "test_accuracy": trained.accuracy.plain,
            "test_accuracy_with_mirror_images": trained.accuracy.mirrored,
            "test_images": trained.test_images,
        }
    else:
        from seriatim.training.tokenizer_task import train_tokenizer

        made = train_tokenizer(chosen, out, **options)
        report = {**reported(made), "psnr": made.psnr}
    return print_json(report) if json else print_table(("trained", ""), list(report.items()))


def budget_for(minutes: float | None, settings: list[str]) -> Budget | None:
    """The budget that begins now; the settings of `training` that are given beside it are kept as they are."""
    if minutes is None:
        return None
    from seriatim.training.budget import Budget  # this imports torch, which mistakes in a recipe need not wait for

    keys = [text.partition("=")[0].strip() for text in settings]
    given = frozenset(key.removeprefix("training.") for key in keys if key.startswith("training."))
    return Budget(minutes, given=given)


def planned(
    folder: str,
    settings: list[str],
    overrides: list[str],
    out: Path | None,
    resume: Resume,
    budget: Budget | None,
    device: str,
    *,
    overwrite: bool,
    quiet: bool,
) -> tuple[Budget | None, Path, FolderPlan | None]:
    """The plan for a folder of pictures, with its budget and run folder; no plan if a run is resumed."""
    from seriatim.core.files import present_or_previous
    from seriatim.training.folder_plan import name_of, plan_folder
    from seriatim.training.plan_table import MINUTES
    from seriatim.training.run_folder import RECIPE, check_out

    out = Path("runs") / name_of(Path(folder)) if out is None else out
    if resume and (resume is True or (present_or_previous(out) / RECIPE).exists()):
        return budget, out, None
    check_out(out, resume=False, overwrite=overwrite)  # before the time that looking at pictures takes
    given = [*settings, *overrides]
    if budget is None and not any(text.startswith("training.images=") for text in given):
        budget = budget_for(MINUTES, given)
    minutes = None if budget is None else budget.minutes
    plan = plan_folder(folder, minutes=minutes, settings=given, out=out, device=device, quiet=quiet)
    plan.say()
    return budget, out, plan


def chosen_recipe(
    recipe: str | None, settings: list[str], overrides: list[str], out: Path | None, resume: Resume, own: bool = False
) -> tuple[AnyRecipe, Path]:
    """The recipe to train, and the run folder; a run that is resumed with `overrides` or no recipe has its own recipe.

    With `own` it has its own in any case.

    `settings` change either of the two; `check_same_run` refuses those that may not change.
    """
    from seriatim.core.errors import UsageError
    from seriatim.training.config import read_any

    if overrides and not resume:
        raise UsageError("override: only valid with --resume; write the settings after the recipe's name")
    if recipe is None and (out is None or not resume):
        raise UsageError("recipe: name one (seriatim recipes list) or a YAML file; only --resume with --out needs none")
    if out is None:
        assert recipe is not None, "one of the two is given"
        out = Path("runs") / read_any(recipe, settings).name
    if resume and (overrides or recipe is None or own):
        from seriatim.core.files import present_or_previous
        from seriatim.training.run_folder import RECIPE, check_resumable

        stored = present_or_previous(out) / RECIPE
        if stored.is_file():
            return read_any(str(stored), [*settings, *overrides]), out
        if resume is True:
            check_resumable(out)
        if recipe is None:
            raise UsageError(f"recipe: there is no run in {out} to resume, so name the recipe of the one to begin")
    assert recipe is not None, "it was refused above"
    return read_any(recipe, [*settings, *overrides]), out


def plan_of(
    recipe: AnyRecipe, out: Path, device: str, resume: Resume, budget: Budget | None = None, *, quiet: bool
) -> dict[str, Any]:
    """What a recipe would train, and what it would take on this machine; nothing is written."""
    from seriatim.checkpoints.unfinished import newest_whole
    from seriatim.core.device import pick_device
    from seriatim.models.build import parameter_count
    from seriatim.training.classifier import ClassifierTask
    from seriatim.training.config import ClassifierRecipe, Recipe
    from seriatim.training.loop import GeneratorTask
    from seriatim.training.plan import measured_plan
    from seriatim.training.tokenizer_task import TokenizerTask

    where = pick_device(device)
    path = newest_whole(out / "checkpoints")[0] if resume else None
    task: GeneratorTask | ClassifierTask | TokenizerTask
    if isinstance(recipe, ClassifierRecipe):
        task = ClassifierTask(recipe, out, where, quiet=quiet)
        sizes = {"features": task.net.dim, "test_images": task.test.count}
    else:
        if isinstance(recipe, Recipe):
            task = GeneratorTask(recipe, out, where, quiet=quiet)
            task.check()
            tokenizer = task.tokenizer
        else:
            task = TokenizerTask(recipe, out, where, quiet=quiet)
            tokenizer = task.result
        sizes = {"tokens": tokenizer.count}
        sizes |= {"features": tokenizer.dim} if tokenizer.vocab is None else {"codes": tokenizer.vocab}
    seen = 0 if path is None else int(path.name)
    return {
        "parameters": parameter_count(task.parts.model),
        **sizes,
        "classes": len(task.data.class_names),
        "training_images": task.data.count,
        **measured_plan(task, where, seen=seen, budget=None if seen else budget, quiet=quiet),
    }


def readable(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan with large numbers as people read them."""
    from seriatim.core.progress import duration

    forms: dict[str, Callable[[float], str]] = {
        "flops_per_image": lambda count: f"{count / 1e9:,.3g} GFLOP",
        "images_per_second": lambda rate: f"{rate:,.3g}",
        "peak_memory_bytes": lambda count: f"{count / 2**30:,.2f} GiB",
        "seconds_to_the_end": duration,
    }
    return {
        name.removesuffix("_bytes").removeprefix("seconds_"): value
        if name not in forms or value is None
        else forms[name](value)
        for name, value in plan.items()
    }


def reported(result: TrainingResult) -> dict[str, Any]:
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
