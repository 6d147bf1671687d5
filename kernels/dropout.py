"""Dropout with counter-based masks in plain torch, its specification: masks are functions of rows' keys. Knows no adapter."""

from __future__ import annotations

import torch
from torch import Tensor


def drop(x_TI: Tensor, keys_T: Tensor, rates_T: Tensor, salt: int) -> Tensor:
    """x with each element zeroed at its row's rate, without scaling the rest; which ones depends on (key, salt, column) alone.

    Keys are int32. The 24 high bits of a 32-bit hash are held against rate * 2^24; C. Wellons' lowbias32 finalizer, twice.
    """
    keys_T = _hash32(keys_T + _as_int32(salt * 0x9E3779B9))
    columns_I = torch.arange(x_TI.shape[1], dtype=torch.int32, device=x_TI.device) * _as_int32(0x85EBCA6B)
    hashes_TI = _hash32(keys_T.unsqueeze(1) + columns_I)
    limits_T = (rates_T * 2**24).round().to(torch.int32)
    return x_TI.masked_fill((hashes_TI >> 8 & 0xFFFFFF) < limits_T.unsqueeze(1), 0.0)


def drop_keys(key: int, positions_W: Tensor) -> Tensor:
    """int32 keys of rows at these positions of a sequence with this key."""
    return _hash32(positions_W.to(torch.int32) * _as_int32(0x9E3779B9) + _as_int32(key))


def _hash32(x: Tensor) -> Tensor:
    """Signed 32-bit integers wrap around as unsigned ones do; shifts are made logical by masks."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * _as_int32(0x846CA68B)
    return x ^ (x >> 16 & 0xFFFF)


def _as_int32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31
