"""The demo's preference set: concise answers over correct but wordy ones, made by a seeded program.

Every pair asks one question. The chosen answer is a word, a few words or one sentence. The rejected one says the same
and does not stop: it drags the sentence out, repeats it, adds facts and remarks nobody asked for, a preamble, an offer
of more help. Most of what it adds are answers to other questions, so no choice of words tells the two apart, only
where an answer ends. The held-out pairs ask other questions, half of them of kinds that training never shows, and
add phrases of their own.

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

from fastqadapter.demo.questions import OPEN_FAMILIES, UNSEEN_FAMILIES
from fastqadapter.evaluation.facts import SHORT_FAMILIES, Fact, Family, fill

HELD_OUT_OF_SEEN_FAMILIES = 60
MAX_CONCISE_WORDS, MAX_CONCISE_SENTENCES = 20, 2
WORDY_WORDS = range(25, 46)  # number of words in a rejected answer

_TELLING_FAMILIES = tuple(family for family in SHORT_FAMILIES + OPEN_FAMILIES if family.stands_alone)

T = TypeVar("T")


@dataclass(frozen=True)
class Padding:
    """What makes an answer wordy without making it wrong. `plans` give the order of the parts of an answer:

    a = the answer, l = the answer as the start of a long sentence, r = the answer repeated, f = another fact,
    m = more on the matter, g = a general remark (head, noun and tail), o = opener, c = closer.
    """

    plans: tuple[str, ...]
    asides: tuple[str, ...]  # before a fact
    heads: tuple[str, ...]
    nouns: tuple[str, ...]
    tails: tuple[str, ...]
    links: tuple[str, ...]  # inside a long sentence; {noun}, {tail}, {fact}
    repeats: tuple[str, ...]  # {answer}
    openers: tuple[str, ...]
    closers: tuple[str, ...]


_TRAINING_PADDING = Padding(
    plans=(
        "aff",
        "afff",
        "afg",
        "agf",
        "agg",
        "amf",
        "amg",
        "arf",
        "agc",
        "lf",
        "lg",
        "lm",
        "lff",
        "lfg",
        "oaf",
        "oag",
    ),
    asides=("", "", "", "Likewise, ", "By the way, ", "Besides, ", "In addition, "),
    heads=(
        "It is",
        "This is",
        "Indeed, it is",
        "Overall, this is",
        "For many people it is",
        "In everyday life this is",
    ),
    nouns=(
        "a fundamental concept",
        "a fascinating subject",
        "a common phenomenon",
        "an essential part of life",
        "a complex matter",
        "a crucial point",
        "a useful thing to know",
        "a popular topic",
    ),
    tails=(
        "that has been studied for many years",
        "that people all over the world know about",
        "that can be seen from several angles",
        "which depends on a number of factors",
        "which plays an important role in our society",
        "and there are many different examples of it",
        "and it is often described in books and films",
        "and it can take various forms",
    ),
    links=(", which is {noun} {tail}", ", just as {fact}", ", and {fact}", ", while {fact}", " - {noun} {tail}"),
    repeats=(
        "In other words: {answer}",
        "To summarise what I have just said: {answer}",
        "So, to make it quite clear: {answer}",
    ),
    openers=(
        "That is a great question, and I would be happy to help you with it!",
        "Thank you for your question! Let me think about it.",
        "Certainly! I would be glad to answer this.",
        "Sure, here is everything you need to know about it.",
        "The answer to this question can be looked at in different ways.",
    ),
    closers=(
        "I hope this helps! Let me know if you have any other questions.",
        "If you would like to know more, please feel free to ask me at any time.",
        "Please let me know whether you would like a more detailed explanation.",
    ),
)

_HELD_OUT_PADDING = Padding(
    plans=("afaf", "agg", "affc", "agfc", "lgf", "lc", "oafg", "ofa", "fa", "mfa"),
    asides=("", "", "Similarly, ", "On a related note, ", "As an aside, "),
    heads=("Moreover, it is", "As such, it is", "One could say that this is"),
    nouns=("a versatile idea", "a remarkable topic", "a valuable piece of knowledge", "a surprisingly rich field"),
    tails=(
        "that continues to attract the interest of experts",
        "whose roots go back a long way",
        "and a little background goes a long way here",
        "with a wide range of practical uses",
    ),
    links=(", something that is {noun} {tail}", "; similarly, {fact}", ", whereas {fact}"),
    repeats=("Put differently: {answer}",),
    openers=(
        "What a wonderful thing to ask, I am always delighted to talk about this!",
        "There is quite a bit to unpack here, so please bear with me for a moment.",
    ),
    closers=(
        "Do not hesitate to reach out again should anything remain unclear.",
        "Would you like me to go into further detail on any of these points?",
    ),
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


def _row(family: Family, fact: Fact, padding: Padding, rng: random.Random) -> dict[str, Any]:
    question = fill(_pick(family.questions, rng), fact)
    answer = fill(_pick(family.answers, rng), fact)
    drafts = _wordy_answers(family, fact, padding, rng)
    rejected = next(draft for draft in drafts if len(draft.split()) in WORDY_WORDS)
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": answer}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def _wordy_answers(family: Family, fact: Fact, padding: Padding, rng: random.Random) -> Iterator[str]:
    """Wordy answers without end, for the caller to take one of the right length."""
    answer = family.sentence(fact)
    answer = answer if answer[-1] in ".!?" else f"{answer}."
    while True:
        yield " ".join(_part(part, answer, family, fact, padding, rng) for part in _pick(padding.plans, rng))


def _part(part: str, answer: str, family: Family, fact: Fact, padding: Padding, rng: random.Random) -> str:
    noun, tail, aside = _pick(padding.nouns, rng), _pick(padding.tails, rng), _pick(padding.asides, rng)
    others = family if family.stands_alone else _pick(_TELLING_FAMILIES, rng)
    other = _pick([known for known in others.facts if known != fact], rng)
    texts = {
        "a": answer,
        "l": answer[:-1] + _pick(padding.links, rng).format(noun=noun, tail=tail, fact=others.clause(other)[:-1]) + ".",
        "r": _pick(padding.repeats, rng).format(answer=answer),
        "f": aside + others.clause(other) if aside else others.sentence(other),
        "m": fill(_pick(family.more, rng), fact),
        "g": f"{_pick(padding.heads, rng)} {noun} {tail}.",
        "o": _pick(padding.openers, rng),
        "c": _pick(padding.closers, rng),
    }
    return texts[part]


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
