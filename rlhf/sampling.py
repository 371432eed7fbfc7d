"""Plain sampling from a causal language model: no top-k, no top-p, no minimum length.

Shapes: B sequences, Q query tokens (padded on the left), R response tokens (padded on the right, behind the stop
token), V vocabulary, H hidden size. Masks are 1 on real tokens and 0 on padding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from rlhf.forward import next_hidden_states, position_ids
from rlhf.vocabulary import token_logits

LOOK_EVERY = 4  # tokens between two looks at which rows have ended, each of which makes the host wait for a GPU


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: from softmax(logits / temperature), up to a stop token."""

    length: int  # of the longest response, in tokens
    temperature: float
    stop_id: int  # the token that ends a response
    stop_after: int = 0  # tokens before it counts; [3] stops at "." after 16


class RoomyLayer(DynamicLayer):
    """The keys and values [B, heads, T, H] of a layer, with room for `room` tokens more.

    Its parent copies all of them at every token.
    """

    def __init__(self, layer: DynamicLayer, room: int):
        super().__init__()
        keys = layer.keys.to(layer.values.dtype)  # rotated in float32 where the values are bfloat16
        self.lazy_initialization(keys, layer.values)
        self.whole = [torch.cat([x, x.new_empty(*x.shape[:2], room, x.shape[3])], 2) for x in (keys, layer.values)]
        self.keys, self.values = (whole[:, :, : keys.shape[2]] for whole in self.whole)

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[2]
        end = start + keys.shape[2]
        for whole, new in zip(self.whole, (keys, values), strict=True):
            whole[:, :, start:end] = new
        self.keys, self.values = (whole[:, :, :end] for whole in self.whole)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        length = self.keys.shape[2]
        self.whole = [whole.index_select(0, indices) for whole in self.whole]
        self.keys, self.values = (whole[:, :, :length] for whole in self.whole)


def make_room(cache, room: int) -> None:
    """Lets the plain layers of a cache hold `room` tokens more without copying; other kinds stay as they are."""
    for i, layer in enumerate(cache.layers):  # each is freed before the next one grows
        if type(layer) is DynamicLayer:
            cache.layers[i] = RoomyLayer(layer, room)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """logits [B, V], random numbers [B] in [0, 1) -> token ids [B], drawn from softmax(logits)."""
    return invert(logits.softmax(-1).cumsum(-1), uniform)


def invert(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Cumulative probabilities [B, V], random numbers [B] in [0, 1) -> token ids [B], where they are reached."""
    reached = torch.searchsorted(cumulative, uniform.unsqueeze(1) * cumulative[:, -1:], right=True)
    return reached.squeeze(1).clamp(max=cumulative.shape[1] - 1)


def uniform_numbers(rows: int, length: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random numbers in [0, 1), one for every token, [rows, length].

    The generator is the CPU's, whatever the device: a run draws the same numbers on each, and goes on on another.
    """
    return torch.rand(rows, length, generator=generator).to(device)


@torch.no_grad()
def sample(
    model, query_ids: Tensor, query_mask: Tensor, sampling: Sampling, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Responses [B, R], R <= sampling.length, to queries [B, Q], and the hidden states [B, R, H] they were drawn from.

    Behind the end of a response stand stop tokens, and states that mean nothing.
    """
    batch, device, length = len(query_ids), query_ids.device, sampling.length
    responses = torch.full((batch, length), sampling.stop_id, device=device)
    uniform = uniform_numbers(batch, length, generator, device)
    rows = torch.arange(batch, device=device)  # the rows still in the batch
    running = torch.ones(batch, dtype=torch.bool, device=device)  # which of them have not stopped
    look_every = 1 if device.type == "cpu" else LOOK_EVERY
    mask, positions, padded = query_mask, position_ids(query_mask), not bool(query_mask.all())
    out = model.base_model(input_ids=query_ids, attention_mask=mask, position_ids=positions, use_cache=True)
    positions = positions[:, -1]
    make_room(out.past_key_values, length)
    cache, state = out.past_key_values, out.last_hidden_state[:, -1]
    states = state.new_zeros(batch, length, state.shape[-1])
    for step in range(length):
        logits = token_logits(model, state, sampling.temperature)
        tokens = draw(logits, uniform[rows, step]).where(running, sampling.stop_id)
        responses[rows, step], states[rows, step] = tokens, state
        running = running & ((tokens != sampling.stop_id) | (step < sampling.stop_after))
        if step + 1 == length:
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = positions + 1
        if (step + 1) % look_every == 0:
            left = int(running.sum())
            if not left:
                break
            if left < 0.8 * len(running):  # below this, idle rows cost more than copying the cache without them
                indices = running.argsort(descending=True, stable=True)[:left]
                rows, tokens, running, mask, positions = (x[indices] for x in (rows, tokens, running, mask, positions))
                cache.batch_select_indices(indices)
        state = next_hidden_states(model, tokens, mask, padded, positions, cache)
    return responses[:, : step + 1], states[:, : step + 1]


@torch.no_grad()
def sample_many(model, query_ids: Tensor, count: int, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """`count` responses [count, R] to one query [1, Q] without padding, distributed as those of `sample`.

    Responses that begin alike share their forward passes: a row of the batch is a prefix, and `prefix_of` says which
    one every response has. A small model at a low temperature begins alike often.
    """
    device, length, stop_id = query_ids.device, sampling.length, sampling.stop_id
    responses = torch.full((count, length), stop_id, device=device)
    uniform = uniform_numbers(count, length, generator, device)
    prefix_of = torch.zeros(count, dtype=torch.long, device=device)
    running = torch.arange(count, device=device)  # the responses that have not stopped
    out = model.base_model(input_ids=query_ids, use_cache=True)
    make_room(out.past_key_values, length)
    cache, state = out.past_key_values, out.last_hidden_state[:, -1]
    for step in range(length):
        logits = token_logits(model, state, sampling.temperature)
        cumulative = logits.softmax(-1).cumsum(-1)
        tokens = invert(cumulative.index_select(0, prefix_of[running]), uniform[running, step])
        responses[running, step] = tokens
        longer = prefix_of[running] * logits.shape[1] + tokens  # a number for every pair of them
        longer, prefix_of[running] = longer.unique(return_inverse=True)
        prefixes, tokens = longer // logits.shape[1], longer % logits.shape[1]
        alive = (tokens != stop_id) | (step < sampling.stop_after)
        running = running[alive[prefix_of[running]]]
        if step + 1 == length or not len(running):
            break
        prefix_of[running] = (alive.cumsum(0) - 1)[prefix_of[running]]
        cache.batch_select_indices(prefixes[alive])
        tokens = tokens[alive]
        positions = torch.full_like(tokens, query_ids.shape[1] + step)
        mask = torch.ones(len(tokens), query_ids.shape[1] + step + 1, device=device, dtype=torch.long)
        state = next_hidden_states(model, tokens, mask, False, positions, cache)
    return responses[:, : step + 1]


def real_tokens(response_ids: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """[B, R] -> mask [B, R], 1 up to and with the stop token, and terminated [B], whether there is one."""
    may_stop = torch.arange(response_ids.shape[1], device=response_ids.device) >= sampling.stop_after
    stops = (response_ids == sampling.stop_id) & may_stop
    return ((stops.cumsum(1) - stops.long()) == 0).long(), stops.any(1)
