"""The native CPU kernels on several threads and in several processes, and the memory they take."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fastqadapter_kernels import cpu, native
from operator_calls import head_arguments
from soft_value_problem import problem

pytestmark = pytest.mark.skipif(native.native_library() is None, reason="no native library: no C++ compiler was found")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, or forks")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run_python(code: str, **environment: str) -> str:
    """What `code` prints in a process of its own; a hang is a failure."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def outputs(rows: int = 70) -> list[Tensor]:
    """Every op once."""
    case = problem("scale and biases", rows, 3000, 40, torch.bfloat16)
    value, lse, expected = cpu.soft_value_and_gradient(*head_arguments(case))
    actions = (torch.arange(2 * rows) * 7919) % 3000
    states = torch.arange(2 * rows) // 2
    taken = cpu.taken_value(case.hidden_q, case.weight, actions, states)
    order, ends = torch.arange(2 * rows), 2 * torch.arange(rows + 1)
    gradient = cpu.hidden_gradient(value, expected, taken, case.weight, actions, order, ends, torch.bfloat16)
    logits = case.hidden_q @ case.weight.T, case.hidden_b @ case.weight.T
    soft, of_scores = cpu.residual_soft_value(*logits, 0.7, 1.3)
    log_probs = cpu.residual_log_probs(*logits, 0.7, 1.3)
    return [
        value, lse, expected, taken, gradient, soft, log_probs,
        cpu.residual_soft_value_bwd(*logits, of_scores, soft, 0.7, 1.3),
        cpu.residual_log_probs_bwd(log_probs, log_probs, 1.3, torch.bfloat16),
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [1, 70, 300])
def test_results_do_not_depend_on_threads(rows: int, threads: Callable[[int], None], isa: str):
    threads(1)
    one = outputs(rows)
    for count in (1, 2, 3, 5):
        threads(count)
        for _ in range(2):
            assert all(map(torch.equal, one, outputs(rows)))


def test_several_python_threads_at_once(threads: Callable[[int], None]):
    threads(2)
    expected = outputs()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: outputs(), range(12)):
            assert all(map(torch.equal, expected, found))


PREAMBLE = """
import os, torch
torch.set_num_threads(1)  # no pool before it is asked for
logits, square = torch.randn(64, 5000), torch.randn(500, 500)
import fastqadapter.ops
from fastqadapter_kernels import cpu
torch.set_num_threads(2)
def use():
    return cpu.residual_soft_value(logits, logits, 0.7, 1.3)[0]
def tasks():
    return len(os.listdir("/proc/self/task"))
"""


@on_linux
def test_threads_are_those_of_torch():
    """One more for the first op, and then the same for a GEMM of torch."""
    code = """
before = tasks()
use()
of_op = tasks()
torch.mm(square, square)
print(of_op - before, tasks() - of_op)
"""
    assert run_python(PREAMBLE + code).split() == ["1", "0"]


@on_linux
def test_one_core_has_one_thread():
    """`taskset -c 0`: torch counts one core, and so do the kernels."""
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})" + PREAMBLE.replace(
        "torch.set_num_threads(2)", "torch.set_num_threads(len(os.sched_getaffinity(0)))"
    )
    code += """
before = tasks()
use()
print(tasks() - before)
"""
    assert run_python(code).strip() == "0"
    alone = "import os; os.sched_setaffinity(0, {0}); import torch; print(torch.get_num_threads())"
    assert run_python(alone).strip() == "1"


@on_linux
@pytest.mark.parametrize("first", ["use()", "torch.mm(square, square)"], ids=["op", "GEMM of torch"])
def test_forked_child_neither_hangs_nor_differs(first: str):
    """The pool's threads do not survive a fork: with them a child would wait for ever, the first to use an op too."""
    code = f"""
{first}
child = os.fork()
if child == 0:
    with open(os.environ["RESULT"], "wb") as file:
        file.write(use().numpy().tobytes())
    os._exit(0)
os.waitpid(child, 0)
with open(os.environ["RESULT"], "rb") as file:
    print(file.read() == use().numpy().tobytes())
"""
    with tempfile.NamedTemporaryFile() as file:
        assert run_python(PREAMBLE + code, RESULT=file.name).strip() == "True"


@on_linux
def test_dataloader_worker():
    code = f"""{PREAMBLE}
expected = use()
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return use()
loader = torch.utils.data.DataLoader(Rows(), num_workers=2, multiprocessing_context="fork")
print(all(torch.equal(batch[0], expected) for batch in loader))
"""
    assert run_python(code).strip() == "True"


@on_linux
def test_extra_memory_is_bounded():
    """The same few MiB for 64 times the rows and 8 times the vocabulary; eager would take 2 GiB for the larger."""
    code = """
import torch
from fastqadapter_kernels import cpu
torch.set_num_threads(2)
def kib(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))
def call(rows, vocab):
    hidden, weight = torch.randn(2, rows, 128), torch.randn(vocab, 128)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak starts again
    before = kib("VmRSS")
    results = cpu.soft_value_and_gradient(*hidden, weight, None, None, None, 0.7, 1.3, 1.0, None, False)
    return (kib("VmHWM") - before) / 1024 - sum(x.nbytes for x in results) / 2**20
call(64, 512)
print(call(512, 1024), call(32768, 8192))
"""
    few, many = map(float, run_python(code).split())
    assert 0 < few <= many <= 48
