"""What the demo measures on a trained adapter: the KL from the base policy, and how it answers."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from fastqadapter.evaluation.scores import Point, score_tokens
from fastqadapter.models import QAdapterModel
from fastqadapter.packing import PackedPairs, pack
from fastqadapter.prompts import encode_chats

BASE: dict[str, float] = {"default": 0.0}


def answers(
    model: QAdapterModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    strength: float,
    *,
    max_new_tokens: int,
    batch_size: int = 12,
    description: str | None = None,
) -> list[list[int]]:
    """Token ids of the greedy answer to each prompt, at one strength of the adapter (0 is the base policy), with the
    final EOS where there is one."""
    result: list[list[int]] = []
    for start in tqdm(range(0, len(prompts), batch_size), desc=description, disable=None, leave=False):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + batch_size]]
        inputs = encode_chats(tokenizer, chats).to(model.device)
        output = model.generate(
            **inputs,
            adapters={"default": strength},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            result.append(row[:end])
    return result


def pack_answers(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], ids: Sequence[list[int]]) -> PackedPairs:
    """Prompts with one answer each, packed."""
    groups = []
    for prompt, answer in zip(prompts, ids, strict=True):
        chat = [{"role": "user", "content": prompt}]
        groups.append((encode_chats(tokenizer, [chat])["input_ids"][0].tolist(), [answer]))
    return pack(groups)


def kl_from_base(model: QAdapterModel, batch: PackedPairs, strength: float = 1.0) -> float:
    """Mean over the response tokens of `batch` of `KL(pi || pi~)` in nats per token, `pi~` at the config's dials."""
    config = model.qadapter_config
    scores = score_tokens(model, batch, [Point(config.alpha_0, config.alpha_tilde, strength)])
    return float(scores.kl.mean())
