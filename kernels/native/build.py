"""The compiled library: built into the user's cache at first use, loaded with ctypes. Knows compilers and symbols, not tensors.

A machine without a compiler, or with another kind of processor, has none: then `library` is None and torch does the work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from kernels.cache import cache_dir

SOURCE = Path(__file__).with_name("heddle_cpu.c")
FLAGS = ("-O3", "-march=x86-64-v3", "-ffp-contract=fast", "-fPIC", "-fopenmp")
COMPILE_TIMEOUT_S = 120
_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "heddle_pack": (None, [_POINTER] * 2 + [_INT64] * 3 + [_INT]),
    "heddle_linear": (_INT, [_POINTER, _INT64, _POINTER, _POINTER, _POINTER] + [_INT64] * 4 + [_INT]),
    "heddle_rms_norm": (None, [_POINTER] * 5 + [_INT64] * 2 + [_FLOAT, _INT]),
    "heddle_rope_and_cache": (None, [_POINTER, _INT64] * 3 + [_POINTER] * 6 + [_INT64] * 4 + [_INT]),
    "heddle_silu_mul": (None, [_POINTER] * 2 + [_INT64] * 2 + [_INT]),
    "heddle_lora": (_INT, [_POINTER, _INT64, _POINTER, _INT64, _INT64, _POINTER, _POINTER] + [_INT64] * 3 + [_INT]),
    "heddle_commit_kv": (_INT, [_POINTER, _INT64, _POINTER, _POINTER] + [_INT64] * 2),
    "heddle_attention": (_INT, [_POINTER] * 8 + [_INT64] * 5 + [_FLOAT, _INT64, _INT]),
}


class BuildError(RuntimeError):
    """The library could not be built or loaded here; the message has the compiler's words."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, built now if this user has none yet (two seconds); None where it cannot be had."""
    if not is_supported():
        return None
    try:
        return load(build(cache_dir()))
    except BuildError as error:
        warnings.warn(f"compiled CPU operations are not available, torch's are slower: {error}", RuntimeWarning, stacklevel=2)
        return None


def is_supported() -> bool:
    """Whether this processor has AVX2 and FMA, and there is a compiler or a library built before."""
    has_avx2 = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    return has_avx2 and (compiler() is not None or target(cache_dir()).exists())


def compiler() -> str | None:
    """The C compiler: $CC, else cc, gcc or clang."""
    return next((found for name in (os.environ.get("CC"), "cc", "gcc") if name and (found := shutil.which(name))), None)


def target(cache: Path) -> Path:
    """Where the library of this source is kept."""
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    return cache / "native" / f"heddle_cpu-{key}.so"


def build(cache: Path) -> Path:
    """Compile unless it was compiled before. Raises BuildError."""
    built = target(cache)
    if built.exists():
        return built
    if (command := compiler()) is None:
        raise BuildError("there is no C compiler (cc or gcc)")
    try:
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            obj, lib = Path(folder, "heddle_cpu.o"), Path(folder, "heddle_cpu.so")
            # Linked without -fopenmp: the threads are those of torch's OpenMP, not of a second one that fights for the cores.
            for step in ([*FLAGS, "-c", str(SOURCE), "-o", str(obj)], ["-shared", str(obj), "-o", str(lib), "-lm"]):
                subprocess.run([command, *step], check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
            os.replace(lib, built)
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{command} failed: {error.stderr.strip()[-500:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(str(error)) from error
    return built


def load(path: Path) -> ctypes.CDLL:
    """The library with its functions' types. Raises BuildError if it cannot be loaded."""
    try:
        loaded = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise BuildError(str(error)) from error
    return loaded
