"""Bytes to message and back: msgpack packs, msgspec validates. Knows no transport."""

from __future__ import annotations

from typing import Any, TypeVar

import msgpack
import msgspec

T = TypeVar("T")


class MalformedMessageError(ValueError):
    """The bytes are not a message of the expected type."""


def encode(message: Any) -> bytes:
    """The message as MessagePack, with its type's tag."""
    packed: bytes = msgpack.packb(msgspec.to_builtins(message))
    return packed


def decode(data: bytes, expected: type[T]) -> T:
    """The message in `data`; `expected` may be one type or a union. Unknown fields are ignored.

    Raises MalformedMessageError for anything else than a valid message of that type.
    """
    try:
        return msgspec.convert(msgpack.unpackb(data), expected)
    except (msgspec.ValidationError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise MalformedMessageError(str(error) or type(error).__name__) from error
