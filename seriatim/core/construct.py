"""From plain data to an object: a table of classes, and constructor arguments checked by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from seriatim.core.errors import ConfigError, UsageError, nearest, one_line

T = TypeVar("T")


def arguments(build: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The named arguments that a constructor takes."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {n: p for n, p in inspect.signature(build).parameters.items() if p.kind in kinds}


def pop_kind(config: Mapping[str, Any], table: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Split `{"kind": name, ...}` into the name, which must be in `table`, and the rest."""
    rest = dict(config)
    kind = rest.pop("kind", None)
    if kind is None:
        raise ConfigError(f"{where}.kind: is required{nearest('', table)}")
    if kind not in table:
        raise ConfigError(f"{where}.kind: {kind!r} is not known{nearest(str(kind), table)}")
    return kind, rest


def construct(build: Callable[..., T], config: Mapping[str, Any], where: str, **extra: Any) -> T:
    """Call `build(**config, **extra)`; an unknown, missing or unfit argument is one line that names its key."""
    allowed = arguments(build)
    given = {**config, **extra}
    for name in config:
        if name not in allowed:
            raise ConfigError(f"{where}: unknown key {where + '.' + name!r}{nearest(name, allowed)}")
    for name, parameter in allowed.items():
        if parameter.default is inspect.Parameter.empty and name not in given:
            raise ConfigError(f"{where}.{name}: is required")
    try:
        return build(**given)
    except UsageError as error:
        raise ConfigError(f"{where}.{one_line(error)}") from error
    except TypeError as error:
        raise ConfigError(f"{where}: {one_line(error)}; check the types of its values") from error
