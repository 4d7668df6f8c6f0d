"""Model folders from the hub."""

from __future__ import annotations

from pathlib import Path

from seriatim.core.errors import CheckpointError, one_line


def download(repository: str) -> Path:
    """A hub repository's model folder, in the hub's own cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.safetensors"], etag_timeout=10))
    except Exception as error:  # the hub's client raises a dozen kinds: offline, not found, no permission, ...
        reason = one_line(error)[:160]
        raise CheckpointError(
            f"model: there is no folder {repository!r}, and it could not be fetched as a hub repository ({reason})"
        ) from error
