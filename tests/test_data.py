"""Rows -> token ids -> packed pairs, on small tokenizers made here (nothing is downloaded)."""

from __future__ import annotations

import json
import logging
import os
import random
from pathlib import Path

import pytest

import fastqadapter.data as data
from fastqadapter.data import PreferenceCollator, TokenizedRows, read_rows, tokenize_row, tokenize_rows
from fastqadapter.packing import PackedPairs
from fastqadapter.rows import TOKENIZED_KEYS

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

REAL_ROWS = Path(os.environ.get("FASTQADAPTER_DATA", "../shared/data")) / "hh_harmless_val.jsonl"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>{{ tools | length }} tools{{ eos_token }}{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(*, single: str = "<s> $A", chat_template: str | None = CHAT_TEMPLATE, **special: str | None):
    """A byte-level BPE tokenizer that merges " sky", "the", ...; `single` says which special tokens it adds."""
    names = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["the sky is blue and the grass is green"] * 20, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", **special}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(autouse=True)
def forget_warnings():
    data._warned.clear()


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def texts(tokenizer, row: dict) -> list[str]:
    return [tokenizer.decode(row[key]) for key in TOKENIZED_KEYS]


STANDARD = {"prompt": "the sky is", "chosen": " blue", "rejected": " green"}
CHAT = {"prompt": [user("the sky?")], "chosen": [assistant("blue")], "rejected": [assistant("green")]}


# --- formats


@pytest.mark.parametrize(
    "row",
    [
        STANDARD,
        {"chosen": "the sky is blue", "rejected": "the sky is green"},
        {**STANDARD, "chosen": " blue</s>"},
        {**STANDARD, "tools": None, "chat_template_kwargs": None, "label": 3},
    ],
)
def test_strings(tokenizer, row):
    ids = tokenize_row(row, tokenizer, max_length=None)
    assert texts(tokenizer, ids) == ["<s>the sky is", " blue</s>", " green</s>"]


@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        {"prompt": None, "chosen": CHAT["prompt"] + CHAT["chosen"], "rejected": CHAT["prompt"] + CHAT["rejected"]},
        {
            "prompt": "the sky?",
            "chosen": CHAT["prompt"] + CHAT["chosen"],
            "rejected": CHAT["prompt"] + CHAT["rejected"],
        },
        {**CHAT, "chosen": ({"role": "assistant", "content": "blue", "tool_calls": None},)},
    ],
)
def test_messages(tokenizer, row):
    ids = tokenize_row(row, tokenizer, max_length=None)
    assert texts(tokenizer, ids) == ["<s><|user|>the sky?</s><|assistant|>", "blue</s>", "green</s>"]


def test_prefilled_answer_goes_on_in_the_same_message(tokenizer):
    row = {**CHAT, "prompt": [user("the sky?"), assistant("it is")]}
    row |= {"chosen": [assistant(" blue")], "rejected": [assistant(" green")]}
    ids = tokenize_row(row, tokenizer, max_length=None)
    assert texts(tokenizer, ids) == ["<s><|user|>the sky?</s><|assistant|>it is", " blue</s>", " green</s>"]


def test_several_response_messages(tokenizer):
    row = {**CHAT, "chosen": [assistant("blue"), user("and?"), assistant("green")]}
    ids = tokenize_row(row, tokenizer, max_length=None)
    assert texts(tokenizer, ids)[1] == "blue</s><|user|>and?</s><|assistant|>green</s>"


def test_tools_and_template_arguments_reach_the_template():
    tokenizer = make_tokenizer(chat_template="{% if loud %}LOUD {% endif %}" + CHAT_TEMPLATE)
    for tools in ([{"name": "a"}, {"name": "b"}], '[{"name": "a"}, {"name": "b"}]'):
        row = {**CHAT, "tools": tools, "chat_template_kwargs": {"loud": True, "other": None}}
        ids = tokenize_row(row, tokenizer, max_length=None)
        assert texts(tokenizer, ids)[0].startswith("LOUD <s><|system|>2 tools</s><|user|>")


def test_message_that_only_calls_a_tool(tokenizer):
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    ids = tokenize_row({**CHAT, "chosen": [calls, assistant("blue")]}, tokenizer, max_length=None)
    assert texts(tokenizer, ids)[1] == "</s><|assistant|>blue</s>"


def test_tokenised_rows_pass_through(tokenizer):
    ids = {"prompt_ids": [0, 7], "chosen_ids": [8, 9], "rejected_ids": [9]}
    former = {"prompt_input_ids": (0, 7), "chosen_input_ids": [8, 9], "rejected_input_ids": [9], "prompt": "ignored"}
    for row in (ids, former):
        assert tokenize_row(row, None, max_length=None) == {**ids, "source": "row 0"}
    assert tokenize_row(ids, tokenizer, max_length=3) == {**ids, "chosen_ids": [8], "source": "row 0"}


def test_datasets_dataset_shows_missing_columns_as_none(tokenizer):
    datasets = pytest.importorskip("datasets")
    tools = json.dumps([{"name": "a"}])
    rows = datasets.Dataset.from_list([{**CHAT, "tools": tools, "source": "web"}, {**CHAT, "source": "web"}])
    tokenized = tokenize_rows(rows, tokenizer, max_length=None)
    assert [row["source"] for row in tokenized] == ["row 0", "row 1"]  # its own column `source` is no place in a file
    assert "1 tools" in texts(tokenizer, tokenized[0])[0]
    assert texts(tokenizer, tokenized[1])[0] == "<s><|user|>the sky?</s><|assistant|>"
    prefilled = datasets.Dataset.from_list([{"chosen": "a b", "rejected": "a c"}, {"prompt": "d", **STANDARD}])
    assert len(tokenize_rows(prefilled, tokenizer, max_length=None)) == 2


# --- special tokens and the border of prompt and response


def test_one_bos_and_one_eos():
    for single in ("<s> $A", "<s> $A </s>", "$A"):
        tokenizer = make_tokenizer(single=single)
        for row in (STANDARD, {**STANDARD, "chosen": " blue</s>"}, CHAT):
            ids = tokenize_row(row, tokenizer, max_length=None)
            whole = ids["prompt_ids"] + ids["chosen_ids"]
            assert whole.count(0) == (0 if row is not CHAT and single == "$A" else 1)
            assert whole[-1] == 1 and whole[-2] != 1


def test_no_eos_token_warns_once(caplog):
    tokenizer = make_tokenizer(eos_token=None)
    for _ in range(2):
        ids = tokenize_row(STANDARD, tokenizer, max_length=None)
    assert texts(tokenizer, ids)[1] == " blue"
    assert [record.message for record in caplog.records if "no EOS token" in record.message] != []
    assert len(caplog.records) == 1


def test_merge_across_the_border_loses_nothing_and_warns_once(tokenizer, caplog):
    row = {"prompt": "the sk", "chosen": "y is blue", "rejected": "y is green"}
    for _ in range(2):
        ids = tokenize_row(row, tokenizer, max_length=None)
    assert texts(tokenizer, ids) == ["<s>the", " sky is blue</s>", " sky is green</s>"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "first seen at row 0" in caplog.text


def test_implicit_prompt_inside_a_word_is_no_warning(tokenizer, caplog):
    ids = tokenize_row({"chosen": "the grass", "rejected": "the green"}, tokenizer, max_length=None)
    assert ids["prompt_ids"] + ids["chosen_ids"] == tokenizer("the grass</s>")["input_ids"]
    assert not caplog.records


def test_template_that_renders_the_prompt_alone_differently():
    # as thinking models do: the generation prompt opens a block that the whole conversation leaves out
    think = CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
    tokenizer = make_tokenizer(chat_template=think)
    ids = tokenize_row(CHAT, tokenizer, max_length=None)
    assert texts(tokenizer, ids) == ["<s><|user|>the sky?</s><|assistant|>", "blue</s>", "green</s>"]


def test_prompt_and_response_are_the_tokenisation_of_the_whole_text(tokenizer):
    rng = random.Random(0)
    pieces = ["the", " sky", " is", "s", "k", "y", " ", "  ", "\n", "blue", " gr", "een", "é", "天", "<s>", "!"]

    def text(longest: int) -> str:
        return "".join(rng.choice(pieces) for _ in range(rng.randint(1, longest)))

    for _ in range(300):
        row = {"prompt": text(6), "chosen": text(6) + "A", "rejected": text(6) + "B"}
        ids = tokenize_row(row, tokenizer, max_length=None)
        chat = {"prompt": [user(row["prompt"])]}
        chat |= {key: [assistant(row[key])] for key in ("chosen", "rejected")}
        chat_ids = tokenize_row(chat, tokenizer, max_length=None)
        for key in ("chosen", "rejected"):
            whole = tokenizer(row["prompt"] + row[key] + "</s>")["input_ids"]
            assert ids["prompt_ids"] + ids[f"{key}_ids"] == whole
            whole = tokenizer.apply_chat_template(chat["prompt"] + chat[key], return_dict=True)["input_ids"]
            assert chat_ids["prompt_ids"] + chat_ids[f"{key}_ids"] == whole


# --- max_length


def test_truncation_keeps_the_start(tokenizer):
    whole = tokenize_row(STANDARD, tokenizer, max_length=None)
    room = len(whole["prompt_ids"]) + 1
    cut = tokenize_row(STANDARD, tokenizer, max_length=room)
    assert cut == {**whole, **{key: whole[key][:1] for key in ("chosen_ids", "rejected_ids")}}
    assert tokenize_row(STANDARD, tokenizer, max_length=1000) == whole


def test_rows_that_max_length_leaves_nothing_of_are_dropped_and_counted(tokenizer, caplog):
    rows = [STANDARD, {**STANDARD, "prompt": "the sky is" * 9}]
    rows.append({**STANDARD, "chosen": " green and blue", "rejected": " green and the sky"})
    tokenized = tokenize_rows(rows, tokenizer, max_length=len(tokenizer(STANDARD["prompt"])["input_ids"]) + 1)
    assert [row["source"] for row in tokenized] == ["row 0"]
    assert tokenized.dropped == {"prompt fills max_length": 1, "equal after truncation": 1}
    assert [record.message.split(":")[0] for record in caplog.records] == ["2 of 3 rows dropped"]
    assert tokenize_row(rows[1], tokenizer, max_length=5) is None
    with pytest.raises(ValueError, match=r"no row left .*2 prompt fills max_length.* max_length=2"):
        tokenize_rows(rows[:2], tokenizer, max_length=2)
    with pytest.raises(ValueError, match="no row left"):
        tokenize_rows([], tokenizer, max_length=2)


@pytest.mark.parametrize("max_length", [1, 0, -3, 2.5, "8", True])
def test_max_length_out_of_range(tokenizer, max_length):
    with pytest.raises(ValueError, match="max_length must be None or an integer >= 2"):
        PreferenceCollator(tokenizer, max_length)


# --- bad rows (tests/test_rows.py has those a row shows before it is tokenised)


def test_bad_rows_of_a_list(tokenizer):
    rows = [STANDARD, {**STANDARD, "chosen": ""}, {**STANDARD, "rejected": " blue"}, "prompt"]
    with pytest.raises(ValueError, match="row 1: 'chosen' is empty"):
        tokenize_rows(rows, tokenizer, max_length=None)
    tokenized = tokenize_rows(rows, tokenizer, max_length=None, on_bad_row="skip")
    assert len(tokenized) == 1
    assert tokenized.dropped == {"empty response": 1, "equal branches": 1, "not an object": 1}


def test_rows_that_only_tokens_show_to_be_bad(tokenizer):
    refuse = "{{ raise_exception('roles must alternate') }}"
    lenient = CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim")
    with pytest.raises(ValueError, match="row 0: the chat template refuses the row: roles must alternate"):
        tokenize_rows([CHAT], make_tokenizer(chat_template=refuse), max_length=None)
    row = {**CHAT, "chosen": [assistant("green ")]}
    with pytest.raises(ValueError, match="row 0: 'chosen' and 'rejected' give the same tokens"):
        tokenize_rows([row], make_tokenizer(chat_template=lenient), max_length=None)
    with pytest.raises(ValueError, match="row 0: the prompt has no token .* BOS"):
        tokenize_rows([{**STANDARD, "prompt": ""}], make_tokenizer(single="$A"), max_length=None)
    assert tokenize_row({**STANDARD, "prompt": ""}, tokenizer, max_length=None)["prompt_ids"] == [0]


def test_a_missing_tokenizer_or_template_is_no_bad_row(tokenizer):
    with pytest.raises(ValueError, match="there is no tokenizer"):
        tokenize_rows([STANDARD], None, max_length=None, on_bad_row="skip")
    with pytest.raises(ValueError, match=r"no chat template; set tokenizer\.chat_template"):
        tokenize_rows([CHAT], make_tokenizer(chat_template=None), max_length=None, on_bad_row="skip")


# --- containers and the collator


def test_tokenized_rows_are_a_list_and_a_torch_dataset(tokenizer):
    from torch.utils.data import DataLoader

    rows = tokenize_rows([{**STANDARD, "prompt": f"{i} is"} for i in range(5)], tokenizer, max_length=None)
    assert isinstance(rows, TokenizedRows) and len(rows) == 5
    assert rows[-1] == rows[4] == rows[3:][1] and rows[0]["prompt_ids"] == tokenizer("0 is")["input_ids"]
    with pytest.raises(IndexError):
        rows[5]
    batches = list(DataLoader(rows, batch_size=2, collate_fn=PreferenceCollator(tokenizer)))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert batches[1].sources == ("row 2", "row 3")


def test_collator_takes_raw_and_tokenised_rows(tokenizer):
    rows = [{**STANDARD, "source": "pairs.jsonl:17"}, CHAT, {"prompt_ids": [0], "chosen_ids": [5], "rejected_ids": [6]}]
    batch = PreferenceCollator(tokenizer, pad_action=1)(rows)
    assert isinstance(batch, PackedPairs) and batch.pad_action == 1
    assert batch.sources == ("pairs.jsonl:17", "batch row 1", "batch row 2")
    ids = [tokenize_row(row, tokenizer, max_length=None) for row in rows]
    assert batch.lengths == tuple(tuple(len(row[key]) for key in TOKENIZED_KEYS) for row in ids)
    batch = PreferenceCollator(tokenizer, max_length=None)(rows[:1])
    expected = ids[0]["prompt_ids"] + ids[0]["chosen_ids"][:-1] + ids[0]["rejected_ids"][:-1]
    assert batch.input_ids.tolist() == expected
    assert batch.actions.tolist() == ids[0]["chosen_ids"] + ids[0]["rejected_ids"]


def test_collator_counts_what_it_drops(tokenizer, caplog):
    collate = PreferenceCollator(tokenizer, 16, on_bad_row="skip")
    rows = [STANDARD, {**STANDARD, "chosen": ""}, {**STANDARD, "prompt": "the sky" * 20}]
    assert [len(collate(rows)) for _ in range(2)] == [1, 1]
    assert collate.dropped == {"empty response": 2, "prompt fills max_length": 2}
    assert len(caplog.records) == 1
    with pytest.raises(ValueError, match="no row of a batch of 2 is left"):
        collate(rows[1:])
    with pytest.raises(ValueError, match="batch row 1: 'chosen' is empty"):
        PreferenceCollator(tokenizer, 16)(rows)


@pytest.mark.parametrize("wrong", [330, -1, 2**40])
def test_token_ids_outside_the_vocabulary(tokenizer, wrong):
    assert len(tokenizer) <= 330
    row = {"prompt_ids": [0], "chosen_ids": [5, wrong], "rejected_ids": [6]}
    with pytest.raises(
        ValueError, match=rf"'chosen_ids' holds the token id {wrong}, outside 0\.\.{len(tokenizer) - 1}"
    ):
        PreferenceCollator(tokenizer)([row])


@pytest.mark.skipif(not REAL_ROWS.exists(), reason=f"no {REAL_ROWS}: real preference pairs are not part of the project")
def test_real_preference_rows(tokenizer):
    rows = read_rows(REAL_ROWS)
    tokenized = tokenize_rows(rows, tokenizer, max_length=512, progress=False)
    assert len(rows) == 200 and len(tokenized) + sum(tokenized.dropped.values()) == 200
    for row in tokenized:
        assert max(len(row["chosen_ids"]), len(row["rejected_ids"])) + len(row["prompt_ids"]) <= 512
        assert tokenizer.decode(row["prompt_ids"]).endswith("<|assistant|>")
    batch = PreferenceCollator(tokenizer, 512)(tokenized[:4])
    assert batch.sources == tuple(row["source"] for row in tokenized[:4])
