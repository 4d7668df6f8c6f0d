"""Settings from plain data: one line, the nearest key."""

from __future__ import annotations

from typing import Any

import pytest

from seriatim.core.construct import construct, pop_kind
from seriatim.core.errors import ConfigError, SeriatimError, UsageError, nearest
from seriatim.core.validation import Strict, parse


class Inner(Strict):
    depth: int = 1
    width: int = 2


class Outer(Strict):
    name: str
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"name": "a", "inner": {"dept": 3}}, ("unknown key 'inner.dept'", "did you mean 'depth'")),
        ({"nam": "a"}, ("name: is required", "1 more")),
        ({"name": "a", "iner": {}}, ("unknown key 'iner'", "did you mean 'inner'")),
        ({"name": "a", "inner": {"depth": "many"}}, ("inner.depth", "got 'many'", "integer")),
        ({"name": "a", "zzz": 1}, ("unknown key 'zzz'", "allowed: name, inner")),
    ],
)
def test_parse_names_the_key(data: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Outer, data, where="file.yaml")
    text = str(caught.value)
    assert text.startswith("file.yaml: ") and "\n" not in text
    for word in words:
        assert word in text


class Thing:
    def __init__(self, size: int, *, colour: str = "red") -> None:
        if size < 1:
            raise UsageError(f"size: {size!r} is not allowed; it must be at least 1")
        self.size, self.colour = size + 0, colour


def test_construct() -> None:
    assert construct(Thing, {"size": 2}, "thing", colour="blue").colour == "blue"
    cases: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"size": 1, "color": "x"}, ("thing.color", "did you mean 'colour'")),
        ({}, ("thing.size: is required",)),
        ({"size": 0}, ("thing.size: 0 is not allowed",)),
        ({"size": "big"}, ("thing.size: input should be a valid integer",)),
    ]
    for config, words in cases:
        with pytest.raises(ConfigError) as caught:
            construct(Thing, config, "thing")
        assert all(word in str(caught.value) for word in words), caught.value


def test_pop_kind() -> None:
    assert pop_kind({"kind": "a", "x": 1}, {"a": 0}, "head") == ("a", {"x": 1})
    with pytest.raises(ConfigError, match=r"head\.kind: 'diffusoin' is not known; did you mean 'diffusion'"):
        pop_kind({"kind": "diffusoin"}, {"diffusion": 0}, "head")
    with pytest.raises(ConfigError, match=r"head\.kind: is required"):
        pop_kind({}, {"diffusion": 0}, "head")


def test_every_error_has_its_exit_code() -> None:
    kinds: list[type[SeriatimError]] = [SeriatimError, *SeriatimError.__subclasses__(), ConfigError]
    codes = {cls.__name__: cls.exit_code for cls in kinds}
    assert codes == {
        "SeriatimError": 1, "UsageError": 2, "ConfigError": 2, "DataError": 3, "CheckpointError": 4, "NumericsError": 5,
        "ResourceError": 6, "Stopped": 143,
    }  # fmt: skip
    assert issubclass(UsageError, ValueError)


def test_nearest_lists_what_is_allowed_when_nothing_is_near() -> None:
    assert nearest("qqq", ["cat", "dog"]) == "; allowed: cat, dog"
    assert nearest("dgo", ["cat", "dog"]) == "; did you mean 'dog'?"
