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
"""It includes all the others: one unit, so that they are compiled into one another."""
FLAGS = ("-O3", "-ffp-contract=fast", "-fPIC", "-fopenmp")
LEVELS = {
    "amx": ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx512": ("-march=x86-64-v4",),
    "avx2": ("-march=x86-64-v3",),
}
"""What the compiler may use, the best first; `HEDDLE_CPU_LEVEL` names one that is less than what the processor has. It is about
this library alone: below "amx" oneDNN multiplies bfloat16 where the processor can, with what it finds there.
"""
COMPILE_TIMEOUT_S = 120
_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "heddle_packed_inputs": (_INT64, [_INT64, _INT]),
    "heddle_pack": (None, [_POINTER] * 2 + [_INT64] * 3 + [_INT]),
    "heddle_linear": (_INT, [_POINTER, _INT64, _POINTER, _POINTER, _POINTER] + [_INT64] * 4 + [_INT]),
    "heddle_rms_norm": (None, [_POINTER] * 5 + [_INT64] * 2 + [_FLOAT, _INT]),
    "heddle_rope_and_cache": (None, [_POINTER, _INT64] * 3 + [_POINTER] * 6 + [_INT64] * 4 + [_INT]),
    "heddle_silu_mul": (None, [_POINTER] * 2 + [_INT64] * 2 + [_INT]),
    "heddle_lora": (_INT, [_POINTER, _INT64, _POINTER, _INT64, _INT64, _POINTER, _POINTER] + [_INT64] * 3 + [_INT]),
    "heddle_commit_kv": (_INT, [_POINTER, _INT64, _POINTER, _POINTER] + [_INT64] * 2),
    "heddle_draw": (_INT, [_POINTER, _INT64, _POINTER, _INT64, _POINTER, _INT]),
    "heddle_layers_width": (_INT64, [_POINTER]),
    "heddle_layers": (_INT, [_POINTER] * 9 + [_INT64] + [_POINTER] * 3),
    "heddle_attention": (_INT, [_POINTER] * 8 + [_INT64] * 5 + [_FLOAT, _INT64, _INT]),
    "heddle_linear_backward": (_INT, [_POINTER, _INT64, _POINTER, _POINTER] + [_INT64] * 3 + [_INT] * 2),
    "heddle_lora_backward": (_INT, [_POINTER] * 2 + [_INT64] * 3),
    "heddle_rms_norm_backward": (None, [_POINTER] * 4 + [_INT64] * 2 + [_FLOAT, _INT]),
    "heddle_silu_mul_backward": (None, [_POINTER] * 3 + [_INT64] * 2 + [_INT]),
    "heddle_losses": (None, [_POINTER] * 4 + [_INT64] * 2 + [_INT]),
    "heddle_attention_backward": (_INT, [_POINTER] * 7 + [_INT64, _POINTER] + [_INT64] * 3 + [_FLOAT, _INT, _INT]),
}


class BuildError(RuntimeError):
    """The library could not be built or loaded here; the message has the compiler's words."""


class LevelError(BuildError):
    """The compiler refuses the source, or the library does not load: those of a lower level may do."""


def library() -> ctypes.CDLL | None:
    """The library, built now if this user has none yet (two seconds); None where it cannot be had."""
    return loaded()[1]


def level() -> str:
    """The level that the library is of; "none" where there is none."""
    return loaded()[0]


@functools.cache
def loaded() -> tuple[str, ctypes.CDLL | None]:
    """Level and library: the best that compiler and machine make together, as a compiler may be older than its processor."""
    for of_level in levels() if is_supported() else ():
        try:
            return of_level, load(find(of_level) or build(cache_dir() / "native", of_level))
        except BuildError as error:
            message = f"compiled CPU operations ({of_level}) are not available, others are slower: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            if not isinstance(error, LevelError):
                break
    return "none", None


def is_supported() -> bool:
    """Whether this is Linux on a processor with AVX2 and FMA, and there is a compiler or a library built before."""
    is_x86 = platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64")
    has_avx2 = is_x86 and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    return has_avx2 and (compiler() is not None or any(find(of_level) for of_level in levels()))


def levels() -> list[str]:
    """Those of LEVELS that processor and kernel have, at most `HEDDLE_CPU_LEVEL`, the best first.

    Raises ValueError for another word.
    """
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    has_tiles = torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
    has_amx = has_avx512 and torch.cpu._is_avx512_bf16_supported() and has_tiles
    available = [name for name, is_there in zip(LEVELS, (has_amx, has_avx512, True), strict=True) if is_there]
    wanted = os.environ.get("HEDDLE_CPU_LEVEL") or available[0]
    if wanted not in LEVELS:
        raise ValueError(f"HEDDLE_CPU_LEVEL={wanted}: not one of {', '.join(LEVELS)}")
    return available[available.index(wanted) :] if wanted in available else available


def compiler() -> str | None:
    """The C compiler: $CC, else cc or gcc."""
    return next((found for name in (os.environ.get("CC"), "cc", "gcc") if name and (found := shutil.which(name))), None)


def file_name(of_level: str) -> str:
    """The library's name; another one for another source or level."""
    sources = b"".join(path.read_bytes() for path in sorted(SOURCE.parent.glob("*.[ch]")))
    key = hashlib.sha256(sources + " ".join((*FLAGS, *LEVELS[of_level])).encode()).hexdigest()[:16]
    return f"heddle_cpu-{of_level}-{key}.so"


def find(of_level: str) -> Path | None:
    """The library that was built before: beside its source, as in our image, or in the user's cache."""
    places = (folder / file_name(of_level) for folder in (SOURCE.parent, cache_dir() / "native"))
    return next((path for path in places if path.exists()), None)


def build(folder: Path, of_level: str) -> Path:
    """Compile into this folder. Raises BuildError."""
    if (command := compiler()) is None:
        raise BuildError("there is no C compiler (cc or gcc)")
    built = folder / file_name(of_level)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            obj, lib = Path(scratch, "heddle_cpu.o"), Path(scratch, "heddle_cpu.so")
            # Linked without -fopenmp: the threads are those of torch's OpenMP, not of a second one that fights for the cores.
            flags = [*FLAGS, *LEVELS[of_level]]
            for step in ([*flags, "-c", str(SOURCE), "-o", str(obj)], ["-shared", str(obj), "-o", str(lib), "-lm"]):
                subprocess.run([command, *step], check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
            os.replace(lib, built)
    except subprocess.CalledProcessError as error:
        raise LevelError(f"{command} failed: {error.stderr.strip()[-500:]}") from error
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
        raise LevelError(str(error)) from error
    return loaded


if __name__ == "__main__":  # python -m kernels.native.build: beside the source, for whoever makes an image
    for each in LEVELS:
        print(build(SOURCE.parent, each))
