"""The shapes that are timed, with random models of them, and the stages of an update as finetuning_nlg.py makes it."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

import ppo
from rlhf import data, models, rewards


@dataclass(frozen=True)
class Case:
    """The shapes of an update, and the configurations of a random policy and reward model (None: those of models/)."""

    batch: int
    query: int
    response: int
    minibatches: int
    ppo_epochs: tuple[int, ...]
    forward_batch: int
    precisions: tuple[str, ...] = ("float32",)
    policy: PretrainedConfig | None = None
    reward: PretrainedConfig | None = None
    peer_reward: PretrainedConfig | None = None  # where the peer cannot take `reward`


def gpt2_config(layers: int, width: int, heads: int, vocabulary: int) -> GPT2Config:
    return GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        vocab_size=vocabulary,
        n_positions=128,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )


SMOLLM2 = LlamaConfig(  # SmolLM2-135M
    num_hidden_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49_152,
    tie_word_embeddings=True,
    max_position_embeddings=2048,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=1,
)
MINILM = BertConfig(  # all-MiniLM-L6
    num_hidden_layers=6,
    hidden_size=384,
    intermediate_size=1536,
    num_attention_heads=12,
    vocab_size=30_522,
    pad_token_id=1,
)
PEER_REWARD = LlamaConfig(  # MiniLM's layers for TRL, whose reward model must share the policy's tokenizer
    num_hidden_layers=6,
    hidden_size=384,
    intermediate_size=1536,
    num_attention_heads=12,
    vocab_size=49_152,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=1,
)
FOUR, GPT2 = gpt2_config(4, 256, 4, 4096), gpt2_config(12, 768, 12, 50_257)
BOTH = ("float32", "bfloat16")
CASES = {
    "cpu": {
        "4 x 256": Case(64, 16, 24, 1, (1, 4), 64, BOTH, FOUR, FOUR),
        "the project's own": Case(256, 5, 40, 4, (1, 4), 64),
        "pretrained 135M": Case(128, 8, 20, 4, (1,), 64, BOTH, SMOLLM2, MINILM, PEER_REWARD),
    },
    "cuda": {
        "GPT-2 124M": Case(512, 64, 24, 1, (4,), 512, ("bfloat16",), GPT2, GPT2),
    },
}
TEMPERATURE = 0.7


def words_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token for each of the words w2, w3, ...; 0 ends a text and 1 pads it."""
    ids = {"<end>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def random_models(case: Case, folder: Path) -> tuple[Path, Path, Path]:
    """Folders of a random generator, of a random classifier, and of one for the peer."""
    for name, kind, config in (
        ("nlg", AutoModelForCausalLM, case.policy),
        ("cls", AutoModelForSequenceClassification, case.reward),
        ("peer_cls", AutoModelForSequenceClassification, case.peer_reward or case.reward),
    ):
        kind.from_config(config).save_pretrained(folder / name)
        words_tokenizer(config.vocab_size).save_pretrained(folder / name)
    return folder / "nlg", folder / "cls", folder / "peer_cls"


def queries_of(case: Case, tokenizer) -> list[str]:
    """At least a batch of queries of `case.query` random words, or of those of the shipped texts."""
    if case.policy:
        ids = torch.randint(2, case.policy.vocab_size, (case.batch, case.query)).tolist()
        return [" ".join(f"w{i}" for i in row) for row in ids]
    texts = argparse.Namespace(data="data_nlg", data_config=None, data_revision=None, text_column=None)
    queries, _ = data.split_queries(data.nlg_texts(texts)["valid"], tokenizer, case.query)
    return (queries * -(-case.batch // len(queries)))[: case.batch]


# the stages of an update


def roll_out(
    policy: ppo.PolicyWithValue, reference, tokenizer, queries: list[str], case: Case, generator: torch.Generator
) -> ppo.Rollout:
    query_ids, query_mask = data.encode_queries(tokenizer, queries, reference.device)
    return ppo.collect(
        policy,
        reference,
        query_ids,
        query_mask,
        length=case.response,
        temperature=TEMPERATURE,
        stop_id=tokenizer.eos_token_id,
        minibatches=ppo.shuffled(case.batch, case.minibatches, generator),
        forward_batch=case.forward_batch,
        generator=generator,
    )


def raw_scores(score: rewards.Score, tokenizer, queries: list[str], rollout: ppo.Rollout) -> torch.Tensor:
    """[B], on the rollout's device."""
    ids = rollout.query_ids, rollout.query_mask, rollout.response_ids, rollout.response_mask
    scores = torch.tensor(score(queries, models.whole_texts(tokenizer, *ids))).float()
    return scores.to(rollout.response_ids.device, non_blocking=True)


def learn(
    policy: ppo.PolicyWithValue,
    reference,
    optimizers: list[torch.optim.Optimizer],
    rollout: ppo.Rollout,
    scores: torch.Tensor,
    case: Case,
    epochs: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """Rewards, advantages and the update."""
    mask = rollout.response_mask
    rewards = ppo.token_rewards(scores, ppo.kl_to_come(rollout.exact_kl), mask, 0.2)
    advantages, returns = ppo.advantages_and_returns(rewards, rollout.values, mask, 1.0, 1.0)
    return ppo.update(
        policy,
        reference,
        optimizers,
        rollout,
        ppo.whiten(advantages, mask),
        returns,
        epochs=epochs,
        clip_range=0.2,
        value_clip_range=0.2,
        value_coef=0.1,
        kl_weight=0.2,
        temperature=TEMPERATURE,
        forward_batch=case.forward_batch,
        generator=generator,
    )
