"""Prompts to answer -> model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Messages = list[dict[str, Any]]


def encode_chats(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Messages]) -> BatchEncoding:
    """Left-padded `input_ids` and `attention_mask`, (B, L) each, of chats that the model shall answer.

    Through the chat template where there is one, else the contents line after line. A tokenizer without a padding token
    gets its EOS token for one.

    Raises:
        ValueError: the chat template refuses a chat (of Gemma's, one with a system message).
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        texts = ["\n".join(message["content"] for message in chat) for chat in chats]
    else:
        texts = [_render(tokenizer, chat) for chat in chats]
    # Tokenised here and not by the template: transformers 5.24 drops its `padding_side`. It brings the special tokens.
    return tokenizer(
        texts,
        add_special_tokens=tokenizer.chat_template is None,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


def _render(tokenizer: PreTrainedTokenizerBase, chat: Messages) -> str:
    try:
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program of the model's author and may raise anything
        roles = ", ".join(str(message.get("role")) for message in chat)
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the chat template refuses a chat with the roles {roles}: {reason}") from error
