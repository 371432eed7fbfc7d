"""GPT-2's body as transformers computes it, but on real tokens only, and without what nobody asks for.

Everything works through transformers for any causal language model; this is the short way for the one of most runs.

Shapes: B sequences, T tokens with padding, M real tokens of all sequences, one after the other, N those of them whose
states are wanted, H hidden size. Masks are 1 on real tokens and 0 on padding.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2Model


def fits(body) -> bool:
    """Whether this is a plain GPT-2 without dropout at work."""
    if type(body) is not GPT2Model or body.training:
        return False
    config = body.config
    unusual = config.scale_attn_by_inverse_layer_idx or config.reorder_and_upcast_attn or config.add_cross_attention
    return config.scale_attn_weights and not unusual


class _Take(torch.autograd.Function):
    """x[places], of places that differ: then the gradient needs no addition, and costs a copy."""

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _put(gradient, *ctx.saved_tensors, ctx.size), None


class _Put(torch.autograd.Function):
    """The rows of x at their places among `size` rows, the others 0."""

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return _put(x, places, size)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, *ctx.saved_tensors), None, None


def _put(x: Tensor, places: Tensor, size: int) -> Tensor:
    return x.new_zeros(size, x.shape[1]).index_copy_(0, places, x)


def hidden_states(body: GPT2Model, ids: Tensor, mask: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
    """ids, mask, positions [B, T], wanted [B, T], True at N real tokens -> their last hidden states [N, H]."""
    real, longest = mask.bool(), int(mask.sum(1).max())
    rows = torch.arange(len(ids), device=ids.device).unsqueeze(1)
    place = (rows * longest + mask.cumsum(1) - 1)[real]  # from column 0 on: a causal mask then hides all padding
    chosen = wanted[real].nonzero().squeeze(1)
    hidden = body.wte(ids[real]) + body.wpe(positions[real])
    for block in body.h:
        seen = attention(block.attn, block.ln_1(hidden), place, (len(ids), longest))
        if block is body.h[-1]:
            hidden, seen = _Take.apply(hidden, chosen), _Take.apply(seen, chosen)
        hidden = hidden + block.attn.c_proj(seen)
        hidden = hidden + block.mlp(block.ln_2(hidden))
    return body.ln_f(hidden)


def attention(layer, hidden: Tensor, place: Tensor, shape: tuple[int, int]) -> Tensor:
    """hidden [M, H], each token's place [M] among those of rows and columns of `shape` -> what it attends to [M, H]."""
    whole, padded = shape[0] * shape[1], layer.c_attn(hidden)
    if len(place) < whole:
        padded = _Put.apply(padded, place, whole)
    queries, keys, values = padded.view(*shape, 3, layer.num_heads, layer.head_dim).permute(2, 0, 3, 1, 4)
    seen = scaled_dot_product_attention(queries, keys, values, is_causal=True).transpose(1, 2).reshape(whole, -1)
    return _Take.apply(seen, place) if len(place) < whole else seen


def next_states(body: GPT2Model, tokens: Tensor, mask: Tensor, positions: Tensor, cache) -> Tensor:
    """The last hidden states [B, H] of tokens [B] at positions [B], which join those in `cache`; mask [B, T]."""
    hidden = body.wte(tokens) + body.wpe(positions)
    allowed = None if mask.all() else mask[:, None, None].bool()
    for block, layer in zip(body.h, cache.layers, strict=True):
        heads = block.attn.c_attn(block.ln_1(hidden)).view(len(tokens), 3, block.attn.num_heads, 1, -1)
        query, key, value = heads.unbind(1)
        seen = scaled_dot_product_attention(query, *layer.update(key, value), attn_mask=allowed)
        hidden = hidden + block.attn.c_proj(seen.flatten(1))
        hidden = hidden + block.mlp(block.ln_2(hidden))
    return body.ln_f(hidden)
