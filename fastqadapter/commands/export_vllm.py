"""`fastqadapter export-vllm`: a folder that `fastqadapter serve` and `vllm serve` take."""

from __future__ import annotations

from pathlib import Path

from fastqadapter.commands.parsing import ArgumentError, OneLineParser


def main(argv: list[str]) -> None:
    parser = OneLineParser(
        prog="fastqadapter export-vllm",
        description="Write a folder that vLLM serves: a base model with its Q-Adapters.",
    )
    parser.add_argument(
        "--adapter", nargs="+", action="extend", required=True, metavar="NAME=FOLDER",
        help="a trained Q-Adapter, folder or hub id, and the name that requests call it by; the first is the default",
    )  # fmt: skip
    parser.add_argument("--base", help="folder or hub id of the base model; default: what the first adapter names")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--max_adapters", type=int, default=1, help="that one request may mix (%(default)s)")
    parser.add_argument("--copy", action="store_true", help="copy the base's files instead of linking to them")
    arguments = parser.parse_args(argv)
    adapters: dict[str, str] = {}
    for entry in arguments.adapter:
        name, equals, folder = entry.partition("=")
        if not equals:
            name, folder = "default", entry
        if not folder:
            raise ArgumentError(f"--adapter {entry}: no folder behind the name; give NAME=FOLDER")
        if name in adapters:
            raise ArgumentError(f"--adapter {entry}: the name {name!r} is given twice; NAME=FOLDER names it")
        adapters[name] = folder

    from fastqadapter.commands.adapters import base_of
    from fastqadapter.integrations.vllm.export import export_for_vllm

    base = arguments.base or base_of(next(iter(adapters.values())))
    folder = export_for_vllm(base, adapters, arguments.output, max_adapters=arguments.max_adapters, copy=arguments.copy)
    print(f"{folder}: {base} with {', '.join(adapters)}; next: fastqadapter serve {folder}")
