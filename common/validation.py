"""What msgspec says of a value that does not fit a type, for users: where it is, and what would be valid. Knows no request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import inspect

_PLACE = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_STEP = re.compile(r"([^.\[\]]+)|\[[^\]]*\]")
_FIELD = re.compile(r"^Object (?:contains unknown|missing required) field `([^`]+)`")
_NAMES: tuple[tuple[type[inspect.Type], str], ...] = (
    (inspect.IntType, "an integer"),
    (inspect.FloatType, "a number"),
    (inspect.DictType, "an object"),
    (inspect.StructType, "an object"),
)
"""What else may stand where one of a few values is expected."""


@dataclass(frozen=True)
class Fault:
    """`problem` is msgspec's text without the place; of a value that is none of a few, it names those. `param` is the field's
    path as clients write it, empty for the whole.
    """

    problem: str
    param: str

    def __str__(self) -> str:
        return f"{self.param}: {self.problem}" if self.param else self.problem


def find_fault(error: msgspec.ValidationError, kind: Any) -> Fault:
    """What is wrong with a value that was to be a `kind`."""
    text = str(error)
    place = _PLACE.search(text)
    problem, path = (text[: place.start()], place[1]) if place else (text, "")
    if problem.startswith("Invalid enum value"):
        problem = f"{problem}; valid: {', '.join(_valid(_types_at(inspect.type_info(kind), path)))}"
    field = _FIELD.match(problem)
    steps = (path.removesuffix("[...]"), field[1] if field else "")  # [...] is a value of a dictionary
    return Fault(problem, ".".join(step for step in steps if step))


def _types_at(root: inspect.Type, path: str) -> list[inspect.Type]:
    """The types that a value at msgspec's path may have."""
    types = list(_alternatives(root))
    for field in _STEP.findall(path):
        types = [found for kind in types for found in _inside(kind, field)]
    return types


def _inside(kind: inspect.Type, field: str) -> Iterator[inspect.Type]:
    """The types of this field, or if it is empty of an item."""
    if isinstance(kind, inspect.StructType):
        for each in kind.fields:
            if each.encode_name == field:
                yield from _alternatives(each.type)
    elif isinstance(kind, inspect.DictType) and not field:
        yield from _alternatives(kind.value_type)
    elif isinstance(kind, inspect.ListType) and not field:
        yield from _alternatives(kind.item_type)


def _alternatives(kind: inspect.Type) -> Iterator[inspect.Type]:
    if isinstance(kind, inspect.UnionType):
        for each in kind.types:
            yield from _alternatives(each)
    elif isinstance(kind, inspect.Metadata):
        yield from _alternatives(kind.type)
    else:
        yield kind


def _valid(types: Iterable[inspect.Type]) -> list[str]:
    """Values first, then what kinds of others there may be."""
    values, others = list[str](), list[str]()
    for kind in types:
        if isinstance(kind, inspect.LiteralType):
            values += map(repr, kind.values)
        elif isinstance(kind, inspect.ListType):
            others.append(f"an array of {', '.join(_valid(_alternatives(kind.item_type)))}".removesuffix(" of "))
        else:
            others += [name for known, name in _NAMES if isinstance(kind, known)]
    return values + others
