"""Imports point one way, and the lower layers know nothing of Hugging Face."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A module imports from the lines above its own and from its own package, never from its own line or below.
LAYERS = [
    {"fastqadapter_kernels", "config", "packing", "rows", "plots", "progress", "prompts", "sharding", "testing"},
    {"ops"},
    {"loss"},
    {"models", "data", "environment", "monitor"},
    {"base_cache", "evaluation"},
    {"trainer"},
    {"demo", "integrations"},
    {"commands"},
    {"cli", "lm_eval"},
    {"__main__"},
]
# What the lowest layers may import besides the standard library and the layers above.
THIRD_PARTY = {
    "fastqadapter_kernels": {"torch", "triton"},
    "config": set(),
    "packing": {"torch"},
    "testing": {"torch"},
    "ops": {"torch"},
    "loss": {"torch"},
}
FILES = [*(ROOT / "fastqadapter").rglob("*.py"), *(ROOT / "kernels" / "fastqadapter_kernels").rglob("*.py")]


def unit_of(module: str) -> str:
    """`fastqadapter.models.base` -> `models`; `fastqadapter_kernels.cpu` -> `fastqadapter_kernels`."""
    top, *rest = module.split(".")
    return rest[0] if top == "fastqadapter" and rest else top


def layer_of(unit: str) -> int:
    layers = [index for index, units in enumerate(LAYERS) if unit in units]
    assert len(layers) == 1, f"{unit} stands in {len(layers)} lines of LAYERS: give it one"
    return layers[0]


def imports_of(path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, wherever in it; `from x import y` gives `x.y`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(path: Path) -> str:
    root = ROOT / "kernels" if "kernels" in path.relative_to(ROOT).parts[:1] else ROOT
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_one_way(path: Path):
    unit = unit_of(module_of(path))
    if unit == "fastqadapter":  # its __init__ names the public names of all layers, and imports them when used
        return
    for imported in imports_of(path):
        used = unit_of(imported)
        if imported in ("fastqadapter", "fastqadapter.__version__") or used == unit:
            continue
        if imported.split(".")[0] in ("fastqadapter", "fastqadapter_kernels"):
            assert layer_of(used) < layer_of(unit), f"{module_of(path)} imports {imported}, which is not below it"
        elif unit in THIRD_PARTY:
            top = imported.split(".")[0]
            assert top in sys.stdlib_module_names or top in THIRD_PARTY[unit], f"{module_of(path)} imports {imported}"


def test_mathematics_loads_nothing_of_hugging_face():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import fastqadapter.ops, fastqadapter.loss, fastqadapter.testing, sys; print(*sys.modules)",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "torch" in loaded
    assert loaded.isdisjoint({"transformers", "peft", "accelerate", "datasets", "trl", "safetensors"})
