"""Features that a tokenizer was trained with judge neither it nor what is built on it: they would judge it too well.

The provenance of a tokenizer or model lists them under "perceptual", and what is trained on it inherits the list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from seriatim.core.errors import UsageError
from seriatim.evaluation.base import FeatureExtractor

SEEN = "perceptual"


def seen_features(provenances: Iterable[Mapping[str, Any]], own: FeatureExtractor | None = None) -> dict[str, Any]:
    """The entry of a provenance for what is trained on others, and with the features of `own`; empty without any."""
    found = [each for provenance in provenances for each in listed(provenance)]
    if own is not None:
        found.append({"name": own.name, "sha256": own.fingerprint()})
    different = {each.get("sha256"): each for each in found}
    return {SEEN: list(different.values())} if different else {}


def check_impartial(provenance: Mapping[str, Any], extractor: FeatureExtractor, argument: str = "features") -> None:
    """Raise UsageError for features with which a tokenizer was trained, or one that it began with."""
    seen = listed(provenance)
    if seen and any(each.get("sha256") == extractor.fingerprint() for each in seen):
        raise UsageError(
            f"{argument}: the tokenizer was trained with those of {extractor.name}, which therefore can't judge it; "
            "name a classifier of another seed and architecture"
        )


def listed(provenance: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = provenance.get(SEEN)
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []
