"""Runs the suites, each by pytest in a process of its own, and keeps what they leave in one folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastqadapter_benchmarks.machine import versions
from fastqadapter_benchmarks.settings import Settings

PACKAGE = Path(__file__).parent
WRITTEN = ("benchmark.json", "report.md", "summary.md", "plots", "suites")  # of a run
PREVIOUS = "previous"


@dataclasses.dataclass(frozen=True)
class Ran:
    """What pytest-benchmark wrote of each suite, and the suites of which something failed."""

    reports: list[dict[str, Any]]
    failed: list[str]


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """The folder for one run alone; also lets a SIGTERM end the suite that runs, as Ctrl-C does.

    Raises:
        ValueError: another run has it.
    """
    output.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with FileLock(output / ".lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(f"--output_dir {output}: another run is using it; name another folder") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def run_suites(suites: Sequence[str], settings: Settings, output: Path, resume: bool) -> Ran:
    """Run them one after the other; with `resume` not those that an interrupted run has left whole.

    Raises:
        ValueError: `resume`, and the folder is of another run.
    """
    options = _options(settings)
    folder = (output / "suites").resolve()
    kept = _prepare(output, [*options, _digest(settings.data)], resume)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = Ran([], [])
    for number, suite in enumerate(suites, start=1):
        whole, part = folder / f"{suite}.json", folder / f"{suite}.part"
        print(f"[{number}/{len(suites)}] {suite}{': kept' if suite in kept else ''}", flush=True)
        if suite not in kept:
            command = [
                *(sys.executable, "-m", "pytest", "-v", "--no-header", "--benchmark-quiet"),
                *("-c", f"{PACKAGE.name}/pytest.ini", f"{PACKAGE.name}/test_{suite}.py"),
                *("--benchmark-json", str(part), *options),
            ]
            try:
                code = subprocess.run(command, cwd=PACKAGE.parent, env=environment, check=False).returncode
            except KeyboardInterrupt:
                print(f"stopped in {suite}; --resume goes on behind the suites before it", file=sys.stderr)
                raise
            if code == 0:
                part.replace(whole)
            else:
                ran.failed.append(suite)
        report = _report(whole) or _report(part)
        if report is not None:
            ran.reports.append(report)
        elif suite not in ran.failed:
            ran.failed.append(suite)
    return ran


def _options(settings: Settings) -> list[str]:
    """The options of the suites' own pytest run."""
    model, data = (
        name if name == "demo" or not Path(name).exists() else str(Path(name).resolve())
        for name in (settings.model, settings.data)
    )
    options = ["--model", model, "--data", data, "--threads", str(settings.threads)]
    options += ["--rounds", str(settings.rounds), "--device", settings.device]
    options += ["--full"] if settings.full else []
    return options + (["--peers", *settings.peers] if settings.peers else [])


def _digest(data: str) -> str:
    return data if data == "demo" else hashlib.sha256(Path(data).read_bytes()).hexdigest()


def _report(path: Path) -> dict[str, Any] | None:
    """None: the suite has left nothing, or a torn file."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and report.get("benchmarks") else None


def _prepare(output: Path, key: Sequence[str], resume: bool) -> set[str]:
    """Make the folder; returns the suites that an interrupted run of the same versions, options and data has left, for
    `resume`. What another run has left goes to a folder `previous`."""
    folder = output / "suites"
    noted = folder / "run.txt"
    text = "\n".join([shlex.join(key), *(f"{name} {version}" for name, version in versions().items())])
    before = noted.read_text(encoding="utf-8") if noted.exists() else None
    if resume and before not in (None, text):
        raise ValueError(f"--resume: {folder} has suites of another run: other options, data or versions, see {noted}")
    if not resume and (output / "benchmark.json").exists():
        shutil.rmtree(output / PREVIOUS, ignore_errors=True)
        (output / PREVIOUS).mkdir()
        for name in WRITTEN:
            if (output / name).exists():
                (output / name).replace(output / PREVIOUS / name)
    folder.mkdir(exist_ok=True)
    keep = {path.stem for path in folder.glob("*.json") if _report(path)} if resume and before == text else set()
    for path in [*folder.glob("*.json"), *folder.glob("*.part")]:
        if path.stem not in keep and (PACKAGE / f"test_{path.stem}.py").exists():  # others are not ours
            path.unlink()
    noted.write_text(text, encoding="utf-8")
    return keep
