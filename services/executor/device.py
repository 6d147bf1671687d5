"""The device that a configuration names, whether memory was what failed on it, and when it is done. Knows no model."""

from __future__ import annotations

import os

import torch

from common.config import ConfigError

MIN_BATCH_TOKENS = 16
"""A pass of so few rows is not made smaller when memory runs out: then its requests or jobs end with an error."""


def choose_device(name: str) -> torch.device:
    """The device of that name. Raises ConfigError when torch knows none such or this machine has none."""
    setting = f"HEDDLE_EXECUTOR_DEVICE={name}"
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            built = "no CUDA device answers here" if torch.version.cuda else "this torch is built without CUDA"
            raise ConfigError(f"{setting}: {built}; cpu works everywhere")
        torch.ones(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # of an unknown name, a missing device, a torch without its kind
        raise ConfigError(f"{setting}: {_first_line(error)}") from error
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU torch has a type for it, on a CPU only words."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def wait_for(device: torch.device) -> None:
    """Returns when the device has done all it was given: before that, a GPU's launches have only been counted, not timed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_bytes(device: torch.device) -> int:
    """All the memory that the device has, or this machine for a CPU: what is larger cannot fit however much is free."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
