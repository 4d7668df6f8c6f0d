"""A row of markdown for each evaluation, for a page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seriatim.core.names import printable
from seriatim.core.orders import RANDOM
from seriatim.pipeline.request import SampleRequest

NAMED = (
    "guidance_schedule",
    "token_schedule",
    "order",
    "solver",
    "top_k",
    "top_p",
    "feature_schedule",
    "guidance_mode",
)


def markdown(reports: Sequence[Mapping[str, Any]]) -> str:
    """A table, one row for each report: figures with their standard error, and the real images' in brackets."""
    names = list(dict.fromkeys(name for report in reports for name in report["figures"]))
    lines = ["| model | sampling | images | " + " | ".join(map(safe, names)) + " | features, reference |"]
    lines.append("|---" * (len(names) + 4) + "|")
    for report in reports:
        settings = report["settings"]
        request = settings["request"]
        sampling = f"guidance {request['guidance_scale']:g}, {request['num_inference_steps']} steps"
        if request["temperature"] != 1:
            sampling += f", temperature {request['temperature']:g}"
        for name in NAMED:
            field = SampleRequest.model_fields.get(name)
            value, usual = (request | request.get("head_options", {})).get(name), field and field.default
            if name == "order":
                usual = RANDOM  # a request says which order it was, and this is what most models have
            if value not in (None, usual):
                sampling += f", {name} {value if isinstance(value, (str, int, float)) else 'given'}"
        pixels = report["pixels_sha256"]["reference"]  # none where an earlier version computed the features
        reference = settings["reference"].get("file_sha256") or pixels or settings["reference"].get("sha256", "")
        cells = [
            f"{model_name(settings['model']['source'])} {settings['model']['sha256'][:8]}",
            sampling,
            f"{report['num']:,} ({report['num_real']:,})",
            *(cell(report["figures"].get(name)) for name in names),
            f"{settings['features']['sha256'][:8]}, {reference[:8]}",
        ]
        lines.append("| " + " | ".join(map(safe, cells)) + " |")
    return "\n".join(lines)


def tokenizer_row(report: Mapping[str, Any]) -> str:
    """A table of one row, of a tokenizer's evaluation."""
    settings, codes = report["settings"], report.get("codes")
    noise = {f"PSNR, noise {level}": x for level, x in report["psnr_under_noise"].items()}
    cells = {name: cell(x) for name, x in (report["figures"] | noise).items()}
    if codes:
        cells[f"used of {codes['codes']:,} codes"] = f"{codes['used']:.1%}"
        cells[f"perplexity of {codes['codes']:,} codes"] = f"{codes['perplexity']:.4g}"
    hashes = "none"
    if settings["features"] is not None:
        reference = report["pixels_sha256"]["reference"] or settings["reference"]["sha256"]
        hashes = f"{settings['features']['sha256'][:8]}, {reference[:8]}"
    name = f"{model_name(settings['tokenizer']['source'], 'tokenizer')} {settings['tokenizer']['sha256'][:8]}"
    row = [safe(name), f"{report['num']:,}", *cells.values(), hashes]
    lines = ["tokenizer", "images", *map(safe, cells), "features, reference"], ["---"] * len(row), row
    return "\n".join(f"|{'|'.join(line)}|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines)


def safe(cell: str) -> str:
    """A cell that nothing in it ends: folders and feature extractors may have any name."""
    return re.sub(r"([|`<&])", r"\\\1", printable(" ".join(cell.split())))


def model_name(source: str, otherwise: str = "model") -> str:
    """The folder's name; of `runs/cats/model`, that of the run."""
    path = Path(source)
    return (path.parent.name if path.name == "model" else path.name) or otherwise


def cell(figure: Mapping[str, float] | None) -> str:
    """`0.595 ± 0.021 (0.248)`."""
    if figure is None:
        return ""
    text = f"{figure['value']:.4g} ± {figure['error']:.2g}"
    return text + (f" ({figure['real']:.4g})" if "real" in figure else "")
