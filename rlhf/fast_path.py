"""A faster forward pass of GPT-2 and Llama: on real tokens only, in the last layer on those whose states are needed.

forward.py chooses it where `is_supported`; every other model goes through transformers.

Shapes: B sequences, T tokens with padding, M real tokens of all sequences, one after the other, N those of them whose
states are needed, H hidden size, D width of a head. Masks are 1 on real tokens and 0 on padding.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import GPT2Model, LlamaModel

from rlhf import activations
from rlhf.lora import adapter_output
from rlhf.precision import body_class, low_precision_products


class Heads(NamedTuple):
    """The queries [M, query heads, D], keys and values [M, key heads, D] of a layer's attention."""

    queries: Tensor
    keys: Tensor
    values: Tensor


class GPT2:
    """The pieces of a GPT-2 body between which tokens attend to each other."""

    def __init__(self, body: GPT2Model):
        self.body, self.layers, self.norm = body, body.h, body.ln_f

    def embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, None]:
        """ids, positions [M] -> states [M, H], and what else `heads` needs to know of positions."""
        return self.body.wte(ids) + self.body.wpe(positions), None

    def heads(self, layer: nn.Module, hidden: Tensor, _: None) -> Heads:
        attention = layer.attn
        fused = attention.c_attn(layer.ln_1(hidden)).view(len(hidden), 3, attention.num_heads, attention.head_dim)
        return Heads(*fused.unbind(1))

    def after_attention(self, layer: nn.Module, hidden: Tensor, attended: Tensor) -> Tensor:
        """States [N, H] before a layer and the output of its attention [N, heads * D] -> states after the layer."""
        hidden = hidden + layer.attn.c_proj(attended)
        return hidden + layer.mlp(layer.ln_2(hidden))


class Llama:
    """The same of a Llama body."""

    def __init__(self, body: LlamaModel):
        self.body, self.layers = body, body.layers

    def embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hidden = self.body.embed_tokens(ids)
        cos, sin = self.body.rotary_emb(hidden, positions.unsqueeze(0))
        return hidden, (cos.transpose(0, 1), sin.transpose(0, 1))  # [M, 1, D]: the same for all heads

    def heads(self, layer: nn.Module, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> Heads:
        attention = layer.self_attn
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        normed = rms_norm(layer.input_layernorm, hidden, attention.q_proj.weight.dtype)
        fused = side_by_side(projections, normed).view(len(hidden), -1, attention.head_dim)
        values = len(attention.v_proj.weight) // attention.head_dim
        turned = rotated(fused[:, :-values], *rotation)
        return Heads(turned[:, :-values], turned[:, -values:], fused[:, -values:])

    def after_attention(self, layer: nn.Module, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + layer.self_attn.o_proj(attended)
        return hidden + layer.mlp(rms_norm(layer.post_attention_layernorm, hidden, layer.mlp.up_proj.weight.dtype))

    def norm(self, hidden: Tensor) -> Tensor:
        return rms_norm(self.body.norm, hidden, hidden.dtype)


def side_by_side(layers: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    """The outputs of linear layers for the same x [M, H], next to each other."""
    weight = torch.cat([layer.weight for layer in layers])  # one large product is faster than three
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    outputs = linear(x, weight, bias)
    if type(layers[0]) is nn.Linear:
        return outputs
    return outputs + torch.cat([adapter_output(layer, x) for layer in layers], 1)


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """heads [M, heads, D], cos, sin [M, 1, D] -> every pair of coordinates turned by its angle."""
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat([-second, first], -1) * sin


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight, over the last of [M, H]; autograd would take twice as many passes."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        scale = (x.square().mean(1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        normed, gradient = x * scale, gradient.to(x.dtype)
        product = normed * gradient
        of_weight = product.sum(0) if ctx.needs_input_grad[1] else None
        mean = (product @ weight.unsqueeze(1)).div_(x.shape[1])
        return (gradient * weight).sub_(normed.mul_(mean)).mul_(scale), of_weight, None, None


def rms_norm(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return _RMSNorm.apply(x, layer.weight, layer.variance_epsilon, dtype)


def is_supported(body) -> bool:
    """Whether this is a plain GPT-2 or Llama without dropout at work."""
    kind, config = body_class(body), body.config
    if kind not in (GPT2Model, LlamaModel) or (body.training and _has_dropout(body)):
        return False
    unusual = "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"
    return kind is LlamaModel or (config.scale_attn_weights and not any(getattr(config, name) for name in unusual))


def _has_dropout(body) -> bool:
    layers = (layer for layer in body.modules() if isinstance(layer, nn.Dropout))
    return any(layer.p for layer in layers) or bool(getattr(body.config, "attention_dropout", 0))


def _pieces(body: GPT2Model | LlamaModel) -> GPT2 | Llama:
    return Llama(body) if isinstance(body, LlamaModel) else GPT2(body)


class Take(torch.autograd.Function):
    """x[places], of places that differ: then the gradient needs no addition, and costs a copy."""

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _put(gradient, *ctx.saved_tensors, ctx.size), None


class Put(torch.autograd.Function):
    """The rows of x at their places among `size` rows, the others 0."""

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return _put(x, places, size)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, *ctx.saved_tensors), None, None


def _put(x: Tensor, places: Tensor, size: int) -> Tensor:
    return x.new_zeros(size, *x.shape[1:]).index_copy_(0, places, x)


def hidden_states(body, ids: Tensor, mask: Tensor, positions: Tensor, places: Tensor) -> Tensor:
    """ids, mask, positions [B, T], places [N] of real tokens among all B * T -> their last hidden states [N, H]."""
    (batch, width), real = ids.shape, mask.flatten().nonzero().squeeze(1)
    rows, columns = torch.arange(batch, device=ids.device).unsqueeze(1), mask.cumsum(1) - 1
    place = (rows * width + columns).flatten().index_select(0, real)  # from column 0: a causal mask hides all padding
    selected = (mask.flatten().cumsum(0) - 1).index_select(0, places)  # among the M real tokens
    ids, positions = (x.flatten().index_select(0, real) for x in (ids, positions))
    return packed_states(body, ids, positions, place, selected, (batch, width))


def packed_states(
    body, ids: Tensor, positions: Tensor, place: Tensor, selected: Tensor, shape: tuple[int, int]
) -> Tensor:
    """The same of M real tokens [M] at these places [M] of a batch of this shape; selected [N]: those to give."""
    pieces = _pieces(body)
    with low_precision_products(body):
        hidden, rotation = pieces.embed(ids, positions)

        def states_after(layer: nn.Module, hidden: Tensor) -> Tensor:
            attended = attention(pieces.heads(layer, hidden, rotation), place, shape)
            if layer is pieces.layers[-1]:
                hidden, attended = Take.apply(hidden, selected), Take.apply(attended, selected)
            return pieces.after_attention(layer, hidden, attended)

        for layer in pieces.layers:
            hidden = activations.run(layer, states_after, layer, hidden)
        return pieces.norm(hidden).float()


def attention(heads: Heads, place: Tensor, shape: tuple[int, int]) -> Tensor:
    """Heads of M tokens, and their places [M] in a batch of this shape (rows, columns) -> attention's output [M, H].

    On a CPU in float32: its bfloat16 kernel takes five times as long for the gradient.
    """
    size = shape[0] * shape[1]
    dtype = torch.float32 if place.device.type == "cpu" else heads.values.dtype
    whole = (Put.apply(x.to(dtype), place, size) if len(place) < size else x.to(dtype) for x in heads)
    queries, keys, values = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in whole)
    with torch.autocast(place.device.type, enabled=False):
        attended = scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=queries.shape[1] != keys.shape[1]
        )
    attended = attended.transpose(1, 2).reshape(size, -1)
    return Take.apply(attended, place) if len(place) < size else attended


def next_states(body, tokens: Tensor, mask: Tensor | None, positions: Tensor, cache) -> Tensor:
    """The last hidden states [B, H] of tokens [B] at positions [B], which join those in `cache`.

    mask [B, T], or None where every token of the cache is real.
    """
    pieces, allowed = _pieces(body), None if mask is None else mask[:, None, None].bool()
    with low_precision_products(body):
        hidden, rotation = pieces.embed(tokens, positions)
        for layer, cached in zip(pieces.layers, cache.layers, strict=True):
            heads = pieces.heads(layer, hidden, rotation)
            keys, values = cached.update(heads.keys.unsqueeze(2), heads.values.unsqueeze(2))
            queries = heads.queries.view(len(tokens), keys.shape[1], -1, keys.shape[3])  # those that share their keys
            attended = scaled_dot_product_attention(queries.to(keys.dtype), keys, values, attn_mask=allowed)
            hidden = pieces.after_attention(layer, hidden, attended.flatten(1))
        return pieces.norm(hidden).float()
