"""A small ResNet that tells classes apart, trained here: its features and class probabilities judge samples.

B images, c channels, H x W pixels in [-1, 1], F features, K classes.

After ResNet-9 (Page 2018-19, "How to train your ResNet"): He et al.'s residual blocks (2015), but few layers, a max
pooling in place of each stride and a whitened input, since a CPU has to train it in minutes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from seriatim.checkpoints.native import (
    CARD,
    CLASSIFIER,
    CONFIG,
    check_class_names,
    fill,
    find_bundle,
    opened,
    replaceable,
    save_folder,
    section,
)
from seriatim.core.construct import check_sizes, construct, pop_kind
from seriatim.core.errors import CheckpointError, ConfigError, UsageError, shown
from seriatim.core.files import MANIFEST, expanded
from seriatim.evaluation.base import FeatureExtractor, Features

SIDE = 1 << 14  # pixels of the largest images
PARTS = (CONFIG, CLASSIFIER, CARD, MANIFEST)  # of a classifier's folder


# --- the network ------------------------------------------------------------------------------------------------------


class ConvNorm(nn.Sequential):
    """Convolution 3x3, halved by max pooling where asked, batch norm (Ioffe & Szegedy 2015), ReLU."""

    def __init__(self, inner: int, outer: int, *, halve: bool = False) -> None:
        pool = [nn.MaxPool2d(2)] if halve else []
        super().__init__(
            nn.Conv2d(inner, outer, 3, padding=1, bias=False), *pool, nn.BatchNorm2d(outer), nn.ReLU(inplace=True)
        )


class Residual(nn.Module):
    """y = x + F(x) (He et al. 2015, eq. 1), F two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(ConvNorm(width, width), ConvNorm(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x)


class ResNet(nn.Module):
    """A stem of whitening filters; for each of `widths` a stage at half the side of the last.

    A stage is a convolution and as many residual blocks as `depth` says for it. Features: the largest value of each
    channel of the last stage (F = widths[-1]); logits: a linear layer on them.
    """

    filters: Tensor
    shift: Tensor

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        widths: Sequence[int] = (32, 128, 128),
        depth: Sequence[int] = (0, 1, 1),
    ) -> None:
        super().__init__()
        if classes < 2:
            raise UsageError(f"classes: {classes!r} is not allowed; it must be at least 2")
        if not widths or min(widths) < 1:
            raise UsageError(f"widths: {list(widths)!r} is not allowed; it must be the channels of each stage")
        if len(depth) != len(widths) or min(depth) < 0:
            raise UsageError(
                f"depth: {list(depth)!r} is not allowed; it must be the blocks of each of {len(widths)} stages"
            )
        self.config = {"classes": classes, "channels": channels, "widths": list(widths), "depth": list(depth)}
        self.classes, self.channels, self.dim = classes, channels, widths[-1]
        self.least = 2 ** len(widths) + 1  # side of the smallest image whose last stage has a pixel
        pixels = 4 * channels  # of a 2x2 patch
        self.register_buffer("filters", both_signs(torch.eye(pixels)).view(2 * pixels, channels, 2, 2))
        self.register_buffer("shift", torch.zeros(2 * pixels))
        self.bias = nn.Parameter(torch.zeros(2 * pixels))
        stages: list[nn.Module] = []
        for inner, outer, blocks in zip((2 * pixels, *widths), widths, depth, strict=False):
            stages.append(nn.Sequential(ConvNorm(inner, outer, halve=True), *(Residual(outer) for _ in range(blocks))))
        self.stages = nn.Sequential(*stages)
        self.classify = nn.Linear(self.dim, classes)

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Take the stem from images (B, c, H, W): the principal components of their 2x2 patches, each to unit variance.

        A fixed first layer whose outputs don't correlate; all others then learn in fewer passes (Page 2019). Both signs
        of a component, since a ReLU follows. Components with hardly any variance are not blown up by more than 45.
        """
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1)  # (B, c, H - 1, W - 1, 2, 2)
        patches = patches.movedim(1, 3).flatten(3).flatten(0, 2).double()  # (patches, 4 c)
        mean, covariance = patches.mean(dim=0), patches.T.cov()
        values, vectors = torch.linalg.eigh(covariance)
        floor = 5e-4 * covariance.diagonal().mean().clamp_min(1e-6)
        rows = (vectors / (values.clamp_min(0) + floor).sqrt()).T  # (components, 4 c)
        self.filters.copy_(both_signs(rows).view_as(self.filters))
        self.shift.copy_(-both_signs(rows) @ mean)

    def features(self, images: Tensor) -> Tensor:
        """(B, c, H, W) in [-1, 1] -> (B, F)."""
        x = images.contiguous(memory_format=torch.channels_last)
        x = F.conv2d(x, self.filters, self.shift + self.bias).relu()  # (B, 8 c, H - 1, W - 1)
        x = self.stages(x)  # (B, F, h, w)
        return x.amax(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """(B, c, H, W) in [-1, 1] -> logits (B, K)."""
        logits: Tensor = self.classify(self.features(images))
        return logits


def both_signs(rows: Tensor) -> Tensor:
    return torch.cat([rows, -rows])


CLASSIFIERS: dict[str, type[ResNet]] = {"resnet": ResNet}


def build_classifier(config: Mapping[str, Any], **known: Any) -> ResNet:
    """A classifier with fresh weights; `known` are what the config may leave out (classes, channels)."""
    check_sizes(config, "model")
    kind, rest = pop_kind(config, CLASSIFIERS, "model")
    for name, value in known.items():
        if rest.setdefault(name, value) != value:
            raise ConfigError(f"model.{name}: {rest[name]!r} does not fit the data ({value})")
    return channels_last(construct(CLASSIFIERS[kind], rest, "model"))


def channels_last(net: ResNet) -> ResNet:
    """Its weights laid out as convolutions on a CPU and in half precision are fastest."""
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


def classifier_config(net: ResNet) -> dict[str, Any]:
    """The config that `build_classifier` takes back, complete."""
    for name, cls in CLASSIFIERS.items():
        if type(net) is cls:
            return {"kind": name, **net.config}
    raise ConfigError(f"{type(net).__name__} is not registered; add it with CLASSIFIERS['name'] = {type(net).__name__}")


# --- its folder -------------------------------------------------------------------------------------------------------


@dataclass
class TrainedClassifier:
    """All that a classifier's folder holds.

    config.json             the network, the images it was made for, class names, accuracies, where it came from
    classifier.safetensors  its weights
    manifest.json           bytes and sha256 of the two, written last
    """

    net: ResNet
    name: str  # of the recipe: figures are called by it
    size: tuple[int, int]  # (H, W) of its training images
    class_names: list[str]
    accuracy: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)  # how it was made: for people


def save_classifier(trained: TrainedClassifier, folder: Path | str, *, card: str | None = None) -> Path:
    """Write a classifier's folder, replacing one that is there only when the new one is complete."""
    config = {
        "name": trained.name,
        "classifier": classifier_config(trained.net),
        "size": list(trained.size),
        "class_names": trained.class_names,
        "accuracy": trained.accuracy,
        "provenance": trained.provenance,
    }
    return save_folder(replaceable(folder, PARTS, "a classifier"), config, {CLASSIFIER: trained.net}, card)


def load_classifier(folder: Path | str) -> TrainedClassifier:
    """Read a classifier's folder, or a run's, every file checked against its sha256, every tensor against the config.

    Raises CheckpointError, one line that names the file, when anything is missing, damaged or does not fit.
    """
    folder = find_bundle(expanded(folder))
    if (folder / CONFIG).is_file() and not (folder / CLASSIFIER).exists():
        raise CheckpointError(
            f"{folder} holds no {CLASSIFIER}: it is no classifier; train one with `seriatim train classifier-cifar10`"
        )
    with opened(folder, CLASSIFIER) as (config, _):
        with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
            net = build_classifier(section(config, "classifier"))
        class_names = check_class_names(config["class_names"], net.classes)
        if not class_names:
            raise ValueError(f"class_names: none given for {net.classes} classes")
        name, size = config["name"], config["size"]
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: {shown(name)} is not a text")
        if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and 1 <= n <= SIDE for n in size)):
            raise ValueError(f"size: {shown(size)} is not allowed; give height and width in pixels, at most {SIDE}")
        accuracy, provenance = section(config, "accuracy"), section(config, "provenance")
        trained = TrainedClassifier(net, name, (size[0], size[1]), class_names, accuracy, provenance)
    fill(net, folder / CLASSIFIER)
    channels_last(net.eval())
    return trained


# --- the extractor ----------------------------------------------------------------------------------------------------


class Classifier(FeatureExtractor):
    """The features of a classifier trained here, and its logits: `--features RUN`, or `--features classifier:RUN`.

    Images of another size are scaled to that of its training images (antialiased, bicubic).
    """

    def __init__(self, trained: TrainedClassifier) -> None:
        super().__init__()
        self.net, self.size = trained.net.eval(), trained.size
        self.name, self.dim = trained.name, trained.net.dim
        self.classes, self.class_names = trained.net.classes, tuple(trained.class_names)
        self.layers = [f"net.stages.{number}" for number in range(len(trained.net.stages))]
        self.config = {
            **classifier_config(trained.net),
            "size": list(self.size),
            "class_names": list(self.class_names),
            "resize": "bicubic, antialiased",
        }

    @classmethod
    @override
    def open(cls, path: Path | None, *, size: tuple[int, int], channels: int) -> Classifier:
        if path is None:
            raise UsageError(
                "features: classifier needs a folder; name that of a trained one, such as classifier:runs/classifier"
            )
        trained = load_classifier(path)
        if trained.net.channels != channels:
            raise UsageError(
                f"features: {path} was trained on images of {trained.net.channels} channels, these have {channels}; "
                "use one trained on such images"
            )
        return cls(trained)

    def forward(self, images: Tensor) -> Features:
        images = images.float()
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(-1, 1)
        features = self.net.features(images)  # (B, F)
        return Features(features, self.net.classify(features))
