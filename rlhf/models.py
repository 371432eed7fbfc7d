"""Models: small ones from scratch, folders and hub names, what a policy writes, model cards."""

import re
import shutil
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.activations import ACT2FN, NewGELUActivation

from rlhf import distributed, runtime
from rlhf.data import encode_queries
from rlhf.errors import UserError
from rlhf.runtime import offline_without_network
from rlhf.sampling import real_tokens, sample

LIMITS = (
    "A research artefact. It knows the texts it was trained on and little else: what it calls ethical is what its "
    "training labels call so, and it can be fooled by texts unlike them. Do not use it to judge people."
)
POSITIONS, HEAD = 256, 32  # of a model from scratch: longest text, and width of an attention head
PADDING = -1  # no token has this number
FUSED_GELU = "gelu_pytorch_tanh"
ARCHITECTURES = {  # what a model from scratch may be, and what is its own in the configuration
    "gpt2": {"activation_function": FUSED_GELU, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": True},
}
SCRATCH = re.compile(rf"scratch(?::({'|'.join(ARCHITECTURES)})(?::([1-9]\d?)x([1-9]\d{{1,3}}))?)?")
SCRATCH_HELP = "scratch (a GPT-2 of 2 layers of 128), scratch:ARCHITECTURE:LAYERSxWIDTH, a folder or a hub name"


def scratch_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, learned from these texts; a whole text ends with <|endoftext|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=2,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = (re.sub(r"\S{200,}", " ", text) for text in texts)  # longer ones are none, and take the trainer minutes
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=POSITIONS,
    )


def is_scratch(name: str) -> bool:
    """Whether a model is to be built from a configuration, such as scratch or scratch:llama:4x256."""
    if name.partition(":")[0] != "scratch":
        return False
    match = SCRATCH.fullmatch(name)
    if not match or int(match[3] or HEAD) % HEAD:
        raise UserError(
            f"--model {name} is no model: give scratch or scratch:ARCHITECTURE:LAYERSxWIDTH, like scratch:llama:4x256, "
            f"of {', '.join(ARCHITECTURES)} and a width that {HEAD} divides"
        )
    return True


def scratch_config(tokenizer, name: str = "scratch") -> PretrainedConfig:
    """A small model, of 2 layers of 128 if the name does not say it otherwise."""
    kind, layers, width = SCRATCH.fullmatch(name).groups()
    kind, layers, width = kind or "gpt2", int(layers or 2), int(width or 128)
    return AutoConfig.for_model(
        kind,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=width // HEAD,
        max_position_embeddings=POSITIONS,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **ARCHITECTURES[kind],
        **({} if kind == "gpt2" else {"intermediate_size": 4 * width}),
    )


def load_pretrained(kind, name: str, flag: str, **options):
    """kind.from_pretrained(name) with its tokenizer; `kind` is an AutoModel class, `name` a folder or a hub name."""
    if not Path(name).is_dir():
        if name.startswith((".", "/", "models/")):
            raise UserError(
                f"{flag} {name}: there is no such folder; {_MADE_BY.get(name, 'give a model folder or hub name')}"
            )
        offline_without_network()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if len(tokenizer) < 2:
            raise ValueError("it holds no tokenizer")
        model, loaded = kind.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **options
        )
        if loaded["missing_keys"] and flag != "--model":  # what is still to be trained may get a new head
            raise ValueError(f"its weights lack {', '.join(sorted(loaded['missing_keys'])[:3])}; they would be random")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise ValueError("its tokenizer has neither a padding nor an end-of-text token")
        with torch.no_grad():
            model.eval()(torch.arange(2).unsqueeze(0))  # a configuration that cannot be run is found here
    except Exception as error:
        raise UserError(f"{flag} {name} cannot be loaded: {error}") from error
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise UserError(f"{flag} {name}: its tokenizer has {len(tokenizer)} tokens, more than its model")
    model.config.pad_token_id = tokenizer.pad_token_id
    fuse_gelu(model)
    return model, tokenizer


def fuse_gelu(model) -> None:
    """Gives GPT-2's activation the name of its fused kernel: the same function, but one pass over memory for eight."""
    if getattr(model.config, "activation_function", None) == "gelu_new":
        model.config.activation_function = FUSED_GELU
        for layer in model.modules():
            if isinstance(getattr(layer, "act", None), NewGELUActivation):
                layer.act = ACT2FN[FUSED_GELU]


_MADE_BY = {
    "models/cls": "run train_cls.py first",
    "models/nlg": "run train_nlg.py first",
    "models/nlg_ppo": "run finetuning_nlg.py first",
}


def load_policy(name: str, flag: str):
    """A causal language model and its tokenizer."""
    model, tokenizer = load_pretrained(AutoModelForCausalLM, name, flag)
    if tokenizer.eos_token is None:
        raise UserError(f"{flag} {name}: its tokenizer has no end-of-text token")
    ids = torch.arange(2).unsqueeze(0)
    with torch.no_grad():
        plain, states = model(ids).logits, model.base_model(ids).last_hidden_state
        if not torch.allclose(model.get_output_embeddings()(states), plain, atol=1e-4):
            raise UserError(f"{flag} {name}: PPO needs logits that are the output layer of the last hidden states")
    return model, tokenizer


def longest(model, tokenizer) -> int:
    """How many tokens the model can read at once."""
    return min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 10**9)


def check_length(model, tokenizer, tokens: int, flags: str) -> None:
    if tokens > (most := longest(model, tokenizer)):
        raise UserError(f"{flags}: {tokens} tokens are more than the {most} that the model can read")


def stop_token(tokenizer, stop: str | None) -> int:
    """The id of the token that ends a response: `stop`, or the tokenizer's end of text."""
    if stop is None:
        return tokenizer.eos_token_id
    ids = tokenizer.encode(stop, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(f"--stop {stop!r} is {len(ids)} tokens of this policy's tokenizer, not one")
    return ids[0]


def whole_texts(tokenizer, query_ids, query_mask, response_ids, response_mask) -> list[str]:
    """The real tokens of queries [B, Q] and responses [B, R] as one text each."""
    ids, mask = torch.cat([query_ids, response_ids], 1), torch.cat([query_mask, response_mask], 1).bool()
    rows = ids.where(mask, PADDING).tolist()  # one copy to the host, for which a GPU must be waited for
    return tokenizer.batch_decode([[i for i in row if i != PADDING] for row in rows], skip_special_tokens=True)


def continuations(model, tokenizer, queries: list[str], batch: int = 256, **sampling) -> list[str]:
    """Each query with a response of `model`; `sampling` as sampling.sample takes it."""
    texts = []
    for start in range(0, len(queries), batch):
        query_ids, query_mask = encode_queries(tokenizer, queries[start : start + batch], model.device)
        response_ids, _ = sample(model, query_ids, query_mask, **sampling)
        response_mask, _ = real_tokens(response_ids, sampling["stop_id"], sampling.get("stop_after", 0))
        texts += whole_texts(tokenizer, query_ids, query_mask, response_ids, response_mask)
    return texts


def plain_sampling(tokenizer, temperature: float, length: int, stop_id: int) -> GenerationConfig:
    """What `generate` must do to draw from the policy as it was trained: no top-k, no top-p."""
    return GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def card(title: str, task: str, source: str, record: dict, table: pd.DataFrame, limits: str = LIMITS) -> str:
    """A short model card in the hub's form: what this is, its data, results and settings, and what it is not."""
    settings = "\n".join(f"- `{name}`: {value}" for name, value in record["settings"].items() if value is not None)
    return f"""---
pipeline_tag: {task}
---
# {title}

Made by `{record["command"]}` (commit {record["commit"]}, {record["machine"]}) from `{source}`.

## Results

```
{table.to_string(float_format="%.4f")}
```

## Limits

{limits}

## Settings

{settings}
"""


@distributed.by_the_first
def save_folder(folder: str | Path, model, tokenizer, card: str, metrics: dict | None = None) -> None:
    """Model, tokenizer, README.md (the model card) and metrics.json, complete or not at all."""
    folder = Path(folder)
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        (fresh / "README.md").write_text(card, encoding="utf-8")
        if metrics is not None:
            runtime.write_json(fresh / "metrics.json", metrics)
    except Exception as error:  # a full disk is an OSError here and a SafetensorError there
        shutil.rmtree(fresh, ignore_errors=True)
        raise UserError(f"{folder} cannot be written ({error}); what was there before still is") from error
    for file in fresh.iterdir():
        runtime.sync(file)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
