"""What holds the house together: imports, names, files in the right place, and the report of `fastqadapter env`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import fastqadapter
from fastqadapter.environment import PACKAGES, environment_report
from fastqadapter_kernels import native

ROOT = Path(__file__).parents[1]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter whose working directory, the first place it imports from, is the repository."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def output_of(code: str, **environment: str) -> str:
    done = run_python(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def test_kernels_folder_is_not_a_package():
    # As a package it would hide PyPI's `kernels`, and transformers would no longer import from this folder.
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.skipif(not installed("kernels"), reason="needs the PyPI package kernels (the extra `test` brings it)")
def test_transformers_finds_the_real_kernels_package():
    code = "import kernels; from transformers import LlamaForCausalLM; print(kernels.__file__)"
    assert Path(output_of(code)) == Path(str(metadata.distribution("kernels").locate_file("kernels/__init__.py")))


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import fastqadapter", {"torch", "transformers", "peft", "triton"}),
        ("import fastqadapter.ops", {"transformers", "peft", "accelerate", "datasets", "triton"}),
        ("import fastqadapter_kernels.native", {"torch", "transformers", "peft", "triton", "fastqadapter"}),
    ],
)
def test_import_loads_no_more_than_it_needs(statement: str, absent: set[str]):
    loaded = output_of(f"{statement}; import sys; print(*sys.modules)").split()
    assert absent.isdisjoint(loaded)


@pytest.mark.parametrize("name", fastqadapter.__all__)
def test_public_name_resolves(name: str):
    assert name in dir(fastqadapter)
    assert getattr(fastqadapter, name) is getattr(fastqadapter, name)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'QAdaptor'"):
        _ = fastqadapter.QAdaptor


@pytest.mark.parametrize("package", ["fastqadapter", "fastqadapter_kernels", "fastqadapter_benchmarks"])
def test_package_is_typed(package: str):
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    assert (Path(spec.origin).parent / "py.typed").is_file()


@pytest.mark.skipif(not installed("fastqadapter"), reason="running from a source tree: there is no metadata to compare")
def test_installed_version_is_the_source_version():
    assert metadata.version("fastqadapter") == fastqadapter.__version__


PRINT_ISA = "from fastqadapter_kernels import native; print(native.cpu_isa())"


@pytest.mark.parametrize("wanted", native.ISAS)
def test_environment_variable_lowers_the_cpu_isa(wanted: str):
    isa = output_of(PRINT_ISA, FASTQADAPTER_CPU_ISA=wanted)
    if native.native_library() is None:
        assert isa == "none"
    else:
        assert isa == min(wanted, native.detected_isa(), key=native.ISAS.index)


def test_unknown_cpu_isa_is_refused():
    done = run_python(PRINT_ISA, FASTQADAPTER_CPU_ISA="sse9")
    assert "ValueError: FASTQADAPTER_CPU_ISA='sse9' is not one of generic, avx2, avx512, avx512_bf16" in done.stderr


PRINT_REPORT = """
import json
from fastqadapter.environment import environment_report, format_report
report = environment_report()
print(json.dumps(report))
print(format_report(report))
"""


def test_environment_report_names_what_is_there_and_what_is_not():
    first, text = output_of(PRINT_REPORT, FASTQADAPTER_CPU_ISA="sse9", FASTQADAPTER_BACKEND="eager").split("\n", 1)
    report = json.loads(first)
    assert report["fastqadapter"] == fastqadapter.__version__
    assert report["packages"]["torch"] == metadata.version("torch")
    assert report["overrides"]["FASTQADAPTER_BACKEND"] == "eager"
    assert report["backends"]["eager"] is None
    assert "'sse9' is not one of" in report["cpu"]
    for name, version in report["packages"].items():
        assert (version or f"not installed ({PACKAGES[name]})") in text
    for reason in filter(None, report["backends"].values()):
        assert f"no: {reason}" in text


def test_missing_native_library_comes_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "library_path", lambda: None)
    monkeypatch.setattr(native, "native_library", lambda: None)
    report = environment_report()
    assert "install one (g++ or clang)" in report["native_library"]
    assert "native kernels use none" in report["cpu"]
