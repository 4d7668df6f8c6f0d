"""Recipes: read, overridden, checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from seriatim.core.errors import ConfigError, UsageError
from seriatim.core.validation import parse
from seriatim.training.config import Recipe, dump, packaged, read_any, read_recipe
from seriatim.training.setup import build


def test_packaged_recipes_are_valid() -> None:
    assert "mar-digits" in packaged()
    for name in packaged():
        recipe = read_any(name)
        assert recipe.name == name and recipe.description


def test_overrides() -> None:
    recipe = read_recipe(
        "mar-digits",
        ["training.images=5000", "model.depth=[1, 2]", "model.head.width=32", "training.betas=[0.8, 0.9]", "seed=3"],
    )
    assert recipe.training.images == 5000 and recipe.model["depth"] == [1, 2] and recipe.model["head"]["width"] == 32
    assert recipe.training.betas == (0.8, 0.9) and recipe.seed == 3
    assert recipe.model["head"]["kind"] == "diffusion", "the rest of a section stays"


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    """YAML 1.1 takes 1e-1 for a string; nobody who writes it means one."""
    recipe = read_recipe("mar-digits", ["model.dropout=1e-1", "training.learning_rate=1e-3"])
    assert recipe.training.learning_rate == 1e-3
    assert build(recipe)[2].backbone.config["dropout"] == 0.1


def test_dump_is_read_back(tmp_path: Path) -> None:
    recipe = read_recipe("mar-digits", ["training.images=7"])
    (tmp_path / "r.yaml").write_text(dump(recipe))
    assert read_recipe(str(tmp_path / "r.yaml")) == recipe


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.imagse=5"], "unknown key 'training.imagse'; did you mean 'images'"),
        (["trainning.images=5"], "unknown key 'trainning.images'; did you mean 'training'"),
        (["training.images=many"], "training.images"),
        (["training.images=0"], "training.images"),
        (["training.images"], "'training.images' is not an override"),
        (["training.learning_rate=.nan"], "training.learning_rate"),
        (["training.schedule=step"], "training.schedule"),
        (["training.images.more=5"], "'images' is a value, not a section"),
        (["training.images=[1"], "is not YAML"),
        (["name="], "name"),
        (["training.betas=[0.9, 1.5]"], "training.betas.1"),
        (["seed=99999999999999999999"], "seed"),
    ],
)
def test_what_is_wrong_is_named(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_recipe("mar-digits", overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.widht=5"], "unknown key 'model.widht'; did you mean 'width'"),
        (["model.head.dept=5"], "unknown key 'model.head.dept'; did you mean 'depth'"),
        (["model.width=big"], "model"),
        (["data.kind=digit"], "data.kind: 'digit' is not known; did you mean 'digits'"),
        (["data.helt_out=true"], "did you mean 'held_out'"),
        (["tokenizer.patch=9"], "tokenizer.patch: 9 is not allowed"),
        (["tokenizer.size=16"], "tokenizer: made for images of 1 x 16 x 16, but the data has 1 x 8 x 8"),
        (["model.classes=5"], "model.classes: 5 does not fit"),
        (["sampling.guidence_scale=2"], "did you mean 'guidance_scale'"),
        (["sampling.temperature=-1"], "sampling: temperature"),
        (["sampling.num_diffusion_steps=2000"], "sampling: num_diffusion_steps: 2000"),
        (["sampling.class_labels=[99]"], "sampling: class_labels: 99 is out of range"),
        (["model.head.train_steps=40"], "sampling: num_diffusion_steps: 50"),
        (["model.head.train_steps=0"], "model.head.train_steps: 0"),
        (["model.mlp_ratio=abc"], "model.mlp_ratio: input should be a valid number"),
        (["model.mlp_ratio=-1"], "model"),
        (["model.dropout=wet"], "model.dropout: input should be a valid number"),
        (["tokenizer.size=abc"], "tokenizer.size"),
        (["tokenizer.size=[8]"], "tokenizer"),
        (["tokenizer.levels=abc"], "tokenizer.levels"),
        (["data.kind=[1]"], "data.kind: [1] is not known"),
        (["data.held_out=maybe"], "data.held_out: input should be a valid boolean"),
    ],
)
def test_parts_that_do_not_fit_are_named_before_anything_is_done(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(read_recipe("mar-digits", overrides))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_sampling_default_that_the_head_does_not_have_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe whose head was changed by an override keeps the defaults of the head that it had."""
    build(read_recipe("mar-digits"))
    assert capsys.readouterr().err == ""
    build(read_recipe("mar-digits", ["model.head={kind: energy, width: 32, depth: 1}"]))
    told = "sampling.num_diffusion_steps: is left out, since the Energy head has no such option\n"
    assert capsys.readouterr().err == told


PATHS = [
    "/somewhere/else", "a/b", "..", ".", "../x", "a/../../b", "x\\y", "C:x", ".hidden", "a..b", "nul\0", "line\nbreak",
    "tab\t", " ", "", "x" * 101, "\u00e9" * 51, "\ud800", "bidi\u202e",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["mar-digits", "classifier-cifar10-tiny"])
@pytest.mark.parametrize("name", PATHS, ids=ascii)
def test_a_name_that_is_a_path_is_refused(name: str, kind: str) -> None:
    """A run's folder is called by it, so that a recipe from anywhere could write anywhere."""
    values = read_any(kind).model_dump()
    with pytest.raises(ConfigError) as caught:
        parse(type(read_any(kind)), {**values, "name": name})
    assert str(caught.value).startswith("name: must ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mar-digits", "Versuch 2, größer", "実験", "v1.2_b", "x" * 100, "-", "~"])
def test_a_name_that_is_none_is_taken(name: str) -> None:
    assert parse(Recipe, {**read_any("mar-digits").model_dump(), "name": name}).name == name


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a file nor a packaged recipe; did you mean 'mar-digits'"):
        read_recipe("mar-digit")
    for content, words in ((b"[1, 2]", "not a mapping"), (b"a: [", "is not YAML"), (b"\xff\xfe\x00", "is not UTF-8")):
        (tmp_path / "bad.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            read_recipe(str(tmp_path / "bad.yaml"))
    (tmp_path / "kind.yaml").write_text("kind: clasifier\nname: x")
    with pytest.raises(ConfigError, match=r"kind.yaml: kind: 'clasifier' is not known; did you mean 'classifier'"):
        read_recipe(str(tmp_path / "kind.yaml"))
    (tmp_path / "tag.yaml").write_text("a: !!python/object/apply:os.system ['touch canary']")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_recipe(str(tmp_path / "tag.yaml"))
    assert not Path("canary").exists()
