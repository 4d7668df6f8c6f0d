"""Validates settings with pydantic; an error is one line and suggests the nearest valid key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from seriatim.core.errors import ConfigError, SeriatimError, nearest, shown

NO_NUMBER = "must be a number, not true or false"


def takes(annotation: Any, kind: type) -> bool:
    """Whether a type annotation names `kind` anywhere."""
    return annotation is kind or any(takes(part, kind) for part in get_args(annotation))


def misplaced_truth(annotation: Any, value: Any) -> bool:
    """Whether `value` is or holds True or False where only numbers are meant. Python would take them for 1 and 0."""
    values = value if isinstance(value, (list, tuple)) else (value,)
    if not any(isinstance(each, bool) for each in values) or takes(annotation, bool) or takes(annotation, str):
        return False
    return takes(annotation, int) or takes(annotation, float)


class Strict(BaseModel):
    """Base class of immutable settings, in which an unknown key is an error, and so is a truth value for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def refuse_misplaced_truth(cls, value: Any, info: ValidationInfo) -> Any:
        if misplaced_truth(cls.model_fields[str(info.field_name)].annotation, value):
            raise ValueError(NO_NUMBER)
        return value


S = TypeVar("S", bound=Strict)


def _fields_at(cls: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The names of the fields that are allowed at `path`."""
    for part in path[:-1]:
        field = cls.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        cls = inner
    return list(cls.model_fields)


def parse(cls: type[S], data: Mapping[str, Any], where: str = "", error: type[SeriatimError] = ConfigError) -> S:
    """Validate `data` as `cls` and return it.

    The first fault raises `error` with one line, which starts with `where` (the name of a file or command).
    """
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
    """Scalars and arrays of NumPy and torch as Python numbers and (nested) tuples; other values are unchanged."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return tuple(plain(item) for item in value)
    return value
