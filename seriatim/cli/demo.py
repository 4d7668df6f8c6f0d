"""`seriatim demo` trains a small model, checks what it generates against real images, and draws the packaged models."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seriatim.cli.output import JsonFlag, print_json, print_table
from seriatim.core.terminal import say

if TYPE_CHECKING:
    from seriatim.cli.demo_page import Section

NAME = "mar-digits"  # the recipe
PER_CLASS = 16
PACKAGED_CLASSES, PACKAGED_EACH = 10, 8  # the most classes of a packaged model that are drawn, and images of each
REAL_DRAWS = 10  # the Frechet distance of real digits is a mean over this many random subsets


def demo(
    out: Annotated[Path, typer.Option(help="The folder for the pictures, the report and the model.")] = Path("demo"),
    images: Annotated[
        int | None, typer.Option(help="The number of images seen in training; fewer is faster and worse.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed of training and sampling.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Train a MAR on handwritten digits on the CPU, check 160 generated ones, then draw the packaged models."""
    from seriatim.checkpoints.packaged import packaged_names
    from seriatim.cli.demo_page import Section, page
    from seriatim.core.files import writable_folder, write_json, write_text
    from seriatim.evaluation.grid import grid, save_png
    from seriatim.training.config import read_recipe
    from seriatim.training.run_folder import DEMO, make_room

    again = is_demo(out)
    overrides = [f"seed={seed}"] + ([f"training.images={images}"] if images is not None else [])
    recipe = read_recipe(NAME, overrides)

    import time

    import numpy as np

    from seriatim.pipeline.loading import load
    from seriatim.training.loop import train
    from seriatim.training.precision import threads

    if again:
        make_room(out, "demo")
    writable_folder(out)
    write_json(out / DEMO, {"training_images": recipe.training.images})
    if not json:
        say(f"training {NAME} on {recipe.training.images:,} images, on the CPU")
    begin = time.monotonic()
    trained = train(recipe, out, device="cpu", quiet=json)
    middle = time.monotonic()
    pipe = load(out / "model", device="cpu")
    with threads(trained.threads):
        result = pipe(list(range(pipe.model.classes)), num_images_per_label=PER_CLASS, seed=seed)
    end = time.monotonic()

    save_png(grid(result.images, columns=PER_CLASS, side=56, smooth=True), out / "grid.png")
    pixels = np.stack([np.asarray(image) for image in result.images]).reshape(len(result.images), -1) / 255.0
    labels = np.array([int(name or 0) for name in result.labels])
    report: dict[str, Any] = {
        "seconds": round(end - begin, 2),
        "training_seconds": round(middle - begin, 2),
        "sampling_seconds": round(end - middle, 2),
        "images_per_second": round(len(labels) / (end - middle), 2),
        "training_images": trained.images,
        "training_images_per_second": round(trained.images_per_second, 1),
        "parameters": trained.parameters,
        "loss": trained.loss,
        "dtype": trained.dtype,
        "threads": trained.threads,
        "samples": len(labels),
        **judge(pixels, labels),
        "seed": seed,
        "sampling": result.request.model_dump(mode="json"),
        "model": str(out / "model"),
        "grid": str(out / "grid.png"),
    }
    more = f"seriatim sample {shlex.quote(str(out / 'model'))} --label 7 --num-images-per-label 8 --out sevens"
    drawn = [drawn_packaged(name, out, seed, quiet=json) for name in packaged_names("model")]
    report["packaged"] = [str(section.picture) for section in drawn]
    write_json(out / "report.json", report)
    rows = figures_of(report)
    digits = Section(
        "Digits, trained here",
        f"{report['samples']} handwritten digits of 8x8 pixels, a class in each row, by a model of "
        f"{report['parameters']:,} parameters that was trained on this machine in {report['training_seconds']:.0f} "
        "seconds.",
        out / "grid.png",
        rows,
        more,
    )
    curve = Section("How the training went", "The loss over the images seen.", out / "training.png")
    sections = [*drawn, digits, *([curve] if curve.picture.exists() else [])]  # a very short training has no curve
    says = "Pictures that Seriatim made on this machine, token by token."
    write_text(out / "index.html", page("Seriatim", says, sections))
    if json:
        print_json(report)
        return
    print_table(("MAR on 8x8 digits", f"{report['samples']} samples"), rows)
    say(f"look at {out / 'index.html'}, or at {out / 'grid.png'} and {out / 'training.png'}")
    say(f"make more: {more}")


def figures_of(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the table and the page say of the digits."""
    return [
        ("training", f"{report['training_seconds']:.0f} s, {report['training_images_per_second']:.0f} images/s"),
        ("sampling", f"{report['sampling_seconds']:.1f} s, {report['images_per_second']:.0f} images/s"),
        (
            "recognised as the class asked for",
            f"{report['recognised']:.1%} (real held-out: {report['recognised_real']:.1%})",
        ),
        (
            "Frechet distance, pixels, to held-out",
            f"{report['frechet']:.3f} (as many real: {report['frechet_real']:.3f})",
        ),
        ("variance within a class, of the real", f"{report['within_class_variance']:.0%}"),
    ]


def drawn_packaged(name: str, out: Path, seed: int, *, quiet: bool) -> Section:
    """Draw a packaged model at its stored settings, a class in each row, and say what it is."""
    import time

    from seriatim.cli.demo_page import Section
    from seriatim.evaluation.sheet import Row, save_sheet, sheet
    from seriatim.pipeline.loading import load

    if not quiet:
        say(f"drawing {name}, which comes with the package")
    begin = time.monotonic()
    pipe = load(name, device="cpu")
    classes = list(range(min(pipe.model.classes, PACKAGED_CLASSES)))
    rows = PACKAGED_CLASSES if not classes else len(classes)
    images = pipe(classes or [None] * rows, num_images_per_label=PACKAGED_EACH, seed=seed, progress=not quiet).images
    seconds = time.monotonic() - begin
    words = [pipe.class_names[number] if pipe.class_names else str(number) for number in classes] or [""] * rows
    parts = [images[i * PACKAGED_EACH : (i + 1) * PACKAGED_EACH] for i in range(rows)]
    picture = out / f"packaged-{name}.png"
    save_sheet(*sheet([Row(*pair) for pair in zip(words, parts, strict=True)]), picture)
    label = f" --label {shlex.quote(words[0])}" if words[0] else ""
    return Section(
        name,
        f"{pipe.bundle.provenance.get('summary', 'a packaged model')}. These {len(images)} took {seconds:.0f} seconds.",
        picture,
        command=f"seriatim sample {name}{label} --num-images-per-label 8 --out pictures",
        pixels=True,
    )


def is_demo(out: Path) -> bool:
    """Whether `out` holds a demo, finished or interrupted, which the next demo may replace.

    Raises UsageError if it holds anything else. A demo that was trained longer afterwards counts as the user's own run.
    """
    from seriatim.core.errors import UsageError
    from seriatim.core.ownership import first_file, json_of
    from seriatim.training.config import read_any
    from seriatim.training.run_folder import DEMO, RECIPE, begun, is_run

    if not out.is_dir():
        return False  # a file is refused later, where the folder is created
    report = json_of(out / "report.json")  # release 0.1 marked its demos by this file alone
    says = json_of(out / DEMO) or (report if "recognised_real" in report else {})
    if says and is_run(out):
        recipe = read_any(str(out / RECIPE))
        if recipe.name == NAME and recipe.training.images == says.get("training_images"):
            return True
    kept = first_file(out, begun(out))
    if kept is None:
        return False
    raise UsageError(
        f"out: {out} holds {str(kept.relative_to(out))!r}, which is not the demo's; choose a new or empty folder"
    )


def judge(pixels: Any, labels: Any) -> dict[str, Any]:
    """The figures of samples (n, 64) in [0, 1] and the classes that were asked for, compared with real digits.

    recognised              the share that a classifier trained on real digits assigns to the class asked for
    frechet, frechet_real   the distance in pixel space to held-out digits, of the samples and of as many real digits
    within_class_variance   the variance of the samples within a class, divided by that of real training digits
    """
    import numpy as np
    import torch
    from sklearn.svm import SVC

    from seriatim.data.base import Digits
    from seriatim.evaluation.metrics import frechet_distance, within_class_variance

    def arrays(data: Digits) -> tuple[Any, Any]:
        index = torch.arange(data.count)
        return (data.images(index).flatten(1).numpy() + 1) / 2, data.labels(index).numpy()

    (real, real_labels), (held, held_labels) = arrays(Digits()), arrays(Digits(held_out=True))
    classifier = SVC(C=10).fit(real, real_labels)
    guessed = classifier.predict(pixels)
    random = np.random.default_rng(0)
    counts = [(c, int((labels == c).sum())) for c in np.unique(labels)]
    distances = []
    for _ in range(REAL_DRAWS):
        chosen = [random.choice(np.flatnonzero(real_labels == c), n, replace=False) for c, n in counts]
        distances.append(frechet_distance(real[np.concatenate(chosen)], held))
    return {
        "recognised": float((guessed == labels).mean()),
        "recognised_per_class": {str(c): float((guessed[labels == c] == c).mean()) for c, _ in counts},
        "recognised_real": float(classifier.score(held, held_labels)),
        "frechet": frechet_distance(pixels, held),
        "frechet_real": float(np.mean(distances)),
        "within_class_variance": within_class_variance(pixels, labels) / within_class_variance(real, real_labels),
    }
