"""`fastqadapter serve`: an OpenAI-compatible server of the customised policy, by vLLM."""

from __future__ import annotations

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
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(arguments.folder), *options]
    os.execv(sys.executable, command)
