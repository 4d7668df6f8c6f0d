"""The fixtures in tests/fixtures/numerics: what version 0.1 computed on small models, and how a case is read.

Version 0.1 wrote them, so they are not made again: later versions must compute the same from the same draws.

A case is a model, one training step and some sampling runs. Every random number of a run is stored under a path, which
says for what it was drawn and not when. Its last two words are a name and the kind of draw:

    step/ratio/uniform            the share of masked tokens, one number for the batch (masked models, training)
    B/drop/uniform                whether image B loses its label (training)
    B/order/permutation           the permutation of image B as version 0.1 drew it: training masks its first entries,
                                  and a sampler takes tokens from its end; a causal model trains in its order
    B/token/P/...                 a draw of the head for the token at raster position P of image B
    B/token/P/step/S/...          the same with the order "confidence", which may draw a token at several steps
    B/token/P/step/S/choice/uniform   the noise of the choice which drawn codes stay

The head's own names follow: `t/integers` (M,) or `t/normal` (M,) and `eps/normal` (M, D) in training; in sampling
`noise/normal` (T + 1, D), or (1, D) for the solver of an ODE, or (D,) for a flow; `component/uniform` and
`value/normal` (D,) of a mixture, `product/uniform` when it is guided exactly, `candidates/uniform` (S,),
`candidates/normal` (S, D) and `choice/uniform` when it chooses among candidates; `code/uniform`; `bin/uniform` (D,).
A nested head puts `part/I` in front of the names of the head inside, I being the part's place in drawing order.

In a file, all draws whose paths differ in their numbers alone are one tensor, beside a table of these numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).resolve().parent / "fixtures" / "numerics"
WEIGHTS, META = "weights.safetensors", "meta.json"
CANDIDATES = 20  # in the place of a mixture's 1,000, so that the files stay small


@dataclass
class Training:
    """One call of the loss, with N tokens asked for in the order in which the backbone gave their z."""

    tokens: Tensor  # (B, L, D), or codes (B, L)
    labels: Tensor | None  # (B,)
    captions: tuple[Tensor, Tensor] | None  # features (B, T, F) and valid (B, T), in the place of labels
    draws: dict[str, Tensor]
    loss: Tensor  # ()
    parts: dict[str, Tensor]  # name -> ()
    gradients: dict[str, Tensor]  # name of every parameter -> gradient
    z: Tensor  # (N, C)
    rows: Tensor  # (N,) the image of each token
    places: Tensor  # (N,) the raster position of each token
    sums: Tensor  # (N,) the loss of each token, summed over its draws
    counts: Tensor  # (N,) how many draws that was


@dataclass
class Sampling:
    """One call of `model.sample`."""

    settings: dict[str, Any]  # the keyword arguments of version 0.1, those of the head included, but for the tensors
    labels: Tensor | None  # (B,)
    captions: tuple[Tensor, Tensor] | None
    tokens: Tensor | None  # (B, L, D) to begin from
    known: Tensor | None  # (B, L) bool
    draws: dict[str, Tensor]
    result: Tensor  # (B, L, D), or codes (B, L)


@dataclass
class Case:
    """A model, its training step and its sampling runs by name."""

    name: str
    config: dict[str, Any]  # the flat config, complete
    weights: dict[str, Tensor]  # the state dict
    training: Training
    samplings: dict[str, Sampling]


def names() -> list[str]:
    """Of all cases."""
    return sorted(json.loads((FOLDER / META).read_text())["cases"])


def runs() -> list[tuple[str, str]]:
    """The sampling runs of all cases: (case, run)."""
    meta = json.loads((FOLDER / META).read_text())["cases"]
    return [(case, run) for case in sorted(meta) for run in meta[case]["samplings"]]


def load_case(path: Path) -> Case:
    """Read FOLDER/<name>.safetensors and what belongs to it in the two files shared by all cases."""
    meta = json.loads((path.parent / META).read_text())["cases"][path.stem]
    shared, own = load_file(path.parent / WEIGHTS), load_file(path)
    weights = {name: shared[f"{meta['trunk']}:{name}"] for name in meta["weights"] if not name.startswith("head.")}
    weights |= {name: shared[f"{meta['head']}:{name}"] for name in meta["weights"] if name.startswith("head.")}
    weights = {name: weights[name] for name in meta["weights"]}
    training = under(own, "training")
    samplings = {}
    for run, settings in meta["samplings"].items():
        found = under(own, run)
        samplings[run] = Sampling(
            settings,
            found.get("labels"),
            captions_of(found),
            found.get("tokens"),
            found.get("known"),
            unpacked(under(found, "draws")),
            found["result"],
        )
    read = Training(
        training["tokens"],
        training.get("labels"),
        captions_of(training),
        unpacked(under(training, "draws")),
        training["loss"],
        under(training, "parts"),
        under(training, "gradients"),
        training["z"],
        training["rows"],
        training["places"],
        training["sums"],
        training["counts"],
    )
    return Case(path.stem, meta["config"], weights, read, samplings)


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with the prefix, without it."""
    begin = f"{prefix}|"
    return {name.removeprefix(begin): value for name, value in tensors.items() if name.startswith(begin)}


def captions_of(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    found = under(tensors, "captions")
    return (found["features"], found["valid"]) if found else None


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Draws as they are stored -> path -> draw.

    `pattern@shape` holds all draws of this pattern and shape; with `@numbers` behind it, the numbers of their paths.
    """
    return dict(each_draw(tensors))


def each_draw(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, values in tensors.items():
        if name.endswith("@numbers"):
            continue
        pattern = name.partition("@")[0]
        values = values if values.is_floating_point() else values.long()
        for numbers, value in zip(tensors[f"{name}@numbers"].tolist(), values, strict=True):
            left = iter(numbers)
            yield "/".join(str(next(left)) if word == "*" else word for word in pattern.split("/")), value
