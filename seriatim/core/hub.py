"""Names of repositories on the Hugging Face hub, and fetching a few files of one; nothing goes there by accident."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from seriatim.core.errors import CheckpointError, nearest, one_line, shown
from seriatim.core.terminal import say

SCHEME = "hf://"
NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w.-]{1,255}))?")
LARGEST = 32 * 10**9  # bytes that are fetched of one repository: far more than any preset takes


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
    """The folder, in the hub's own cache, with those files of a repository; patterns are fnmatch's.

    The commit is looked up first, and with it the size of each file: all files are of one commit, which is told, and
    nothing is fetched that is larger than LARGEST. What was fetched before is used where the hub can't be asked.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    allowed, ignored = list(files), list(leave_out) or None
    try:
        info = HfApi().model_info(wanted.name, revision=wanted.revision, files_metadata=True, timeout=10)
        sizes = {file.rfilename: file.size for file in info.siblings or []}
        chosen = list(filter_repo_objects(sizes, allow_patterns=allowed, ignore_patterns=ignored))
        check_sizes(wanted.name, {name: sizes[name] for name in chosen}, argument)
        found = snapshot_download(
            wanted.name, revision=info.sha, etag_timeout=10, allow_patterns=allowed, ignore_patterns=ignored
        )
        for name in chosen:
            if (size := (Path(found) / name).stat().st_size) != sizes[name]:
                raise CheckpointError(
                    f"{argument}: {name} of {wanted.name} has {size:,} bytes, and the hub told {sizes[name]}"
                )
        say(f"{SCHEME}{wanted.name}@{info.sha} is what was fetched: this name gets the same files again")
    except CheckpointError:
        raise
    except Exception as error:  # the hub's client raises a dozen kinds: offline, not found, no permission, ...
        with contextlib.suppress(Exception):
            kept = snapshot_download(
                wanted.name,
                revision=wanted.revision,
                local_files_only=True,
                allow_patterns=allowed,
                ignore_patterns=ignored,
            )
            return Path(kept)
        reason = one_line(error)
        reason = reason if len(reason) <= 200 else f"{reason[:197]}..."
        raise CheckpointError(
            f"{argument}: there is no folder {wanted.name!r}, and it could not be fetched as a hub repository "
            f"({reason})"
        ) from error
    return Path(found)


def check_sizes(name: str, sizes: Mapping[str, int | None], argument: str) -> None:
    """Refuse files whose sizes the hub doesn't tell, or that are too many bytes, before one of them is fetched."""
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
