"""Log-likelihoods of continuations under the customised policy, from packed batches.

A context is run once for all its continuations, nothing is padded, and logits are formed where a token is scored and
nowhere else. The context is the prompt and the continuation the response, as in training, in every KV mode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch

from fastqadapter.evaluation.scores import LOGITS
from fastqadapter.models import QAdapterModel
from fastqadapter.models.base import lm_head_of
from fastqadapter.models.dials import Dials, combined_logits
from fastqadapter.models.streams import lock_of
from fastqadapter.ops.checks import accumulation_dtype
from fastqadapter.packing import pack

LogLikelihood = tuple[float, bool]  # nats; whether each token of the continuation is the likeliest one


@dataclasses.dataclass(frozen=True)
class Request:
    """A continuation to score, as token ids."""

    index: int  # among all requests
    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def inputs(self) -> int:
        """How many tokens are run for it alone; the last one is never an input."""
        return len(self.context) + len(self.continuation) - 1

    def truncated(self, max_length: int) -> Request:
        """The same with so much of the context, its end, that no more than `max_length` tokens are inputs.

        Raises:
            ValueError: the continuation alone is longer.
        """
        room = max_length + 1 - len(self.continuation)
        if room < 1:
            raise ValueError(
                f"a continuation of {len(self.continuation)} tokens does not fit into max_length={max_length}: raise "
                "max_length as far as the base model goes"
            )
        return dataclasses.replace(self, context=self.context[-room:])


def batches(requests: Iterable[Request], rows: int) -> Iterator[list[Request]]:
    """Split into batches with no more tokens than `rows` rows padded to the longest one would have.

    Longest contexts first, so that memory that does not suffice shows at once; those with the same context side by
    side, so that they share it.
    """
    batch: list[Request] = []
    tokens = longest = 0
    for request in sorted(requests, key=lambda each: (-len(each.context), each.context, -len(each.continuation))):
        longest = max(longest, request.inputs)
        is_shared = bool(batch) and batch[-1].context == request.context
        tokens += len(request.continuation) - 1 if is_shared else request.inputs
        if batch and tokens > rows * longest:
            yield batch
            batch, tokens, longest = [], request.inputs, request.inputs
        batch.append(request)
    if batch:
        yield batch


@torch.no_grad()
def log_likelihoods(model: QAdapterModel, dials: Dials, batch: Sequence[Request]) -> list[LogLikelihood]:
    """`sum_t log pi~(a_t | s_t)` of each request, those of one context side by side; log-softmax in fp32."""
    responses: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for request in batch:
        responses.setdefault(request.context, []).append(request.continuation)
    packed = pack(list(responses.items())).to(model.device)
    with lock_of(model.streams.decoder):
        hidden_b, hidden_qs = model.streams.stream_states(packed, dials.adapters)
    hidden = torch.stack([hidden_b, *hidden_qs]).index_select(1, packed.action_states())  # (streams, M, D)
    head = lm_head_of(model.get_base_model())
    mixture = dials.mixture(head)
    size = max(1, LOGITS // len(head.weight))
    log_probs, likeliest = [], []
    for rows, actions in zip(hidden.split(size, dim=1), packed.actions.split(size), strict=True):
        logits = combined_logits(rows[:, None], head, mixture)[0]  # (rows, V)
        each = torch.log_softmax(logits, dim=-1, dtype=accumulation_dtype(logits.dtype))
        log_probs.append(each.gather(1, actions[:, None])[:, 0])
        likeliest.append(logits.argmax(dim=-1) == actions)
    lengths = [len(request.continuation) for request in batch]
    sums = [float(each.sum()) for each in torch.cat(log_probs).cpu().split(lengths)]
    return list(zip(sums, (bool(each.all()) for each in torch.cat(likeliest).cpu().split(lengths)), strict=True))
