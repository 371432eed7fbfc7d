import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data_cls")]

import torch  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402


@pytest.fixture
def tiny_model():
    """A random GPT-2 with 11 tokens, with weights so large that its distributions are not flat."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_layer=2, n_head=2, n_embd=16, n_positions=32, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()
