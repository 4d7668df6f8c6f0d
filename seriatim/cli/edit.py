"""`seriatim edit` repaints a part of a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from seriatim.cli.output import DeviceOption, JsonFlag, print_json, print_table
from seriatim.cli.sample import say_replaced
from seriatim.cli.threads import ThreadsOption, drawing_with


def edit(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model folder, a run, RUN@latest or the like, or a hub repository.")],
    image: Annotated[Path, typer.Argument(help="The picture to edit, which must have the model's size.")],
    mask: Annotated[Path, typer.Option(help="A picture of the same size; its white pixels are repainted.")],
    label: Annotated[
        list[str] | None,
        typer.Option(help="The class to paint, by name or number. Repeat it for several. Default: no class."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="The number of images generated at once.")] = None,
    threads: ThreadsOption = None,
    out: Annotated[Path, typer.Option(help="The folder for the PNG files and grid.png.")] = Path("edited"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace earlier images of the same names in --out.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="The dtype of the backbone: auto, float32 or bfloat16.")] = "auto",
    json: JsonFlag = False,
) -> None:
    """Repaint the white part of a mask: inpaint, outpaint inside the frame, or change the class of a region.

    Pixels under black keep their exact values.
    """
    from seriatim.core.errors import UsageError
    from seriatim.core.files import writable_folder
    from seriatim.core.flatten import BLACK
    from seriatim.core.images import BadImage, read_image
    from seriatim.evaluation.grid import grid, save_png
    from seriatim.pipeline.labels import names_of
    from seriatim.pipeline.loading import load
    from seriatim.pipeline.picture_names import file_names
    from seriatim.pipeline.samples_folder import GRID, check_samples_folder

    pipe = load(model, device=device, dtype=dtype)
    try:
        argument, file = "image", image
        picture = read_image(image, pipe.tokenizer.channels, pipe.bundle.background)
        argument, file = "mask", mask
        white = read_image(mask, 1, BLACK)
    except BadImage as error:
        raise UsageError(f"{argument}: {file} can't be read: {error}") from error
    settings: dict[str, Any] = {"class_labels": label or [None], **context.obj}
    asked = pipe.request(**settings)
    names = file_names(names_of(pipe.classes_of(asked), pipe.class_names))
    say_replaced(check_samples_folder(out, [*(out / name for name in names), out / GRID], overwrite=overwrite))
    with drawing_with(pipe, threads):
        result = pipe.edit(picture, mask=white, batch_size=batch_size, **settings)
    out = writable_folder(out)
    files = result.save(out, overwrite=overwrite)
    shown = [picture, white.convert(picture.mode), *result.images]
    save_png(grid(shown, min(8, len(shown)), side=64), out / GRID)
    report = {"images": len(files), "folder": str(out), "grid": str(out / GRID), "seed": result.request.seed}
    return print_json(report) if json else print_table(("edited", ""), list(report.items()))
