"""The dials of each request, on their way from `SamplingParams.extra_args` to the model's step.

Runner V1 tells its logits processors of every change of the batch before a step; `QAdapterRequests` listens and leaves
the logits as they are. Runner V2 tells the model's state (`model_state.py`). Both let a logits processor's
`validate_params` refuse a request where it comes in.
"""

from __future__ import annotations

import base64
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from fastqadapter.integrations.vllm.rows import QRows, rows_of_step
from fastqadapter.integrations.vllm.served import BASE, RequestDials, Served

_PREFIX = "QAdapterRequests_"


class Requests:
    """What the requests of the batch asked for, by their slot in it."""

    # By VllmConfig.instance_id: an engine of this process.
    of_engine: ClassVar[weakref.WeakValueDictionary[str, Requests]] = weakref.WeakValueDictionary()

    def __init__(self, served: Served) -> None:
        self.served = served
        self.asked: dict[int, tuple[RequestDials, bool]] = {}  # whether every token has rows: for prompt logprobs
        self.changes = 0

    def put(self, slot: int, params: Any) -> None:
        on_prompt = params.prompt_logprobs is not None or getattr(params, "prompt_logprob_token_ids", None) is not None
        self.asked[slot] = self.served.request(params.extra_args), on_prompt
        self.changes += 1

    def remove(self, slot: int) -> None:
        self.asked.pop(slot, None)
        self.changes += 1

    def move(self, source: int, target: int, swap: bool) -> None:
        moved, other = self.asked.pop(source), self.asked.pop(target, None)
        self.asked[target] = moved
        if swap and other is not None:
            self.asked[source] = other
        self.changes += 1

    def rows(self, starts: Sequence[int], device: torch.device, slots: Sequence[int] | None = None) -> QRows | None:
        """The rows of a step in which the request at `slots[i]`, or i, has tokens `starts[i]` to `starts[i + 1]`."""
        slots = range(len(starts) - 1) if slots is None else slots
        everywhere = self.served.kv_mode == "separate"  # each token has K/V of its own there
        asked = [self.asked.get(slot, (BASE, False)) for slot in slots]
        every_token = [everywhere or every for _, every in asked]
        return rows_of_step(starts, [dials for dials, _ in asked], every_token, device)


class QAdapterRequests(LogitsProcessor, LogitsProcessorV2):
    """Carries parameters; leaves logits alone. Subclasses know what is served (see `processor_name`)."""

    served: ClassVar[Served]

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        served = Served.of(vllm_config.model_config.hf_config)
        self.requests = Requests.of_engine[vllm_config.instance_id] = Requests(served)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise a ValueError for dials that cannot be: the request is refused (HTTP 400), the engine goes on."""
        cls.served.request(sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Any, context: Any = None) -> Any:
        return logits

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False  # V2: nothing to apply

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for slot in batch_update.removed:
            self.requests.remove(slot)
        for slot, params, *_ in batch_update.added:
            self.requests.put(slot, params)
        for source, target, direction in batch_update.moved:
            self.requests.move(source, target, direction == MoveDirectionality.SWAP)


def processor_name(served: Served) -> str:
    """What to put into vLLM's `logits_processors`.

    vLLM takes a class by its name and asks the class, not an object, whether a request is valid: so there is one class
    for each set of adapters, and what is served travels to other processes in its name.
    """
    return f"{__name__}:{_PREFIX}{base64.urlsafe_b64encode(served.to_json().encode()).decode().rstrip('=')}"


def __getattr__(name: str) -> type[QAdapterRequests]:
    if not name.startswith(_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    text = name.removeprefix(_PREFIX)
    served = Served.from_json(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode())
    made = type(name, (QAdapterRequests,), {"served": served, "__module__": __name__})
    globals()[name] = made
    return made
