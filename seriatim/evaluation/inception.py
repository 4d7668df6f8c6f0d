"""The Inception-v3 of the Frechet Inception distance: TensorFlow's network of 2015-12-05 with its weights.

Szegedy et al. 2016, table 1; Heusel et al. 2017 compare its 2048 pooled features. What is unusual: average pools in
the blocks don't count padding, the last block pools by maximum, there are 1008 classes. Module names are those of the
weights file that everybody uses.

B images, H x W pixels, 299 inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from seriatim.checkpoints.official import read_official
from seriatim.checkpoints.shapes import mapped
from seriatim.core.errors import UsageError
from seriatim.evaluation.base import FeatureExtractor, Features
from seriatim.evaluation.weights import find_weights

SIDE, WIDTH, CLASSES = 299, 2048, 1008
SPATIAL = 7  # channels of Mixed_6d.branch1x1 (17 x 17) that ADM's sFID takes: Nash et al. 2021, ADM's evaluator

Kernel = int | tuple[int, int]
Step = tuple[int, Kernel]  # channels out, kernel: height and width
Fork = tuple[Step, Step]  # two convolutions of the same input, side by side


def chains(name: str) -> tuple[Mapping[str, Sequence[Step | Fork]], str]:
    """The branches of a block, each a chain of convolutions, and how its pool branch pools. In the order they join."""
    kind, _, number = name.partition(" ")
    if kind == "A":
        return {
            "branch1x1": [(64, 1)],
            "branch5x5": [(48, 1), (64, 5)],
            "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
            "branch_pool": [(int(number), 1)],
        }, "mean"
    if kind == "B":
        return {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, "halve"
    if kind == "C":
        c = int(number)
        return {
            "branch1x1": [(192, 1)],
            "branch7x7": [(c, 1), (c, (1, 7)), (192, (7, 1))],
            "branch7x7dbl": [(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
            "branch_pool": [(192, 1)],
        }, "mean"
    if kind == "D":
        seven: list[Step | Fork] = [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]
        return {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": seven}, "halve"
    assert kind == "E", kind
    return {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), ((384, (1, 3)), (384, (3, 1)))],
        "branch3x3dbl": [(448, 1), (384, 3), ((384, (1, 3)), (384, (3, 1)))],
        "branch_pool": [(192, 1)],
    }, number


STEM = {  # channels in and out, kernel, stride, padding
    "Conv2d_1a_3x3": (3, 32, 3, 2, 0),
    "Conv2d_2a_3x3": (32, 32, 3, 1, 0),
    "Conv2d_2b_3x3": (32, 64, 3, 1, 1),
    "Conv2d_3b_1x1": (64, 80, 1, 1, 0),
    "Conv2d_4a_3x3": (80, 192, 3, 1, 0),
}
POOLED = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")  # a maximum pool of stride 2 comes after these
MIXED = {
    "Mixed_5b": "A 32",
    "Mixed_5c": "A 64",
    "Mixed_5d": "A 64",
    "Mixed_6a": "B",
    "Mixed_6b": "C 128",
    "Mixed_6c": "C 160",
    "Mixed_6d": "C 160",
    "Mixed_6e": "C 192",
    "Mixed_7a": "D",
    "Mixed_7b": "E mean",
    "Mixed_7c": "E max",
}


class Conv(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, inside: int, out: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, their channels joined."""

    def __init__(self, inside: int, kind: str) -> None:
        super().__init__()
        branches, self.pooling = chains(kind)
        self.rows: list[tuple[str, list[list[str]]]] = []  # of each branch: its steps, one name or two
        self.width = inside if self.pooling == "halve" else 0
        for branch, steps in branches.items():
            width, names = inside, []
            for number, step in enumerate(steps, 1):
                parts = step if isinstance(step[0], tuple) else (step,)
                stem = branch if len(steps) == 1 else f"{branch}_{number}"
                names.append([f"{stem}{suffix}" for suffix in ("ab" if len(parts) == 2 else ("",))])
                # The last step of a branch halves height and width where the block does, without padding.
                halves = self.pooling == "halve" and number == len(steps)
                for name, (out, kernel) in zip(names[-1], parts, strict=True):
                    padding = 0 if halves else around(kernel)
                    self.add_module(name, Conv(width, out, kernel, 2 if halves else 1, padding))
                width = sum(out for out, _ in parts)
            self.rows.append((branch, names))
            self.width += width

    def forward(self, x: Tensor) -> Tensor:
        joined = []
        for branch, steps in self.rows:
            y = pool(x, self.pooling) if branch == "branch_pool" else x
            for names in steps:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            joined.append(y)
        if self.pooling == "halve":
            joined.append(F.max_pool2d(x, 3, 2))
        return torch.cat(joined, dim=1)


def around(kernel: Kernel) -> Kernel:
    """The padding that keeps height and width."""
    return (kernel - 1) // 2 if isinstance(kernel, int) else ((kernel[0] - 1) // 2, (kernel[1] - 1) // 2)


def pool(x: Tensor, how: str) -> Tensor:
    if how == "max":
        return F.max_pool2d(x, 3, 1, 1)
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Inception(FeatureExtractor):
    """Features of the FID convention; `standard` once it has the known weights.

    Images are resized and scaled as ADM's evaluator and torch-fidelity do: the corner of the first pixel stays, values
    become (v - 128) / 128. `InceptionPytorchFid` does what pytorch-fid does. For one another's figures use their own.
    """

    resizing = "tensorflow-1"

    def __init__(self) -> None:
        super().__init__()
        self.name, self.dim, self.classes = "inception", WIDTH, CLASSES
        self.config = {"resize": self.resizing}
        for name, arguments in STEM.items():
            self.add_module(name, Conv(*arguments))
        width = STEM["Conv2d_4a_3x3"][1]
        for name, kind in MIXED.items():
            block = Mixed(width, kind)
            self.add_module(name, block)
            width = block.width
        assert width == WIDTH, width
        self.fc = nn.Linear(WIDTH, CLASSES)

    @classmethod
    @override
    def open(cls, path: Path | None, *, size: tuple[int, int], channels: int) -> Inception:
        if channels not in (1, 3):
            raise UsageError(f"features: inception takes 1 or 3 channels, the images have {channels}")
        file, digest = find_weights(path)
        with torch.device("meta"):
            network = cls()
        network.load_tensors(read_official(file).tensors, str(file))
        network.standard = True
        network.config["weights_sha256"] = digest
        return network.requires_grad_(False).eval()

    def load_tensors(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Give it a weights file's tensors: all of them, no others, of the same shapes."""

        def counter(name: str) -> bool:  # batches seen in training: some files have them, nothing uses them
            return name.endswith("num_batches_tracked")

        wanted = {name: value.shape for name, value in self.state_dict().items() if not counter(name)}
        given = {name: value for name, value in tensors.items() if not counter(name)}
        found = mapped(given, wanted, lambda name: name, where)
        counters = {name: torch.tensor(0) for name in self.state_dict() if counter(name)}
        self.load_state_dict({**found, **counters}, assign=True)

    def prepare(self, images: Tensor) -> Tensor:
        """(B, c, H, W) in [-1, 1] -> (B, 3, 299, 299) about [-1, 1]."""
        x = images.float().expand(-1, 3, -1, -1)
        return (stretch(x, SIDE) + 1) * (127.5 / 128) - 1

    def forward(self, images: Tensor) -> Features:
        x = self.prepare(images)  # (B, 3, 299, 299)
        for name in STEM:
            x = self.get_submodule(name)(x)
            if name in POOLED:
                x = F.max_pool2d(x, 3, 2)
        spatial = x  # (B, 192, 35, 35)
        for name in MIXED:
            block = self.get_submodule(name)
            if name == "Mixed_6d":
                spatial = block.get_submodule("branch1x1")(x)[:, :SPATIAL]  # (B, 7, 17, 17)
            x = block(x)
        features = x.mean(dim=(2, 3))  # (B, 2048)
        # Without the bias, as TensorFlow's own script, ADM and torch-fidelity compute the inception score.
        logits = F.linear(features, self.fc.weight)  # (B, 1008)
        return Features(features, logits, spatial.permute(0, 2, 3, 1).flatten(1))  # channels last, as ADM's statistics


class InceptionPytorchFid(Inception):
    """The same network behind pytorch-fid's resizing: pixels' centres, values in [-1, 1]."""

    resizing = "half-pixel"

    def prepare(self, images: Tensor) -> Tensor:
        x = images.float().expand(-1, 3, -1, -1)
        return F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False)


def stretch(x: Tensor, side: int) -> Tensor:
    """Bilinear resize (B, c, H, W) -> (B, c, side, side) as TensorFlow 1: output i reads position i H / side.

    torch's reads (i + 1/2) H / side - 1/2 instead.
    """
    for dim in (2, 3):
        size = x.shape[dim]
        position = torch.arange(side, dtype=torch.float64) * (size / side)
        low = position.floor().long()
        weight = (position - low).to(x.device, x.dtype)
        weight = weight.view(-1, 1) if dim == 2 else weight
        first, second = (x.index_select(dim, i.clamp(max=size - 1).to(x.device)) for i in (low, low + 1))
        x = first + (second - first) * weight
    return x
