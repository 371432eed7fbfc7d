"""What the policy is asked, and what is seen of its responses: texts that it continues, and conversations (--chat).

The two classes have the same methods: which queries there are, how a query becomes tokens, how tokens become the text
that rewards, judges and people see, and how that text is taken apart again. Shapes as in rlhf/rollout.py.
"""

import argparse
import random
import zlib
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf import chat, data, models, querying
from rlhf.errors import UserError
from rlhf.sampling import Sampling

REPLY, BOTH = "reply", "both"


class Sample(NamedTuple):
    """A response with its query, as people read them."""

    query: str
    message: str  # what a reward function gets as the query: of a conversation, the user's last message
    response: str  # the end of the text


def load(is_chat: bool, *source) -> dict[str, list[str]]:
    """The texts or conversations of every split; source as data.load_texts takes it."""
    return data.load_texts(*source, read=chat.conversations_of if is_chat else data.texts_of)


def new(is_chat: bool, tokenizer, reward_sees: str):
    return Conversations(tokenizer, reward_sees) if is_chat else Texts(tokenizer)


def sampling_of(settings: argparse.Namespace, prompts) -> Sampling:
    """How a run of finetuning_nlg.py with these settings draws its responses."""
    stop_id = prompts.stop_token(settings.stop)
    return Sampling(settings.response_length, settings.temperature, stop_id, settings.stop_after)


class Texts:
    """A query is the beginning of a text, and the policy continues it."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def stop_token(self, stop: str | None) -> int:
        """The id of the token that ends a response: `stop`, or the end of text."""
        return models.stop_token(self.tokenizer, stop)

    def training_queries(self, texts: dict[str, list[str]], length: int) -> list[str]:
        """The training queries of both splits; the longest has `length` tokens.

        Those of "valid" alone would be too few to learn what follows rare ones. "valid" must have some for evaluation,
        which is refused here rather than after the training.
        """
        self.held_out_queries(texts, length)
        return querying.split_queries(texts["train"] + texts["valid"], self.tokenizer, length)[0]

    def held_out_queries(self, texts: dict[str, list[str]], length: int) -> list[str]:
        """The queries of "valid" that evaluate_nlg.py asks."""
        return querying.split_queries(texts["valid"], self.tokenizer, length)[1]

    def validation_queries(self, texts: dict[str, list[str]], length: int) -> list[str]:
        """Held-out queries for evaluation during training, always in the same order.

        First come those that evaluate_nlg.py does not ask: what is chosen by some queries should not be judged by them.
        """
        _, held_out = querying.split_queries(texts["train"] + texts["valid"], self.tokenizer, length)
        of_the_end = set(self.held_out_queries(texts, length))
        shuffled = random.Random(0).sample(held_out, len(held_out))
        return sorted(shuffled, key=lambda query: query in of_the_end)

    def encode(self, queries: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Queries padded on the left: ids and mask, [B, Q] each."""
        return querying.encode_queries(self.tokenizer, queries, device)

    def texts(self, queries, query_ids: Tensor, query_mask: Tensor, response_ids: Tensor, response_mask: Tensor):
        """What is seen of B responses: the whole texts, which begin with their queries."""
        ids, mask = torch.cat([query_ids, response_ids], 1), torch.cat([query_mask, response_mask], 1)
        return models.decode(self.tokenizer, ids, mask)

    @staticmethod
    def split(query: str, text: str) -> Sample:
        return Sample(query, query, text[len(query) :])

    def readable(self, texts: list[str]) -> list[str]:
        """Texts of the data, as people read them."""
        return texts


class Conversations:
    """A query is a conversation that ends with a message of the user, and the policy replies.

    reward_sees: the reply, or both: all that was said before, and the reply on the next line. The chat template is seen
    by the policy only.
    """

    def __init__(self, tokenizer, reward_sees: str):
        self.tokenizer, self._reward_sees = tokenizer, reward_sees

    @cached_property
    def _end_of_turn(self) -> int:
        return chat.end_of_turn(self.tokenizer)

    def stop_token(self, stop: str | None) -> int:
        """The id of the token that ends a response: `stop`, or the end of the assistant's turn."""
        return self._end_of_turn if stop is None else models.stop_token(self.tokenizer, stop)

    def training_queries(self, conversations: dict[str, list[str]], length: int) -> list[str]:
        """The conversations of both splits but those for evaluation and those of more than `length` tokens.

        They are whole prompts, far fewer than beginnings of texts: held out is a fifth of both splits.
        """
        fitting, total = self._fitting(conversations, length), len(conversations["train"] + conversations["valid"])
        if len(fitting) < total:
            print(f"{total - len(fitting)} of {total} prompts are longer than --query-length {length}: left out")
        return querying.hold_out_queries(fitting, chat.plain)[0]

    def held_out_queries(self, conversations: dict[str, list[str]], length: int) -> list[str]:
        """The half of what is held out that evaluate_nlg.py asks."""
        return self._held_out(conversations, length)[::2]

    def validation_queries(self, conversations: dict[str, list[str]], length: int) -> list[str]:
        """The other half, for evaluation during training."""
        return self._held_out(conversations, length)[1::2]

    def _held_out(self, conversations: dict[str, list[str]], length: int) -> list[str]:
        _, held_out = querying.hold_out_queries(self._fitting(conversations, length), chat.plain)
        return sorted(set(held_out), key=lambda conversation: (zlib.crc32(conversation.encode()), conversation))

    def _fitting(self, conversations: dict[str, list[str]], length: int) -> list[str]:
        """Those of at most `length` tokens. A conversation is never cut: the reply would not be to it."""
        both = conversations["train"] + conversations["valid"]
        rows = self.tokenizer([chat.render(self.tokenizer, each) for each in both], add_special_tokens=False)
        lengths = [len(ids) for ids in rows["input_ids"]]
        if min(lengths) > length:
            raise UserError(f"--query-length {length}: all prompts are longer; the shortest has {min(lengths)} tokens")
        return [each for each, tokens in zip(both, lengths, strict=True) if tokens <= length]

    def encode(self, queries: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Queries in the tokens of the chat template, padded on the left: ids and mask, [B, Q] each."""
        return querying.encode_queries(
            self.tokenizer, [chat.render(self.tokenizer, query) for query in queries], device
        )

    def texts(self, queries, query_ids: Tensor, query_mask: Tensor, response_ids: Tensor, response_mask: Tensor):
        """What is seen of B responses, without the template's tokens."""
        is_said = response_mask.bool() & (response_ids != self._end_of_turn)  # not every tokenizer calls it special
        replies = [reply.strip() for reply in models.decode(self.tokenizer, response_ids, is_said)]
        return [self._before(query) + reply for query, reply in zip(queries, replies, strict=True)]

    def _before(self, query: str) -> str:
        """What is seen before the reply."""
        return chat.plain(query) + "\n" if self._reward_sees == BOTH else ""

    def split(self, query: str, text: str) -> Sample:
        return Sample(chat.plain(query), chat.to_messages(query)[-1]["content"], text[len(self._before(query)) :])

    def readable(self, texts: list[str]) -> list[str]:
        """Conversations of the data, as people read them."""
        return [chat.plain(conversation) for conversation in texts]
