"""Patches of pixels as codes without a network: the code of a patch is the nearest of V centres found by k-means.

Shapes: B images, c channels, H x W pixels, p patch side, h x w = L codes, D = c p p features of a patch, V centres.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from seriatim.core.errors import DataError, UsageError, check_least
from seriatim.core.keys import Keys
from seriatim.nn.patch import patchify
from seriatim.tokenizers.pixels import Patched
from seriatim.tokenizers.quantise import nearest_codes

MOST_PATCHES = 1 << 17  # k-means learns from at most this many random patches, to bound time and memory
AT_ONCE = 4096  # patches in a mini-batch of k-means


class KMeans(Patched):
    """Encodes each p x p patch as the code of the nearest of `vocab` centres, and decodes a code to its centre.

    `fit` finds the centres once and sorts them from dark to light; they are saved with the tokenizer like weights. The
    same images and `seed` give the same centres.
    """

    vocab: int
    centres: Tensor  # (V, D)
    measured: Tensor  # ()

    def __init__(
        self,
        size: int | Sequence[int],
        patch: int = 2,
        channels: int = 3,
        *,
        levels: int = 256,
        vocab: int = 512,
        seed: int = 0,  # the seed of k-means
    ) -> None:
        super().__init__(size, patch, channels, levels)
        check_least(2, vocab=vocab)
        if not 0 <= seed < 2**32:
            raise UsageError(f"seed: {seed!r} is not allowed; it must be from 0 to 2^32 - 1")
        self.seed, self.dim, self.vocab = seed, channels * patch * patch, vocab
        self.config |= {"vocab": vocab, "seed": seed}
        self.register_buffer("centres", torch.zeros(vocab, self.dim))
        self.register_buffer("measured", torch.tensor(False, device="cpu"))

    @torch.no_grad()
    @override
    def tokens(self, moments: Tensor, keys: Keys | None = None) -> Tensor:
        if not self.measured:
            raise UsageError("tokenizer: k-means has no centres yet; call fit(batches), or load a trained tokenizer")
        patches = patchify(moments.to(self.centres), self.patch)  # (B, L, D)
        return nearest_codes(patches.flatten(0, 1), self.centres).view(patches.shape[:2])

    @torch.no_grad()
    def embeddings(self, codes: Tensor) -> Tensor:
        return F.embedding(self.check_codes(codes), self.centres)  # (B, L, D)

    @torch.no_grad()
    def decode_embeddings(self, embeddings: Tensor) -> Tensor:
        return self.images_of(embeddings.to(self.centres))

    def decode(self, tokens: Tensor) -> Tensor:
        return self.decode_embeddings(self.embeddings(tokens))

    # --- finding the centres --------------------------------------------------------------------------------------

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Find the centres, unless they were found before."""
        if not self.measured:
            super().fit(batches)

    def fit_moments(self, batches: Iterable[Tensor]) -> None:
        if self.measured:
            return
        patches, different = sample_of((patchify(moments, self.patch).flatten(0, 1) for moments in batches), self.seed)
        if not len(patches):
            raise DataError("no images to measure: k-means needs at least one")
        if len(different) < self.vocab:
            raise UsageError(
                f"vocab: {self.vocab} codes are more than the {len(different)} different patches of the images; lower "
                "vocab, or give more images"
            )
        centres = cluster(patches, different, self.vocab, self.seed)
        self.centres.copy_(centres[centres.mean(dim=1).argsort(stable=True)])
        self.measured.fill_(True)


def sample_of(batches: Iterable[Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """A random sample of patches, and the set of different patches, from batches (n, D); float32 on the CPU.

    The sample (N, D) is uniform and has at most MOST_PATCHES rows. The set (M, D) has each different patch once,
    however rare it is; if there are more than MOST_PATCHES, it has the different patches of the sample only.
    """
    random = torch.Generator().manual_seed(seed)
    kept, keys = torch.empty(0), torch.empty(0, dtype=torch.float64)
    different: Tensor | None = torch.empty(0)
    for batch in batches:  # keep the rows with the largest random keys so far, which is a uniform sample
        rows = batch.detach().cpu().float()
        drawn = torch.rand(len(rows), dtype=torch.float64, generator=random)
        kept, keys = torch.cat([kept.view(-1, rows.shape[1]), rows]), torch.cat([keys, drawn])
        if len(keys) > MOST_PATCHES:
            keys, places = keys.topk(MOST_PATCHES)
            kept = kept[places]
        if different is not None:
            different = torch.unique(torch.cat([different.view(-1, rows.shape[1]), rows]), dim=0)
            different = different if len(different) <= MOST_PATCHES else None
    return kept, torch.unique(kept, dim=0) if different is None else different


def cluster(patches: Tensor, different: Tensor, vocab: int, seed: int) -> Tensor:
    """The centres (V, D) of patches (N, D), each of them nearest to some patch.

    `different` (M, D), M >= V, holds each different patch once. K-means runs on one thread, because several would add
    numbers in a random order and results could not be reproduced.
    """
    if len(different) == vocab:
        return different
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    means = MiniBatchKMeans(vocab, batch_size=max(AT_ONCE, 2 * vocab), n_init=1, random_state=seed)
    with threadpool_limits(1):
        means.fit(patches.numpy())
    return all_used(torch.from_numpy(means.cluster_centers_).float(), different)


def all_used(centres: Tensor, different: Tensor) -> Tensor:
    """The centres (V, D) changed so that each is nearest to some of the different patches (M, D), M >= V.

    Mini-batch k-means may leave centres that are nearest to no patch, or two in one place. Such a centre moves to the
    patch that is farthest from all centres. The error falls with every move, so the loop ends.
    """
    centres, different = centres.double(), different.double()  # so that a moved centre is nearest to its patch
    while True:
        codes = nearest_codes(different, centres)
        free = (torch.bincount(codes, minlength=len(centres)) == 0).nonzero()[:, 0]
        if not len(free):
            return centres.float()
        distance = (different - centres[codes]).square().sum(dim=1)
        for i in free.tolist():
            centres[i] = different[int(distance.argmax())]
            distance = torch.minimum(distance, (different - centres[i]).square().sum(dim=1))
