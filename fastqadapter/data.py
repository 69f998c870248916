"""Preference rows -> token ids -> packed pairs.

A pair is tokenised as two whole texts, `x + y_chosen` and `x + y_rejected`. The prompt kept is their longest common
prefix inside the tokenised prompt `x`; everything after it is the response. So `prompt_ids + chosen_ids` is always
exactly the tokenisation of the whole text, also where tokens merge across the border of prompt and response.
"""

from __future__ import annotations

import dataclasses
import logging
from array import array
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, overload

from fastqadapter.packing import BaseStates, PackedPairs, pack_pairs
from fastqadapter.rows import (
    TOKENIZED_KEYS,
    BadRow,
    DroppedRow,
    OnBadRow,
    RowGuard,
    check_row,
    common_prefix_length,
    read_rows,
    source_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PreferenceCollator", "TokenizedRows", "read_rows", "tokenize_row", "tokenize_rows"]

logger = logging.getLogger(__name__)

_PROGRESS_FROM = 500  # rows; fewer are done before a bar could be read
_warned: set[str] = set()


class TokenizedRows(Sequence[dict[str, Any]]):
    """Tokenised rows: a list to index, usable as a torch map-style dataset.

    An item is `{"prompt_ids": [...], "chosen_ids": [...], "rejected_ids": [...], "source": "pairs.jsonl:17"}`.
    `dropped` counts the rows left out, by reason.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], dropped: Mapping[str, int] | None = None) -> None:
        # int32 arrays: a tenth of the memory of lists of Python integers
        self._rows = [(row["source"], *(array("i", row[key]) for key in TOKENIZED_KEYS)) for row in rows]
        self.dropped: dict[str, int] = dict(dropped or {})

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        source, *ids = self._rows[index]
        return {**{key: tokens.tolist() for key, tokens in zip(TOKENIZED_KEYS, ids, strict=True)}, "source": source}

    def __repr__(self) -> str:
        return f"TokenizedRows({len(self)} rows, dropped={self.dropped})"


class PreferenceCollator:
    """Makes packed pairs of a list of rows, raw or tokenised: the `data_collator` of a `QAdapterTrainer`.

    Args:
        tokenizer: tokenises raw rows and bounds the ids of tokenised ones; None if rows come tokenised.
        max_length: longest prompt + response in tokens, the end is cut off; None: no limit.
        pad_action: token scored after the last one (`reference` preset), or None; see `pack_pairs`.
        on_bad_row: "raise", or "skip" to leave bad rows out of the batch.

    Attributes:
        dropped: rows left out so far, by reason. A DataLoader with workers counts in each worker's own copy.

    Raises:
        ValueError: an option out of its range; on a call, a bad row or a batch of which no row is left.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int | None = 1024,
        *,
        pad_action: int | None = None,
        on_bad_row: OnBadRow = "raise",
    ) -> None:
        self.pad_action = pad_action
        self._encoder = _RowEncoder(tokenizer, max_length, on_bad_row)

    @property
    def dropped(self) -> dict[str, int]:
        return dict(self._encoder.guard.dropped)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> PackedPairs:
        guard = self._encoder.guard
        first_loss = not guard.dropped
        encoded = [self._encoder(row, f"batch row {index}") for index, row in enumerate(rows)]
        kept = [row for row in encoded if row is not None]
        if first_loss and guard.dropped:
            logger.warning("rows left out of a batch: %s; from here on .dropped counts in silence", guard.summary())
        if not kept:
            raise ValueError(
                f"no row of a batch of {len(rows)} is left ({guard.summary() or 'it was empty'}); raise max_length or "
                "filter the rows with tokenize_rows before training"
            )
        pairs = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in kept]
        packed = pack_pairs(pairs, pad_action=self.pad_action, sources=[row["source"] for row in kept])
        base = [row["base"] for row in rows if "base" in row]
        if len(base) != len(kept):  # most often none has any
            return packed
        return dataclasses.replace(packed, base=BaseStates.cat(base))


def tokenize_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int | None,
    on_bad_row: OnBadRow = "raise",
    progress: bool = True,
) -> TokenizedRows:
    """Tokenise preference rows (`fastqadapter.rows` lists the formats).

    Args:
        rows: a list of dicts, a `datasets.Dataset`, the result of `read_rows`, or any finite iterable of these.
        tokenizer: with a chat template if the rows are conversational; None if they come tokenised.
        max_length: longest prompt + response in tokens, the end is cut off; None: no limit.
        on_bad_row: "raise" at the first bad row, or "skip" and count it.
        progress: show a bar on a terminal, if there are many rows.

    Returns:
        The rows that can be trained on. Rows whose prompt fills `max_length`, or whose branches are equal once cut to
        it, are left out and counted in `.dropped`, with one warning.

    Raises:
        ValueError: a bad row, named by its place ("row 17" counts from 0); no tokenizer or no chat template where one
            is needed; no row left.
    """
    from tqdm import tqdm

    encoder = _RowEncoder(tokenizer, max_length, on_bad_row)
    total = len(rows) if isinstance(rows, Sized) else None
    # tqdm's disable=None shows the bar on a terminal only
    quiet = None if progress and (total is None or total >= _PROGRESS_FROM) else True
    bar = tqdm(rows, desc="Tokenizing", unit=" rows", total=total, disable=quiet)
    encoded = (encoder(row, f"row {index}") for index, row in enumerate(bar))
    tokenized = TokenizedRows(row for row in encoded if row is not None)
    tokenized.dropped = dict(encoder.guard.dropped)
    if not tokenized:
        raise ValueError(
            f"no row left to train on ({encoder.guard.summary() or 'there were none'}) with max_length={max_length}"
        )
    if tokenized.dropped:
        count = encoder.guard.dropped.total()
        logger.warning("%d of %d rows dropped: %s", count, count + len(tokenized), encoder.guard.summary())
    return tokenized


def tokenize_row(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, *, max_length: int | None
) -> dict[str, Any] | None:
    """Tokenise one preference row.

    Returns:
        `{"prompt_ids", "chosen_ids", "rejected_ids", "source"}`, each list with at least one token, or None if
        `max_length` leaves nothing to learn: the prompt fills it, or the branches are equal once cut to it.

    Raises:
        ValueError: what is wrong with the row; no tokenizer or no chat template where one is needed.
    """
    return _RowEncoder(tokenizer, max_length, "raise")(row, "row 0")


class _RowEncoder:
    """Row -> token ids cut to `max_length`, or None for a row left out, which `guard` counts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None, on_bad_row: OnBadRow) -> None:
        if max_length is not None and (type(max_length) is not int or max_length < 2):
            raise ValueError(f"max_length must be None or an integer >= 2 (prompt and response), not {max_length!r}")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.vocab_size = None if tokenizer is None else len(tokenizer)
        self.guard = RowGuard(on_bad_row)

    def __call__(self, row: Any, default_source: str) -> dict[str, Any] | None:
        source = source_of(row, default_source)
        with self.guard.row(source):
            ids = check_row(row, self.vocab_size)
            if "prompt_ids" not in ids:
                ids = _encode_pair(ids, self.tokenizer, explicit_prompt=row.get("prompt") is not None, source=source)
            return {**_truncate(ids, self.max_length), "source": source}
        return None


def _encode_pair(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, *, explicit_prompt: bool, source: str
) -> dict[str, list[int]]:
    """Token ids of a checked row: both whole texts, split where they part."""
    if tokenizer is None:
        raise ValueError(f"{source}: the row is not tokenised and there is no tokenizer; pass one")
    encode = _encode_chat if isinstance(row["prompt"], list) else _encode_text
    prompt, chosen, rejected = encode(row, tokenizer)
    length = common_prefix_length(prompt, chosen, rejected)
    if length == 0:
        raise BadRow(
            "no shared prompt token",
            "the prompt has no token that both branches begin with; give a longer prompt or a tokenizer with a BOS",
        )
    if length < len(prompt) and explicit_prompt:
        _warn_once(
            "the tokenised prompt is not how prompt + response begins (first seen at %s): tokens merge across the "
            "border, or the chat template renders the prompt alone differently. The responses start where they part; "
            "if many rows are so, end prompts at a token border. Shown once.",
            source,
        )
    ids = {"prompt_ids": chosen[:length], "chosen_ids": chosen[length:], "rejected_ids": rejected[length:]}
    for key in ("chosen_ids", "rejected_ids"):
        if not ids[key]:
            raise BadRow("empty response", f"'{key.removesuffix('_ids')}' gives no token after the prompt")
    if ids["chosen_ids"] == ids["rejected_ids"]:
        raise BadRow("equal branches", "'chosen' and 'rejected' give the same tokens: there is nothing to prefer")
    return ids


def _encode_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of prompt, prompt + chosen, prompt + rejected, with the tokenizer's own special tokens and a final EOS."""
    eos = tokenizer.eos_token_id
    adds_eos = tokenizer("a")["input_ids"][-1:] == [eos]

    def encode(text: str) -> list[int]:
        ids = tokenizer(text, verbose=False)["input_ids"]  # verbose would warn of lengths we cut ourselves
        return list(ids[:-1] if adds_eos else ids)

    branches = [encode(row["prompt"] + row[key]) for key in ("chosen", "rejected")]
    if eos is None:
        _warn_once("the tokenizer has no EOS token: the model will not learn where a response ends; set eos_token")
    else:
        branches = [ids if ids[-1:] == [eos] else [*ids, eos] for ids in branches]
    return [encode(row["prompt"]), *branches]


def _encode_chat(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of prompt, prompt + chosen, prompt + rejected through the chat template, which brings all special tokens."""
    arguments = {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}
    if not (tokenizer.chat_template or arguments.get("chat_template")):
        raise ValueError(
            "the rows are conversational but the tokenizer has no chat template; set tokenizer.chat_template, take "
            "an instruct model's tokenizer, or give prompt, chosen and rejected as strings"
        )

    def encode(messages: list[dict[str, Any]], **options: bool) -> list[int]:
        try:
            encoded = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, tokenizer_kwargs={"verbose": False}, **options, **arguments
            )
        except Exception as error:  # a template is a program of the user's and may raise anything
            reason = str(error).partition("\n")[0]
            raise BadRow("chat template", f"the chat template refuses the row: {reason}") from error
        return list(encoded["input_ids"])

    prompt = row["prompt"]
    opening = {"continue_final_message": True} if prompt[-1]["role"] == "assistant" else {"add_generation_prompt": True}
    return [encode(prompt, **opening), *(encode(_join_messages(prompt, row[key])) for key in ("chosen", "rejected"))]


def _join_messages(prompt: list[dict[str, Any]], response: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation; a prompt that ends in the assistant's words is a prefill, which the response goes on from."""
    last, first = prompt[-1], response[0]
    if not last["role"] == first["role"] == "assistant":
        return prompt + response
    return [*prompt[:-1], {**last, **first, "content": last["content"] + first["content"]}, *response[1:]]


def _truncate(ids: dict[str, list[int]], max_length: int | None) -> dict[str, list[int]]:
    """Keep the start of prompt + response. Raises `DroppedRow` if that leaves nothing to learn."""
    if max_length is None:
        return ids
    prompt = ids["prompt_ids"]
    room = max_length - len(prompt)
    if room <= 0:
        raise DroppedRow("prompt fills max_length", f"the prompt of {len(prompt)} tokens fills max_length={max_length}")
    chosen, rejected = ids["chosen_ids"][:room], ids["rejected_ids"][:room]
    if chosen == rejected:
        raise DroppedRow("equal after truncation", f"chosen and rejected are equal when cut to max_length={max_length}")
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def _warn_once(message: str, *args: object) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message, *args)
