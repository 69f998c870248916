"""What `fastqadapter env` prints: the installation as a bug report needs it, and a remedy for each missing piece."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

import fastqadapter
from fastqadapter import ops
from fastqadapter_kernels import native

# Distribution -> how to get it where it is missing.
PACKAGES = {
    "torch": "pip install torch",
    "triton": "pip install triton; Linux on x86-64 only",
    "transformers": "pip install transformers",
    "peft": "pip install peft",
    "accelerate": "pip install accelerate",
    "safetensors": "pip install safetensors",
    "trl": "optional: pip install trl",
    "datasets": "optional: pip install datasets",
    "bitsandbytes": "optional, for quantised bases: pip install bitsandbytes",
    "flash-attn": 'optional, attention of generation on a GPU: pip install "fastqadapter[flash-attn]"',
    "deepspeed": "optional, for ZeRO-3: pip install deepspeed",
    "lm-eval": 'optional, for fastqadapter.lm_eval: pip install "fastqadapter[eval]"',
    "vllm": 'optional, for serving: pip install "fastqadapter[vllm]"',
    "gguf": 'optional, for the demo: pip install "fastqadapter[demo]"',
    "matplotlib": 'optional, for the demo: pip install "fastqadapter[demo]"',
    "kernels": "optional: pip install kernels",
}
OVERRIDES = ("FASTQADAPTER_BACKEND", "FASTQADAPTER_CPU_ISA", "FASTQADAPTER_AUTOTUNE", "FASTQADAPTER_CACHE")

_NO_LIBRARY = (
    "missing: the install found no working C++ compiler. Everything works without it, slower; "
    "to add it, install one (g++ or clang) and run pip install again"
)
_BROKEN_LIBRARY = "cannot be used on this system or with these sources: run pip install again from the source"


def environment_report() -> dict[str, Any]:
    """The installation, as plain JSON types. No missing optional piece makes it fail.

    Keys: `fastqadapter`, `python`, `platform`, `packages` (distribution -> version or None), `threads`, `gpus`, `cpu`,
    `native_library`, `backends` (name -> None where it can be used, else the reason why not) and `overrides`
    (environment variable -> value or None).
    """
    return {
        "fastqadapter": fastqadapter.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()},
        "gpus": _gpus(),
        "cpu": _cpu(),
        "native_library": _native_library(),
        "backends": ops.backends(),
        "overrides": {name: os.environ.get(name) for name in OVERRIDES},
    }


def format_report(report: dict[str, Any]) -> str:
    """The report of `environment_report` as text to read or to paste into a bug report: one fact a line."""
    threads = report["threads"]
    facts = {
        **{name: report[name] for name in ("fastqadapter", "python", "platform")},
        **{name: version or f"not installed ({PACKAGES[name]})" for name, version in report["packages"].items()},
        "threads": f"{threads['torch']} (of {threads['cores']} cores)",
        "gpu": "; ".join(report["gpus"]) or "none",
        "cpu": report["cpu"],
        "native library": report["native_library"],
        **{f"backend {name}": f"no: {reason}" if reason else "yes" for name, reason in report["backends"].items()},
        **{name: "not set" if value is None else value for name, value in report["overrides"].items()},
    }
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    properties = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in properties]


def _cpu() -> str:
    common = f"{platform.machine()}; torch uses {torch.backends.cpu.get_cpu_capability()}"
    try:
        native_isa = native.cpu_isa()
    except ValueError as error:
        return f"{common}; {error}"
    detected = native.detected_isa()
    lowered = "" if detected in (None, native_isa) else f" (the processor has {detected})"
    return f"{common}; native kernels use {native_isa}{lowered}"


def _native_library() -> str:
    path = native.library_path()
    if path is None:
        return _NO_LIBRARY
    return str(path) if native.native_library() is not None else f"{path} {_BROKEN_LIBRARY}"
