"""Plain sampling from a causal language model: no top-k, no top-p, no minimum length.

Shapes: B sequences, Q query tokens (padded on the left), R response tokens (padded on the right, behind the stop
token), V vocabulary, H hidden size. Masks are 1 on real tokens and 0 on padding.
"""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from rlhf import fast_path
from rlhf.policy import position_ids, token_logits

LOOK_EVERY = 4  # tokens between two looks at which rows have ended, each of which makes the host wait for a GPU


class RoomyLayer(DynamicLayer):
    """The keys and values [B, heads, T, H] of a layer, with room for `room` tokens more.

    Its parent copies all of them at every token.
    """

    def __init__(self, layer: DynamicLayer, room: int):
        super().__init__()
        keys = layer.keys.to(layer.values.dtype)  # rotated in float32 where the values are bfloat16
        self.lazy_initialization(keys, layer.values)
        self.keys, self.values = keys, layer.values
        self.whole = [torch.cat([x, x.new_empty(*x.shape[:2], room, x.shape[3])], 2) for x in (keys, layer.values)]

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


def draw(logits: Tensor, heights: Tensor) -> Tensor:
    """logits [B, V], heights [B] in [0, 1) -> token ids [B], where the cumulative softmax reaches these heights."""
    return invert(logits.softmax(-1).cumsum(-1), heights)


def invert(cumulative: Tensor, heights: Tensor) -> Tensor:
    """Cumulative probabilities [B, V], heights [B] in [0, 1) -> token ids [B], each where its height is reached."""
    reached = torch.searchsorted(cumulative, heights.unsqueeze(1) * cumulative[:, -1:], right=True)
    return reached.squeeze(1).clamp(max=cumulative.shape[1] - 1)


def heights_of(rows: int, length: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random numbers in [0, 1), one for every token, [rows, length].

    The generator is the CPU's, whatever the device: a run draws the same numbers on each, and goes on on another.
    """
    return torch.rand(rows, length, generator=generator).to(device)


def next_states(body, tokens: Tensor, mask: Tensor, padded: bool, positions: Tensor, cache) -> Tensor:
    """The last hidden states [B, H] of tokens [B] at positions [B], which join those in `cache`; mask [B, T]."""
    if fast_path.is_supported(body):
        return fast_path.next_states(body, tokens, mask if padded else None, positions, cache)
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
    behind it stand `stop_id`s. With them the hidden states [B, R, H] from which their real tokens were drawn.
    """
    batch, device = len(query_ids), query_ids.device
    responses = torch.full((batch, length), stop_id, device=device)
    heights = heights_of(batch, length, generator, device)
    rows = torch.arange(batch, device=device)  # the rows still in the batch
    going = torch.ones(batch, dtype=torch.bool, device=device)  # which of them have not stopped
    look_every = 1 if device.type == "cpu" else LOOK_EVERY
    mask, positions, padded = query_mask, position_ids(query_mask), not bool(query_mask.all())
    out = model.base_model(input_ids=query_ids, attention_mask=mask, position_ids=positions, use_cache=True)
    positions = positions[:, -1]
    make_room(out.past_key_values, length)
    cache, state = out.past_key_values, out.last_hidden_state[:, -1]
    states = state.new_zeros(batch, length, state.shape[-1])
    for step in range(length):
        tokens = draw(token_logits(model, state, temperature), heights[rows, step]).where(going, stop_id)
        responses[rows, step], states[rows, step] = tokens, state
        going = going & ((tokens != stop_id) | (step < stop_after))
        if step + 1 == length:
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = positions + 1
        if (step + 1) % look_every == 0:
            left = int(going.sum())
            if not left:
                break
            if left < 0.8 * len(going):  # below this, idle rows cost more than copying the cache without them
                keep = going.argsort(descending=True, stable=True)[:left]
                rows, tokens, going, mask, positions = (x[keep] for x in (rows, tokens, going, mask, positions))
                cache.batch_select_indices(keep)
        state = next_states(model.base_model, tokens, mask, padded, positions, cache)
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
    heights = heights_of(count, length, generator, device)
    share = torch.zeros(count, dtype=torch.long, device=device)
    going = torch.arange(count, device=device)  # the responses that have not stopped
    out = model.base_model(input_ids=query_ids, use_cache=True)
    for step in range(length):
        cumulative = token_logits(model, out.last_hidden_state[:, -1], temperature).softmax(-1).cumsum(-1)
        tokens = invert(cumulative[share[going]], heights[going, step])
        responses[going, step] = tokens
        beginnings, share[going] = torch.stack([share[going], tokens], 1).unique(dim=0, return_inverse=True)
        alive = (beginnings[:, 1] != stop_id) | (step < stop_after)
        going = going[alive[share[going]]]
        if step + 1 == length or not len(going):
            break
        share[going] = (alive.cumsum(0) - 1)[share[going]]
        cache = out.past_key_values
        cache.batch_select_indices(beginnings[alive, 0])
        out = model.base_model(input_ids=beginnings[alive, 1:], past_key_values=cache, use_cache=True)
    return responses[:, : step + 1]


def real_tokens(response_ids: Tensor, stop_id: int, stop_after: int = 0) -> tuple[Tensor, Tensor]:
    """[B, R] -> mask [B, R], 1 up to and with the stop token, and terminated [B], whether there is one."""
    stops = (response_ids == stop_id) & (torch.arange(response_ids.shape[1], device=response_ids.device) >= stop_after)
    return ((stops.cumsum(1) - stops.long()) == 0).long(), stops.any(1)
