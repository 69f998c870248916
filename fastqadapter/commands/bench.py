"""`fastqadapter bench`: the benchmarks on this machine, as a table, plots and pytest-benchmark's JSON."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastqadapter.commands.parsing import ArgumentError, OneLineParser

if TYPE_CHECKING:
    from fastqadapter_benchmarks.results import Result

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
    if not arguments.max_slowdown > 0:
        raise ArgumentError(f"--max_slowdown {arguments.max_slowdown}: a ratio above 0 is needed")
    _check_choice(arguments)

    from fastqadapter_benchmarks.results import read_results

    old = read_results(arguments.compare[0]) if arguments.compare else None
    if arguments.compare and len(arguments.compare) == 2:
        new = read_results(arguments.compare[1])
    else:
        _check_installed()
        kept = (shlex.quote(each) for each in argv if each != "--resume")
        new = _run_and_report(arguments, " ".join(["fastqadapter bench", *kept]))
    if old is not None:
        _compare(old, new, arguments.max_slowdown)


def _check_choice(arguments: argparse.Namespace) -> None:
    for suite in arguments.only or ():
        if suite in FULL_ALONE and not arguments.full:
            raise ArgumentError(f"--only {suite}: this suite has nothing for a quick run; add --full")
    if arguments.results and (arguments.only or arguments.peers):
        raise ArgumentError("--results: a part of a run would replace the whole section; leave --only and --peers out")


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
    from fastqadapter_benchmarks import plots, report, results

    output: Path = arguments.output_dir
    _check_inputs(arguments)
    files, failed = _run_suites(arguments)
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    if not any(report["benchmarks"] for report in reports):
        raise ArgumentError(f"nothing could be measured: {', '.join(failed)} failed; see above")
    merged = results.merged(reports)
    (output / "benchmark.json").write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    found = results.results_of(merged)
    drawn = plots.draw_all(found, output / "plots")
    names = [f"plots/{path.name}" for path in drawn]
    section = report.measured_section(found, command, names)
    (output / "report.md").write_text(section + "\n", encoding="utf-8")
    summary = report.summary(found)
    (output / "summary.md").write_text(summary + "\n", encoding="utf-8")
    print(f"\n{report.machine_lines(found[0].machine)}\n\n{summary}\n")
    print(f"all tables: {output / 'report.md'}; plots: {output / 'plots'}; numbers: {output / 'benchmark.json'}")
    if failed:
        unwritten = f"; {arguments.results} was left alone" if arguments.results else ""
        print(f"FAILED, and not or only partly in the tables: {', '.join(failed)}{unwritten}", file=sys.stderr)
        raise SystemExit(1)
    if arguments.results:
        write_results(arguments.results, found, command)
    return found


def write_results(path: Path, found: list[Result], command: str) -> None:
    """This machine's section, with its plots in a folder beside the file."""
    from fastqadapter_benchmarks import plots, report

    device = str(found[0].machine["device"])
    folder = path.parent / "plots" / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    for plot in folder.glob("*.svg"):
        plot.unlink()
    drawn = [plot.relative_to(path.parent).as_posix() for plot in plots.draw_all(found, folder)]
    for plot in folder.glob("*.png"):
        plot.unlink()  # the SVG files are what the page shows
    sections = {f"measured: {device}": report.measured_section(found, command, drawn)}
    if importlib.util.find_spec("triton") is not None:
        sections["predictions"] = report.predicted_section()
    report.update_results_file(path, sections)
    print(f"section of {device}: {path}")


def _check_inputs(arguments: argparse.Namespace) -> None:
    """Mistakes before the first minute is spent; settles the device."""
    import torch

    found = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cuda" and found == "cpu":
        raise ArgumentError("--device cuda: torch finds no GPU here; leave it out, or see `fastqadapter env`")
    arguments.device = arguments.device or found
    if found == "cpu":
        print("no GPU here: the shapes of Llama-3-8B, Qwen2.5-7B and Gemma are skipped")
    if arguments.model != "demo":
        from transformers import AutoConfig

        if "/" not in arguments.model and not Path(arguments.model).is_dir():
            raise ArgumentError(f"--model {arguments.model}: no such folder")
        AutoConfig.from_pretrained(arguments.model)  # or one line that says why not
    if arguments.data != "demo" and not Path(arguments.data).is_file():
        raise ArgumentError(f"--data {arguments.data}: no such file")


def _run_suites(arguments: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """The JSON files of the suites, and the names of those of which something failed. Each runs in its own process."""
    import fastqadapter_benchmarks

    package = Path(str(fastqadapter_benchmarks.__file__)).parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    suites = arguments.only or (FULL if arguments.full else QUICK)
    folder = (arguments.output_dir / "suites").resolve()
    options = _options(arguments)
    kept = _prepare(folder, options, arguments.resume)
    files, failed = [], []
    for number, suite in enumerate(suites, start=1):
        whole, part = folder / f"{suite}.json", folder / f"{suite}.part"
        print(f"[{number}/{len(suites)}] {suite}{': kept' if suite in kept else ''}", flush=True)
        if suite not in kept:
            command = [
                *(sys.executable, "-m", "pytest", "-v", "--no-header", "--no-summary", "--benchmark-quiet"),
                *("-c", f"{package.name}/pytest.ini", f"{package.name}/test_{suite}.py"),
                *("--benchmark-json", str(part), *options),
            ]
            code = subprocess.run(command, cwd=package.parent, env=environment, check=False).returncode
            if code == 0:
                part.replace(whole)
            else:
                failed.append(suite)
        files += [path for path in (whole, part) if path.exists() and path.stat().st_size]
    return files, failed


def _options(arguments: argparse.Namespace) -> list[str]:
    """The options of the suites' own pytest run."""
    data, model = (
        name if name == "demo" or not Path(name).exists() else str(Path(name).resolve())
        for name in (arguments.data, arguments.model)
    )
    options = ["--model", model, "--data", data, "--threads", str(arguments.threads)]
    options += ["--rounds", str(arguments.rounds)]
    options += ["--device", arguments.device]
    options += ["--full"] if arguments.full else []
    options += ["--peers", *arguments.peers] if arguments.peers else []
    return options


def _prepare(folder: Path, options: list[str], resume: bool) -> set[str]:
    """Make the folder; returns the suites that an interrupted run of the same code and options left, for `resume`."""
    from fastqadapter_benchmarks.machine import versions

    folder.mkdir(parents=True, exist_ok=True)
    noted = folder / "run.txt"
    text = "\n".join([shlex.join(options), *(f"{name} {version}" for name, version in versions().items())])
    before = noted.read_text(encoding="utf-8") if noted.exists() else None
    if resume and before not in (None, text):
        raise ArgumentError(f"--resume: {folder} has suites of another run: other options or versions, see {noted}")
    keep = {path.stem for path in folder.glob("*.json")} if resume and before == text else set()
    for path in folder.iterdir():
        if path.stem not in keep:
            path.unlink()
    noted.write_text(text, encoding="utf-8")
    return keep


def _compare(old: list[Result], new: list[Result], limit: float) -> None:
    from fastqadapter_benchmarks import compare

    changes = compare.compare(old, new)
    print(f"\n{compare.report(changes, limit)}\n")
    for title in compare.not_compared(old, new):
        print(f"not compared, the new run has it not: {title}")
    slower = [change for change in changes if change.slowdown > limit]
    if slower:
        print(f"{len(slower)} of {len(changes)} times became more than {limit:g} times slower", file=sys.stderr)
        raise SystemExit(1)
    print(f"none of {len(changes)} times became more than {limit:g} times slower")
