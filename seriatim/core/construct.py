"""From plain data to an object: a table of classes, and constructor arguments checked by name."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from seriatim.core.errors import (
    ConfigError,
    ResourceError,
    SeriatimError,
    UsageError,
    is_out_of_memory,
    nearest,
    one_line,
    shown,
)
from seriatim.core.names import SURROGATE

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")

MOST_THREADS = 1024  # of the CPU: far more end the process without a word
# The largest number that an argument of each name may have, wherever it stands in a config.
LARGEST = {
    "tokens": 1 << 20, "dim": 1 << 20, "vocab": 1 << 24, "classes": 1 << 22, "grid": 1 << 20, "group": 1 << 20,
    "width": 1 << 17, "widths": 1 << 17, "hidden": 1 << 17, "condition_width": 1 << 17, "z_dim": 1 << 17,
    "heads": 1 << 14, "buffer": 1 << 14, "prefix": 1 << 14, "caption_dim": 1 << 17, "caption_tokens": 1 << 16,
    "draws": 1 << 12, "train_steps": 100_000, "components": 1 << 16, "bins": 1 << 16, "mlp_ratio": 1 << 10,
    "size": 1 << 14, "patch": 1 << 12, "channels": 1 << 20, "levels": 1 << 24, "code_dim": 1 << 14,
}  # fmt: skip
LARGEST_LAYERS = 1 << 9  # of all of a config together: each is built, even without memory
ENDINGS = {"_channels": 1 << 14, "layers_per_block": 1 << 5}  # of the arguments of an autoencoder, by how they end
MOST_DIGITS = 5000  # longer texts are no numbers to Python
MOST_LEVELS = 16  # of an autoencoder, each at half the size of the one before
SMALL = 1 << 28  # the square of a config's largest size, times the second
LAYERS = re.compile(r"depth|.*layers.*|num_\w*blocks")  # arguments that count layers, diffusers' own included


def check_sizes(config: Mapping[str, Any], where: str) -> None:
    """Refuse numbers that would decide how much is done: before anything is built, and wherever they stand."""
    layers = 0.0
    for path, name, value in numbers(config, where):
        most = next((most for end, most in ENDINGS.items() if name.endswith(end)), LARGEST.get(name, math.inf))
        if LAYERS.fullmatch(name):
            layers += max(0, value)
            if layers > LARGEST_LAYERS:
                raise ConfigError(f"{path}: {shown(value)} is not allowed; at most {LARGEST_LAYERS} layers are built")
        if value > most:
            raise ConfigError(f"{path}: {shown(value)} is not allowed; it must be at most {most}")


def numbers(value: Any, path: str, name: str = "") -> Iterator[tuple[str, str, float]]:
    """Every number of plain data: where it stands, the key that it stands under, and the number."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from numbers(inner, f"{path}.{key}", str(key))
    elif isinstance(value, (list, tuple)):
        if name.endswith(("_channels", "widths")) and len(value) > MOST_LEVELS:
            raise ConfigError(f"{path}: {len(value)} given; at most {MOST_LEVELS} levels are built")
        for inner in value:
            yield from numbers(inner, path, name)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, name, value
    elif isinstance(value, str) and len(value) < MOST_DIGITS:  # "1e9" becomes a number where one is wanted
        with contextlib.suppress(ValueError):
            yield path, name, float(value)


def check_room(build: Callable[[], nn.Module], config: Mapping[str, Any], where: str) -> None:
    """Refuse a module whose weights alone this machine can't hold, before memory is taken for them.

    It is built without memory first, which takes a second: only where the sizes in its config make that worth while.
    """
    first, second = sorted((1, 1, *(value for _, name, value in numbers(config, where) if name != "seed")))[:-3:-1]
    if first * first * second < SMALL:
        return

    import torch

    with torch.device("meta"):
        module = build()
    weights = itertools.chain(module.parameters(), module.buffers())
    needed = sum(t.numel() * t.element_size() for t in weights)
    there = machine_memory()
    if needed > there:
        raise ResourceError(
            f"{where}: its weights take {needed / 2**30:,.1f} GiB, this machine has {there / 2**30:,.1f} GiB of "
            "memory; make it smaller"
        )


def machine_memory() -> float:
    """Bytes that this process may use at most; infinite where the system does not tell."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return physical if limit == resource.RLIM_INFINITY else min(limit, physical)
    except (ImportError, AttributeError, ValueError, OSError):  # Windows has neither
        return math.inf


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
        raise ConfigError(f"{where}.kind: {shown(kind)} is not known{nearest(str(kind)[:100], table)}")
    return kind, rest


def construct(build: Callable[..., T], config: Mapping[str, Any], where: str, **extra: Any) -> T:
    """Call `build(**config, **extra)`; an unknown, missing or unfit argument is one line that names its key."""
    allowed = arguments(build)
    given = {**config, **extra}
    for name in config:
        if name not in allowed:
            raise ConfigError(f"{where}: unknown key {shown(f'{where}.{name}')}{nearest(str(name)[:100], allowed)}")
    for name, parameter in allowed.items():
        if parameter.default is inspect.Parameter.empty and name not in given:
            raise ConfigError(f"{where}.{name}: is required")
    given.update(checked_types(build, config, where))
    try:
        return build(**given)
    except UsageError as error:
        raise ConfigError(f"{where}.{one_line(error)}") from error
    except SeriatimError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            reason = one_line(error)[:120]
            raise ResourceError(f"{where}: does not fit into memory ({reason}); make it smaller") from error
        if not is_ours(build):  # a class of the user's own may fail in any way
            name, kind = getattr(build, "__qualname__", str(build)), type(error).__name__
            raise ConfigError(
                f"{where}: {name} failed with {kind}: {one_line(error)[:300]}; SERIATIM_DEBUG=1 shows where"
            ) from error
        if not isinstance(error, (TypeError, ValueError, RuntimeError, ArithmeticError)):
            raise
        raise ConfigError(f"{where}: {one_line(error)}; check its values") from error


def is_ours(build: Callable[..., Any]) -> bool:
    return str(getattr(build, "__module__", "")).split(".")[0] == __name__.split(".")[0]


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
                message = f"{where}.{name}: {reason[:1].lower()}{reason[1:]} (got {shown(value)})"
                raise ConfigError(message) from None
            except PydanticUserError:  # a type that only its class can check
                continue
    return values
