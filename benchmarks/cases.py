"""The shapes that are timed, random models of these shapes, and the stages of an update as in finetuning_nlg.py."""

import copy
import dataclasses
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
from rlhf import data, models, optim, precision, querying, rewards, rollout
from rlhf.policy import PolicyWithValue
from rlhf.rollout import Rollout
from rlhf.sampling import Sampling


@dataclass(frozen=True)
class Case:
    """The shapes of an update, and the configurations of a random policy and reward model (None: those of models/)."""

    batch_size: int
    query_length: int
    response_length: int
    minibatches: int
    ppo_epochs: tuple[int, ...]  # values of K to time
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
FOUR_LAYERS, GPT2 = gpt2_config(4, 256, 4, 4096), gpt2_config(12, 768, 12, 50_257)
BOTH = ("float32", "bfloat16")
CASES = {
    "cpu": {
        "4 x 256": Case(64, 16, 24, 1, (1, 4), 64, BOTH, FOUR_LAYERS, FOUR_LAYERS),
        "default": Case(256, 5, 40, 4, (1, 4), 64),
        "pretrained 135M": Case(128, 8, 20, 4, (1,), 64, BOTH, SMOLLM2, MINILM, PEER_REWARD),
    },
    "cuda": {
        "GPT-2 124M": Case(512, 64, 24, 1, (4,), 512, ("bfloat16",), GPT2, GPT2),
    },
}
TEMPERATURE, KL_COEF = 0.7, 0.2
PPO = ppo.Settings(
    epochs=1,
    forward_batch=64,
    temperature=TEMPERATURE,
    exact_kl=True,
    leave_one_out=0,
    discount=1.0,
    gae_lambda=1.0,
    whiten_rewards=False,
    clip_range=0.2,
    value_clip_range=0.2,
    value_coef=0.1,
)
LR = 1e-6  # so low that the lengths of the responses stay as they are, here and with a peer


def words_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token for each of the words w2, w3, ...; 0 ends a text and 1 pads it."""
    ids = {"<end>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def random_models(case: Case, folder: Path) -> tuple[Path, Path, Path]:
    """Folders of a random generator, of a random classifier, and of one for the peer."""
    for name, auto_class, config in (
        ("nlg", AutoModelForCausalLM, case.policy),
        ("cls", AutoModelForSequenceClassification, case.reward),
        ("peer_cls", AutoModelForSequenceClassification, case.peer_reward or case.reward),
    ):
        auto_class.from_config(config).save_pretrained(folder / name)
        words_tokenizer(config.vocab_size).save_pretrained(folder / name)
    return folder / "nlg", folder / "cls", folder / "peer_cls"


def queries_of(case: Case, tokenizer) -> list[str]:
    """A batch of queries: random words, or queries of the shipped texts."""
    if case.policy:
        ids = torch.randint(2, case.policy.vocab_size, (case.batch_size, case.query_length)).tolist()
        return [" ".join(f"w{i}" for i in row) for row in ids]
    queries, _ = querying.split_queries(data.load_texts("data_nlg")["valid"], tokenizer, case.query_length)
    return (queries * -(-case.batch_size // len(queries)))[: case.batch_size]


class Update:
    """An update of finetuning_nlg.py, stage by stage, with a policy, reference and reward model from folders."""

    def __init__(
        self,
        case: Case,
        epochs: int,
        policy_folder: Path,
        reward_folder: Path,
        device: torch.device,
        precision_name: str,
        queries: list[str] | None = None,
    ):
        self.case, self.device = case, device
        self.reference, self.tokenizer = models.load_policy(str(policy_folder), "--policy")
        model = copy.deepcopy(self.reference.to(device))
        dtype = precision.choose(precision_name, device, model)
        precision.freeze(self.reference, dtype)
        self.policy = PolicyWithValue(model, precision=dtype).eval()
        self.optimizer = optim.ppo_optimizer(self.policy, LR, muon=case.policy is None)
        self.reward = rewards.load([str(reward_folder)], -1.0, device, precision_name, bounded=False)
        self.reward.load_state_dict({"score_mean": [0.0], "score_std": [1.0], "ethics_before": 0.5})
        self.queries = queries or queries_of(case, self.tokenizer)
        self.sampling = Sampling(case.response_length, TEMPERATURE, self.tokenizer.eos_token_id)
        self.generator = torch.Generator().manual_seed(0)
        self.settings = dataclasses.replace(PPO, epochs=epochs, forward_batch=case.forward_batch)

    def roll_out(self) -> Rollout:
        query_ids, query_mask = querying.encode_queries(self.tokenizer, self.queries, self.device)
        minibatches = rollout.shuffled_minibatches(len(self.queries), self.case.minibatches, self.generator)
        return rollout.collect(
            self.policy,
            self.reference,
            query_ids,
            query_mask,
            self.sampling,
            self.generator,
            forward_batch=self.case.forward_batch,
            minibatches=minibatches,
        )

    def score(self, rollout: Rollout) -> rewards.Scores:
        texts = models.decode(self.tokenizer, rollout.ids, rollout.mask)
        return self.reward(self.queries, texts, rollout.terminated)

    def learn(self, rollout: Rollout, scores: rewards.Scores) -> dict[str, float | None]:
        """Rewards, advantages and the optimizer steps."""
        token_rewards = ppo.rewards(rollout, scores.total, KL_COEF, self.settings)
        targets = ppo.targets(rollout, token_rewards, KL_COEF, self.settings)
        return ppo.update(self.policy, self.reference, self.optimizer, rollout, targets, self.settings, self.generator)
