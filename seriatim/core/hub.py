"""Recognises names of repositories on the Hugging Face hub and downloads some of their files.

A name counts as a repository only if it can't be a local path, so that a mistyped path downloads nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from seriatim.core.errors import CheckpointError, nearest, one_line, shown
from seriatim.core.terminal import say

SCHEME = "hf://"
NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w.-]{1,255}))?")
LARGEST = 32 * 10**9  # bytes that are downloaded from one repository at most; all presets are far smaller


class Repository(NamedTuple):
    name: str  # owner/name
    revision: str | None = None  # a commit, a tag or a branch; None means the main branch


def repository(text: str, argument: str) -> Repository:
    """The hub repository that `text` names, for a `text` that is not a local folder.

    `hf://owner/name` always names a repository, and `hf://owner/name@REVISION` a fixed state of it. A plain
    `owner/name` names one only if there is no local folder `owner`, because a mistyped path must not download a
    stranger's weights. Anything else raises CheckpointError.
    """
    explicit = text.startswith(SCHEME)
    found = NAME.fullmatch(text.removeprefix(SCHEME))
    if explicit and found is None:
        raise CheckpointError(f"{argument}: {shown(text)} is not a hub repository; write {SCHEME}owner/name")
    if found is None or (not explicit and found["revision"]):
        raise CheckpointError(
            f"{argument}: there is no folder {shown(text)}, and it is not the name of a hub repository (owner/name)"
        )
    if not explicit and (parent := Path(text).parent).exists():
        inside = sorted(p.name for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []
        hint = nearest(Path(text).name, inside) or "; it holds no folders"
        raise CheckpointError(
            f"{argument}: there is no folder {text} in {parent}{hint} (for the hub repository write {SCHEME}{text})"
        )
    return Repository(found["repository"], found["revision"])


class Access(NamedTuple):
    """How the hub is accessed; by default the hub's own client decides, which environment variables may configure."""

    token: str | bool | None = None  # for private repositories; None means the token that was saved at login
    cache_dir: str | os.PathLike[str] | None = None  # the folder for downloaded files
    local_files_only: bool = False  # use only files from earlier downloads


USUAL = Access()


def fetch(
    wanted: Repository,
    files: Sequence[str],
    argument: str,
    leave_out: Sequence[str] = (),
    access: Access = USUAL,
) -> Path:
    """Download files of a repository and return their folder in the hub's cache; `files` and `leave_out` are patterns.

    The patterns are those of `fnmatch`. The commit and the size of each file are looked up first, so that all files
    come from one commit, which is printed, and nothing larger than LARGEST bytes is downloaded. Where the hub can't be
    reached, files from an earlier download are used. Raises CheckpointError.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    allowed, ignored = list(files), list(leave_out) or None
    get = partial(
        snapshot_download,
        wanted.name,
        allow_patterns=allowed,
        ignore_patterns=ignored,
        token=access.token,
        cache_dir=access.cache_dir,
    )

    def kept() -> Path:
        return Path(str(get(revision=wanted.revision, local_files_only=True)))

    try:
        if access.local_files_only:
            return kept()
        info = HfApi().model_info(
            wanted.name, revision=wanted.revision, files_metadata=True, timeout=10, token=access.token
        )
        sizes = {file.rfilename: file.size for file in info.siblings or []}
        chosen = list(filter_repo_objects(sizes, allow_patterns=allowed, ignore_patterns=ignored))
        check_sizes(wanted.name, {name: sizes[name] for name in chosen}, argument)
        found = Path(str(get(revision=info.sha, etag_timeout=10)))
        for name in chosen:
            if (size := (found / name).stat().st_size) != sizes[name]:
                raise CheckpointError(
                    f"{argument}: {name} of {wanted.name} has {size:,} bytes, but the hub announced {sizes[name]}"
                )
        say(f"downloaded {SCHEME}{wanted.name}@{info.sha} (this name gets the same files again)")
    except CheckpointError:
        raise
    except Exception as error:  # the hub's client has many error types: offline, not found, no permission, ...
        with contextlib.suppress(Exception):
            return kept()
        reason = one_line(error)
        reason = reason if len(reason) <= 200 else f"{reason[:197]}..."
        raise CheckpointError(
            f"{argument}: there is no folder {wanted.name!r}, and it could not be fetched as a hub repository "
            f"({reason})"
        ) from error
    return found


def check_sizes(name: str, sizes: Mapping[str, int | None], argument: str) -> None:
    """Raise CheckpointError, before anything is downloaded, for files of unknown size or of too many bytes together."""
    unknown = sorted(file for file, size in sizes.items() if size is None)
    if unknown:
        raise CheckpointError(
            f"{argument}: the hub does not tell the size of {shown(unknown[0])} of {name}; download it yourself and "
            "name the folder"
        )
    total = sum(size for size in sizes.values() if size is not None)
    if total > LARGEST:
        raise CheckpointError(
            f"{argument}: {name} would take {total:,} bytes, and at most {LARGEST:,} are fetched; download it yourself "
            "and name the folder"
        )
