"""The page that `seriatim demo` leaves: one HTML file with its pictures inside, so that it can be sent to somebody."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222;
  background: #fafafa }
h1, h2 { line-height: 1.2 }
img { max-width: 100%; height: auto; border-radius: 6px; box-shadow: 0 1px 4px rgb(0 0 0 / 25%) }
img.pixels { image-rendering: pixelated }
pre { background: #eee; padding: .6rem .8rem; border-radius: 6px; overflow-x: auto }
td { padding: .1rem 1.2rem .1rem 0; vertical-align: top }
"""


@dataclass(frozen=True)
class Section:
    """A picture with what is said of it: a sentence, rows of figures, and a command to make more of it."""

    title: str
    says: str
    picture: Path
    figures: Sequence[tuple[str, str]] = ()
    command: str = ""
    pixels: bool = False  # whether the picture is of few pixels, which a browser must not smooth


def page(title: str, says: str, sections: Sequence[Section]) -> str:
    """The page as HTML. Pictures are PNG files, which are read now and written into the page."""
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1><p>{escape(says)}</p>",
    ]
    for section in sections:
        data = base64.b64encode(section.picture.read_bytes()).decode("ascii")
        kind = ' class="pixels"' if section.pixels else ""
        parts.append(f"<h2>{escape(section.title)}</h2><p>{escape(section.says)}</p>")
        parts.append(f'<img{kind} alt="{escape(section.title)}" src="data:image/png;base64,{data}">')
        if section.figures:
            rows = "".join(
                f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in section.figures
            )
            parts.append(f"<table>{rows}</table>")
        if section.command:
            parts.append(f"<pre>{escape(section.command)}</pre>")
    return "\n".join([*parts, "</body></html>"]) + "\n"
