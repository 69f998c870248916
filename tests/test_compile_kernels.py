"""tools/compile_kernels.py: the check of the machine code finds what it looks for.

The whole matrix takes minutes and runs in CI by itself; here a few kernels, each in a process without the interpreter.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="Triton compiles on Linux")

PRELUDE = """
import torch, compile_kernels as tool
from kernel_compiler import GPUS, compile_launch, recorded_launches
from fastqadapter_kernels.triton import soft_value_lse
from fastqadapter_kernels.triton.soft_value import RowConfig, soft_value_and_gradient
from fastqadapter_kernels.triton.soft_value_lse import LseConfig

def problems(gpu, dtype, launcher, config, vocab=128256):
    dtype = tool.DTYPES[dtype]
    hidden, weight = (torch.empty(rows, 4096, dtype=dtype, device="meta") for rows in (4096, vocab))
    with recorded_launches(GPUS[gpu]) as launches:
        launcher(hidden, hidden, weight, None, None, None, 0.7, 1.3, 0.9, None, False, config=config)
    name = next(name for name, value in tool.DTYPES.items() if value is dtype)
    return tool.check(tool.Job(gpu, name, "Llama-3-8B", launches[0]))[1]
"""


def run(script: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tools"), str(ROOT / "kernels"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_choice_of_the_rule_has_no_problem():
    script = "print([problems(gpu, 'bf16', soft_value_lse.soft_value_lse, None) for gpu in GPUS])"
    assert run(script).strip() == str([[]] * 6)


def test_spills_and_shared_memory_are_found():
    """Two accumulators of 128 x 256 are 512 registers a lane in 4 warps; eight stages are more than 227 KiB."""
    script = """
spilling = LseConfig(128, 256, 32, 4, 2)
deep = LseConfig(128, 128, 64, 8, 8)
print(problems("sm_80", "bf16", soft_value_lse.soft_value_lse, spilling))
print(problems("sm_90", "bf16", soft_value_lse.soft_value_lse, deep))
"""
    spills, shared = run(script).splitlines()
    assert "spills or stack" in spills
    assert "bytes of shared memory, the device has 232448" in shared


def test_narrow_loads_are_found():
    """A row of an odd number of scores does not start at 16 bytes; the launchers' own scratch always does."""
    script = """
import dataclasses
hidden, weight = (torch.empty(rows, 64, dtype=torch.bfloat16, device="meta") for rows in (64, 50257))
print(problems("sm_90", "bf16", soft_value_and_gradient, RowConfig(2048, 8), vocab=50257))
from fastqadapter_kernels.triton.residual import residual_soft_value
logits = torch.empty(64, 50257, dtype=torch.bfloat16, device="meta")
with recorded_launches(GPUS["sm_90"]) as launches:
    residual_soft_value(logits, logits, 0.7, 1.3)
print(tool.check(tool.Job("sm_90", "bf16", "Llama-3-8B", launches[0]))[1])
"""
    scratch, logits = run(script).splitlines()
    assert scratch == "[]"
    assert "loads of less than 16 bytes" in logits


def test_scores_are_rounded_alike_in_every_kernel():
    """The backward kernel forms the scores anew; one product fused with a sum, and exp(c - lse) is off by 1.6% where c
    is 1e5. The forward kernel has fused ones in its logarithms alone, however many scores a lane has."""
    script = """
import kernel_compiler
from fastqadapter_kernels.triton import residual
kernel_compiler.NVIDIA_INSTRUCTIONS["fused"] = r"\\bFFMA\\b"
lse = torch.empty(64, dtype=torch.float32, device="meta")
for vocab in (3000, 128256):
    logits = torch.empty(64, vocab, dtype=torch.bfloat16, device="meta")
    with recorded_launches(GPUS["sm_90"]) as launches:
        residual.residual_soft_value_bwd(logits, logits, lse, lse, 0.7, 1.3)
        residual.residual_soft_value(logits, logits, 0.7, 1.3)
    print([compile_launch(launch, GPUS["sm_90"]).instructions.get("fused", 0) for launch in launches])
"""
    assert run(script).splitlines() == ["[0, 24]", "[0, 24]"]


def test_plain_tf32_and_missing_tensor_cores_are_found():
    script = """
print(problems("sm_90", "fp32", soft_value_lse.soft_value_lse, LseConfig(64, 64, 16, 8, 3, precision="tf32")))
print(problems("sm_90", "bf16", soft_value_lse.soft_value_lse, LseConfig(32, 64, 32, 4, 2)))
"""
    plain, small = run(script).splitlines()
    assert "plain TF32" in plain
    assert "no HGMMA" in small  # tiles of 32 rows are too small for a warp group


def test_launch_that_does_not_compile_is_a_problem():
    script = "print(problems('sm_90', 'bf16', soft_value_lse.soft_value_lse, LseConfig(48, 64, 64, 4, 3)))"
    assert "does not compile" in run(script)
