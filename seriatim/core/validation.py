"""Validated settings: pydantic models whose errors are one line and name the nearest valid key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from seriatim.core.errors import ConfigError, SeriatimError, nearest, shown


class Strict(BaseModel):
    """Frozen settings; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Strict)


def _fields_at(cls: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The names of the fields allowed where `path` points to."""
    for part in path[:-1]:
        field = cls.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        cls = inner
    return list(cls.model_fields)


def parse(cls: type[S], data: Mapping[str, Any], where: str = "", error: type[SeriatimError] = ConfigError) -> S:
    """Validate `data` as `cls`; the first thing wrong becomes one line (prefixed by `where`, a file or verb)."""
    try:
        return cls.model_validate(dict(data))
    except ValidationError as failure:
        first = failure.errors()[0]
        path = tuple(first["loc"])
        key = ".".join(str(part) for part in path)
        prefix = f"{where}: " if where else ""
        more = failure.error_count() - 1
        suffix = f" (and {more} more)" if more else ""
        if first["type"] == "extra_forbidden":
            hint = nearest(str(path[-1]), _fields_at(cls, path))
            raise error(f"{prefix}unknown key {key!r}{hint}{suffix}") from None
        value = first.get("input")
        message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        if first["type"] == "missing":
            raise error(f"{prefix}{key}: is required{suffix}") from None
        got = f" (got {shown(value)})" if key and not isinstance(value, Mapping) else ""
        label = f"{key}: " if key else ""
        raise error(f"{prefix}{label}{message[:1].lower()}{message[1:]}{got}{suffix}") from None


def plain(value: Any) -> Any:
    """NumPy's and torch's scalars and arrays as Python's own."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return tuple(plain(item) for item in value)
    return value
