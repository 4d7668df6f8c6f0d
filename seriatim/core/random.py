"""Derives seeds from other seeds, and makes torch generators. Models draw their numbers from `seriatim.core.keys`."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) derived from integers and names; it is the same on all machines, versions and processes."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int) -> torch.Generator:
    """A torch generator on the CPU that starts from `seed`."""
    return torch.Generator().manual_seed(seed)
