"""The table that maps names to data source classes. Register one of your own with `DATASETS["mine"] = Mine`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seriatim.core.construct import check_sizes, construct, pop_kind
from seriatim.data.array_file import ArrayData
from seriatim.data.base import Digits, ImageData
from seriatim.data.folder import Folder
from seriatim.data.hub_datasets import HuggingFace, HuggingFaceStream
from seriatim.data.latents import Latents

DATASETS: dict[str, type[ImageData]] = {
    "arrays": ArrayData,
    "digits": Digits,
    "folder": Folder,
    "hf": HuggingFace,
    "hf-stream": HuggingFaceStream,
    "latents": Latents,
}


def build_data(config: Mapping[str, Any]) -> ImageData:
    """The data source for a config such as `{"kind": "folder", "path": "photos/"}`."""
    check_sizes(config, "data")
    kind, rest = pop_kind(config, DATASETS, "data")
    return construct(DATASETS[kind], rest, "data")
