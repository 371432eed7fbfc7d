"""The forward passes of every model: GPT-2 and Llama take the fast path, all others transformers' own.

Shapes: B sequences, T tokens with padding, N those of them whose states are needed, H hidden size.
"""

import torch
from torch import Tensor
from transformers import GPT2ForSequenceClassification, LlamaForSequenceClassification

from rlhf import fast_path


def position_ids(mask: Tensor) -> Tensor:
    """[B, T] -> [B, T]: positions that count real tokens only, so that left padding changes nothing."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def hidden_states(model, ids: Tensor, mask: Tensor, places: Tensor, positions: Tensor | None = None) -> Tensor:
    """ids, mask [B, T], places [N] of real tokens among all B * T -> the model's last hidden states there, [N, H].

    positions [B, T]: `position_ids`, or those that the model was trained with.
    """
    positions = position_ids(mask) if positions is None else positions
    if fast_path.is_supported(model.base_model):
        return fast_path.hidden_states(model.base_model, ids, mask, positions, places)
    out = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return fast_path.Take.apply(out.last_hidden_state.flatten(0, 1), places)


def next_hidden_states(model, tokens: Tensor, mask: Tensor, padded: bool, positions: Tensor, cache) -> Tensor:
    """The last hidden states [B, H] of tokens [B] at positions [B], which are added to `cache`.

    mask [B, T]; padded: whether any of it is 0.
    """
    if fast_path.is_supported(model.base_model):
        return fast_path.next_states(model.base_model, tokens, mask if padded else None, positions, cache)
    out = model.base_model(
        input_ids=tokens.unsqueeze(1),
        attention_mask=mask,
        position_ids=positions.unsqueeze(1),
        past_key_values=cache,
        use_cache=True,
    )
    return out.last_hidden_state[:, -1]


def classifier_logits(model, encoded: dict[str, Tensor]) -> Tensor:
    """A classifier's logits [B, classes] for texts [B, T]. Of GPT-2 and Llama only the last token meets the head."""
    if not isinstance(model, (GPT2ForSequenceClassification, LlamaForSequenceClassification)) or len(encoded) > 2:
        return model(**encoded).logits
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    columns = torch.arange(ids.shape[1], device=ids.device)
    last = ((ids != model.config.pad_token_id) * columns).argmax(1, keepdim=True)
    if not mask.gather(1, last).all():  # a text without tokens
        return model(**encoded).logits
    places = torch.arange(len(ids), device=ids.device) * ids.shape[1] + last.squeeze(1)
    states = hidden_states(model, ids, mask, places, positions=columns.expand_as(ids))
    return model.score(states)
