"""The dials of each request, on their way from `SamplingParams.extra_args` to the model's step.

Runner V1 tells its logits processors of every change of the batch before a step; `QAdapterRequests` listens and leaves
the logits as they are. Runner V2 tells the model's state (`model_state.py`). Both let a logits processor's
`validate_params` refuse a request where it comes in.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from fastqadapter.integrations.vllm.rows import QRows, rows_of_step
from fastqadapter.integrations.vllm.served import BASE, RequestDials, Served

_PREFIX = "QAdapterRequests_"
_VARIABLE = "FASTQADAPTER_SERVED_"


class Requests:
    """What the requests of the batch asked for, by their place in it."""

    of_engine: ClassVar[dict[str, Requests]] = {}  # by VllmConfig.instance_id: an engine of this process

    def __init__(self, served: Served) -> None:
        self.served = served
        self.asked: dict[int, tuple[RequestDials, bool]] = {}  # whether every token has rows: for prompt logprobs
        self.changes = 0

    def put(self, place: int, params: Any) -> None:
        self.asked[place] = self.served.request(params.extra_args), params.prompt_logprobs is not None
        self.changes += 1

    def remove(self, place: int) -> None:
        self.asked.pop(place, None)
        self.changes += 1

    def move(self, source: int, target: int, swap: bool) -> None:
        moved, other = self.asked.pop(source), self.asked.pop(target, None)
        self.asked[target] = moved
        if swap and other is not None:
            self.asked[source] = other
        self.changes += 1

    def rows(self, starts: Sequence[int], device: torch.device, places: Sequence[int] | None = None) -> QRows | None:
        """The rows of a step in which the request at `places[i]`, or i, has tokens `starts[i]` to `starts[i + 1]`."""
        places = range(len(starts) - 1) if places is None else places
        everywhere = self.served.kv_mode == "separate"  # each token has K/V of its own there
        asked = [self.asked.get(place, (BASE, False)) for place in places]
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
        for place in batch_update.removed:
            self.requests.remove(place)
        for place, params, *_ in batch_update.added:
            self.requests.put(place, params)
        for source, target, direction in batch_update.moved:
            self.requests.move(source, target, direction == MoveDirectionality.SWAP)


def processor_name(served: Served) -> str:
    """What to put into vLLM's `logits_processors`, in the process that accepts requests or one above it.

    vLLM takes a class by its name and asks the class, not an object, whether a request is valid: so there is one class
    for each set of adapters. Its data go to child processes by the environment.
    """
    text = served.to_json()
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    os.environ[_VARIABLE + digest] = text
    return f"{__name__}:{_PREFIX}{digest}"


def __getattr__(name: str) -> type[QAdapterRequests]:
    if not name.startswith(_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    text = os.environ[_VARIABLE + name.removeprefix(_PREFIX)]
    made = type(name, (QAdapterRequests,), {"served": Served.from_json(text), "__module__": __name__})
    globals()[name] = made
    return made
