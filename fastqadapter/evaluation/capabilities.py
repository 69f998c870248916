"""What a model could do before: small tasks made by a seeded program, answered as completions and scored exactly.

Each prompt shows a few solved examples and leaves the last one open; the answer is what the model writes up to the end
of the line. No chat template: any causal LM can be asked.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from fastqadapter.evaluation.facts import SHORT_FAMILIES, fill
from fastqadapter.evaluation.scores import Point
from fastqadapter.models import QAdapterModel

SHOTS = 4
LONGEST_ANSWER = 24  # tokens
MOST = 200  # items of a task: there are 217 facts
NAMES = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Hugo",
    "Iris",
    "Jack",
    "Lena",
    "Max",
    "Nora",
    "Oscar",
)
WORDS = (
    *("apple", "bridge", "candle", "desk", "engine", "forest", "garden", "hammer", "island", "jacket", "kettle"),
    *("lemon", "mirror", "needle", "orange", "pencil", "river", "silver", "table", "window", "yellow", "stone"),
)
CITIES = ("Rome", "Oslo", "Lima", "Cairo", "Paris", "Tokyo", "Delhi", "Quito")


@dataclasses.dataclass(frozen=True)
class Item:
    """One question: the prompt ends where the answer begins."""

    task: str
    prompt: str
    answer: str


def capability_set(count: int = 40, seed: int = 0) -> list[Item]:
    """`count` items of each task: arithmetic, copying, formatting, facts. The same for the same seed.

    Raises:
        ValueError: more than there are.
    """
    if not 1 <= count <= MOST:
        raise ValueError(f"count={count} is outside its legal range [1, {MOST}]")
    items = []
    for task, solved in TASKS.items():
        random_numbers = random.Random(f"{seed} {task}")
        examples = solved(random_numbers)
        shots = [next(examples) for _ in range(SHOTS)]
        lines = "".join(f"{question}{answer}\n" for question, answer in shots)
        seen = dict(shots)
        while len(seen) < SHOTS + count:
            question, answer = next(examples)
            if question not in seen:
                seen[question] = answer
                items.append(Item(task, lines + question.rstrip(" "), answer))
    return items


def _arithmetic(numbers: random.Random) -> Iterator[tuple[str, str]]:
    while True:
        first, second = numbers.randint(1, 20), numbers.randint(1, 20)
        if numbers.random() < 0.5:
            yield f"{first} + {second} = ", str(first + second)
        elif first > second:
            yield f"{first} - {second} = ", str(first - second)


def _copying(numbers: random.Random) -> Iterator[tuple[str, str]]:
    while True:
        words = " ".join(numbers.sample(WORDS, numbers.randint(3, 5)))
        yield f"Repeat: {words} | ", words


def _formatting(numbers: random.Random) -> Iterator[tuple[str, str]]:
    while True:
        record = {"name": numbers.choice(NAMES), "age": numbers.randint(18, 80), "city": numbers.choice(CITIES)}
        question = f"{record['name']} is {record['age']} years old and lives in {record['city']}. JSON: "
        yield question, json.dumps(record)


def _facts(numbers: random.Random) -> Iterator[tuple[str, str]]:
    while True:
        family = numbers.choice([each for each in SHORT_FAMILIES if each.name != "sums"])
        fact = numbers.choice(family.facts)
        yield f"Q: {fill(family.questions[0], fact)} A: ", fact[1]


TASKS: dict[str, Callable[[random.Random], Iterator[tuple[str, str]]]] = {
    "arithmetic": _arithmetic,
    "copying": _copying,
    "formatting": _formatting,
    "facts": _facts,
}


def is_right(item: Item, written: str) -> bool:
    """Whether the first line of what was written is the answer, apart from case, space and a final full stop."""

    def plain(text: str) -> str:
        return " ".join(text.split()).rstrip(".").casefold()

    return plain(written.lstrip(" ").partition("\n")[0]) == plain(item.answer)


class EndOfLine(StoppingCriteria):
    """Ends each answer at its first line break, as transformers' `stop_strings` does for the tokenizers it can read."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int) -> None:
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :])
        return torch.tensor(["\n" in text.lstrip(" ") for text in texts], device=input_ids.device)


@torch.no_grad()
def answer_right(
    model: QAdapterModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    point: Point,
    *,
    batch_size: int = 16,
    description: str | None = None,
) -> list[bool]:
    """Whether the greedy completion of each item is right, with the active adapter at `point`."""
    right: list[bool] = []
    bar = tqdm(total=len(items), desc=description, disable=None, leave=False, unit=" items")
    for start in range(0, len(items), batch_size):
        part = items[start : start + batch_size]
        inputs = tokenizer(
            [item.prompt for item in part], padding=True, padding_side="left", return_tensors="pt", verbose=False
        ).to(model.device)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            **point.generate_options(model.active_adapter),
            max_new_tokens=LONGEST_ANSWER,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([EndOfLine(tokenizer, inputs["input_ids"].shape[1])]),
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += [is_right(item, text) for item, text in zip(part, texts, strict=True)]
        bar.update(len(part))
    bar.close()
    return right
