"""A word-level tokenizer for the tiny models, and preference rows in its words."""

from __future__ import annotations

import json
import random
from pathlib import Path

import tokenizers
from transformers import PreTrainedTokenizerFast

from tiny import VOCABULARY, tiny_base

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def word_tokenizer(extra: int = 0) -> PreTrainedTokenizerFast:
    """Words `w5` ... `w96` (and `extra` more), five special ones; splits at spaces."""
    words = ["<pad>", "<s>", "</s>", "user", "assistant", *(f"w{index}" for index in range(5, VOCABULARY + extra))]
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w5")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


def word_rows(count: int, seed: int = 0) -> list[dict]:
    """Conversational preference rows of random words and lengths."""
    choose = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(f"w{choose.randrange(5, VOCABULARY)}" for _ in range(choose.randint(1, most)))

    return [
        {
            "prompt": [{"role": "user", "content": text(8)}],
            "chosen": [{"role": "assistant", "content": f"w5 {text(6)}"}],
            "rejected": [{"role": "assistant", "content": f"w6 {text(9)}"}],
        }
        for _ in range(count)
    ]


def save_workplace(folder: Path, rows: int) -> Path:
    """A tiny model in `base` and preference rows in `pairs.jsonl`; returns the folder."""
    save_base(folder / "base")
    lines = [json.dumps(row) for row in word_rows(rows)]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def save_base(folder: Path) -> str:
    """A tiny Llama with its tokenizer in `folder`, as a user's model would lie there."""
    model = tiny_base("llama", name_or_path=str(folder))
    model.config.name_or_path = str(folder)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)
