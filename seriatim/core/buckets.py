"""Round the lengths of sequences up to a few values, so that training computes few shapes.

Compiled code is made for each shape, and on a CPU oneDNN keeps a kernel for each. Padding is masked out, so losses and
gradients are those of the lengths themselves, except for rounding.

Shapes: B images.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bucket_size(most: int, buckets: int) -> int:
    """The number of which lengths are multiples, so that lengths up to `most` have at most `buckets` values.

    It is 1 without buckets.
    """
    return -(-most // buckets) if buckets else 1


def padded_length(length: int, most: int, buckets: int) -> int:
    """The length rounded up to a multiple of `bucket_size`, from one multiple up to `most`."""
    size = bucket_size(most, buckets)
    return length if size == 1 else min(most, size * max(1, -(-length // size)))


def padded_counts(counts: Tensor, most: int, buckets: int) -> Tensor:
    """The counts (B,) raised, none above `most`, so that the largest and the sum take few values.

    The largest is rounded up by `padded_length`, and the sum up to a multiple of B times `bucket_size`.
    """
    images, size = len(counts), bucket_size(most, buckets)
    if size == 1:
        return counts
    top = padded_length(int(counts.max()), most, buckets)
    room = top - counts  # (B,)
    total = min(images * top, images * size * -(-int(counts.sum()) // (images * size)))
    missing = total - int(counts.sum())
    before = room.cumsum(dim=0) - room  # the room in earlier images, which are filled first
    return counts + torch.minimum(room, (missing - before).clamp(min=0))
