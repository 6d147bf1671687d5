"""Values that do not fit: the field's path, and what would be valid where one of a few values is expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import UNSET, Meta, UnsetType

from common.validation import Fault, find_fault

Thread = Literal["warp", "weft"]


class Cloth(msgspec.Struct, forbid_unknown_fields=True):
    """A bit of everything."""

    name: str
    width: Annotated[int, Meta(ge=1)] | Literal["auto"] = "auto"
    threads: Annotated[list[Thread], Meta(min_length=1)] | Literal["all"] | UnsetType = UNSET
    by_color: dict[Annotated[str, Meta(max_length=3)], Thread] | None = None
    lining: Cloth | None = None
    weave: Annotated[Literal["plain", "twill"] | None, Meta(description="How it is woven.")] = None


def from_json(value: Any) -> Cloth:
    return msgspec.json.decode(msgspec.json.encode(value), type=Cloth)


def from_map(value: Any) -> Cloth:
    return msgspec.convert(value, Cloth)


@pytest.mark.parametrize("decode", [from_json, from_map])
@pytest.mark.parametrize(
    ("value", "param", "problem"),
    [
        ({"weave": "satin"}, "weave", "Invalid enum value 'satin'; valid: 'plain', 'twill'"),
        ({"width": "wide"}, "width", "Invalid enum value 'wide'; valid: 'auto', an integer"),
        ({"threads": ["warp", "x"]}, "threads[1]", "Invalid enum value 'x'; valid: 'warp', 'weft'"),
        ({"threads": "x"}, "threads", "Invalid enum value 'x'; valid: 'all', an array of 'warp', 'weft'"),
        ({"by_color": {"red": "x"}}, "by_color", "Invalid enum value 'x'; valid: 'warp', 'weft'"),
        ({"lining": {"name": "silk", "weave": "x"}}, "lining.weave", "Invalid enum value 'x'; valid: 'plain', 'twill'"),
        ({"weave": " - at `$.name`"}, "weave", "Invalid enum value ' - at `$.name`'; valid: 'plain', 'twill'"),
        ({"width": 0}, "width", "Expected `int` >= 1"),
        ({"by_color": {"crimson": "warp"}}, "by_color", "Expected `str` of length <= 3"),
        ({"lining": {}}, "lining.name", "Object missing required field `name`"),
        ({"lining": {"name": "silk", "hue": 1}}, "lining.hue", "Object contains unknown field `hue`"),
        ({"hue": 1}, "hue", "Object contains unknown field `hue`"),
    ],
)
def test_the_fault_is_found(decode: Callable[[Any], Cloth], value: dict[str, Any], param: str, problem: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        decode({"name": "linen", **value})
    fault = find_fault(caught.value, Cloth)
    assert fault == Fault(problem, param)
    assert str(fault) == f"{param}: {problem}"


def test_a_value_that_is_wrong_as_a_whole_has_no_param() -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        from_json(3)
    assert str(find_fault(caught.value, Cloth)) == "Expected `object`, got `int`"
