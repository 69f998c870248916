"""Where training shards the base over processes: FSDP2, DeepSpeed ZeRO-3."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.integrations import is_deepspeed_zero3_enabled

from fastqadapter.loss import LMHead
from fastqadapter.models.base import lm_head_of
from fastqadapter.sharding import whole


@contextlib.contextmanager
def gathered_head(model: PreTrainedModel, hidden: Tensor) -> Iterator[LMHead]:
    """The whole head on every process, after the decoder has made `hidden` (S, D): the loss reads its weight, outside
    of its forward.

    FSDP2 gathers a group of parameters for the forward of its modules, and the group of the head waits until the head
    has run: so it runs, on no rows. DeepSpeed ZeRO-3 gathers for the length of a context; a tensor that backward keeps
    holds on to the memory.
    """
    head = model.get_output_embeddings()
    with _gathered_by_deepspeed(head.parameters()):
        if isinstance(head.weight, DTensor):
            head(hidden[:0])
        found = lm_head_of(model)
        bias = None if found.bias is None else whole(found.bias)
        yield dataclasses.replace(found, weight=whole(found.weight), bias=bias)


@contextlib.contextmanager
def loading_whole() -> Iterator[None]:
    """Let `from_pretrained` give each process the whole model, which a Q-Adapter looks at when it is put on it; under
    ZeRO-3 it would give it a part. DeepSpeed partitions the model when training begins."""
    reference: Any = deepspeed_integration._hf_deepspeed_config_weak_ref  # of `--deepspeed` or of accelerate's launcher
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = reference


def _gathered_by_deepspeed(parameters: Iterator[Tensor]) -> contextlib.AbstractContextManager[None]:
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    import deepspeed

    context: contextlib.AbstractContextManager[None] = deepspeed.zero.GatheredParameters(list(parameters))
    return context
