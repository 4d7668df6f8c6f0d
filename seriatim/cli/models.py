"""`seriatim models` lists the presets, with what their authors published and what is proven here."""

from __future__ import annotations

from dataclasses import asdict

from seriatim.cli.output import JsonFlag, print_json, print_table
from seriatim.core.terminal import say


def models(json: JsonFlag = False) -> None:
    """List the presets: their parameters, their tokens, the figures of their authors, and what is proven here."""
    from seriatim.zoo import PRESETS

    if json:
        print_json([asdict(preset) for preset in PRESETS.values()])
        return
    rows = []
    for preset in PRESETS.values():
        figures = preset.published or {}
        shown = ", ".join(f"{k} {v}" for k, v in figures.items() if k in ("FID", "IS"))
        proven = "; ".join(preset.proven) or "nothing yet"
        rows.append((preset.name, f"{preset.parameters:,}", preset.tokens, shown or "-", proven))
    print_table(("preset", "parameters", "tokens", "published by the authors", "proven here"), rows)
    say("a preset has no weights of its own: train one (seriatim recipes list) or load a model folder")
