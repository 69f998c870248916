"""`fastqadapter bench`: the benchmarks on this machine, as a table, plots and pytest-benchmark's JSON."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastqadapter.commands.parsing import ArgumentError, OneLineParser

if TYPE_CHECKING:
    from fastqadapter_benchmarks.results import Result
    from fastqadapter_benchmarks.settings import Settings

QUICK = ("step", "loss", "decode")
FULL = (*QUICK, "files", "ops", "growth")
FULL_ALONE = ("ops", "growth")
NEEDED = ("pytest", "pytest_benchmark", "matplotlib")


def main(argv: list[str]) -> None:
    parser = OneLineParser(
        prog="fastqadapter bench",
        description="Measure training step, loss and generation against other ways to do the same, on this machine.",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the small shapes, in three minutes (this is the default)")
    size.add_argument("--full", action="store_true", help="all shapes and sweeps, in 40 minutes")
    parser.add_argument("--only", nargs="+", choices=FULL, help="these suites alone")
    parser.add_argument("--peers", nargs="+", default=[], help="only competitors with one of these words in their name")
    parser.add_argument("--model", default="demo", help="folder or hub id; default: the demo's SmolLM2")
    parser.add_argument("--data", default="demo", help="preference pairs, .jsonl (default: the demo's own)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--threads", type=_count(1), default=2, help="of a CPU (%(default)s)")
    parser.add_argument("--rounds", type=_count(5), default=5, help="each competitor runs once in each (%(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("fastqadapter-bench"), help="(%(default)s)")
    parser.add_argument("--results", type=Path, help="also write this run's section of a RESULTS.md")
    parser.add_argument("--resume", action="store_true", help="keep the suites that an interrupted run had finished")
    parser.add_argument(
        "--compare", nargs="+", type=Path, metavar="JSON",
        help="OLD: run, then exit with 1 if something became slower; OLD NEW: compare the two and run nothing",
    )  # fmt: skip
    parser.add_argument("--max_slowdown", type=float, default=1.25, help="that --compare lets pass (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.compare and len(arguments.compare) > 2:
        raise ArgumentError(f"--compare takes one or two files, not {len(arguments.compare)}")
    if not 0 < arguments.max_slowdown < float("inf"):
        raise ArgumentError(f"--max_slowdown {arguments.max_slowdown}: a finite ratio above 0 is needed")
    arguments.only = list(dict.fromkeys(arguments.only or (FULL if arguments.full else QUICK)))
    _check_choice(arguments)

    from fastqadapter_benchmarks.results import read_results

    _check_installed()
    old = read_results(arguments.compare[0]) if arguments.compare else None
    if arguments.compare and len(arguments.compare) == 2:
        new = read_results(arguments.compare[1])
    else:
        kept = (shlex.quote(each) for each in argv if each != "--resume")
        new = _run_and_report(arguments, " ".join(["fastqadapter bench", *kept]))
    if old is not None:
        _compare(old, new, arguments.max_slowdown)


def _check_choice(arguments: argparse.Namespace) -> None:
    if arguments.output_dir.exists() and not arguments.output_dir.is_dir():
        raise ArgumentError(f"--output_dir {arguments.output_dir}: a file of that name is there")
    for suite in arguments.only:
        if suite in FULL_ALONE and not arguments.full:
            raise ArgumentError(f"--only {suite}: this suite has nothing for a quick run; add --full")
    if arguments.compare and len(arguments.compare) == 1:
        [old] = arguments.compare
        if old.resolve().is_relative_to(arguments.output_dir.resolve()):
            raise ArgumentError(f"--compare {old}: the run would replace it; copy it, or name another --output_dir")
    if arguments.results:
        if set(arguments.only) != {*(FULL if arguments.full else QUICK)} or arguments.peers:
            raise ArgumentError("--results: a part of a run would replace the whole section: no --only, no --peers")
        _check_results_file(arguments.results)


def _check_results_file(path: Path) -> None:
    from fastqadapter_benchmarks.report import HEADER

    if path.is_dir() or not path.parent.is_dir():
        raise ArgumentError(f"--results {path}: name a file, in a folder that is there")
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip() and not text.startswith(HEADER.splitlines()[0]):
            raise ArgumentError(f"--results {path}: holds something else than results of `fastqadapter bench`")


def _count(least: int) -> type:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too few: at least {least}")
        return value

    parse.__name__ = "integer"  # argparse names it in its own message
    return parse  # type: ignore[return-value]


def _check_installed() -> None:
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ArgumentError(f'the benchmarks need {name}: pip install "fastqadapter[bench]"')


def _run_and_report(arguments: argparse.Namespace, command: str) -> list[Result]:
    from fastqadapter_benchmarks import plots, report, results, run_suites

    output: Path = arguments.output_dir
    settings = _checked_settings(arguments)
    with run_suites.locked(output):
        ran = run_suites.run_suites(arguments.only, settings, output, arguments.resume)
        if not ran.reports:
            raise ArgumentError(f"nothing could be measured: {', '.join(ran.failed)} failed; see above")
        merged = results.merged(ran.reports)
        (output / "benchmark.json").write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
        found = results.results_of(merged)
        _check_peers(arguments.peers, found)
        names = [f"plots/{path.name}" for path in plots.draw_all(found, output / "plots")]
        section = report.measured_section(found, command, names)
        (output / "report.md").write_text(section + "\n", encoding="utf-8")
        summary = report.summary(found) or report.tables(found)
        (output / "summary.md").write_text(summary + "\n", encoding="utf-8")
    print(f"\n{report.machine_lines(found[0].machine)}\n\n{summary}\n")
    print(f"all tables: {output / 'report.md'}; plots: {output / 'plots'}; numbers: {output / 'benchmark.json'}")
    if ran.failed:
        unwritten = f"; {arguments.results} was left alone" if arguments.results else ""
        print(f"FAILED, and not or only partly in the tables: {', '.join(ran.failed)}{unwritten}", file=sys.stderr)
        raise SystemExit(1)
    if arguments.results:
        write_results(arguments.results, found, command)
    return found


def _check_peers(words: list[str], found: list[Result]) -> None:
    from fastqadapter_benchmarks.settings import Settings

    labels = {label for result in found for label in (*result.seconds[result.metric], *result.absent)}
    for word in words:
        if not any(map(Settings(peers=(word,)).asks_for, labels)):
            names = "; ".join(sorted(labels))
            raise ArgumentError(f"--peers {word}: no competitor has that in its name; these ran or could not: {names}")


def write_results(path: Path, found: list[Result], command: str) -> None:
    """This machine's section, with its plots in a folder beside the file."""
    from fastqadapter_benchmarks import plots, report

    device = str(found[0].machine["device"])
    folder = path.parent / "plots" / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    paths = plots.draw_all(found, folder)
    drawn = [plot.relative_to(path.parent).as_posix() for plot in paths]
    for plot in paths:
        plot.with_suffix(".png").unlink()  # the SVG files are what the page shows
    sections = {f"measured: {device}": report.measured_section(found, command, drawn)}
    if importlib.util.find_spec("triton") is not None:
        sections["predictions"] = report.predicted_section()
    report.update_results_file(path, sections)
    print(f"section of {device}: {path}")


def _checked_settings(arguments: argparse.Namespace) -> Settings:
    """Mistakes before the first minute is spent."""
    import torch

    from fastqadapter_benchmarks.settings import Settings
    from fastqadapter_benchmarks.workload import check_inputs

    found = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cuda" and found == "cpu":
        raise ArgumentError("--device cuda: torch finds no GPU here; leave it out, or see `fastqadapter env`")
    device = arguments.device or found
    if device == "cpu":
        print("no GPU: the shapes of Llama-3-8B, Qwen2.5-7B and Gemma are skipped")
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        print(f"this machine is busy (load {load:.1f} on {cores} cores): times will differ from round to round")
    if arguments.model != "demo" and "/" not in arguments.model and not Path(arguments.model).is_dir():
        raise ArgumentError(f"--model {arguments.model}: no such folder")
    if arguments.data != "demo" and not Path(arguments.data).is_file():
        raise ArgumentError(f"--data {arguments.data}: no such file")
    names = ("full", "model", "data", "threads", "rounds")
    options = {name: getattr(arguments, name) for name in names}
    settings = Settings(**options, device=device, peers=tuple(arguments.peers))
    check_inputs(settings, "step" in arguments.only)
    return settings


def _compare(old: list[Result], new: list[Result], limit: float) -> None:
    from fastqadapter_benchmarks import compare

    changes = compare.compare(old, new)
    for what in ("device", "threads"):
        before, after = (each[0].machine[what] for each in (old, new))
        if before != after:
            print(f"not the same {what}: {before}, then {after}; the ratios may be of that")
    print(f"\n{compare.report(changes, limit)}\n")
    for title in compare.not_compared(old, new):
        print(f"not compared, the new run has it not: {title}")
    slower = [change for change in changes if change.slowdown > limit]
    if slower:
        print(f"{len(slower)} of {len(changes)} times became more than {limit:g} times slower", file=sys.stderr)
        raise SystemExit(1)
    print(f"none of {len(changes)} times became more than {limit:g} times slower")
