"""The layers of VGG-16 that LPIPS compares, with its weights of channels (Zhang et al. 2018, arXiv 1801.03924).

The weights are a file of the user's own, because Seriatim needs neither `lpips` nor `torchvision`. Where those are
installed, `torch.save(lpips.LPIPS(net="vgg").state_dict(), "lpips.pth")` writes it.

Shapes: B images, c channels, H x W pixels in [-1, 1], C channels of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from seriatim.checkpoints.official import read_official
from seriatim.checkpoints.shapes import mapped
from seriatim.core.errors import UsageError
from seriatim.core.files import sha256
from seriatim.evaluation.base import FeatureExtractor, Features

# Convolutions of each of the five slices: the number of a layer in torchvision's list, and its channels.
SLICES = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS's normalisation of images in [-1, 1]


class Slice(nn.Module):
    """Convolutions of 3x3, each with a ReLU; a max pooling comes first, but in the first slice."""

    def __init__(self, inner: int, convolutions: tuple[tuple[int, int], ...], *, halve: bool) -> None:
        super().__init__()
        self.halve, self.convolutions = halve, nn.ModuleList()
        for _, outer in convolutions:
            self.convolutions.append(nn.Conv2d(inner, outer, 3, padding=1))
            inner = outer

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(x, 2) if self.halve else x
        for convolution in self.convolutions:
            x = convolution(x).relu()
        return x


class LPIPS(FeatureExtractor):
    """The five layers of LPIPS, for `objective.perceptual_features=lpips:FILE`; its features are means of the last."""

    shift: Tensor  # (3, 1, 1)
    scale: Tensor  # (3, 1, 1)

    def __init__(self) -> None:
        super().__init__()
        self.name, self.dim, self.config = "lpips", SLICES[-1][-1][1], {}
        inner = [3, *(each[-1][1] for each in SLICES)]
        self.slices = nn.ModuleList(Slice(inner[i], each, halve=i > 0) for i, each in enumerate(SLICES))
        self.channel_weights = nn.ParameterList(torch.zeros(each[-1][1]) for each in SLICES)
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.layers = [f"slices.{i}" for i in range(len(SLICES))]

    @property
    def layer_weights(self) -> Mapping[str, Tensor]:  # type: ignore[override]
        return dict(zip(self.layers, self.channel_weights, strict=True))

    @classmethod
    @override
    def open(cls, path: Path | None, *, size: tuple[int, int], channels: int) -> LPIPS:
        if path is None or not path.is_file():
            raise UsageError("features: lpips needs the file of its weights, such as lpips:lpips.pth")
        if min(size) < 2 ** (len(SLICES) - 1):
            raise UsageError(f"features: lpips takes images of at least 16 pixels a side, not {size[0]}x{size[1]}")
        if channels not in (1, 3):
            raise UsageError(f"features: lpips takes 1 or 3 channels, the images have {channels}")
        network = cls()
        network.load_tensors(read_official(path).tensors, str(path))
        network.config["weights_sha256"] = sha256(path)
        return network.requires_grad_(False).eval()

    def load_tensors(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Give it the tensors of `lpips.LPIPS(net="vgg")`. Its constants and the copies of its weights are left out."""
        given = {name: value for name, value in tensors.items() if not re.match(r"lins\.|scaling_layer\.", name)}
        wanted = {name: value.shape for name, value in self.state_dict().items()}
        self.load_state_dict(mapped(given, wanted, official_name, where))

    def forward(self, images: Tensor) -> Features:
        x = (images.float().expand(-1, 3, -1, -1) - self.shift) / self.scale
        for each in self.slices:
            x = each(x)
        return Features(x.mean(dim=(2, 3)))


def official_name(name: str) -> str:
    """The name in a file of the `lpips` package of a tensor of `LPIPS`."""
    found = re.fullmatch(r"slices\.(\d)\.convolutions\.(\d)\.(weight|bias)", name)
    if found:
        number, place, kind = int(found[1]), int(found[2]), found[3]
        return f"net.slice{number + 1}.{SLICES[number][place][0]}.{kind}"
    return f"lin{name.rpartition('.')[2]}.model.1.weight"
