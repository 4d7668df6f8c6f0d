"""Names of repositories on the Hugging Face hub, and fetching a few files of one; nothing goes there by accident."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from seriatim.core.errors import CheckpointError, nearest, one_line, shown

SCHEME = "hf://"
NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w.-]{1,255}))?")


class Repository(NamedTuple):
    name: str  # owner/name
    revision: str | None = None  # a commit, a tag or a branch; None: the main branch


def repository(text: str, argument: str) -> Repository:
    """The repository that a name which is no local folder stands for.

    `hf://owner/name` always is one, `hf://owner/name@REVISION` a fixed state of it. A plain `owner/name` is one where
    there is no folder `owner` here: a mistyped path must not fetch a stranger's weights. CheckpointError otherwise.
    """
    explicit = text.startswith(SCHEME)
    found = NAME.fullmatch(text.removeprefix(SCHEME))
    if explicit and found is None:
        raise CheckpointError(f"{argument}: {shown(text)} is no hub repository; write {SCHEME}owner/name")
    if found is None or (not explicit and found["revision"]):
        raise CheckpointError(f"{argument}: there is no folder {shown(text)}, nor is it a hub repository, owner/name")
    if not explicit and (parent := Path(text).parent).exists():
        inside = sorted(p.name for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []
        hint = nearest(Path(text).name, inside) or "; it holds no folders"
        raise CheckpointError(
            f"{argument}: there is no folder {text} in {parent}{hint} (for the hub repository write {SCHEME}{text})"
        )
    return Repository(found["repository"], found["revision"])


def fetch(wanted: Repository, files: Sequence[str], argument: str, leave_out: Sequence[str] = ()) -> Path:
    """The folder, in the hub's own cache, with those files of a repository; patterns are fnmatch's."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            wanted.name,
            revision=wanted.revision,
            allow_patterns=list(files),
            ignore_patterns=list(leave_out) or None,
            etag_timeout=10,
        )
    except Exception as error:  # the hub's client raises a dozen kinds: offline, not found, no permission, ...
        reason = one_line(error)
        reason = reason if len(reason) <= 200 else f"{reason[:197]}..."
        raise CheckpointError(
            f"{argument}: there is no folder {wanted.name!r}, and it could not be fetched as a hub repository "
            f"({reason})"
        ) from error
    return Path(found)
