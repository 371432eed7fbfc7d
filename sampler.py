"""Plain sampling from a causal language model: no top-k, no top-p, no minimum length.

Shapes: B sequences, Q query tokens (padded on the left), R response tokens (padded on the right, behind the stop
token), V vocabulary, H hidden size. Masks are 1 on real tokens and 0 on padding.
"""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

import gpt2
from policy import position_ids, token_logits


class RoomyLayer(DynamicLayer):
    """The keys and values [B, heads, T, H] of a layer, with room for `room` tokens more.

    Its parent copies all of them at every token.
    """

    def __init__(self, layer: DynamicLayer, room: int):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self.whole = [
            torch.cat([x, x.new_empty(*x.shape[:2], room, x.shape[3])], 2) for x in (layer.keys, layer.values)
        ]

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[2]
        end = start + keys.shape[2]
        for whole, new in zip(self.whole, (keys, values), strict=True):
            whole[:, :, start:end] = new
        self.keys, self.values = (whole[:, :, :end] for whole in self.whole)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        length = self.keys.shape[2]
        self.whole = [whole[indices] for whole in self.whole]
        self.keys, self.values = (whole[:, :, :length] for whole in self.whole)


def make_room(cache, room: int) -> None:
    """Lets the plain layers of a cache hold `room` tokens more without copying; other kinds stay as they are."""
    cache.layers = [RoomyLayer(layer, room) if type(layer) is DynamicLayer else layer for layer in cache.layers]


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """logits [B, V] -> token ids [B], sampled from their softmax by inverting its cumulative distribution."""
    return invert(logits.softmax(-1).cumsum(-1), generator)


def invert(cumulative: Tensor, generator: torch.Generator) -> Tensor:
    """Cumulative probabilities [B, V] -> token ids [B], each where a random height is reached."""
    uniform = torch.rand(len(cumulative), 1, generator=generator, device=cumulative.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, uniform, right=True).squeeze(1).clamp(max=cumulative.shape[1] - 1)


def next_states(body, tokens: Tensor, mask: Tensor, positions: Tensor, cache) -> Tensor:
    """The last hidden states [B, H] of tokens [B] at positions [B], which join those in `cache`; mask [B, T]."""
    if gpt2.fits(body):
        return gpt2.next_states(body, tokens, mask, positions, cache)
    out = body(
        input_ids=tokens.unsqueeze(1),
        attention_mask=mask,
        position_ids=positions.unsqueeze(1),
        past_key_values=cache,
        use_cache=True,
    )
    return out.last_hidden_state[:, -1]


@torch.no_grad()
def sample(
    model,
    query_ids: Tensor,
    query_mask: Tensor,
    *,
    length: int,
    temperature: float,
    stop_id: int,
    stop_after: int = 0,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Responses [B, R], R <= length, to queries [B, Q]: plain sampling, no top-k, no top-p, no minimum length.

    A row ends with its first `stop_id` that has at least `stop_after` tokens before it ([3] stops at "." after 16);
    behind it stand `stop_id`s. R is the length of the longest row. With them the hidden states [B, R, H] from which
    their real tokens were drawn.
    """
    batch, device = len(query_ids), query_ids.device
    responses = torch.full((batch, length), stop_id, device=device)
    rows = torch.arange(batch, device=device)  # the rows still in the batch
    going = torch.ones(batch, dtype=torch.bool, device=device)  # which of them have not stopped
    mask, positions = query_mask, position_ids(query_mask)
    out = model.base_model(input_ids=query_ids, attention_mask=mask, position_ids=positions, use_cache=True)
    positions = positions[:, -1]
    make_room(out.past_key_values, length)
    cache, state = out.past_key_values, out.last_hidden_state[:, -1]
    states = state.new_zeros(batch, length, state.shape[-1])
    for step in range(length):
        tokens = draw(token_logits(model, state, temperature), generator).where(going, stop_id)
        responses[rows, step], states[rows, step] = tokens, state
        going = going & ((tokens != stop_id) | (step < stop_after))
        if step + 1 == length or not going.any():
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = positions + 1
        if going.float().mean() < 0.8:  # below this, idle rows cost more than copying the cache without them
            keep = going.nonzero().squeeze(1)
            rows, tokens, going, mask, positions = rows[keep], tokens[keep], going[keep], mask[keep], positions[keep]
            cache.batch_select_indices(keep)
        state = next_states(model.base_model, tokens, mask, positions, cache)
    return responses[:, : step + 1], states[:, : step + 1]


@torch.no_grad()
def sample_many(
    model,
    query_ids: Tensor,
    count: int,
    *,
    length: int,
    temperature: float,
    stop_id: int,
    stop_after: int = 0,
    generator: torch.Generator,
) -> Tensor:
    """`count` responses [count, R] to one query [1, Q] without padding, distributed as those of `sample`.

    Responses that begin alike share their forward passes: a row of the batch is a beginning, and `share` says which of
    them every response still has. A small model at a low temperature begins alike often.
    """
    device = query_ids.device
    responses = torch.full((count, length), stop_id, device=device)
    share = torch.zeros(count, dtype=torch.long, device=device)
    going = torch.arange(count, device=device)  # the responses that have not stopped
    out = model(input_ids=query_ids, logits_to_keep=1, use_cache=True)
    for step in range(length):
        cumulative = (out.logits[:, -1].float() / temperature).softmax(-1).cumsum(-1)
        tokens = invert(cumulative[share[going]], generator)
        responses[going, step] = tokens
        beginnings, share[going] = torch.stack([share[going], tokens], 1).unique(dim=0, return_inverse=True)
        alive = (beginnings[:, 1] != stop_id) | (step < stop_after)
        going = going[alive[share[going]]]
        if step + 1 == length or not len(going):
            break
        share[going] = (alive.cumsum(0) - 1)[share[going]]
        out.past_key_values.batch_select_indices(beginnings[alive, 0])
        out = model(input_ids=beginnings[alive, 1:], past_key_values=out.past_key_values, use_cache=True)
    return responses[:, : step + 1]


def real_tokens(response_ids: Tensor, stop_id: int, stop_after: int = 0) -> tuple[Tensor, Tensor]:
    """[B, R] -> mask [B, R], 1 up to and with the stop token, and terminated [B], whether there is one."""
    stops = (response_ids == stop_id) & (torch.arange(response_ids.shape[1], device=response_ids.device) >= stop_after)
    return ((stops.cumsum(1) - stops.long()) == 0).long(), stops.any(1)
