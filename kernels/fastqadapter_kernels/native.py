"""The native library of the CPU kernels: a plain C library beside this file, loaded when it is first asked for.

It is absent where no C++ compiler was found at install time; everything then works without it, slower.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from pathlib import Path

import fastqadapter_kernels

logger = logging.getLogger(__name__)

ISAS = ("generic", "avx2", "avx512", "avx512_bf16")
ENVIRONMENT_VARIABLE = "FASTQADAPTER_CPU_ISA"
ABI_VERSION = 2  # of kernels/csrc/cpu/api.h

# CMake's names of one module library on Linux and macOS, and on Windows with GCC and with Clang.
_FILE_NAMES = ("libfastqadapter_cpu.so", "libfastqadapter_cpu.dll", "fastqadapter_cpu.dll")

# Where the threads of torch's pool are. A child forked later may be the first to load the library.
_HOME_PROCESS = os.getpid()


def library_path() -> Path | None:
    """The file of the native library, or None where this installation has none."""
    # An editable install keeps the library in another folder than this file, and both folders in __path__.
    candidates = (Path(folder) / name for folder in fastqadapter_kernels.__path__ for name in _FILE_NAMES)
    return next((path for path in candidates if path.is_file()), None)


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The loaded native library, or None where there is none or it cannot be used (logged once)."""
    path = library_path()
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
        version = library.fqa_abi_version()
    except (OSError, AttributeError) as error:  # an AttributeError: a library from before there were versions
        logger.warning("the native CPU library cannot be loaded, going on without it: %s", error)
        return None
    if version != ABI_VERSION:
        logger.warning(
            "the native CPU library %s was built from other sources (version %d, not %d), going on without it: "
            "run pip install again", path, version, ABI_VERSION,
        )  # fmt: skip
        return None
    library.fqa_detected_isa.restype = ctypes.c_char_p
    library.fqa_isa.restype = ctypes.c_char_p
    library.fqa_set_home_process(ctypes.c_int64(_HOME_PROCESS))
    return library


def detected_isa() -> str | None:
    """The best instruction set of this processor, one of ISAS; None without the native library."""
    library = native_library()
    return None if library is None else library.fqa_detected_isa().decode()


def cpu_isa() -> str:
    """The instruction set that the native kernels use, one of ISAS; "none" without the native library.

    It is the processor's best, or a lower one: forced by the environment variable FASTQADAPTER_CPU_ISA, which is read
    once per process, or by `set_cpu_isa`.

    Raises:
        ValueError: FASTQADAPTER_CPU_ISA names no instruction set.
    """
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    if wanted and wanted not in ISAS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={wanted!r} is not one of {', '.join(ISAS)}")
    library = native_library()
    return "none" if library is None else library.fqa_isa().decode()


def set_cpu_isa(isa: str) -> str:
    """Make this process use `isa`, or the best that the processor has where that is lower; returns what is used.

    For tests and benchmarks of one level after another.

    Raises:
        ValueError: `isa` is not one of ISAS.
    """
    if isa not in ISAS:
        raise ValueError(f"isa={isa!r} is not one of {', '.join(ISAS)}")
    library = native_library()
    if library is not None:
        library.fqa_set_isa(isa.encode())
    return cpu_isa()
