"""Conversations: from the rows of a data set, through the policy's chat template, to the token that ends a turn.

A conversation is a list of messages, {"role": ..., "content": ...}, and its last one is the user's. As a query it is
written as JSON, whatever the policy's template makes of it.
"""

import json
from typing import Any

import datasets

from rlhf import data
from rlhf.errors import UserError

Message = dict[str, str]
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
COLUMNS = ("messages", "prompt")  # of a row; the first one that it fills counts


# from the rows of a data set


def conversations_of(rows: datasets.Dataset, text_columns: list[str] | None, split: str = "train") -> list[str]:
    """The conversations of all rows: of the COLUMNS; or texts as data.texts_of gives them, each a user's message.

    split: its name, for what is said of its rows.
    """
    columns = [name for name in text_columns or COLUMNS if name in rows.column_names]
    first = {name: next((cell for cell in rows[name] if cell), None) for name in columns}  # that is not empty
    hold_messages = any(isinstance(cell, list) for cell in first.values())
    if not columns or (text_columns and not hold_messages):
        return [from_text(text) for text in data.texts_of(rows, text_columns, split) if text]
    conversations = []
    for number, row in enumerate(rows.select_columns(columns), 1):
        where = f"{split}, row {number}"
        column = next((name for name in columns if row[name]), columns[0])
        cell = row[column] or None
        if isinstance(cell, list):
            conversations.append(from_messages(cell, where))
        elif text := data.cell_text(cell, column, where).strip():
            conversations.append(from_text(text))
        else:
            raise UserError(f"{where} is empty: give it {' or '.join(columns)}, or take it out")
    return conversations


def from_text(text: str) -> str:
    """The conversation that begins with this message of the user."""
    return json.dumps([{"role": USER, "content": text}], ensure_ascii=False)


def from_messages(messages: list[Any], where: str) -> str:
    """Everything up to and with the last message of the user; what follows is an answer to it."""
    for place, message in enumerate(messages, 1):
        role, content = (message.get(name) if isinstance(message, dict) else None for name in ("role", "content"))
        which = f"{where}, message {place}"
        if not (isinstance(role, str) and isinstance(content, str)):
            raise UserError(f'{which}: a message is {{"role": ..., "content": ...}}, both texts')
        if role not in (USER, ASSISTANT) and (role, place) != (SYSTEM, 1):
            raise UserError(f"{which}: its role is {role!r}; roles are user and assistant, and system at the start")
        if not content.strip():
            raise UserError(f"{which} is empty; give it a content, or take the row out")
    last = max((i for i, message in enumerate(messages) if message["role"] == USER), default=None)
    if last is None:
        raise UserError(f"{where} has no message of the user")
    up_to_last = [{"role": message["role"], "content": message["content"]} for message in messages[: last + 1]]
    return json.dumps(up_to_last, ensure_ascii=False)


def to_messages(conversation: str) -> list[Message]:
    return json.loads(conversation)


def plain(conversation: str) -> str:
    """A conversation as people read it: what its messages say, each on lines of its own."""
    return "\n".join(message["content"] for message in to_messages(conversation))


# the chat template


def render(tokenizer, conversation: str) -> str:
    """A conversation in the tokens of the policy's chat template, up to where the assistant's turn begins."""
    try:
        return tokenizer.apply_chat_template(to_messages(conversation), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may refuse a system message, for one
        raise UserError(f"the policy's chat template refuses {plain(conversation)[:60]!r}: {error}") from error


def end_of_turn(tokenizer) -> int:
    """The token that ends an assistant's turn: the first one behind its words that is no part of a text.

    It is often not the tokenizer's end of text, which is taken where a template ends turns with no token of its own.
    """
    words = "The assistant's words."
    messages = [{"role": USER, "content": "The user's words."}, {"role": ASSISTANT, "content": words}]
    behind = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(words)[2]
    no_text = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    ids = tokenizer.encode(behind, add_special_tokens=False)
    return next((token for token in ids if token in no_text), tokenizer.eos_token_id)
