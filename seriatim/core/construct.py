"""From plain data to an object: a table of classes, and constructor arguments checked by name."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from seriatim.core.errors import (
    ConfigError,
    ResourceError,
    SeriatimError,
    UsageError,
    is_out_of_memory,
    nearest,
    one_line,
)
from seriatim.core.names import SURROGATE

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
    if not isinstance(kind, str) or kind not in table:
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
    given.update(checked_types(build, config, where))
    try:
        return build(**given)
    except UsageError as error:
        raise ConfigError(f"{where}.{one_line(error)}") from error
    except (TypeError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        if isinstance(error, SeriatimError):
            raise
        if is_out_of_memory(error):
            reason = one_line(error)[:120]
            raise ResourceError(f"{where}: does not fit into memory ({reason}); make it smaller") from error
        raise ConfigError(f"{where}: {one_line(error)}; check its values") from error


def checked_types(build: Callable[..., Any], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of `config`, each of the type that the constructor's annotation names."""
    from pydantic import PydanticUserError, TypeAdapter, ValidationError

    try:
        hints = typing.get_type_hints(getattr(build, "__init__") if isinstance(build, type) else build)  # noqa: B009
    except (NameError, TypeError):  # annotations that are not importable: a user's class; its own checks must do
        return dict(config)
    values = dict(config)
    for name, value in config.items():
        as_is = isinstance(value, str) and SURROGATE.search(value)  # a path of any bytes, which pydantic refuses
        if name in hints and not as_is:
            try:
                values[name] = TypeAdapter(hints[name]).validate_python(value)
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                message = f"{where}.{name}: {reason[:1].lower()}{reason[1:]} (got {value!r})"
                raise ConfigError(message) from None
            except PydanticUserError:  # a type that only its class can check
                continue
    return values
