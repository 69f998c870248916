"""Runner V2: the dials of requests on their way to the step. Written to its documented hooks; no GPU has run it yet."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from fastqadapter.integrations.vllm.requests import Requests
from fastqadapter.integrations.vllm.rows import QRows, RowBuffers
from fastqadapter.integrations.vllm.served import BASE


class QAdapterModelState(DefaultModelState):
    """Keeps dials by the slot of their request, and lays out the rows of each step.

    In a step in which every request decodes, row r is token r in buffers of fixed address, so that a CUDA graph of it
    can be replayed; padding gets rows too.
    """

    supports_prompt_embeds = False

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.requests = Requests(model.served)
        self.slots: dict[str, int] = {}
        self.buffers = RowBuffers(self.max_num_reqs, model.served.max_adapters, device)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self.slots[new_req_data.req_id] = req_index
        self.requests.put(req_index, new_req_data.sampling_params)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        slot = self.slots.pop(req_id, None)
        if slot is not None:
            self.requests.remove(slot)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs(input_batch, req_states)
        slots = input_batch.idx_mapping_np[: input_batch.num_reqs].tolist()
        starts = input_batch.query_start_loc_np[: input_batch.num_reqs + 1].tolist()
        inputs["q_rows"] = self._rows(slots, starts, input_batch.num_tokens_after_padding)
        return inputs

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        inputs["q_rows"] = self.buffers.filled([], num_tokens) if num_reqs == num_tokens else None
        return inputs

    def _rows(self, slots: list[int], starts: list[int], padded: int) -> QRows | None:
        requests = self.requests
        decodes = starts == list(range(len(slots) + 1)) and padded <= self.max_num_reqs
        if decodes:
            return self.buffers.filled([requests.asked.get(slot, (BASE, False))[0] for slot in slots], padded)
        return requests.rows(starts, self.device, slots)
