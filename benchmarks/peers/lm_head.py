"""Soft values and taken values of rows, forward and backward, on the kernels of others.

Each function takes a `Problem` and gives a call that returns v (N,), taken values (N,) and the gradient (N, D) of
`sum(upstream_v v + upstream_x x)`. The peers know log-probabilities, so each is composed twice: with z a gathered dot
product in fp32, `lse = z - log p[a]` gives the base lse from `h_b` and the combined one from `d + alpha_0 h_b`.

Sources: TRL's ChunkedLogProbFunction (https://github.com/huggingface/trl), torch.nn.functional.linear_cross_entropy
(https://docs.pytorch.org), Liger's chunked DPO loss (https://github.com/linkedin/Liger-Kernel).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastqadapter import ops

Result = tuple[Tensor, Tensor, Tensor]
Call = Callable[[], Result]


@dataclasses.dataclass(frozen=True)
class Problem:
    """The rows, the frozen head, and what comes back from the loss."""

    hidden_q: Tensor  # (N, D) asks for a gradient
    hidden_b: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    actions: Tensor  # (N,)
    upstream_v: Tensor  # (N,)
    upstream_x: Tensor  # (N,)
    alpha_0: float = 0.9
    alpha_tilde: float = 0.7

    @staticmethod
    def make(rows: int, size: int, vocab: int, dtype: torch.dtype) -> Problem:
        """Random states; logits have a standard deviation of 2."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        actions = torch.randint(vocab, (rows,), generator=generator)
        hidden_q = (0.1 * normal(rows, size)).to(dtype).requires_grad_()
        weight = torch.empty(vocab, size, dtype=dtype)
        for rows_of_weight in weight.split(8192):
            rows_of_weight.copy_(normal(len(rows_of_weight), size) * (2 / size**0.5))
        return Problem(hidden_q, normal(rows, size).to(dtype), weight, actions, normal(rows), normal(rows))

    def first(self, rows: int, dtype: torch.dtype) -> Problem:
        """The first rows alone, in another dtype."""
        few = {name: getattr(self, name)[:rows] for name in ("hidden_b", "actions", "upstream_v", "upstream_x")}
        return dataclasses.replace(
            self,
            hidden_q=self.hidden_q.detach()[:rows].to(dtype).requires_grad_(),
            weight=self.weight.to(dtype),
            **{name: x.to(dtype) if x.is_floating_point() and name == "hidden_b" else x for name, x in few.items()},
        )

    def with_gradient(self, value: Tensor, taken: Tensor) -> Result:
        total = (self.upstream_v * value).sum() + (self.upstream_x * taken).sum()
        (gradient,) = torch.autograd.grad(total, self.hidden_q)
        return value.detach(), taken.detach(), gradient


def backend(problem: Problem, name: str) -> Call:
    """This library's own backends."""
    params = ops.HeadParams(problem.alpha_0, problem.alpha_tilde)
    states = torch.arange(len(problem.actions))

    def run() -> Result:
        value, _, taken = ops.state_action_values(
            problem.hidden_q, problem.hidden_b, problem.weight, params, states, problem.actions, backend=name
        )
        return problem.with_gradient(value, taken)

    return run


def published(problem: Problem) -> Call:
    """Two full fp32 logit tensors, log-softmax, log-sum-exp and a gather, as in the published scripts."""

    def run() -> Result:
        with torch.no_grad():
            log_pi = torch.log_softmax(F.linear(problem.hidden_b, problem.weight).float(), dim=-1)
        q = F.linear(problem.hidden_q, problem.weight).float()
        scores = (q + problem.alpha_0 * log_pi) / problem.alpha_tilde
        value = problem.alpha_tilde * torch.logsumexp(scores, dim=-1)
        return problem.with_gradient(value, q.gather(1, problem.actions[:, None])[:, 0])

    return run


def _composed(problem: Problem, log_probs: Callable[[Tensor, float], Tensor]) -> Result:
    """From `log_probs(hidden, temperature)`, the log-probability of each action."""
    rows = problem.weight[problem.actions].float()

    def lse(hidden: Tensor, temperature: float) -> Tensor:
        return (hidden.float() * rows).sum(dim=-1) / temperature - log_probs(hidden, temperature).float()

    with torch.no_grad():
        base_lse = lse(problem.hidden_b, 1.0)
    combined = problem.hidden_q + problem.alpha_0 * problem.hidden_b
    value = problem.alpha_tilde * lse(combined, problem.alpha_tilde) - problem.alpha_0 * base_lse
    return problem.with_gradient(value, (problem.hidden_q.float() * rows).sum(dim=-1))


def trl_twice(problem: Problem, vocab_chunk: int = 32768) -> Call:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def log_probs(hidden: Tensor, temperature: float) -> Tensor:
        arguments = hidden, problem.weight, None, problem.actions, temperature, vocab_chunk, None, 1.0, ()
        return ChunkedLogProbFunction.apply(*arguments)[0]

    return lambda: _composed(problem, log_probs)


def torch_twice(problem: Problem, row_chunk: int | None = None) -> Call:
    """`row_chunk` None: torch's own choice."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=row_chunk)

    def log_probs(hidden: Tensor, temperature: float) -> Tensor:
        scaled = hidden if temperature == 1.0 else hidden / temperature
        return -F.linear_cross_entropy(scaled, problem.weight, problem.actions, reduction="none", options=options)

    return lambda: _composed(problem, log_probs)


def liger_dpo(problem: Problem, pairs: int, pairs_at_once: int) -> Call:
    """Another loss of the same cost class, on the same rows as `pairs` pairs: nothing to check it against."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(chunk_size=pairs_at_once)
    shape = 2 * pairs, len(problem.actions) // (2 * pairs)

    def run() -> Result:
        policy, reference = (x.view(*shape, -1) for x in (problem.hidden_q, problem.hidden_b))
        value, *_ = loss(problem.weight, policy, problem.actions.view(shape), None, reference, problem.weight)
        (gradient,) = torch.autograd.grad(value, problem.hidden_q)
        return value.detach(), value.detach(), gradient

    return run


def bare_products(problem: Problem) -> Callable[[], None]:
    """The three GEMMs of size N D V that the mathematics needs, and nothing else."""
    hidden, weight = problem.hidden_q.detach(), problem.weight
    logits, out = hidden.new_empty(len(hidden), len(weight)), torch.empty_like(hidden)

    def run() -> None:
        torch.mm(problem.hidden_b, weight.T, out=logits)
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=out)

    return run
