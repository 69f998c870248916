"""`fastqadapter.loss`: which transitions each preset scores, and the whole objective by hand."""

from __future__ import annotations

import dataclasses
from math import exp, inf, log, nan
from typing import Any

import pytest
import torch
from torch import Tensor

from backend_cases import device_of
from fastqadapter import ops
from fastqadapter.config import PRESETS, QAdapterConfig
from fastqadapter.loss import LMHead, pair_transitions, q_adapter_loss
from fastqadapter.packing import PackedPairs, pack, pack_pairs
from fastqadapter.testing import assert_close_to_truth
from references import Branch, Weights, preference_loss

each_backend = pytest.mark.parametrize("backend", ["eager", "torch"])
each_preset = pytest.mark.parametrize("preset", PRESETS)
PAD = 0
# Vocabulary of 3, two pairs: (prompt, chosen, rejected).
PAIRS = [([1, 1], [1, 2], [2]), ([2], [0], [1, 0])]
# exp(q) in the state after the prompt and these response tokens, of each pair.
EXP_Q: list[dict[tuple[int, ...], tuple[int, int, int]]] = [
    {(): (1, 2, 3), (1,): (2, 2, 5), (1, 2): (4, 4, 4), (2,): (4, 1, 1)},
    {(): (3, 5, 4), (0,): (1, 2, 3), (1,): (5, 3, 1), (1, 0): (7, 1, 1)},
]
WITHOUT_PAD = [(0, ()), (0, (1,)), (1, ()), (1, (1,))]  # the state rows of `PAIRS`: pair, response tokens so far
WITH_PAD = [(0, ()), (0, (1,)), (0, (1, 2)), (0, (2,)), (1, ()), (1, (0,)), (1, (1,)), (1, (1, 0))]


def packed(pairs: Any, preset: str) -> PackedPairs:
    return pack_pairs(pairs, pad_action=PAD if preset == "reference" else None)


def tokens_in_order(prompt: int, *responses: int) -> tuple[list[int], ...]:
    """Responses of these lengths, every token of which is its position in the prompt + response."""
    return list(range(prompt)), *(list(range(prompt, prompt + length)) for length in responses)


def scored(batch: PackedPairs, config: QAdapterConfig, branch: int) -> tuple[list[int], list[int], list[int]]:
    """Positions t of the scored states of a branch, their actions, and the position of each value (-1: terminal)."""
    transitions = pair_transitions(batch, config)
    positions = batch.position_ids[batch.state_rows()]
    start, stop = transitions.pairs.branch_ends[branch : branch + 2].tolist()
    value_rows = transitions.pairs.value_rows[start:stop].tolist()
    return (
        positions[transitions.states[start:stop]].tolist(),
        batch.actions[transitions.action_index[start:stop]].tolist(),
        [-1 if row < 0 else int(positions[row]) for row in value_rows],
    )


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_every_response_token_is_scored(preset: str):
    """Prompt of P = 5, total length L = 12: t = P-1..L-2, action at t+1, value of the next state, 0 at the end."""
    batch = packed([tokens_in_order(5, 7, 1)], preset)
    config = QAdapterConfig(preset=preset)
    assert scored(batch, config, 0) == ([*range(4, 11)], [*range(5, 12)], [*range(5, 11), -1])
    assert scored(batch, config, 1) == ([4], [5], [-1])  # a response of one token
    assert pair_transitions(batch, config).pairs.divisor.item() == {"default": 8, "paper": 1}[preset]
    longer = QAdapterConfig(preset=preset, divisor="max_length")
    assert pair_transitions(batch, longer).pairs.divisor.item() == 7


@pytest.mark.parametrize(
    ("padded_length", "positions", "actions"),
    [(12, [*range(5, 11)], [*range(6, 12)]), (13, [*range(5, 12)], [*range(6, 12), PAD])],
)
def test_published_mask(padded_length: int, positions: list[int], actions: list[int]):
    """Published, with P = 5 and L = 12: t = 5..10 where the row is not padded (T = 12), 5..11 where it is (T >= 13);
    so the first response token is never scored, and a padded row scores "last token -> pad". Values of s_t."""
    mate = tokens_in_order(2, padded_length - 2, 3)
    batch = packed([tokens_in_order(5, 7, 1), mate], "reference")
    config = QAdapterConfig(preset="reference")
    assert scored(batch, config, 0) == (positions, actions, positions)
    assert scored(batch, config, 1) == ([5], [PAD], [5])
    assert scored(batch, config, 3) == ([2, 3, 4], [3, 4, PAD], [2, 3, 4])
    pairs = pair_transitions(batch, config).pairs
    assert pairs.divisor.tolist() == [padded_length - 1.0] * 2
    total = pairs.branch_ends[-1].item()
    assert (len(pairs) / pairs.squares_divisor).tolist() == pytest.approx([4 / total] * 2)  # sum r^2 / sum of the mask


def test_published_mask_leaves_an_unpadded_one_token_response_without_reward():
    """Pair 1 is as long as the longest and scores nothing; the mean of r^2 is over the 6 transitions of pair 2 alone.
    All rewards are 1, so its margin is 0 too: loss = log 2 + beta 6/6."""
    batch = packed([tokens_in_order(5, 1, 1), tokens_in_order(2, 4, 3)], "reference")
    config = QAdapterConfig(preset="reference", beta=0.1)
    pairs = pair_transitions(batch, config).pairs
    assert pairs.branch_ends.tolist() == [0, 0, 0, 3, 6]
    loss, _ = ops.preference_loss(torch.ones(6).double(), torch.zeros(20).double(), pairs, config)
    assert loss.item() == pytest.approx(log(2) + 0.1, abs=1e-7)


def test_batch_without_any_published_transition_has_a_finite_loss():
    batch = packed([tokens_in_order(5, 1, 1)], "reference")
    config = QAdapterConfig(preset="reference")
    pairs = pair_transitions(batch, config).pairs
    loss, _ = ops.preference_loss(torch.zeros(0), torch.zeros(5), pairs, config)
    assert loss.item() == pytest.approx(log(2), rel=1e-6)


def test_fields_of_a_preset_can_be_set_alone():
    batch = pack_pairs([tokens_in_order(2, 3, 5)])
    current = QAdapterConfig(value_state="current", divisor="7")
    assert scored(batch, current, 1) == ([1, 2, 3, 4, 5], [2, 3, 4, 5, 6], [1, 2, 3, 4, 5])
    assert pair_transitions(batch, current).pairs.divisor.item() == 7
    assert pair_transitions(batch, QAdapterConfig(divisor="padded_length")).pairs.divisor.item() == 6
    shifted = pack_pairs([tokens_in_order(2, 3, 5)], pad_action=PAD)
    config = QAdapterConfig(scored_states="shifted", divisor="max_length")
    assert pair_transitions(shifted, config).pairs.divisor.item() == 5
    assert scored(shifted, config, 0)[:2] == ([2, 3, 4], [3, 4, PAD])


def test_pad_action_must_fit_the_preset():
    with pytest.raises(ValueError, match="scored_states='shifted'.*pad_action=tokenizer.pad_token_id"):
        pair_transitions(pack_pairs(PAIRS), QAdapterConfig(preset="reference"))
    with pytest.raises(ValueError, match="collate with pad_action=None"):
        pair_transitions(pack_pairs(PAIRS, pad_action=0), QAdapterConfig())


@pytest.mark.parametrize("responses", [([1],), ([1], [2], [0])])
def test_a_pair_has_two_responses(responses: Any):
    with pytest.raises(ValueError, match="two responses for each prompt"):
        pair_transitions(pack([([1], [[1], [2]]), ([1], responses)]), QAdapterConfig())


def test_identity_3_telescoping():
    """With undiscounted sums `sum_t gamma v(s_t) - sum_t gamma v(s_{t+1}) = gamma v(s_{P-1})`, the same for both
    branches of a pair: with a shared prompt and a shared divisor the preference difference is the same, for any
    gamma. Only the regulariser tells `v(s_t)` from `v(s_{t+1})`."""
    batch = pack_pairs([tokens_in_order(3, 4, 6), tokens_in_order(1, 1, 2), tokens_in_order(2, 5, 5)])
    generator = torch.Generator().manual_seed(0)
    q_taken, values = torch.randn(2, len(batch.actions), generator=generator, dtype=torch.float64)
    for gamma in (1.0, 0.9, 0.5):
        metrics = []
        for value_state in ("next", "current"):
            config = QAdapterConfig(value_state=value_state, gamma=gamma)
            pairs = pair_transitions(batch, config).pairs
            metrics.append(ops.preference_loss(q_taken, values, pairs, config)[1])
        following, current = metrics
        torch.testing.assert_close(following["rewards/margins"], current["rewards/margins"])
        assert ((following["chi2_loss"] - current["chi2_loss"]).abs() > 1e-3).all()


def toy_states(preset: str) -> tuple[Tensor, Tensor, LMHead]:
    """hidden_q and hidden_b of `PAIRS` under W = 1: the base logits are all log 2, q is that of `EXP_Q`."""
    rows = WITH_PAD if preset == "reference" else WITHOUT_PAD
    q = torch.tensor([EXP_Q[pair][so_far] for pair, so_far in rows], dtype=torch.float64).log()
    hidden_b = torch.full_like(q, log(2))
    hidden_q = q + hidden_b if preset == "default" else q
    return hidden_q.requires_grad_(), hidden_b, LMHead(torch.eye(3, dtype=torch.float64))


# Per pair: rewards of chosen and of rejected, divisor, and exp of both log-probabilities. See the test's docstring.
BY_HAND: dict[str, list[tuple[list[float], list[float], int, float, float]]] = {
    "default": [
        ([log(2 / 3), log(5)], [log(3)], 8, 2 / 6 * 5 / 9, 3 / 6),
        ([log(3)], [log(5 / 3), log(5)], 8, 3 / 12, 5 / 12 * 5 / 9),
    ],
    "paper": [
        ([log(2 / 3), log(5)], [log(3)], 1, 2 / 6 * 5 / 9, 3 / 6),
        ([log(3)], [log(5 / 3), log(5)], 1, 3 / 12, 5 / 12 * 5 / 9),
    ],
    "reference": [
        ([log(5 / 3)], [log(4 / 2)], 3, 5 / 9, 4 / 6),
        ([log(1 / 2)], [log(5 / 3), log(7 / 3)], 3, 1 / 6, 5 / 9 * 7 / 9),
    ],
}


@each_backend
@each_preset
def test_two_pairs_by_hand(preset: str, backend: str):
    """log pi = -log 3 everywhere, all of alpha_0, alpha_tilde, gamma are 1, so v(s) = log(sum exp q / 3).

    default, paper. Pair 1, chosen [1, 2]: state (), action 1, next value log 9/3: r = log 2 - log 3. State (1),
    action 2, then the end: r = log 5. Rejected [2]: r = log 3. Pair 2, chosen [0]: r = log 3. Rejected [1, 0]: state
    (), next value log 9/3: r = log 5 - log 3; state (1): r = log 5. The divisor is 8, or 1.

    reference. Values of the state itself, T = 4, divisor 3, no first tokens. Pair 1, chosen, unpadded: state (1),
    action 2, v = log 9/3: r = log 5 - log 3. Rejected, padded: state (2), action pad = 0, v = log 6/3: r = log 4 -
    log 2. Pair 2, chosen, padded: state (0), pad, v = log 2: r = log 1 - log 2. Rejected, padded: state (1), action
    0, v = log 3: r = log 5 - log 3; state (1, 0), pad, v = log 3: r = log 7 - log 3.

    The customised policy is exp q / sum exp q. The mean of r^2 is over 3 transitions a pair; `reference`: over all 5.
    """
    config = QAdapterConfig(preset=preset, beta=0.1)
    hidden_q, hidden_b, head = toy_states(preset)
    loss, metrics = q_adapter_loss(hidden_q, hidden_b, head, packed(PAIRS, preset), config, backend=backend)

    losses, squares = [], []
    for i, (chosen, rejected, divisor, chosen_probability, rejected_probability) in enumerate(BY_HAND[preset]):
        margin = (sum(chosen) - sum(rejected)) / divisor
        losses.append(log(1 + exp(-margin)))
        squares.append([reward**2 for reward in chosen + rejected])
        assert metrics["rewards/margins"][i].item() == pytest.approx(margin, abs=1e-7)
        assert metrics["logps/chosen"][i].item() == pytest.approx(log(chosen_probability), abs=1e-12)
        assert metrics["logps/rejected"][i].item() == pytest.approx(log(rejected_probability), abs=1e-12)
    if preset == "reference":
        mean_square = sum(map(sum, squares)) / 5
    else:
        mean_square = sum(sum(of_pair) / 3 for of_pair in squares) / 2
    assert loss.item() == pytest.approx(sum(losses) / 2 + 0.1 * mean_square, abs=1e-7)
    loss.backward()
    assert hidden_q.grad.isfinite().all()


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True, "logit_scale": 0.5},
    "softcap": {"bias": True, "logit_scale": 0.5, "softcap": 2.0},
}
MATES = [tokens_in_order(3, 4, 2), tokens_in_order(1, 1, 6), tokens_in_order(2, 6, 5)]


def random_states(
    batch: PackedPairs, head: str = "plain", dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, LMHead]:
    """Random hidden states, each row a function of its token and position, and a head over 8 tokens."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(2, 20, 20, 6, generator=generator, dtype=torch.float64).to(dtype)
    options = dict(HEADS[head])
    if options.get("bias"):
        options["bias"] = torch.randn(8, generator=generator, dtype=torch.float64).to(dtype)
    rows = batch.state_rows()
    hidden_q, hidden_b = table[:, batch.input_ids[rows], batch.position_ids[rows]]
    weight = torch.randn(8, 6, generator=generator, dtype=torch.float64).to(dtype)
    return hidden_q.clone().requires_grad_(), hidden_b, LMHead(weight, **options)


def branches_of(hidden_q: Tensor, hidden_b: Tensor, head: LMHead, batch: PackedPairs, pairs: Any) -> list[Branch]:
    """What the slow reference takes: both logits in the states of each response; zeros after its last token."""

    def logits(hidden: Tensor) -> Tensor:
        raw = head.logit_scale * (hidden @ head.weight.T + (0.0 if head.bias is None else head.bias))
        return raw if head.softcap is None else head.softcap * torch.tanh(raw / head.softcap)

    branches = []
    for (prompt, *responses), group in zip(pairs, batch.layout, strict=True):
        for response, inputs in zip(responses, group.branch_states, strict=True):
            rows = [group.first_state, *range(inputs.start, inputs.stop)]
            both = (logits(hidden[rows]) for hidden in (hidden_b, hidden_q))
            pad = (0, 0, 0, len(response) + 1 - len(rows))
            branches.append(Branch(prompt, response, *(torch.nn.functional.pad(part, pad) for part in both)))
    return branches


@each_backend
@each_preset
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradient_equal_the_slow_reference(head: str, preset: str, backend: str):
    numbers = {"alpha_0": 0.7, "alpha_tilde": 1.3, "gamma": 0.9, "beta": 0.1}
    batch = packed(MATES, preset)
    hidden_q, hidden_b, lm_head = random_states(batch, head)
    config = QAdapterConfig(preset=preset, **numbers)
    loss, _ = q_adapter_loss(hidden_q, hidden_b, lm_head, batch, config, backend=backend)
    slow = preference_loss(branches_of(hidden_q, hidden_b, lm_head, batch, MATES), Weights(**numbers), preset)
    torch.testing.assert_close(loss, slow, rtol=1e-7, atol=1e-7)  # the divisors are fp32
    gradient, slow_gradient = (torch.autograd.grad(result, hidden_q)[0] for result in (loss, slow))
    torch.testing.assert_close(gradient, slow_gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@each_preset
@pytest.mark.parametrize("head", HEADS)
def test_triton_kernels_give_the_same_loss(head: str, preset: str, dtype: torch.dtype):
    """Loss, every metric and the gradient; the bars of its loss are those of eager in the same dtype."""
    pytest.importorskip("triton", reason="Triton is not installed")
    batch = packed(MATES, preset)
    config = QAdapterConfig(preset=preset, alpha_0=0.7, alpha_tilde=1.3, gamma=0.9, beta=0.1)

    def run(backend: str, to: torch.dtype) -> dict[str, Tensor]:
        hidden_q, hidden_b, lm_head = random_states(batch, head, dtype)
        hidden_q = hidden_q.detach().to(to).requires_grad_()
        bias = None if lm_head.bias is None else lm_head.bias.to(to)
        there = dataclasses.replace(lm_head, weight=lm_head.weight.to(to), bias=bias)
        device = device_of(backend)
        there = dataclasses.replace(
            there, weight=there.weight.to(device), bias=None if bias is None else bias.to(device)
        )
        loss, metrics = q_adapter_loss(
            hidden_q.to(device), hidden_b.to(device, to), there, batch.to(device), config, backend=backend
        )
        loss.backward()
        return {"loss": loss.detach(), "gradient": hidden_q.grad, **metrics}

    actual, eager, truth = run("triton", dtype), run("eager", dtype), run("eager", torch.float64)
    for name in truth:
        if name != "rewards/accuracies":  # a step function
            assert_close_to_truth(actual[name], eager[name], truth[name], name=name, dtype=dtype)


@each_backend
@each_preset
@pytest.mark.parametrize("head", HEADS)
def test_log_probabilities_are_those_of_the_customised_policy(head: str, preset: str, backend: str):
    """Of two responses of one token each, over the same state, all tokens once: the probabilities sum to 1."""
    config = QAdapterConfig(preset=preset, alpha_0=0.7, alpha_tilde=1.3, scored_states="response")
    total = 0.0
    for first in range(0, 8, 2):
        batch = pack_pairs([([3, 1], [first], [first + 1])])
        hidden_q, hidden_b, lm_head = random_states(batch, head)
        _, metrics = q_adapter_loss(hidden_q, hidden_b, lm_head, batch, config, backend=backend)
        total += metrics["logps/chosen"].exp().item() + metrics["logps/rejected"].exp().item()
    assert total == pytest.approx(1.0, abs=1e-12)


@each_backend
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_batch_mates_change_nothing(preset: str, backend: str):
    """Neither loss nor gradient of a pair depends on its mates, so micro-batches of any size add up to the same."""
    config = QAdapterConfig(preset=preset)

    def run(pairs: list[Any]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        batch = pack_pairs(pairs)
        hidden_q, *rest = random_states(batch)
        loss, metrics = q_adapter_loss(hidden_q, *rest, batch, config, backend=backend)
        return loss, metrics, torch.autograd.grad(loss, hidden_q)[0]

    loss, metrics, gradient = run(MATES)
    alone = [run([pair]) for pair in MATES]
    torch.testing.assert_close(loss, torch.stack([one for one, _, _ in alone]).mean())
    torch.testing.assert_close(gradient, torch.cat([g for _, _, g in alone]) / len(MATES))
    for name, metric in metrics.items():
        torch.testing.assert_close(metric, torch.cat([m[name] for _, m, _ in alone]), msg=name)
    torch.testing.assert_close(run(MATES[::-1])[0], loss)


def test_published_loss_depends_on_batch_mates():
    """As published: the divisor is the padded length, so a long mate shrinks the margin of a short pair."""
    config = QAdapterConfig(preset="reference")
    margins = []
    for pairs in (MATES[:1], MATES):
        batch = packed(pairs, "reference")
        hidden_q, hidden_b, head = random_states(batch)
        _, metrics = q_adapter_loss(hidden_q, hidden_b, head, batch, config)
        margins.append(metrics["rewards/margins"][0].item())
    assert margins[0] != pytest.approx(margins[1], rel=1e-3)


@each_backend
@each_preset
def test_q_values_of_bf16_states_are_never_rounded_to_bf16(preset: str, backend: str):
    """h_q - h_b and the product with W[a] are formed in fp32: a rounding of either would be off by 1e-3."""
    batch = packed(MATES, preset)
    states = random_states(batch, dtype=torch.bfloat16)
    hidden_q, hidden_b, head = states[0].detach(), states[1], states[2]
    config = QAdapterConfig(preset=preset, gamma=0.0)
    true_head = LMHead(head.weight.double())
    _, truth = q_adapter_loss(hidden_q.double(), hidden_b.double(), true_head, batch, config, backend="eager")
    _, metrics = q_adapter_loss(hidden_q, hidden_b, head, batch, config, backend=backend)
    for name in ("rewards/chosen", "rewards/rejected"):
        torch.testing.assert_close(metrics[name].double(), truth[name], rtol=1e-6, atol=1e-6, msg=name)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_untrained_difference_head_starts_at_log_2(head: str, dtype: torch.dtype, backend: str):
    batch = pack_pairs(MATES)
    _, hidden_b, lm_head = random_states(batch, head, dtype)
    config = QAdapterConfig(alpha_0=1.0, alpha_tilde=1.0)
    loss, metrics = q_adapter_loss(hidden_b.clone(), hidden_b, lm_head, batch, config, backend=backend)
    assert loss.item() == pytest.approx(log(2), abs=2e-6)
    for name in ("rewards/chosen", "rewards/rejected", "chi2_loss", "q_values/mean", "values/mean"):
        assert metrics[name].abs().max() < 2e-6, name


@each_backend
@each_preset
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_bad_state_never_gives_a_finite_loss(bad: float, head: str, preset: str, backend: str):
    """In any of the states that the preset scores; a published mask leaves out the first state of each pair."""
    batch = packed(MATES, preset)
    config = QAdapterConfig(preset=preset, beta=0.0)
    for row in set(pair_transitions(batch, config).states.tolist()):
        hidden_q, hidden_b, lm_head = random_states(batch, head)
        with torch.no_grad():
            hidden_q[row, 1] = bad
        loss, _ = q_adapter_loss(hidden_q, hidden_b, lm_head, batch, config, backend=backend)
        assert not loss.isfinite(), row


@each_backend
@each_preset
def test_backward_twice_gives_the_same_gradient(preset: str, backend: str, poisoned_memory: None):
    batch = packed(MATES, preset)
    hidden_q, hidden_b, head = random_states(batch, "bias", torch.bfloat16)
    loss, _ = q_adapter_loss(hidden_q, hidden_b, head, batch, QAdapterConfig(preset=preset), backend=backend)
    first, second = (torch.autograd.grad(loss, hidden_q, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.isfinite().all()


@each_preset
def test_states_of_other_dtypes_than_the_head(preset: str):
    """Autocast leaves one stream in bf16 and the other in fp32, whatever the dtype of the head."""
    batch = packed(MATES, preset)
    config = QAdapterConfig(preset=preset)
    hidden_q, hidden_b, head = random_states(batch, "bias")
    truth, _ = q_adapter_loss(hidden_q, hidden_b, head, batch, config, backend="eager")
    for q_dtype in (torch.bfloat16, torch.float32):
        for b_dtype in (torch.bfloat16, torch.float32):
            for head_dtype in (torch.bfloat16, torch.float32):
                states = hidden_q.detach().to(q_dtype).requires_grad_(), hidden_b.to(b_dtype)
                lm_head = dataclasses.replace(head, weight=head.weight.to(head_dtype), bias=head.bias.to(head_dtype))
                loss, _ = q_adapter_loss(*states, lm_head, batch, config)
                loss.backward()
                assert loss.dtype == torch.float32 and states[0].grad.dtype == q_dtype
                assert loss.item() == pytest.approx(truth.item(), rel=0.1)


@each_backend
@each_preset
@pytest.mark.parametrize("head", HEADS)
def test_no_device_sync(head: str, preset: str, backend: str):
    batch = packed(MATES, preset)
    hidden_q, hidden_b, lm_head = random_states(batch, head)
    bias = None if lm_head.bias is None else lm_head.bias.to("meta")
    lm_head = dataclasses.replace(lm_head, weight=lm_head.weight.to("meta"), bias=bias)
    hidden_q = hidden_q.detach().to("meta").requires_grad_()
    config = QAdapterConfig(preset=preset)
    loss, metrics = q_adapter_loss(hidden_q, hidden_b.to("meta"), lm_head, batch.to("meta"), config, backend=backend)
    loss.backward()
    assert loss.shape == () and {metric.shape for metric in metrics.values()} == {(3,)}
