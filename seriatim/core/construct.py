"""Builds an object from plain data: looks its class up in a table, and checks the constructor arguments by name."""

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
    nearest_part,
    one_line,
    shown,
)
from seriatim.core.names import SURROGATE

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")

MOST_AT_ONCE = 1 << 20  # images of a batch
MOST_WORKERS = 256  # processes
MOST_THREADS = 1024  # CPU threads; far more than this can end the process without an error message
# The largest value of each named argument, at any level of a config.
LARGEST = {
    "tokens": 1 << 20,
    "dim": 1 << 20,
    "vocab": 1 << 24,
    "classes": 1 << 22,
    "grid": 1 << 20,
    "group": 1 << 20,
    "width": 1 << 17,
    "widths": 1 << 17,
    "hidden": 1 << 17,
    "condition_width": 1 << 17,
    "z_dim": 1 << 17,
    "heads": 1 << 14,
    "buffer": 1 << 14,
    "prefix": 1 << 14,
    "caption_dim": 1 << 17,
    "caption_tokens": 1 << 16,
    "draws": 1 << 12,
    "train_steps": 100_000,
    "components": 1 << 16,
    "bins": 1 << 16,
    "mlp_ratio": 1 << 10,
    "size": 1 << 14,
    "patch": 1 << 12,
    "channels": 1 << 20,
    "levels": 1 << 24,
    "code_dim": 1 << 14,
}
LARGEST_LAYERS = 1 << 9  # layers of a whole config; the limit also bounds the time to build them on the meta device
ENDINGS = {"_channels": 1 << 14, "layers_per_block": 1 << 5}  # the same limits for autoencoders, by ending of the name
MOST_DIGITS = 5000  # Python does not convert longer texts to numbers
MOST_LEVELS = 16  # levels of an autoencoder; each one halves the height and width
SMALL = 1 << 28  # (largest number in a config)^2 times the second largest; below this, memory needs no check
LAYERS = re.compile(r"depth|.*layers.*|num_\w*blocks")  # names of arguments that count layers, including diffusers'


def check_sizes(config: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for a number that would make the model too large, at any level of `config`.

    This runs before anything is built, because building is what takes the memory and the time.
    """
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
    """Iterate over all numbers in nested plain data, as (path of the number, its key, the number)."""
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
    elif isinstance(value, str) and len(value) < MOST_DIGITS:  # pydantic would convert the text "1e9" to a number
        with contextlib.suppress(ValueError):
            yield path, name, float(value)


def check_room(build: Callable[[], nn.Module], config: Mapping[str, Any], where: str) -> None:
    """Raise ResourceError for a module whose weights alone do not fit into this machine's memory.

    The module is built on the meta device, which allocates no memory but takes about a second. Configs whose numbers
    are small (below SMALL) skip this check.
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
    """The largest number of bytes that this process may use; infinite where the system does not tell."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return physical if limit == resource.RLIM_INFINITY else min(limit, physical)
    except (ImportError, AttributeError, ValueError, OSError):  # Windows has neither `resource` nor `sysconf`
        return math.inf


def arguments(build: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments that a constructor accepts by name: name -> inspect.Parameter."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {n: p for n, p in inspect.signature(build).parameters.items() if p.kind in kinds}


def pop_kind(config: Mapping[str, Any], table: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Split `{"kind": name, ...}` into the name and the rest; raises ConfigError unless the name is in `table`."""
    rest = dict(config)
    kind = rest.pop("kind", None)
    if kind is None:
        raise ConfigError(f"{where}.kind: is required{nearest('', table)}")
    if not isinstance(kind, str) or kind not in table:
        raise ConfigError(f"{where}.kind: {shown(kind)} is not known{nearest_part(str(kind)[:100], table)}")
    return kind, rest


def construct(build: Callable[..., T], config: Mapping[str, Any], where: str, **extra: Any) -> T:
    """Return `build(**config, **extra)`.

    An unknown, missing or wrong argument raises ConfigError, and a lack of memory raises ResourceError; the message is
    one line that names the key.
    """
    allowed = arguments(build)
    given = {**config, **extra}
    for name in config:
        if name not in allowed:
            raise ConfigError(f"{where}: unknown key {shown(f'{where}.{name}')}{nearest(str(name)[:100], allowed)}")
    for name, parameter in allowed.items():
        if parameter.default is inspect.Parameter.empty and name not in given:
            raise ConfigError(f"{where}.{name}: is required")
    if config.get("path") == "":  # as a path it would mean the current folder
        raise ConfigError(f"{where}.path: is empty; name a file or folder")
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
    """The values of `config`, each converted to the annotated type of the constructor's argument, or a ConfigError."""
    from pydantic import PydanticUserError, TypeAdapter, ValidationError

    from seriatim.core.validation import NO_NUMBER, misplaced_truth

    try:
        hints = typing.get_type_hints(getattr(build, "__init__") if isinstance(build, type) else build)  # noqa: B009
    except (NameError, TypeError):  # a user's class may have annotations that can't be resolved; it checks itself
        return dict(config)
    values = dict(config)
    for name, value in config.items():
        as_is = isinstance(value, str) and SURROGATE.search(value)  # pydantic refuses paths that are not valid UTF-8
        if name in hints and not as_is:
            if misplaced_truth(hints[name], value):
                raise ConfigError(f"{where}.{name}: {NO_NUMBER} (got {shown(value)})")
            try:
                values[name] = TypeAdapter(hints[name]).validate_python(value)
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                message = f"{where}.{name}: {reason[:1].lower()}{reason[1:]} (got {shown(value)})"
                raise ConfigError(message) from None
            except PydanticUserError:  # pydantic has no check for this type, so the class must check the value itself
                continue
    return values
