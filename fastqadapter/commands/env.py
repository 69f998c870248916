"""`fastqadapter env`: what is installed and which backends can be used."""

from __future__ import annotations

import json

from fastqadapter.commands.parsing import OneLineParser
from fastqadapter.environment import environment_report, format_report


def main(argv: list[str]) -> None:
    parser = OneLineParser(prog="fastqadapter env", description="Print the installation, to paste into a bug report.")
    parser.add_argument("--json", action="store_true", help="as JSON")
    arguments = parser.parse_args(argv)
    report = environment_report()
    print(json.dumps(report, indent=2) if arguments.json else format_report(report))
