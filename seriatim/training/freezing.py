"""Keep parameters of a model as they are (`training.freeze`)."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from seriatim.core.errors import ConfigError, nearest, shown


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Make the parameters whose names match a pattern, such as `backbone.encoder.*`, not require gradients.

    Raises ConfigError for a pattern that no name matches, and if nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        found = [name for name in parameters if fnmatchcase(name, pattern)]
        if not found:
            raise ConfigError(
                f"training.freeze: no parameter matches {shown(pattern)}{nearest(pattern, choices(list(parameters)))}"
            )
        for name in found:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(
            f"training.freeze: {', '.join(patterns)} match all {len(parameters)} parameters, so that nothing would be "
            "trained; leave some out"
        )


def choices(names: Sequence[str]) -> list[str]:
    """The patterns of whole modules and the names of parameters, the shortest first."""
    parts = [name.split(".") for name in names]
    modules = {".".join([*part[:end], "*"]) for part in parts for end in range(1, len(part))}
    return [*sorted(modules, key=lambda pattern: (pattern.count("."), pattern)), *names]
