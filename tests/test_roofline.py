"""The benchmarks' roofline: the paper model of the GPU kernels, and what it says of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from fastqadapter_benchmarks import roofline  # noqa: E402

ROOT = Path(__file__).parents[1]
LARGE = [name for name, (size, _) in roofline.MODELS.items() if size >= 2048]


# A row of 256000 scores is read a second time from memory: (8 + 4) / 8 and (10 + 4) / 10 bytes.
TWICE_FROM_MEMORY = {"residual_log_probs": 1.5, "residual_log_probs, backward": 1.4}


@pytest.mark.parametrize("op", roofline.OPS)
@pytest.mark.parametrize("model", LARGE)
@pytest.mark.parametrize("gpu", roofline.GPUS)
def test_ops_of_large_models_stay_near_the_floor(gpu: str, model: str, op: str):
    limit = TWICE_FROM_MEMORY.get(op, 1.25) if model == "Gemma-2-2B" else 1.25
    for rows in roofline.ROWS:
        assert 1.0 - 1e-9 <= roofline.ratio(op, roofline.GPUS[gpu], rows, *roofline.MODELS[model]) <= limit + 1e-9


def test_three_products_of_llama_by_hand():
    """3 * 2 * 4096 * 4096 * 128256 FLOP at 700 TFLOP/s are 18.4 ms; the row kernel's 3 passes over 4096 * 128256 bf16
    numbers at 3.01 TB/s are 1.05 ms, the states 0.09 ms."""
    floor, ours = roofline.training(4096, 4096, 128256, 3)
    gpu = roofline.GPUS["H100"]
    assert floor.seconds(gpu) * 1e3 == pytest.approx(18.44, abs=0.01)
    assert ours.seconds(gpu) * 1e3 == pytest.approx(18.44 + 1.05 + 0.09, abs=0.02)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastqadapter_benchmarks.roofline", *arguments]
    return subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False)


def test_table_says_that_it_is_a_prediction():
    done = run("--rows", "64", "--model", "SmolLM2-135M", "--gpu", "mine=100,50,1,0.5,8,30")
    assert done.returncode == 0
    assert done.stdout.startswith("PREDICTION")
    assert "mine: GEMM 50 of 100 TFLOP/s" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "H100=1,2"], "'H100=1,2' is not NAME="),
        (["--rows", "0"], "--rows 0"),
        (["--model", "GPT-5"], "GPT-5"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str):
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
