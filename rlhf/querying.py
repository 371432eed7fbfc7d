"""Queries: openings of texts, which the policy continues. Some are held out for evaluation."""

import random
import re
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import UserError

HELD_OUT = 5  # one in so many queries is for evaluation only


def opening(text: str) -> str:
    """The part of a text from which a query is cut: its first sentence, or its first half if it is one sentence."""
    sentence, _, rest = re.sub(r"([.!?][\"']?)\s+", r"\1\n", text, count=1).partition("\n")
    words = text.split()
    return sentence if rest else " ".join(words[: (len(words) + 1) // 2])


def shortest_query(length: int) -> int:
    """The shortest query where the longest has `length` tokens."""
    return max(1, length // 2)


def split_queries(texts: list[str], tokenizer, length: int) -> tuple[list[str], list[str]]:
    """The queries of these texts: those for training, and those for evaluation only, about a fifth.

    A query is the first tokens of an opening, from half of `length` to `length` of them, as the 32 to 64 of [1]; the
    text's checksum decides how many.
    """
    shortest = shortest_query(length)
    rows = tokenizer([opening(text) for text in texts], add_special_tokens=False)["input_ids"]
    lengths = [shortest + zlib.crc32(text.encode()) % (length - shortest + 1) for text in texts]
    return hold_out_queries([whole_text(tokenizer, row[:count]) for row, count in zip(rows, lengths, strict=True)])


def whole_text(tokenizer, ids: list[int]) -> str:
    """The text of token ids, without special tokens, and without the last ones if they are a part of a character."""

    def text_of(ids: list[int]) -> str:  # special tokens are left out of a response's text, too
        return tokenizer.decode(ids, skip_special_tokens=True) or tokenizer.decode(ids)

    text = text_of(ids)
    while len(ids) > 1 and text.endswith("\ufffd"):
        ids = ids[:-1]
        text = text_of(ids)
    return text


def hold_out_queries(queries: list[str], text_of: Callable[[str], str] = str) -> tuple[list[str], list[str]]:
    """The queries for training, and those for evaluation only, about a fifth.

    The checksum of a query's text decides on which side it is, so that equal queries are on the same side in every
    script and every run.
    """
    training, held_out = [], []
    for query in queries:
        (held_out if zlib.crc32(text_of(query).encode()) % HELD_OUT == 0 else training).append(query)
    if not (training and held_out):
        raise UserError("the validation texts are too few to hold out queries for evaluation; give more of them")
    return training, held_out


def encode_queries(tokenizer, queries: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Queries padded on the left: ids and mask, [B, Q] each."""
    rows = tokenizer(queries, add_special_tokens=False)["input_ids"]
    if begins_texts(tokenizer):
        first = [tokenizer.bos_token_id]
        rows = [row if row[:1] == first else first + row for row in rows]  # chat templates may have it
    width = max(map(len, rows))
    ids = [[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def shortest_row(tokenizer, length: int) -> int:
    """The number of tokens of the shortest query that `encode_queries` gives, where the longest has `length`."""
    return shortest_query(length) + begins_texts(tokenizer)


def begins_texts(tokenizer) -> bool:
    """Whether the tokenizer opens every text with a token of its own, as Llama's does; so a query has it, too."""
    return tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


class QueryStream:
    """Queries without end: all of them in a random order, then all of them in another one, and so on."""

    def __init__(self, queries: list[str], seed: int):
        self._queries, self._rng = queries, random.Random(seed)
        self._waiting: list[str] = []  # the rest of the present order

    def take(self, count: int) -> list[str]:
        """The next `count` queries."""
        while len(self._waiting) < count:
            self._waiting += self._rng.sample(self._queries, len(self._queries))
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self._rng.getstate(), "waiting": self._waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rng.setstate(state["rng"])
        self._waiting = state["waiting"]
