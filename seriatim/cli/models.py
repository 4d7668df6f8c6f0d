"""`seriatim models` lists what comes with the package, and the presets with what is published and proven of each."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from seriatim.cli.output import JsonFlag, print_json, print_table
from seriatim.core.terminal import say


def models(json: JsonFlag = False) -> None:
    """List the packaged models, then the presets: parameters, tokens, published figures, and what is proven here."""
    from seriatim.zoo import PRESETS

    ready = packaged_rows()
    if json:
        print_json([*ready, *(asdict(preset) for preset in PRESETS.values())])
        return
    if ready:
        print_table(("ready to use", "kind", "what it is"), [(r["name"], r["kind"], r["summary"]) for r in ready])
    rows = []
    for preset in PRESETS.values():
        figures = preset.published or {}
        shown = ", ".join(f"{k} {v}" for k, v in figures.items() if k in ("FID", "IS"))
        proven = "; ".join(preset.proven) or "nothing yet"
        rows.append((preset.name, f"{preset.parameters:,}", preset.tokens, shown or "-", proven))
    print_table(("preset", "parameters", "tokens", "published by the authors", "proven here"), rows)
    say("a preset has no weights of its own: train one (seriatim recipes list) or load a model folder")


def packaged_rows() -> list[dict[str, Any]]:
    """The name, the kind and the summary of each packaged model; the summary is in its provenance."""
    from seriatim.checkpoints.native import CONFIG
    from seriatim.checkpoints.packaged import WEIGHTS, packaged_kind, packaged_names
    from seriatim.core.ownership import json_of

    found = []
    for name in packaged_names():
        provenance = json_of(WEIGHTS / name / CONFIG).get("provenance", {})
        summary = str(provenance.get("summary", ""))
        found.append({"name": name, "packaged": True, "kind": packaged_kind(name), "summary": summary})
    return found
