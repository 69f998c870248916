"""The loss of packed pairs from hidden states, forward and backward, on the kernels of others.

Each function takes a `Problem` and gives a call that returns a `Result`. The peers know log-probabilities, so each is
composed twice: with z a gathered dot product in fp32, `lse = z - log p[a]` gives the base lse from `h_b` and the
combined one from `h_q + (alpha_0 - 1) h_b`. What follows, rewards and loss, is the same code for all, and a thousandth
of the work.

Sources: TRL's ChunkedLogProbFunction (https://github.com/huggingface/trl), torch.nn.functional.linear_cross_entropy
(https://docs.pytorch.org), Liger's losses (https://github.com/linkedin/Liger-Kernel), Apple's cut-cross-entropy
(https://github.com/apple/ml-cross-entropy).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import fastqadapter as fqa
from fastqadapter import ops
from fastqadapter.loss import LMHead, Transitions, pair_transitions, q_adapter_loss
from fastqadapter_benchmarks.race import Unavailable

CONFIG = fqa.QAdapterConfig(alpha_0=0.9, alpha_tilde=0.7, gamma=1.0, beta=0.1)


class Result(NamedTuple):
    """Of one call."""

    loss: Tensor
    found: Tensor  # the gradient (S, D) by `h_q`, or, of a problem without gradient, the soft values (S,)
    backward_seconds: float | None = None


Call = Callable[[], Result]


@dataclasses.dataclass(frozen=True)
class Problem:
    """The state rows of a batch of pairs, and the frozen head."""

    hidden_q: Tensor  # (S, D), h_q, asks for a gradient
    hidden_b: Tensor  # (S, D)
    weight: Tensor  # (V, D)
    batch: fqa.PackedPairs
    softcap: float | None = None
    gradient: bool = True

    @staticmethod
    def random(batch: fqa.PackedPairs, size: int, vocab: int, softcap: float | None = None) -> Problem:
        """Random states in fp32; logits have a standard deviation of 2."""
        generator = torch.Generator().manual_seed(0)
        states = len(batch.state_rows())
        hidden_b = torch.randn(states, size, generator=generator)
        hidden_q = hidden_b + 0.1 * torch.randn(states, size, generator=generator)
        weight = torch.randn(vocab, size, generator=generator) * (2 / size**0.5)
        return Problem(hidden_q.requires_grad_(), hidden_b, weight, batch, softcap)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Problem:
        hidden_q = self.hidden_q.detach().to(device, dtype).requires_grad_()
        weight, hidden_b = self.weight.to(device, dtype), self.hidden_b.to(device, dtype)
        return Problem(hidden_q, hidden_b, weight, self.batch.to(device), self.softcap, self.gradient)

    def first(self, pairs: int) -> Problem:
        """The first pairs alone."""
        lengths = self.batch.lengths[:pairs]
        tokens = sum(prompt + sum(responses) - len(responses) for prompt, *responses in lengths)
        actions = sum(sum(responses) for _, *responses in lengths)
        ids, positions = self.batch.input_ids[:tokens], self.batch.position_ids[:tokens]
        batch = fqa.PackedPairs(ids, positions, self.batch.actions[:actions], lengths)
        states = len(batch.state_rows())
        hidden_q = self.hidden_q.detach()[:states].clone().requires_grad_()
        return dataclasses.replace(self, hidden_q=hidden_q, hidden_b=self.hidden_b[:states], batch=batch)

    def save(self, path: Path) -> None:
        """For other processes."""
        names = ("input_ids", "position_ids", "actions")
        tensors = {name: getattr(self.batch, name) for name in names} | {"lengths": torch.tensor(self.batch.lengths)}
        states = {"hidden_q": self.hidden_q.detach(), "hidden_b": self.hidden_b, "weight": self.weight}
        whole = {name: tensor.contiguous().cpu() for name, tensor in {**tensors, **states}.items()}
        save_file(whole, path, metadata={} if self.softcap is None else {"softcap": str(self.softcap)})

    @staticmethod
    def load(path: Path, device: str = "cpu") -> Problem:
        with safe_open(path, "pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
            softcap = (file.metadata() or {}).get("softcap")
        lengths = tuple(map(tuple, tensors.pop("lengths").tolist()))
        states = {name: tensors.pop(name).to(device) for name in ("hidden_q", "hidden_b", "weight")}
        batch = fqa.PackedPairs(**tensors, lengths=lengths).to(device)
        states["hidden_q"].requires_grad_()
        cap = None if softcap is None else float(softcap)
        return Problem(**states, batch=batch, softcap=cap)

    @functools.cached_property
    def transitions(self) -> Transitions:
        return pair_transitions(self.batch, CONFIG)

    @property
    def actions(self) -> Tensor:
        """(M,) of the transitions."""
        return self.batch.actions[self.transitions.action_index]

    @functools.cached_property
    def one_action(self) -> Tensor:
        """(S,) some action of each state, for kernels that take one target a row."""
        return self.actions.new_zeros(len(self.hidden_q)).scatter(0, self.transitions.states, self.actions)

    def call(self, values: Callable[[], tuple[Tensor, Tensor]]) -> Call:
        """The timed call, from one that computes `v` (S,) and `q[a]` (M,)."""

        def run() -> Result:
            value, taken = values()
            loss, _ = ops.preference_loss(taken, value, self.transitions.pairs, CONFIG, backend="torch")
            return self.result(loss, value)

        return run if self.gradient else torch.no_grad()(run)

    def result(self, loss: Tensor, value: Tensor) -> Result:
        if not self.gradient:
            return Result(loss, value)
        start = self._now()
        gradient = torch.autograd.grad(loss, self.hidden_q)[0]
        return Result(loss.detach(), gradient, self._now() - start)

    def _now(self) -> float:
        if self.weight.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def backend(problem: Problem, name: str) -> Call:
    """This library's own backends."""
    head = LMHead(problem.weight, softcap=problem.softcap)

    def whole_loss() -> Result:
        loss, _ = q_adapter_loss(problem.hidden_q, problem.hidden_b, head, problem.batch, CONFIG, backend=name)
        return problem.result(loss, loss)

    def values() -> tuple[Tensor, Tensor]:
        capped = problem.softcap is not None
        params = ops.HeadParams(CONFIG.alpha_0, CONFIG.alpha_tilde, softcap=problem.softcap, difference=capped)
        hidden_b, states = problem.hidden_b, problem.transitions.states
        accumulated = _accumulated(problem.weight)
        hidden = problem.hidden_q if capped else problem.hidden_q.to(accumulated) - hidden_b.to(accumulated)
        value, _, taken = ops.state_action_values(
            hidden, hidden_b, problem.weight, params, states, problem.actions, backend=name
        )
        if capped:
            base = ops.taken_value(hidden_b[states], problem.weight, problem.actions, backend=name)
            taken = head.scale_and_cap(taken, None) - head.scale_and_cap(base, None)
        return value, taken

    return whole_loss if problem.gradient else problem.call(values)


def _plain_values(
    hidden_q: Tensor, hidden_b: Tensor, weight: Tensor, states: Tensor, actions: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """`v` (S,) and `q[a]` (M,) from two full logit tensors."""
    base, adapted = (F.linear(hidden, weight).to(_accumulated(weight)) for hidden in (hidden_b, hidden_q))
    if softcap is not None:
        base, adapted = (softcap * torch.tanh(logits / softcap) for logits in (base, adapted))
    q = adapted - base.detach()
    scores = (q + CONFIG.alpha_0 * torch.log_softmax(base.detach(), dim=-1)) / CONFIG.alpha_tilde
    return CONFIG.alpha_tilde * torch.logsumexp(scores, dim=-1), q[states, actions]


def _accumulated(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def published(problem: Problem, compiled: bool = False) -> Call:
    """Full fp32 logits of both streams, log-softmax, log-sum-exp and a gather, as in the published scripts."""
    values = torch.compile(_plain_values, dynamic=False) if compiled else _plain_values
    states = problem.transitions.states

    def run() -> tuple[Tensor, Tensor]:
        return values(problem.hidden_q, problem.hidden_b, problem.weight, states, problem.actions, problem.softcap)

    return problem.call(run)


def _composed(problem: Problem, log_probs: Callable[[Tensor, float], Tensor]) -> Call:
    """From `log_probs(hidden, temperature)`, the log-probability of one action of each state."""
    if problem.softcap is not None:
        raise Unavailable("it takes one hidden state a row, and behind a soft-cap the streams cannot be combined in it")
    alpha_0, alpha_tilde = CONFIG.alpha_0, CONFIG.alpha_tilde
    accumulated = _accumulated(problem.weight)

    def values() -> tuple[Tensor, Tensor]:
        some_rows = problem.weight[problem.one_action].to(accumulated)

        def lse(hidden: Tensor, temperature: float) -> Tensor:
            logits = (hidden.to(accumulated) * some_rows).sum(dim=-1)
            return logits / temperature - log_probs(hidden, temperature).to(accumulated)

        with torch.no_grad():
            base_lse = lse(problem.hidden_b, 1.0)
        combined = problem.hidden_q + (alpha_0 - 1) * problem.hidden_b
        value = alpha_tilde * lse(combined, alpha_tilde) - alpha_0 * base_lse
        difference = problem.hidden_q.to(accumulated) - problem.hidden_b.to(accumulated)
        rows = problem.weight[problem.actions].to(accumulated)
        return value, (difference[problem.transitions.states] * rows).sum(dim=-1)

    return problem.call(values)


def trl_twice(problem: Problem, vocab_chunk: int = 32768) -> Call:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def log_probs(hidden: Tensor, temperature: float) -> Tensor:
        arguments = hidden, problem.weight, None, problem.one_action, temperature, vocab_chunk, None, 1.0, ()
        return ChunkedLogProbFunction.apply(*arguments)[0]

    return _composed(problem, log_probs)


def torch_twice(problem: Problem, most_rows: int | None = None) -> Call:
    """In equal chunks of at most so many rows; None: torch's own choice."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"torch {torch.__version__} has no chunked linear_cross_entropy: 2.13 has")
    rows = len(problem.hidden_q)
    chunk = None if most_rows is None else math.ceil(rows / math.ceil(rows / most_rows))
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)

    def log_probs(hidden: Tensor, temperature: float) -> Tensor:
        arguments = _scaled(hidden, temperature), problem.weight, problem.one_action
        return -F.linear_cross_entropy(*arguments, reduction="none", options=options)

    return _composed(problem, log_probs)


def liger_twice(problem: Problem) -> Call:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if not problem.weight.is_cuda:
        raise Unavailable("its Triton kernels need a GPU")
    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")

    def log_probs(hidden: Tensor, temperature: float) -> Tensor:
        return -loss(problem.weight, _scaled(hidden, temperature), problem.one_action)

    return _composed(problem, log_probs)


def cce_twice(problem: Problem, filter_eps: str | None = None) -> Call:
    """`filter_eps` None: exact; its Triton kernels on CUDA, elsewhere its own path through torch.compile."""
    from cut_cross_entropy import linear_cross_entropy

    implementation = "cce" if problem.weight.is_cuda else "torch_compile"
    if implementation == "torch_compile" and filter_eps is not None:
        raise Unavailable("gradient filtering is a part of its CUDA kernels")

    def log_probs(hidden: Tensor, temperature: float) -> Tensor:
        arguments = _scaled(hidden, temperature), problem.weight, problem.one_action
        return -linear_cross_entropy(*arguments, reduction="none", filter_eps=filter_eps, impl=implementation)

    return _composed(problem, log_probs)


def _scaled(hidden: Tensor, temperature: float) -> Tensor:
    return hidden if temperature == 1.0 else hidden / temperature


def liger_dpo(problem: Problem, pairs_at_once: int = 1) -> Call:
    """Another loss of the same cost, on as many rows as equal responses fill: nothing to check it against."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    if problem.softcap is not None:
        raise Unavailable("its loss knows no soft-cap")
    if not problem.gradient:
        raise Unavailable("it gives no values")
    loss = LigerFusedLinearDPOLoss(chunk_size=pairs_at_once)
    branches = 2 * len(problem.batch)
    length = len(problem.hidden_q) // branches
    rows = branches * length

    def run() -> Result:
        policy, reference = (x[:rows].view(branches, length, -1) for x in (problem.hidden_q, problem.hidden_b))
        targets = problem.one_action[:rows].view(branches, length)
        value, *_ = loss(problem.weight, policy, targets, None, reference, problem.weight)
        return problem.result(value, value)

    return run


def bare_products(problem: Problem) -> Callable[[], None]:
    """The GEMMs of size S D V that the mathematics needs, 3 with the gradient and 2 without, and nothing else.

    In chunks of rows: all scores at once would not fit.
    """
    hidden, weight = problem.hidden_q.detach(), problem.weight
    logits, out = hidden.new_empty(min(len(hidden), 1024), len(weight)), torch.empty_like(hidden)

    def run() -> None:
        for first in range(0, len(hidden), 1024):
            rows = slice(first, first + 1024)
            scores = logits[: len(hidden[rows])]
            torch.mm(problem.hidden_b[rows], weight.T, out=scores)
            torch.mm(hidden[rows], weight.T, out=scores)
            if problem.gradient:
                torch.mm(scores, weight, out=out[rows])

    return run
