"""The classifier: its network, its folder, and as a feature extractor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_bundle

from seriatim.checkpoints.native import load_bundle, save_bundle
from seriatim.core.errors import CheckpointError, ConfigError, NumericsError, SeriatimError, UsageError
from seriatim.evaluation.features import open_features
from seriatim.evaluation.reference import ArrayImages
from seriatim.evaluation.residual_net import (
    CLASSIFIERS,
    ResNet,
    TrainedClassifier,
    build_classifier,
    load_classifier,
    save_classifier,
)
from seriatim.evaluation.run import evaluate
from seriatim.models.build import seeded
from seriatim.pipeline.pipeline import Pipeline

SMALL = {"kind": "resnet", "widths": [8, 8], "depth": [1, 0]}


def trained(classes: int = 3, channels: int = 3) -> TrainedClassifier:
    with seeded(0):
        net = build_classifier(SMALL, classes=classes, channels=channels)
    net.whiten(images(32, channels))
    net.train()(torch.randn(8, channels, 8, 8, generator=torch.Generator().manual_seed(1)))  # batch norm has seen some
    return TrainedClassifier(net.eval(), "small", (8, 8), ["cat", "dog", "horse"][:classes], {"test": 0.9}, {"of": "x"})


def test_the_stem_whitens() -> None:
    """Each filter's output has mean 0 and variance 1, and no two correlate."""
    mixed = torch.nn.functional.avg_pool2d(images(64, side=24), 3, stride=1) * torch.tensor([1.0, 0.5, 0.1]).view(
        3, 1, 1
    )
    net = ResNet(2, widths=[4], depth=[0])
    net.whiten(mixed + 0.3)
    out = torch.conv2d(mixed + 0.3, net.filters, net.shift)
    values = out.movedim(1, 0).flatten(1).double()  # (2 x 12, outputs)
    assert values.mean(dim=1).abs().max() < 1e-3 and torch.equal(net.filters[:12], -net.filters[12:])
    covariance = values[:12].cov()
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 1e-3
    assert 0.5 < covariance.diagonal().min() and covariance.diagonal().max() < 1.001
    net.whiten(torch.zeros(4, 3, 8, 8))
    assert torch.isfinite(net.filters).all(), "images of one colour"


def images(count: int = 4, channels: int = 3, side: int = 8) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_shapes_and_what_the_network_computes() -> None:
    net = trained().net
    x = images()
    features = net.features(x)
    assert features.shape == (4, 8) and net.dim == 8 and net(x).shape == (4, 3)
    assert torch.equal(net(x), net.classify(features))
    stage = net.stages(torch.conv2d(x, net.filters, net.shift + net.bias).relu())
    assert stage.shape == (4, 8, 1, 1) and torch.allclose(features, stage.flatten(2).max(dim=2).values)
    block: Any = net.get_submodule("stages.0.1")
    inner = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(inner), inner + block.residual(inner)), "y = x + F(x)"
    assert ResNet(10).classify.in_features == 128


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 4}, "unknown key 'model.width'; did you mean 'widths'"),
        ({"widths": []}, "model.widths: [] is not allowed"),
        ({"widths": [4, 0]}, "model.widths: [4, 0] is not allowed"),
        ({"depth": [1]}, "model.depth: [1] is not allowed; it must be the blocks of each of 2 stages"),
        ({"depth": [1, -1]}, "model.depth: [1, -1] is not allowed"),
        ({"widths": "wide"}, "model.widths: "),
        ({"classes": 5}, "model.classes: 5 does not fit the data (3)"),
        ({"kind": "vgg"}, "model.kind: 'vgg' is not known; allowed: resnet"),
    ],
)
def test_settings_that_do_not_fit_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_classifier({**SMALL, **change}, classes=3, channels=3)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_gives_back_what_was_saved(tmp_path: Path) -> None:
    before = trained()
    folder = save_classifier(before, tmp_path / "model", card="# card")
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "classifier.safetensors", "manifest.json", "README.md"
    }  # fmt: skip
    after = load_classifier(tmp_path)  # of a run, that holds it as model/
    assert (after.name, after.size, after.class_names) == ("small", (8, 8), ["cat", "dog", "horse"])
    assert after.accuracy == {"test": 0.9} and after.provenance == {"of": "x"}
    assert torch.equal(after.net(images()), before.net(images()))
    save_classifier(before, folder)  # over itself
    assert not (folder / "README.md").exists()


def test_any_flipped_byte_is_refused(tmp_path: Path) -> None:
    folder = save_classifier(trained(), tmp_path / "model")
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(CheckpointError, match=path.name):
                load_classifier(folder)
        path.unlink()
        with pytest.raises(CheckpointError, match=path.name):
            load_classifier(folder)
        path.write_bytes(whole)
    load_classifier(folder)


def test_folders_that_are_something_else(tmp_path: Path) -> None:
    model = save_bundle(make_bundle(), tmp_path / "generator")
    classifier = save_classifier(trained(), tmp_path / "classifier")
    with pytest.raises(CheckpointError, match=r"generator holds no classifier\.safetensors: it is no classifier"):
        load_classifier(model)
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        load_classifier(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="classifier holds a classifier, which draws nothing"):
        load_bundle(classifier)
    with pytest.raises(UsageError, match=r"holds 'model\.safetensors', which is no part of a classifier"):
        save_classifier(trained(), model)
    with pytest.raises(UsageError, match=r"holds 'classifier\.safetensors', which is no part of a model"):
        save_bundle(make_bundle(), classifier)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not a classifier folder"):
        save_classifier(trained(), tmp_path / "mine")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 3}, "format 3 is not 2"),
        ({"class_names": ["cat"]}, "class_names: 1 given for 3 classes"),
        ({"classifier": {**SMALL, "classes": 4, "channels": 3}, "class_names": list("abcd")}, "classify.bias"),
        ({"classifier": {**SMALL, "kind": "mine"}}, "model.kind: 'mine' is not known"),
        ({"size": [8]}, "cannot be used"),
    ],
)
def test_configs_that_do_not_fit(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    from seriatim.core.files import write_json, write_manifest

    folder = save_classifier(trained(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, **change})
    write_manifest(folder, ("config.json", "classifier.safetensors"))
    with pytest.raises(CheckpointError) as caught:
        load_classifier(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    bad = trained()
    with torch.no_grad():
        bad.net.classify.bias[0] = float("nan")
    with pytest.raises(NumericsError):
        save_classifier(bad, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_network_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(ResNet):
        pass

    own = trained()
    own.net = Mine(3, widths=[8], depth=[0]).eval()
    with pytest.raises(ConfigError, match=r"Mine is not registered; add it with CLASSIFIERS\['name'\] = Mine"):
        save_classifier(own, tmp_path / "model")
    monkeypatch.setitem(CLASSIFIERS, "mine", Mine)
    assert type(load_classifier(save_classifier(own, tmp_path / "model")).net) is Mine


# --- as an extractor ------------------------------------------------------------------------------------------------


def test_as_an_extractor(tmp_path: Path) -> None:
    before = trained()
    folder = save_classifier(before, tmp_path / "run" / "model")
    by_path = open_features(str(tmp_path / "run"), size=(8, 8), channels=3)
    by_name = open_features(f"classifier:{folder}", size=(8, 8), channels=3)
    assert by_path.fingerprint() == by_name.fingerprint()
    assert (by_path.name, by_path.dim, by_path.classes) == ("small", 8, 3) and not by_path.standard
    assert list(by_path.class_names) == ["cat", "dog", "horse"]
    features, logits, _ = by_path(images())
    assert torch.equal(features, before.net.features(images())) and torch.equal(logits, before.net(images()))
    alone = torch.cat([by_path(image).features for image in images().split(1)])
    assert torch.allclose(alone, features, atol=1e-6), "an image's features are its own"
    assert by_path(images(side=16)).features.shape == (4, 8), "another size is scaled"


def test_the_fingerprint_is_that_of_weights_and_names(tmp_path: Path) -> None:
    def fingerprint(of: TrainedClassifier, name: str) -> str:
        folder = save_classifier(of, tmp_path / name)
        return open_features(str(folder), size=(8, 8), channels=3).fingerprint()

    first, other, renamed = trained(), trained(), trained()
    with torch.no_grad():
        other.net.classify.bias[0] += 1e-6
    renamed.class_names[0] = "lion"
    assert fingerprint(first, "a") == fingerprint(trained(), "b")
    assert len({fingerprint(x, "c") for x in (first, other, renamed)}) == 3


def test_evaluate_takes_it(tmp_path: Path) -> None:
    """Its features are compared, and its logits tell whether samples are of their class, matched by name."""

    class Grey(ArrayImages):
        def __init__(self, count: int) -> None:
            chance = np.random.default_rng(count)
            super().__init__(chance.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8), f"grey {count}")
            self.class_names = ["cat", "dog", "horse"]

        def labels(self, index: torch.Tensor) -> torch.Tensor:
            return index % 3

    judge = trained(channels=1)
    judge.class_names = ["horse", "cat", "dog"]
    with torch.no_grad():
        judge.net.classify.bias.copy_(torch.tensor([0.0, 100.0, 0.0]))  # everything is a cat
    extractor = open_features(str(save_classifier(judge, tmp_path / "model")), size=(8, 8), channels=1)
    pipe = Pipeline(make_bundle(), source="x")
    done = evaluate(pipe, Grey(60), tmp_path / "out", num=12, features=extractor, real=Grey(30), quiet=True)
    assert done.figures is not None and "FD[small]" in done.figures
    assert done.figures["accuracy[small]"].value == pytest.approx(1 / 3), "the third of the samples that shall be cats"


@pytest.mark.parametrize(
    ("which", "channels", "words"),
    [
        ("classifier", 3, "features: classifier needs a folder"),
        ("classifier:nowhere", 3, "nowhere: no such folder"),
        ("{folder}", 1, "was trained on images of 3 channels, these have 1"),
    ],
)
def test_extractors_that_cannot_be_opened(tmp_path: Path, which: str, channels: int, words: str) -> None:
    folder = save_classifier(trained(), tmp_path / "model")
    with pytest.raises(SeriatimError) as caught:
        open_features(which.format(folder=folder), size=(8, 8), channels=channels)
    assert words in str(caught.value) and "\n" not in str(caught.value)
