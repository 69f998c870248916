"""Reading preference files: every kind of bad row raises with file and line, or is skipped and counted."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fastqadapter.rows import read_rows

STANDARD = {"prompt": "the sky is", "chosen": " blue", "rejected": " green"}


def write(folder: Path, *lines: str) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


BAD_ROWS = [
    ("3", "not an object", r"not int 3"),
    ('{"prompt": "x", ', "unreadable JSON", r"not valid JSON"),
    ("[" * 100_000, "unreadable JSON", r"not valid JSON"),
    ('{"prompt": "x", "chosen": "a"}', "missing key", r"'rejected' among its keys \(prompt, chosen\)"),
    ('{"prompt": "x", "chosen": "a", "rejected": null}', "missing key", r"'rejected'"),
    ('{"prompt": "x", "chosen": "a", "rejected": 4}', "wrong type", r"'rejected' must be a string .* not int 4"),
    ('{"prompt": "x", "chosen": "a", "rejected": ["b"]}', "wrong type", r"'rejected\[0\]' must be a message"),
    ('{"chosen": [{"role": "user"}], "rejected": []}', "wrong type", r"'chosen\[0\].content' must be .* not nothing"),
    ('{"chosen": [{"role": 1, "content": ""}], "rejected": []}', "wrong type", r"'chosen\[0\].role'.* not int 1"),
    ('{"chosen": [{"role": "user", "content": []}], "rejected": []}', "wrong type", r"only text is supported"),
    ('{"chosen": "a", "rejected": []}', "wrong type", r"both be strings or both"),
    ('{"prompt": [], "chosen": "a", "rejected": "b"}', "wrong type", r"responses are strings"),
    ('{"prompt": "x", "chosen": "a", "rejected": "b", "tools": "{"}', "wrong type", r"'tools'"),
    ('{"prompt": "x", "chosen": "a", "rejected": "b", "tools": 1}', "wrong type", r"'tools'"),
    ('{"prompt": "x", "chosen": "a", "rejected": "b", "chat_template_kwargs": 1}', "wrong type", r"_kwargs' must be"),
    (
        '{"prompt": "x", "chosen": "a\\ud800", "rejected": "b"}',
        "invalid Unicode",
        r"'chosen' .*surrogate at character 1",
    ),
    ('{"prompt": "x", "chosen": "a", "rejected": " "}', "empty response", r"'rejected' is empty"),
    ('{"prompt": "x", "chosen": "a", "rejected": "a"}', "equal branches", r"nothing to prefer"),
    ('{"chosen": "yes", "rejected": "no"}', "no common prompt", r"share no beginning.*add a 'prompt'"),
    ('{"chosen": "Q A", "rejected": "Q A B"}', "no common prompt", r"continue one another"),
    ('{"prompt_ids": [], "chosen_ids": [1], "rejected_ids": [2]}', "empty prompt", r"at least one token"),
    ('{"prompt_ids": [1], "chosen_ids": [1]}', "missing key", r"'rejected_ids'"),
    ('{"prompt_ids": [1], "chosen_ids": [1.5], "rejected_ids": [2]}', "wrong type", r"list of integers"),
    ('{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}', "equal branches", r"nothing to prefer"),
    (
        '{"prompt_ids": [1], "chosen_ids": [-2], "rejected_ids": [2]}',
        "token id out of range",
        r"token id -2, outside 0",
    ),
]
GOOD_LINE = json.dumps(STANDARD)


@pytest.mark.parametrize("line, reason, message", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_row_of_a_file(tmp_path, caplog, line, reason, message):
    path = write(tmp_path, GOOD_LINE, "", line, GOOD_LINE)
    with pytest.raises(ValueError, match=rf"pairs\.jsonl:3: .*{message}") as caught:
        read_rows(path)
    assert "\n" not in str(caught.value) and 'on_bad_row="skip"' in str(caught.value)
    rows = read_rows(path, on_bad_row="skip")
    assert [row["source"] for row in rows] == [f"{path}:1", f"{path}:4"]
    assert rows.dropped == {reason: 1}
    assert [record.levelno for record in caplog.records] == [logging.WARNING] and f"1 {reason}" in caplog.text


def test_undecodable_line_and_byte_order_mark(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD_LINE.encode() + b'\r\n{"prompt": "\xff"}\r\n')
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: not valid JSON"):
        read_rows(path)
    assert len(read_rows(path, on_bad_row="skip")) == 1


def test_json_list(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([STANDARD, {}]))
    with pytest.raises(ValueError, match=r"pairs\.json\[1\]: no key 'chosen'"):
        read_rows(path)
    rows = read_rows(path, on_bad_row="skip")
    assert rows == [{**STANDARD, "source": f"{path}[0]"}] and rows.dropped == {"missing key": 1}
    for text, message in (("{}", "must hold a list"), ("[\n{]", r"pairs\.json:2: not valid JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_rows(path)


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read rows from \.parquet; .*load_dataset"):
        read_rows("pairs.parquet")
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no usable row .the file is empty"):
        read_rows(write(tmp_path, ""))
    with pytest.raises(ValueError, match="no usable row .2 not an object"):
        read_rows(write(tmp_path, "1", "2"), on_bad_row="skip")
    with pytest.raises(ValueError, match="on_bad_row must be one of raise, skip, not 'ignore'"):
        read_rows("pairs.jsonl", on_bad_row="ignore")
