"""Preference rows as users have them: reading them, checking them, finding a prompt that is not given.

TRL's preference format, in any of four shapes (other columns are ignored):

* `prompt`, `chosen`, `rejected`: strings;
* the same as lists of messages `{"role": ..., "content": ...}`, with optional `tools` and `chat_template_kwargs`;
* `chosen` and `rejected` alone, strings or messages that begin with the same prompt;
* already tokenised: `prompt_ids`, `chosen_ids`, `rejected_ids` (or TRL's former `prompt_input_ids`, ...).

A key whose value is None counts as missing: that is how `datasets.Dataset` shows a column a row does not have.
"""

from __future__ import annotations

import json
import logging
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

logger = logging.getLogger(__name__)

OnBadRow = Literal["raise", "skip"]
TOKENIZED_KEYS = ("prompt_ids", "chosen_ids", "rejected_ids")

_TEXT_KEYS = ("prompt", "chosen", "rejected")
_FORMER_NAMES = {key.replace("_ids", "_input_ids"): key for key in TOKENIZED_KEYS}
_NEEDED = "a row needs prompt, chosen and rejected, or chosen and rejected that begin with the same prompt"
_OWN_SOURCE = re.compile(r".+:\d+|.+\[\d+\]|row \d+|batch row \d+")
_MAX_ID = 2**31  # token ids are kept as int32


def longest_branch(row: Mapping[str, Any]) -> int:
    """Tokens of a tokenised row's prompt with the longer of its responses."""
    prompt, *responses = (len(row[name]) for name in TOKENIZED_KEYS)
    return prompt + max(responses)


class BadRow(ValueError):
    """A row that cannot be trained on. `reason` is a short label to count by, `detail` the sentence for the user."""

    def __init__(self, reason: str, detail: str, source: str | None = None) -> None:
        super().__init__(f"{source}: {detail}" if source else detail)
        self.reason = reason
        self.detail = detail


class DroppedRow(BadRow):
    """A sound row that `max_length` leaves no use for: always dropped and counted, never an error."""


class RowGuard:
    """Raises on bad rows or counts them in `dropped`, as `on_bad_row` says."""

    def __init__(self, on_bad_row: OnBadRow) -> None:
        if on_bad_row not in get_args(OnBadRow):
            raise ValueError(f"on_bad_row must be one of {', '.join(get_args(OnBadRow))}, not {on_bad_row!r}")
        self.on_bad_row = on_bad_row
        self.dropped: Counter[str] = Counter()

    @contextmanager
    def row(self, source: str) -> Iterator[None]:
        """Work on the row that came from `source`; what raises `BadRow` inside is skipped or gets the source's name."""
        try:
            yield
        except BadRow as error:
            if self.on_bad_row == "raise" and not isinstance(error, DroppedRow):
                raise BadRow(error.reason, f'{error.detail} (on_bad_row="skip" drops such rows)', source) from error
            self.dropped[error.reason] += 1

    def summary(self) -> str:
        """`12 empty response, 3 equal branches`."""
        return ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())


class Rows(list[dict[str, Any]]):
    """Rows of a file; `dropped` counts those left out, by reason."""

    def __init__(self, rows: Iterable[dict[str, Any]], dropped: Mapping[str, int]) -> None:
        super().__init__(rows)
        self.dropped = dict(dropped)


def read_rows(path: str | Path, *, on_bad_row: OnBadRow = "raise") -> Rows:
    """Read and check the preference rows of a `.jsonl` file, or of a `.json` file that holds a list.

    Args:
        path: the file.
        on_bad_row: "raise" stops at the first bad row, "skip" leaves bad rows out, counts them and warns once.

    Returns:
        The rows as they are in the file, each with its place under `source`: "pairs.jsonl:17" (line 17, from 1) or
        "pairs.json[16]" (item 16, from 0). `.dropped` counts the rows left out by reason.

    Raises:
        ValueError: a bad row, named by its place; a file of another kind; no usable row at all.
        OSError: the file cannot be opened.
    """
    guard = RowGuard(on_bad_row)
    rows = []
    for source, item in _items(Path(path)):
        with guard.row(source):
            row = _parse_line(item) if isinstance(item, bytes) else item
            check_row(row)
            rows.append({**row, "source": source})
    if not rows:
        raise ValueError(f"{path}: no usable row ({guard.summary() or 'the file is empty'}); {_NEEDED}")
    if guard.dropped:
        count = guard.dropped.total()
        logger.warning("%s: %d of %d rows skipped: %s", path, count, count + len(rows), guard.summary())
    return Rows(rows, guard.dropped)


def source_of(row: Any, default: str) -> str:
    """The place `read_rows` noted, else `default`; a column `source` of the user's own does not count."""
    source = row.get("source") if isinstance(row, Mapping) else None
    return source if isinstance(source, str) and _OWN_SOURCE.fullmatch(source) else default


def check_row(row: Any, vocab_size: int | None = None) -> dict[str, Any]:
    """Check one row and bring it to one of two shapes.

    Args:
        row: a row in any of the shapes at the top of this module.
        vocab_size: upper bound (exclusive) of the token ids of a row already tokenised; None: not known.

    Returns:
        Tokenised rows: `prompt_ids`, `chosen_ids`, `rejected_ids` as lists of int. Others: `prompt`, `chosen`,
        `rejected`, all strings or all lists of messages, with `tools` and `chat_template_kwargs` where given.

    Raises:
        BadRow: what is wrong with it.
    """
    if not isinstance(row, Mapping):
        raise BadRow("not an object", f"a row must be an object (dict), not {_show(row)}; {_NEEDED}")
    given: dict[str, Any] = {
        _FORMER_NAMES.get(str(key), str(key)): value for key, value in row.items() if value is not None
    }
    if any(key in given for key in TOKENIZED_KEYS):
        return _check_tokenized(given, _MAX_ID if vocab_size is None else vocab_size)
    _need_keys(given, ("chosen", "rejected"))
    texts = {key: _check_text(key, value) for key, value in given.items() if key in _TEXT_KEYS}
    checked = _split_branches(texts)
    for key in ("chosen", "rejected"):
        if not _has_text(checked[key]):
            raise BadRow("empty response", f"'{key}' is empty; both responses need at least one word")
    if isinstance(checked["prompt"], list) and not checked["prompt"]:
        raise BadRow("empty prompt", "'prompt' is a list without messages; give at least one")
    return {**checked, **_template_arguments(given)}


def common_prefix_length(*sequences: Sequence[Any]) -> int:
    """Number of leading items that all sequences share."""
    for length, items in enumerate(zip(*sequences, strict=False)):
        if any(item != items[0] for item in items[1:]):
            return length
    return min(len(sequence) for sequence in sequences)


def _items(path: Path) -> Iterator[tuple[str, Any]]:
    """`(source, item)`: undecoded lines of a .jsonl file, objects of a .json file."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:  # bytes: one undecodable line is that line's error, not the whole file's
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    elif path.suffix == ".json":
        try:
            items = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            place = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else path
            raise ValueError(f"{place}: not valid JSON: {error}; one object a line belongs in a .jsonl") from None
        if not isinstance(items, list):
            raise ValueError(f"{path}: must hold a list of rows, not {_show(items)}")
        for index, item in enumerate(items):
            yield f"{path}[{index}]", item
    else:
        raise ValueError(
            f"{path}: cannot read rows from {path.suffix or 'a file without suffix'}; use .jsonl or .json, or pass "
            "the rows of datasets.load_dataset(...) instead of a path"
        )


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRow("unreadable JSON", f"not valid JSON: {error}; write one object a line") from None


def _check_tokenized(row: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    _need_keys(row, TOKENIZED_KEYS)
    ids = {key: _as_list(row[key]) for key in TOKENIZED_KEYS}
    for key, tokens in ids.items():
        if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
            raise BadRow("wrong type", f"'{key}' must be a list of integers, not {_show(row[key])}")
        if not tokens:
            raise BadRow(f"empty {key.removesuffix('_ids')}", f"'{key}' is empty; it needs at least one token")
        if min(tokens) < 0 or max(tokens) >= vocab_size:
            wrong = min(tokens) if min(tokens) < 0 else max(tokens)
            raise BadRow(
                "token id out of range",
                f"'{key}' holds the token id {wrong}, outside 0..{vocab_size - 1}; tokenise with the model's tokenizer",
            )
    if ids["chosen_ids"] == ids["rejected_ids"]:
        raise BadRow("equal branches", "'chosen_ids' and 'rejected_ids' are equal: there is nothing to prefer")
    return ids


def _check_text(key: str, value: Any) -> str | list[dict[str, Any]]:
    value = _as_list(value)
    if isinstance(value, str):
        _check_unicode(key, value)
        return value
    if not isinstance(value, list):
        raise BadRow("wrong type", f"'{key}' must be a string or a list of messages, not {_show(value)}")
    return [_check_message(f"{key}[{index}]", message) for index, message in enumerate(value)]


def _check_message(name: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRow("wrong type", f"'{name}' must be a message with role and content, not {_show(message)}")
    given = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in given:
        given.setdefault("content", "")  # a call of tools alone says nothing; templates want the key
    if isinstance(given.get("content"), list):
        raise BadRow("wrong type", f"'{name}.content' is a list (multimodal); only text is supported: give a string")
    for field in ("role", "content"):
        if not isinstance(given.get(field), str):
            raise BadRow("wrong type", f"'{name}.{field}' must be a string, not {_show(given.get(field))}")
        _check_unicode(f"{name}.{field}", given[field])
    return given


def _check_unicode(name: str, text: str) -> None:
    """A lone surrogate, half of a character that JSON wrote in two, is no text that a tokenizer takes."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRow("invalid Unicode", f"'{name}' holds a lone surrogate at character {error.start}") from None


def _split_branches(row: dict[str, Any]) -> dict[str, Any]:
    """Refuse mixed types and equal branches; take an implicit prompt off the branches."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if type(chosen) is not type(rejected):
        raise BadRow("wrong type", "'chosen' and 'rejected' must both be strings or both be lists of messages")
    if isinstance(prompt, list) and isinstance(chosen, str):
        raise BadRow(
            "wrong type",
            "'prompt' is a list of messages but the responses are strings; write each response as "
            '[{"role": "assistant", "content": ...}]',
        )
    if chosen == rejected:
        raise BadRow("equal branches", "'chosen' and 'rejected' are equal: there is nothing to prefer")
    if prompt is not None and type(prompt) is type(chosen):
        return row
    # Some sets repeat as a string the prompt that their message lists begin with (UltraFeedback does).
    length = common_prefix_length(chosen, rejected)
    if length in (0, len(chosen), len(rejected)):
        why = "share no beginning" if length == 0 else "continue one another"
        remedy = "add a 'prompt'" if prompt is None else "give 'prompt' as a list of messages"
        raise BadRow("no common prompt", f"'chosen' and 'rejected' {why}, so their prompt is not known; {remedy}")
    if isinstance(chosen, str) and chosen[length - 1] == " ":
        length -= 1  # as TRL: tokenizers join a space to the word after it
    return {"prompt": chosen[:length], "chosen": chosen[length:], "rejected": rejected[length:]}


def _template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """`tools` and `chat_template_kwargs`, where given, as `apply_chat_template` takes them."""
    arguments: dict[str, Any] = {}
    if "tools" in row:
        arguments["tools"] = _read_tools(row["tools"])
    if "chat_template_kwargs" in row:
        options = row["chat_template_kwargs"]
        if not isinstance(options, Mapping):
            raise BadRow("wrong type", f"'chat_template_kwargs' must be an object, not {_show(options)}")
        arguments["chat_template_kwargs"] = {key: value for key, value in options.items() if value is not None}
    return arguments


def _read_tools(tools: Any) -> list[Any]:
    tools = _as_list(tools)
    if isinstance(tools, str):  # TRL's way to keep differing schemas in one Arrow column
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRow("wrong type", f"'tools' is a string that is not JSON: {error}") from None
    if not isinstance(tools, list):
        raise BadRow("wrong type", f"'tools' must be a list of tool schemas, not {_show(tools)}")
    return tools


def _need_keys(row: Mapping[str, Any], keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in row]
    if missing:
        found = ", ".join(map(str, row)) or "none"
        raise BadRow("missing key", f"no key '{missing[0]}' among its keys ({found}); {_NEEDED}")


def _has_text(response: str | list[dict[str, Any]]) -> bool:
    if isinstance(response, str):
        return bool(response.strip())
    return any(message["content"].strip() or message.get("tool_calls") for message in response)


def _as_list(value: Any) -> Any:
    """Tuples, arrays and tensors as lists; anything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _show(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"
