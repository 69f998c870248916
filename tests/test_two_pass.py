"""The published computation (`fastqadapter_benchmarks/peers/two_pass.py`) against numbers derived by hand.

The toy. Vocabulary {0, 1, 2}, pad token 0; prompt [1], chosen [1, 2], rejected [2]: rows [1 1 2] and [1 2 pad], T = 3.
Base logits are log 2 everywhere, so log pi = -log 3. The adapted logits, and with alpha_0 = alpha_tilde = 1 and the
`logits` head the values v = log(sum exp Q / 3):

    row       state  Q                 v          action   Q[action]
    chosen    0      (0, log 2, 0)     log 4/3    1        log 2
    chosen    1      (0, 0, log 4)     log 2      2        log 4
    chosen    2      (log 7, 0, 0)     log 3      -        -
    rejected  0      (0, log 2, 0)     log 4/3    2        0
    rejected  1      (0, log 4, 0)     log 2      pad (0)  0
    rejected  2      (0, 0, 0)         0          -        -
"""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, log, tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fastqadapter_benchmarks.peers import two_pass
from fastqadapter_benchmarks.peers.two_pass import PUBLISHED, VARIANTS, PaddedPairs, Variant

LOG2, LOG3, LOG7 = log(tensor([2.0, 3.0, 7.0], dtype=torch.float64)).tolist()
TOY_PAIR = ([1], [1, 2], [2])
TOY_Q = [
    [[0, LOG2, 0], [0, 0, 2 * LOG2], [LOG7, 0, 0]],
    [[0, LOG2, 0], [0, 2 * LOG2, 0], [0, 0, 0]],
]
ONES = {"alpha_0": 1.0, "alpha_tilde": 1.0, "gamma": 1.0}


class FixedLogits:
    """Stands for a PEFT model: its logits are two given tables."""

    def __init__(self, base: Tensor, adapted: Tensor) -> None:
        self.base, self.adapted, self.adapter_on = base, adapted, True

    @contextlib.contextmanager
    def disable_adapter(self):
        self.adapter_on = False
        yield
        self.adapter_on = True

    def __call__(self, **inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.adapted if self.adapter_on else self.base)


def toy() -> tuple[FixedLogits, PaddedPairs]:
    q = tensor(TOY_Q, dtype=torch.float64)
    return FixedLogits(torch.full_like(q, LOG2), q), two_pass.pad_pairs([TOY_PAIR], pad_id=0)


def tiny_llama() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=1, **sizes)).double()
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def train_adapter(model: torch.nn.Module) -> None:
    """Random LoRA weights instead of the zeros that make an adapter invisible."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(0.3 * noise)


def random_pairs(count: int) -> list[two_pass.TokenTriple]:
    generator = torch.Generator().manual_seed(2)

    def ids() -> list[int]:
        length = int(torch.randint(1, 9, (), generator=generator))
        return torch.randint(1, 40, (length,), generator=generator).tolist()

    return [(ids(), ids(), ids()) for _ in range(count)]


def test_padded_rows() -> None:
    _, batch = toy()
    assert batch.input_ids.tolist() == [[1, 1, 2], [1, 2, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.response_mask.tolist() == [[False, True, True], [False, True, False]]


@pytest.mark.parametrize(
    ("preset", "preference", "penalty"),
    [
        # Scored t = 1 in both rows, v(s_t): r^chosen = log 4 - log 2 = log 2, r^rejected = 0 - log 2 (on "2 -> pad").
        # Margin 2 log 2 / (T - 1) = log 2, -log sigmoid(log 2) = log(1 + 1/2); mean r^2 = log^2 2.
        ("reference", log(tensor(1.5)).item(), LOG2**2),
        # Scored t = 0, 1 and t = 0, v(s_{t+1}): r^chosen = (log 2 - log 2, log 4 - 0), r^rejected = 0 - 0.
        # Margin log 4, -log sigmoid(log 4) = log(1 + 1/4); mean r^2 = (0 + 4 log^2 2 + 0) / 3.
        ("paper", log(tensor(1.25)).item(), 4 / 3 * LOG2**2),
        # q = Q - log 2, so every v loses log 2 too: r^chosen = (0 - 0, log 2 - 0), r^rejected = -log 2 - 0.
        # Margin 2 log 2 / 8, -log sigmoid of it = log(1 + 2^(-1/4)); mean r^2 = (0 + log^2 2 + log^2 2) / 3.
        ("default", math.log(1 + 2 ** (-1 / 4)), 2 / 3 * LOG2**2),
    ],
)
def test_loss_of_the_toy(preset: str, preference: float, penalty: float) -> None:
    for beta in (0.0, 0.7):
        loss = two_pass.two_pass_loss(*toy(), **ONES, beta=beta, variant=VARIANTS[preset])
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(preference + beta * penalty, abs=1e-7)


def test_weights_enter_the_rewards() -> None:
    """alpha_0 = alpha_tilde = 2, gamma = 1/2: v = 2 log(sum exp(Q / 2) / 3), and r = Q[action] - v / 2.

    Rejected row, state 1: exp(Q / 2) = (1, 2, 1), v = 2 log 4/3, r = 0 - log 4/3.
    Chosen row, state 1: exp(Q / 2) = (1, 1, 2), v the same, r = log 4 - log 4/3 = log 3.
    """
    model, batch = toy()
    log_pi = torch.log_softmax(model.base, dim=-1)
    rewards = two_pass.token_rewards(model.adapted, log_pi, batch, alpha_0=2.0, alpha_tilde=2.0, gamma=0.5)
    assert rewards[:, 1].tolist() == pytest.approx([LOG3, LOG3 - 2 * LOG2], abs=1e-12)


def test_terminal_state_is_worth_nothing_in_every_row() -> None:
    """v(s_{t+1}) is 0 after the last token, at the padded end (chosen, t = 1) and before it (rejected, t = 0)."""
    model, batch = toy()
    log_pi = torch.log_softmax(model.base, dim=-1)
    rewards = two_pass.token_rewards(model.adapted, log_pi, batch, **ONES, variant=VARIANTS["paper"])
    assert rewards[0, 1].item() == pytest.approx(2 * LOG2)
    assert rewards[1, 0].item() == 0.0


@pytest.mark.parametrize(("longest", "last_scored"), [(12, 10), (13, 11), (20, 11)])
def test_published_mask_is_one_late(longest: int, last_scored: int) -> None:
    """P = 5, L = 12: the right states are t = 4..10; published are 5..11, less t = 11 where no padding follows."""
    prompt = [1] * 5
    batch = two_pass.pad_pairs([(prompt, [2] * 7, [3] * (longest - 5))], pad_id=0)
    published = two_pass.scored_states(batch, PUBLISHED)[0].nonzero().flatten().tolist()
    right = two_pass.scored_states(batch, VARIANTS["paper"])[0].nonzero().flatten().tolist()
    assert published == list(range(5, last_scored + 1))
    assert right == list(range(4, 11))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_swapping_the_branches_negates_the_margins(variant: Variant) -> None:
    generator = torch.Generator().manual_seed(3)
    pairs = random_pairs(3)
    batch = two_pass.pad_pairs(pairs, pad_id=0)
    swapped = two_pass.pad_pairs([(prompt, rejected, chosen) for prompt, chosen, rejected in pairs], pad_id=0)
    rewards = torch.randn(6, batch.input_ids.shape[1] - 1, generator=generator, dtype=torch.float64)
    rewards_swapped = torch.cat(rewards.chunk(2)[::-1])
    margins = two_pass.preference_margins(rewards, batch, variant)
    torch.testing.assert_close(two_pass.preference_margins(rewards_swapped, swapped, variant), -margins)
    penalty = two_pass.reward_penalty(rewards, batch, variant)
    torch.testing.assert_close(two_pass.reward_penalty(rewards_swapped, swapped, variant), penalty)


def test_untrained_difference_head_starts_at_log_2() -> None:
    batch = two_pass.pad_pairs(random_pairs(3), pad_id=0)
    loss = two_pass.two_pass_loss(tiny_llama(), batch, **ONES, beta=0.1, variant=VARIANTS["default"])
    assert loss.item() == pytest.approx(LOG2, abs=1e-12)


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_batch_mates_change_no_pair(preset: str) -> None:
    """The loss of a micro-batch is the mean of the losses of its pairs; the published variant has no such property."""
    model, pairs = tiny_llama(), random_pairs(3)
    train_adapter(model)

    def loss(triples: list[two_pass.TokenTriple], variant: Variant) -> float:
        batch = two_pass.pad_pairs(triples, pad_id=0)
        return two_pass.two_pass_loss(model, batch, **ONES, beta=0.1, variant=variant).item()

    alone = [loss([pair], VARIANTS[preset]) for pair in pairs]
    assert loss(pairs, VARIANTS[preset]) == pytest.approx(sum(alone) / 3, abs=1e-12)
    alone = [loss([pair], PUBLISHED) for pair in pairs]
    assert abs(loss(pairs, PUBLISHED) - sum(alone) / 3) > 1e-6  # so it does depend on them; equality would be 1e-12


def test_base_pass_without_autograd_is_the_same_computation() -> None:
    model, batch = tiny_llama(), two_pass.pad_pairs(random_pairs(2), pad_id=0)
    train_adapter(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results = []
    for base_no_grad in (False, True):
        loss = two_pass.two_pass_loss(model, batch, **ONES, beta=0.1, base_no_grad=base_no_grad)
        results.append((loss, *torch.autograd.grad(loss, parameters)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
