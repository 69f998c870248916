"""Packed pairs: several preference pairs on one token axis, nothing padded and no prompt stored twice.

Token axis of one pair with a prompt of P tokens and responses of L_1, L_2 tokens::

    [ prompt 0..P-1 | chosen 0..L_1-2 | rejected 0..L_2-2 ]

The last response token is an action but never an input: nothing is predicted from it. The *state rows* of a pair are
the rows that predict a response token, `[ P-1 | chosen 0..L_1-2 | rejected 0..L_2-2 ]`; both branches share the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class GroupLayout:
    """Where one prompt and its responses lie on the token axis and on the axis of the state rows."""

    prompt: slice  # token rows of the prompt
    branches: tuple[slice, ...]  # token rows of each response's inputs, maybe empty
    first_state: int  # state row of the last prompt token, shared by all branches
    branch_states: tuple[slice, ...]  # state rows of each response's inputs

    def states_of(self, branch: int) -> list[int]:
        """The state rows of one response: the shared last prompt token, then its inputs."""
        inputs = self.branch_states[branch]
        return [self.first_state, *range(inputs.start, inputs.stop)]


@dataclasses.dataclass(frozen=True)
class BaseStates:
    """What the base says of the state rows of a batch, or of some of them, where it is known already."""

    hidden: Tensor  # (S, D) last hidden states
    lse: Tensor  # (S,) lse of the base logits, fp32

    def map(self, function: Callable[[Tensor], Tensor]) -> BaseStates:
        return BaseStates(function(self.hidden), function(self.lse))

    @classmethod
    def cat(cls, parts: Sequence[BaseStates]) -> BaseStates:
        return cls(torch.cat([part.hidden for part in parts]), torch.cat([part.lse for part in parts]))


@dataclasses.dataclass(frozen=True)
class PackedPairs:
    """A micro-batch of prompts with their responses (two each for training: chosen, rejected) on one token axis.

    T input tokens, M actions, B pairs. Lengths stay Python numbers, so that laying out a batch never waits for a
    device. `pad_action` is set for the `reference` preset alone, which also scores "last token -> pad": then the last
    response token is an input too, and each response has one more action.
    """

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64, every branch goes on from the end of its prompt
    actions: Tensor  # (M,) int64, response tokens branch after branch, then `pad_action` where it is set
    lengths: tuple[tuple[int, ...], ...]  # per pair: tokens of the prompt, of the chosen, of the rejected response
    pad_action: int | None = None
    sources: tuple[str, ...] = ()  # where each pair came from, for error messages
    base: BaseStates | None = None  # then no base pass is needed, in `separate` mode

    def __len__(self) -> int:
        return len(self.lengths)

    def __contains__(self, name: object) -> bool:
        """Fields can be looked up by name as in transformers' own batches, which the Trainer's counters do."""
        return name in self.__dataclass_fields__

    def __getitem__(self, name: str) -> object:
        if name not in self:
            raise KeyError(name)
        return getattr(self, name)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedPairs:
        """The same batch with its tensors on `device`."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("input_ids", "position_ids", "actions")
        }
        base = None if self.base is None else self.base.map(lambda x: x.to(device, non_blocking=non_blocking))
        return dataclasses.replace(self, **moved, base=base)

    def pin_memory(self) -> PackedPairs:
        """The same batch in page-locked memory (the DataLoader's `pin_memory=True` calls this)."""
        pinned = {name: getattr(self, name).pin_memory() for name in ("input_ids", "position_ids", "actions")}
        return dataclasses.replace(self, **pinned, base=None if self.base is None else self.base.map(Tensor.pin_memory))

    @property
    def layout(self) -> list[GroupLayout]:
        """Rows of every prompt and response, in the order of the batch."""
        extra_inputs = 0 if self.pad_action is None else 1
        groups, token, state = [], 0, 0
        for prompt_length, *response_lengths in self.lengths:
            prompt = slice(token, token + prompt_length)
            token, first_state = prompt.stop, state
            state += 1
            branches, branch_states = [], []
            for length in response_lengths:
                inputs = length - 1 + extra_inputs
                branches.append(slice(token, token + inputs))
                branch_states.append(slice(state, state + inputs))
                token, state = token + inputs, state + inputs
            groups.append(GroupLayout(prompt, tuple(branches), first_state, tuple(branch_states)))
        return groups

    def state_rows(self) -> Tensor:
        """(S,) int64 on the device of `input_ids`: the token row of every state row."""
        rows: list[int] = []
        for group in self.layout:
            rows.append(group.prompt.stop - 1)
            for branch in group.branches:
                rows.extend(range(branch.start, branch.stop))
        return torch.tensor(rows, dtype=torch.int64).to(self.input_ids.device, non_blocking=True)

    def action_states(self) -> Tensor:
        """(M,) int64 on the device of `input_ids`: the state row in which every action is taken."""
        groups = self.layout
        rows = [row for group in groups for branch in range(len(group.branches)) for row in group.states_of(branch)]
        return torch.tensor(rows, dtype=torch.int64).to(self.input_ids.device, non_blocking=True)


def pack(
    groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    *,
    pad_action: int | None = None,
    sources: Sequence[str] | None = None,
) -> PackedPairs:
    """Pack prompts, each with one or more responses.

    Args:
        groups: `(prompt_ids, [response_ids, ...])`, no list empty.
        pad_action: token scored after the last one (`reference` preset), or None.
        sources: a name for each group, for error messages.

    Raises:
        ValueError: no group, an empty prompt or an empty response.
    """
    if not groups:
        raise ValueError("cannot pack an empty batch: give at least one prompt with its responses")
    input_ids: list[int] = []
    position_ids: list[int] = []
    actions: list[int] = []
    lengths = []
    for index, (prompt, responses) in enumerate(groups):
        if not len(prompt) or not responses or any(not len(response) for response in responses):
            name = sources[index] if sources else f"group {index}"
            raise ValueError(f"{name}: a prompt and its responses need at least one token each")
        lengths.append((len(prompt), *(len(response) for response in responses)))
        input_ids.extend(prompt)
        position_ids.extend(range(len(prompt)))
        for response in responses:
            inputs = response[:-1] if pad_action is None else response
            input_ids.extend(inputs)
            position_ids.extend(range(len(prompt), len(prompt) + len(inputs)))
            actions.extend(response)
            if pad_action is not None:
                actions.append(pad_action)
    return PackedPairs(
        input_ids=torch.tensor(input_ids, dtype=torch.int64),
        position_ids=torch.tensor(position_ids, dtype=torch.int64),
        actions=torch.tensor(actions, dtype=torch.int64),
        lengths=tuple(lengths),
        pad_action=pad_action,
        sources=tuple(sources or ()),
    )


def pack_pairs(
    pairs: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]],
    *,
    pad_action: int | None = None,
    sources: Sequence[str] | None = None,
) -> PackedPairs:
    """Pack preference pairs given as `(prompt_ids, chosen_ids, rejected_ids)`; see `pack`."""
    groups = [(prompt, (chosen, rejected)) for prompt, chosen, rejected in pairs]
    return pack(groups, pad_action=pad_action, sources=sources)
