"""What the documents tell a reader to run: their blocks of Python, and every command line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
PROGRAMS = ("seriatim", "python", "torchrun", "pip", "git", "pytest", "ruff", "mypy")
SHELL = ("", "bash", "sh", "console", "shell")
DATA = ("yaml", "json", "text")  # languages of blocks that are not run


def fenced(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return re.findall(r"^```([\w-]*)[^\n]*\n(.*?)^```", text, flags=re.M | re.S)


def python(text: str) -> str:
    """The Python blocks of a page, joined: a reader runs them one after another."""
    return "\n".join(body for language, body in fenced(text) if language == "python")


def commands(text: str) -> list[list[str]]:
    """Each command of a page as words: of fenced blocks, of indented lines and inline, in their order."""
    lines: list[str] = []
    rest = re.sub(r"^```.*?^```", lambda block: fenced_commands(block[0]), text, flags=re.M | re.S)
    joined = re.sub(r"\\\n\s*", "", rest)  # a backslash continues a line
    joined = re.sub(r"(?<=\S)\n(?=\S)", " ", joined)  # a paragraph is one line
    for line in joined.splitlines():
        if line.startswith("    ") and first_word(line.strip()) in PROGRAMS:
            lines.append(line.strip())
        elif not line.startswith("    "):
            spans = re.findall(r"`([^`]+)`", line)
            lines += [span for span in spans if first_word(span) in PROGRAMS and " " in span]
    found = []
    for line in lines:
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
                continue
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]  # a variable of the environment
            if words:
                found.append(alone(words))
            words = []
    return found


def alone(words: list[str]) -> list[str]:
    """A command of Seriatim that torchrun starts in several processes, as one process."""
    if words[0] != "torchrun" or "seriatim" not in words or words[-1] == "...":
        return words
    return words[words.index("seriatim") :]


def fenced_commands(block: str) -> str:
    """The lines of a fenced block of commands, indented; nothing of other blocks."""
    ((language, body),) = fenced(block)
    return re.sub(r"^(?=.)", "    ", body, flags=re.M) if language in SHELL else ""


def first_word(line: str) -> str:
    words = [word for word in line.split() if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    return words[0] if words else ""
