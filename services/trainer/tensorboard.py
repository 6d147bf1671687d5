"""TensorBoard's event files: scalars as framed protocol buffers. Knows the format alone, no job and no file system.

Written here in a few lines because the libraries that write it bring gRPC and a web server (tensorboard) or import torch where
there is one (tensorboardX).
Format: TFRecord frames (length, masked CRC-32C, data, masked CRC-32C) of tensorflow.Event messages.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

_POLYNOMIAL = 0x82F63B78
"""Castagnoli's, reflected."""


def header(wall_time: float) -> bytes:
    """The first record of a file."""
    return _record(_event(wall_time, 0, _bytes(3, b"brain.Event:2")))


def restart(wall_time: float, step: int) -> bytes:
    """A record that makes readers forget what earlier files of the run say of steps from `step` on."""
    session_start = _varint_field(1, 1)
    return _record(_event(wall_time, step, _bytes(7, session_start)))


def scalars(wall_time: float, step: int, values: Mapping[str, float]) -> bytes:
    """A record of one step's values by tag."""
    summary = b"".join(_bytes(1, _bytes(1, tag.encode()) + b"\x15" + struct.pack("<f", value)) for tag, value in values.items())
    return _record(_event(wall_time, step, _bytes(5, summary)))


def _event(wall_time: float, step: int, content: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", wall_time) + (_varint_field(2, step) if step else b"") + content


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _masked_crc(length) + data + _masked_crc(data)


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _varint_field(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc_of_byte(crc: int) -> int:
    for _ in range(8):
        crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
    return crc


_TABLE = [_crc_of_byte(byte) for byte in range(256)]
