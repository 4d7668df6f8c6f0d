"""Sequences that are no pictures: signals of two channels, a pointer that turns about twice, left or right.

    python examples/make_waves.py waves.npy --labels turns.npy
    seriatim train mar-waves data.path=waves.npy data.labels=turns.npy --out runs/waves
    seriatim sample runs/waves --num-images-per-label 100 --out drawn
    python examples/make_waves.py --check drawn/samples.npy

A signal has 128 instants of 2 channels, cut into 32 tokens of 4 instants: 8 features, channel after channel.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

INSTANTS, TOKEN = 128, 4
TURNS = (1.75, 2.25)  # least and most; the classes are left, 0, and right, 1
START = 0.1  # turns from straight ahead at which it begins, at most
EVEN = 0.25  # how far, on average, the angle of a steady signal strays in radians, and its radius by its own size


def make(count: int, seed: int) -> tuple[Any, Any]:
    """Tokens (N, 32, 8) float32; labels (N,): 0 turns left, 1 right."""
    chance = np.random.default_rng(seed)
    labels = chance.integers(0, 2, count)
    turns = chance.uniform(*TURNS, (count, 1)) * np.where(labels == 0, 1, -1)[:, None]
    angle = 2 * np.pi * (chance.uniform(-START, START, (count, 1)) + turns * np.arange(INSTANTS) / INSTANTS)  # (N, 128)
    radius = chance.uniform(0.5, 1.5, (count, 1))
    signals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)  # (N, 2, 128)
    signals += 0.02 * chance.standard_normal(signals.shape)
    tokens = signals.reshape(count, 2, -1, TOKEN).transpose(0, 2, 1, 3).reshape(count, INSTANTS // TOKEN, 2 * TOKEN)
    return tokens.astype(np.float32), labels


def check(tokens: Any, labels: Any = None) -> dict[str, float]:
    """Of signals (N, 32, 8): how many turn steadily from end to end, about twice, and the way that was asked."""
    signals = tokens.reshape(len(tokens), -1, 2, TOKEN).transpose(0, 2, 1, 3).reshape(len(tokens), 2, -1)
    radius = np.hypot(signals[:, 0], signals[:, 1])  # (N, 128)
    angle = np.unwrap(np.arctan2(signals[:, 1], signals[:, 0]), axis=1)
    time = np.arange(angle.shape[1]) - (angle.shape[1] - 1) / 2
    pace = (angle - angle.mean(axis=1, keepdims=True)) @ time / (time @ time)  # (N,): the line of least squares
    stray = (angle - angle.mean(axis=1, keepdims=True) - pace[:, None] * time).std(axis=1)
    turns = pace * INSTANTS / (2 * np.pi)
    steady = (stray < EVEN) & (radius.std(axis=1) < EVEN * radius.mean(axis=1))
    whole = steady & (TURNS[0] - EVEN < np.abs(turns)) & (np.abs(turns) < TURNS[1] + EVEN)
    found = {"signals": len(tokens), "steady": float(steady.mean()), "as_often": float(whole.mean())}
    if labels is not None:
        found["as_asked"] = float((whole & ((turns > 0) == (labels == 0))).mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("waves.npy"))
    parser.add_argument("--labels", type=Path, help="also write which way each turns")
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=Path, help="look at drawn signals instead")
    given = parser.parse_args()
    if given.check:
        says = given.check.with_suffix(".json")  # what `seriatim sample` writes beside the array
        labels = json.loads(says.read_text())["labels"] if says.exists() else [None]
        asked = None if None in labels else np.array(labels, dtype=int)
        for name, value in check(np.load(given.check, allow_pickle=False), asked).items():
            print(f"{name:12} {value:.4g}")
        return
    tokens, labels = make(given.count, given.seed)
    np.save(given.out, tokens, allow_pickle=False)
    if given.labels:
        np.save(given.labels, labels, allow_pickle=False)


if __name__ == "__main__":
    main()
