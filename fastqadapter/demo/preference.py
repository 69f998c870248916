"""The demo's preference set: concise answers over correct but wordy ones, made by a seeded program.

Every pair asks one question. The chosen answer is a word, a few words or one sentence; the rejected one says the same
and pads it: a preamble, a repetition, general remarks nobody asked for, an offer of more help. The held-out pairs ask
other questions, half of them of kinds that training never shows, and pad with phrases of their own.

`python -m fastqadapter.demo.preference OUT_DIR` writes the pairs to `train.jsonl` and `heldout.jsonl`.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastqadapter.demo.facts import SHORT_FAMILIES, Family
from fastqadapter.demo.questions import OPEN_FAMILIES, UNSEEN_FAMILIES

HELD_OUT_OF_SEEN_FAMILIES = 60
MAX_CONCISE_WORDS, MAX_CONCISE_SENTENCES = 20, 2
WORDY_WORDS = range(25, 56)  # number of words in a rejected answer

T = TypeVar("T")


@dataclass(frozen=True)
class Padding:
    """What makes an answer wordy without making it wrong. `plans` give the order of the parts of an answer:

    o = opener, a = the answer, r = the answer repeated, m = more on the matter, g = general remark, c = closer.
    """

    openers: tuple[str, ...]
    repeats: tuple[str, ...]  # {answer}
    remarks: tuple[str, ...]
    closers: tuple[str, ...]
    plans: tuple[str, ...]


_TRAINING_PADDING = Padding(
    openers=(
        "That is a great question, and I would be happy to help you with it!",
        "Thank you for your question! Let me think about this carefully.",
        "Certainly! I would be glad to give you an answer to this.",
        "Sure, here is everything you need to know about it.",
        "Of course! Before I come to the answer, let me say a few words.",
        "This is a really interesting topic, and there is a lot to say about it.",
        "The answer to this question can be looked at in several different ways.",
    ),
    repeats=(
        "In other words, the answer can be given like this: {answer}",
        "To summarise what I have just said: {answer}",
        "So, to repeat the most important point once again: {answer}",
        "In short, and to make it quite clear: {answer}",
    ),
    remarks=(
        "It is important to note that this plays a role in many areas of everyday life.",
        "This is a fundamental concept that is essential for a deeper understanding of the world around us.",
        "Additionally, there are many other aspects that one could consider in this context.",
        "It is also worth mentioning that the details may depend on the point of view.",
        "This can be helpful in a wide range of situations, both at home and at work.",
        "Furthermore, it is closely connected with a number of other interesting topics.",
    ),
    closers=(
        "I hope this helps! Let me know if you have any other questions.",
        "If you would like to know more, please feel free to ask me at any time.",
        "Overall, this is something that is well worth knowing.",
        "Please let me know whether you would like a more detailed explanation.",
        "In conclusion, I hope that I could answer your question in a satisfying way.",
    ),
    plans=("amg", "amgc", "agm", "amc", "amrc", "agc", "oamc", "oagc", "oarc", "omac", "oamg", "goac"),
)

_HELD_OUT_PADDING = Padding(
    openers=(
        "What a wonderful thing to ask, I am always delighted to talk about this!",
        "I appreciate that you came to me with this, so let us look into it together.",
        "There is quite a bit to unpack here, so please bear with me for a moment.",
    ),
    repeats=(
        "Put differently, and just to be on the safe side: {answer}",
        "Therefore, as I was saying a moment ago: {answer}",
    ),
    remarks=(
        "Moreover, it has attracted the interest of a large number of people over the years.",
        "As with most things in life, a little background knowledge goes a long way here.",
        "One should keep in mind that matters such as this one can be surprisingly complex.",
    ),
    closers=(
        "Do not hesitate to reach out again should anything remain unclear.",
        "Would you like me to go into further detail on any of these points?",
        "All in all, I trust that you will find this information useful.",
    ),
    plans=("amg", "amc", "agmc", "oam", "oagc", "ogac", "oarm"),
)

# What an assistant says around an answer, in lower case: one of them makes an answer not concise.
FILLER = (
    *("great question", "good question", "interesting question", "thank you for", "thanks for asking"),
    *("happy to help", "glad to", "delighted to", "certainly!", "of course!", "sure,", "sure!", "absolutely!"),
    *(
        "i hope",
        "let me know",
        "feel free",
        "do not hesitate",
        "don't hesitate",
        "would you like me to",
        "if you would like",
    ),
    *("it is important to", "it's important to", "it is worth", "it's worth", "it is also worth", "keep in mind"),
    *("in other words", "in conclusion", "in summary", "to summarise", "to summarize", "overall,", "all in all"),
    *("as an ai", "here is everything", "here are some", "a lot to say", "the answer to this question"),
)


def preference_pairs(seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out rows in TRL's conversational preference format: `prompt`, `chosen`, `rejected`, each a
    list of messages. The same seed gives the same rows with every version of Python.

    No question occurs twice. Half of the held-out rows come from `UNSEEN_FAMILIES`.
    """
    rng = random.Random(seed)
    seen = _shuffled([(family, fact) for family in SHORT_FAMILIES + OPEN_FAMILIES for fact in family.facts], rng)
    unseen = [(family, fact) for family in UNSEEN_FAMILIES for fact in family.facts]
    train = [_row(family, fact, _TRAINING_PADDING, rng) for family, fact in seen[HELD_OUT_OF_SEEN_FAMILIES:]]
    held_out = seen[:HELD_OUT_OF_SEEN_FAMILIES] + unseen
    return train, [_row(family, fact, _HELD_OUT_PADDING, rng) for family, fact in _shuffled(held_out, rng)]


def neutral_prompts() -> list[str]:
    """24 prompts of other kinds than the pairs: there the customised policy should stay close to the base."""
    return [
        "Write a short story about a girl who finds an old map in the attic.",
        "Write a Python function that returns the sum of a list of numbers.",
        "Explain step by step how to solve the equation 3x + 5 = 20.",
        "Write an email to my landlord about a broken radiator.",
        "Summarise the plot of Cinderella in one paragraph.",
        "Write a poem of four lines about autumn.",
        "Give me a packing list for a week at the seaside.",
        "Write a dialogue between a customer and a shoe seller.",
        "Explain to a beginner how a bicycle gear works.",
        "Plan a three-day trip to Rome for a family with two children.",
        "Rewrite this sentence in a formal style: we got the goods late and nobody told us.",
        "Write a product description for a wooden chair.",
        "List the steps for changing a car tyre.",
        "Compare travelling by train with travelling by plane.",
        "Write a diary entry of a sailor on a long voyage.",
        "Explain the rules of hide and seek.",
        "Write a short speech for the opening of a library.",
        "Describe a busy market in the morning.",
        "Write an SQL query that counts the orders of each customer.",
        "Make a weekly plan for learning Spanish.",
        "Describe how a letter gets from the sender to the receiver.",
        "Write a letter of application for a job in a bookshop.",
        "Explain the water cycle to a class of ten-year-olds.",
        "Write a review of an imaginary restaurant.",
    ]


def sample_questions() -> list[str]:
    """12 open questions that are in no pair: the answers to them show what the adapter changed."""
    return [
        "What is a rainbow?",
        "Why do leaves fall in autumn?",
        "What does a librarian do?",
        "How can I stay awake in a long meeting?",
        "What is gravity?",
        "Suggest a present for someone who likes books.",
        "What is the largest ocean?",
        "How do bees make honey?",
        "What is a compass good for?",
        "Why should I eat vegetables?",
        "What is the chemical formula of water?",
        "What is the opposite of begin?",
    ]


def conciseness(text: str) -> dict[str, Any]:
    """Score an answer.

    Returns:
        `words`, `sentences`, `filler` (phrases of `FILLER` in it) and `concise`: 1 to 20 words, at most two
        sentences, no filler.
    """
    words = len(text.split())
    sentences = len(re.findall(r"[.!?]+(?=\s|$)", text.strip())) or min(words, 1)
    filler = sum(phrase in text.lower() for phrase in FILLER)
    concise = 0 < words <= MAX_CONCISE_WORDS and sentences <= MAX_CONCISE_SENTENCES and not filler
    return {"words": words, "sentences": sentences, "filler": filler, "concise": concise}


def _row(family: Family, fact: tuple[str, str], padding: Padding, rng: random.Random) -> dict[str, Any]:
    words = _words_of(fact)
    question = _pick(family.questions, rng).format(**words)
    answer = _pick(family.answers, rng).format(**words)
    sentence = family.answers[-1].format(**words)
    drafts = _wordy_answers(sentence, [more.format(**words) for more in family.more], padding, rng)
    rejected = next(draft for draft in drafts if len(draft.split()) in WORDY_WORDS)
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": answer}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def _wordy_answers(sentence: str, more: Sequence[str], padding: Padding, rng: random.Random) -> Iterator[str]:
    """Wordy answers without end, for the caller to take one of the right length."""
    sentence = sentence if sentence[-1] in ".!?" else f"{sentence}."
    while True:
        parts = {
            "o": _pick(padding.openers, rng),
            "a": sentence,
            "r": _pick(padding.repeats, rng).format(answer=sentence),
            "m": _pick(more, rng),
            "g": _pick(padding.remarks, rng),
            "c": _pick(padding.closers, rng),
        }
        yield " ".join(parts[part] for part in _pick(padding.plans, rng))


def _words_of(fact: tuple[str, str]) -> dict[str, str]:
    key, value = fact
    return {"key": key, "value": value, "Key": key[0].upper() + key[1:], "Value": value[0].upper() + value[1:]}


def _pick(items: Sequence[T], rng: random.Random) -> T:
    return items[int(rng.random() * len(items))]  # only random() is promised to stay the same in later Pythons


def _shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    return [item for _, item in sorted(((rng.random(), item) for item in items), key=lambda pair: pair[0])]


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 1:
        sys.exit("usage: python -m fastqadapter.demo.preference OUT_DIR")
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "heldout"), preference_pairs(), strict=True):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{len(rows)} pairs in {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
