"""Find the class that a label means: a label is the name of a class, in any Unicode form, or its number.

Digits mean the same as a string and as a number, from Python and from the command line. If they are the name of one
class and the number of another, the label is refused as ambiguous; `number:3` says that a number is meant.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from seriatim.core.errors import UsageError, nearest
from seriatim.core.names import as_text, find_name

NONE = "none"  # stands for no class on a command line
NUMBER = "number:"
LONGEST = 18  # a number with more digits counts as larger than any class


def class_number(label: int | str | None, classes: int, names: Sequence[str]) -> int:
    """The number of the class with this number or name; -1 for no class, which is None or "none".

    Raises UsageError if the model has no such class, or if the label is ambiguous.
    """
    if label is None or (label == NONE and label not in names):
        return -1
    text = as_text(str(label))
    explicit = text.startswith(NUMBER) and text not in names
    value = value_of(text.removeprefix(NUMBER) if explicit else text)
    if value is None and explicit:
        raise UsageError(f"class_labels: {text!r} is not allowed; write {NUMBER} and digits, such as {NUMBER}0")
    named = [] if explicit else find_name(text, names)
    if value is not None and not explicit and not named:
        named = digits(tuple(names)).get(value, [])  # "2" may mean the class "02"
    only_a_name = text in names and text != str(value)  # "02" is a name, since the number is "2"
    numbered = [] if value is None or only_a_name or not 0 <= value < classes else [value]
    readings = list(dict.fromkeys([*named, *numbered]))
    if len(readings) == 1:
        return readings[0]
    if readings:
        told = [f"the class named {names[place]!r} ({NUMBER}{place})" for place in named]
        told += [f"class number {place}, named {name_of(place, names)!r} ({NUMBER}{place})" for place in numbered]
        raise UsageError(f"class_labels: {text} is ambiguous: {' or '.join(told)}; write what is in the brackets")
    if value is None:
        raise UsageError(f"class_labels: {text!r} is not a class of this model{nearest(text, names)}")
    if not classes:
        raise UsageError(f"class_labels: {label!r} given, but this model has no classes; leave it out")
    raise UsageError(f"class_labels: {text[:30]} is out of range; this model has classes 0 to {classes - 1}")


def value_of(text: str) -> int | None:
    """The number that a text of digits (of any script) spells, at most 10**LONGEST; None if it is not a number."""
    if not re.fullmatch(r"-?\d+", text):
        return None
    return int(text) if len(text) <= LONGEST else 10**LONGEST


@functools.lru_cache(maxsize=64)
def digits(names: tuple[str, ...]) -> dict[int, list[int]]:
    """A map from each number to the classes whose names spell it in digits, such as "2" or "02"."""
    found: dict[int, list[int]] = {}
    for place, name in enumerate(names):
        value = value_of(name)
        if value is not None:
            found.setdefault(value, []).append(place)
    return found


def name_of(number: int, names: Sequence[str]) -> str:
    return names[number] if number < len(names) else str(number)


def names_of(numbers: Sequence[int], names: Sequence[str]) -> list[str | None]:
    """The names of the classes with these numbers; None for -1, which is no class."""
    return [None if number < 0 else name_of(number, names) for number in numbers]


def label_of(number: int, names: Sequence[str]) -> int | str:
    """A label for class `number` that can't be mistaken for the name of another class."""
    return number if digits(tuple(names)).get(number, [number]) == [number] else f"{NUMBER}{number}"
