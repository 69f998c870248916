"""`fastqadapter.packing`: where every token of a packed batch lies."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastqadapter.packing import GroupLayout, PackedPairs, pack, pack_pairs

PAIRS = [([10, 11, 12], [20, 21, 22], [30, 31]), ([13], [23], [33, 34, 35])]


def tensors_of(batch: PackedPairs) -> dict[str, Tensor]:
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def test_two_pairs_by_hand():
    """[prompt | chosen | rejected], the last token of a response never an input, positions going on after the prompt;
    the state rows are the last prompt token and the inputs of both responses."""
    batch = pack_pairs(PAIRS, sources=["a:1", "a:2"])
    assert batch.input_ids.tolist() == [10, 11, 12, 20, 21, 30] + [13, 33, 34]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3] + [0, 1, 2]
    assert batch.actions.tolist() == [20, 21, 22, 30, 31] + [23, 33, 34, 35]
    assert batch.lengths == ((3, 3, 2), (1, 1, 3)) and len(batch) == 2
    assert batch.sources == ("a:1", "a:2") and batch.pad_action is None
    assert batch.state_rows().tolist() == [2, 3, 4, 5] + [6, 7, 8]
    assert batch.layout == [
        GroupLayout(slice(0, 3), (slice(3, 5), slice(5, 6)), 0, (slice(1, 3), slice(3, 4))),
        GroupLayout(slice(6, 7), (slice(7, 7), slice(7, 9)), 4, (slice(5, 5), slice(5, 7))),
    ]
    assert {tensor.dtype for tensor in (*tensors_of(batch).values(), batch.state_rows())} == {torch.int64}


def test_pad_action_by_hand():
    """It is one more action of each response; so the last response token becomes an input and a state."""
    batch = pack_pairs(PAIRS, pad_action=0)
    assert batch.input_ids.tolist() == [10, 11, 12, 20, 21, 22, 30, 31] + [13, 23, 33, 34, 35]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 3, 4] + [0, 1, 1, 2, 3]
    assert batch.actions.tolist() == [20, 21, 22, 0, 30, 31, 0] + [23, 0, 33, 34, 35, 0]
    assert batch.state_rows().tolist() == [2, 3, 4, 5, 6, 7] + [8, 9, 10, 11, 12]
    assert batch.layout == [
        GroupLayout(slice(0, 3), (slice(3, 6), slice(6, 8)), 0, (slice(1, 4), slice(4, 6))),
        GroupLayout(slice(8, 9), (slice(9, 10), slice(10, 13)), 6, (slice(7, 8), slice(8, 11))),
    ]
    assert batch.lengths == pack_pairs(PAIRS).lengths


def test_shortest_pair_is_its_prompt_alone():
    batch = pack_pairs([([5], [6], [7])])
    assert (batch.input_ids.tolist(), batch.position_ids.tolist(), batch.state_rows().tolist()) == ([5], [0], [0])
    assert batch.actions.tolist() == [6, 7]


@pytest.mark.parametrize("branches", [1, 2, 5])
def test_any_number_of_responses_shares_one_prompt(branches: int):
    responses = [[100 * branch + token for token in range(branch + 1)] for branch in range(branches)]
    batch = pack([([1, 2], responses), ([3], [[4]])])
    assert len(batch.layout[0].branches) == branches and batch.lengths[0] == (2, *range(1, branches + 1))
    for response, rows in zip(responses, batch.layout[0].branches, strict=True):
        assert batch.input_ids[rows].tolist() == response[:-1]
        assert batch.position_ids[rows].tolist() == list(range(2, 1 + len(response)))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_every_action_follows_the_context_that_its_state_row_sees(seed: int, padded: bool):
    """Read a batch back by its layout alone: prompt, then per response the states, each with the action it predicts."""
    random = Random(seed)

    def tokens() -> list[int]:
        return random.choices(range(10), k=random.randint(1, 4))

    groups = [(tokens(), [tokens() for _ in range(random.randint(1, 3))]) for _ in range(random.randint(1, 3))]
    batch = pack(groups, pad_action=99 if padded else None)
    rows = batch.state_rows().tolist()
    actions = iter(batch.actions.tolist())
    token, state = 0, 0
    for (prompt, responses), group in zip(groups, batch.layout, strict=True):
        assert group.prompt.start == token and batch.input_ids[group.prompt].tolist() == prompt
        assert group.first_state == state and rows[state] == group.prompt.stop - 1
        token, state = group.prompt.stop, state + 1
        for response, inputs, states in zip(responses, group.branches, group.branch_states, strict=True):
            assert (inputs.start, states.start) == (token, state)
            assert rows[states] == list(range(inputs.start, inputs.stop))
            seen = batch.input_ids[inputs].tolist()
            taken = [next(actions) for _ in range(len(seen) + 1)]
            assert taken == response + [99] * padded and seen == taken[:-1]
            token, state = inputs.stop, states.stop
    assert (token, state) == (len(batch.input_ids), len(rows)) and next(actions, None) is None


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([([1], [[2], [3]]), ([], [[2], [3]])], "group 1: .* at least one token"),
        ([([1], [[2], []])], "group 0: .* at least one token"),
        ([([1], [[], [3]])], "group 0: .* at least one token"),
        ([([1], [])], "group 0: .* at least one token"),
    ],
)
def test_nothing_may_be_empty(groups: Any, message: str):
    with pytest.raises(ValueError, match=message):
        pack(groups)
    sources = [f"data.jsonl:{i + 1}" for i in range(len(groups))]
    with pytest.raises(ValueError, match=r"^data\.jsonl:\d: "):
        pack(groups, sources=sources)
    with pytest.raises(ValueError, match="cannot pack an empty batch"):
        pack([])
    with pytest.raises(ValueError, match="cannot pack an empty batch"):
        pack_pairs([])


def test_moving_to_the_same_device_copies_nothing():
    batch = pack_pairs(PAIRS, pad_action=0, sources=["a", "b"])
    same = batch.to("cpu", non_blocking=True)
    assert all(getattr(same, name) is tensor for name, tensor in tensors_of(batch).items())
    assert (same.lengths, same.pad_action, same.sources) == (batch.lengths, batch.pad_action, batch.sources)


def test_moving_takes_every_tensor_along():
    batch = pack_pairs(PAIRS).to("meta")
    assert tensors_of(batch).keys() == {"input_ids", "position_ids", "actions"}
    assert {tensor.device.type for tensor in (*tensors_of(batch).values(), batch.state_rows())} == {"meta"}


def test_pinning_takes_every_tensor_along(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor + 1000)  # real pinning needs an accelerator
    batch = pack_pairs(PAIRS, sources=["a", "b"])
    pinned = batch.pin_memory()
    assert all(torch.equal(getattr(pinned, name), tensor + 1000) for name, tensor in tensors_of(batch).items())
    assert (pinned.lengths, pinned.sources) == (batch.lengths, batch.sources)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
def test_data_loader_that_pins_hands_the_batch_on():
    (batch,) = DataLoader(PAIRS, batch_size=2, collate_fn=pack_pairs, pin_memory=True)
    assert isinstance(batch, PackedPairs) and batch.lengths == pack_pairs(PAIRS).lengths


def test_fields_by_name():
    batch = pack_pairs(PAIRS)
    assert "input_ids" in batch and "labels" not in batch and 0 not in batch
    assert batch["input_ids"] is batch.input_ids
    with pytest.raises(KeyError, match="labels"):
        batch["labels"]
