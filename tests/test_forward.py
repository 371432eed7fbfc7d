"""What the forward passes see of a sequence: padding on the left changes nothing."""

import torch
from torch import tensor

from rlhf.forward import hidden_states, position_ids
from rlhf.vocabulary import token_logits


def test_positions_count_real_tokens():
    assert position_ids(tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])).tolist() == [
        [0, 0, 0, 1, 2],
        [0, 1, 2, 2, 2],
    ]


def test_left_padding_changes_no_log_probability(tiny_model):
    alone = hidden_states(tiny_model, tensor([[1, 2, 3, 4, 5]]), torch.ones(1, 5).long(), tensor([1, 2, 3]))
    padded_mask = tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    padded = hidden_states(tiny_model, tensor([[7, 7, 7, 1, 2, 3, 4, 5]]), padded_mask, tensor([4, 5, 6]))
    padded, alone = (token_logits(tiny_model, x, 0.7).log_softmax(-1) for x in (padded, alone))
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)
