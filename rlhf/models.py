"""Models and tokenizers: new small ones, loading and saving folders, and the texts that a policy writes."""

import importlib.util
import re
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.activations import ACT2FN, NewGELUActivation

from rlhf import distributed, lora, querying, recipes, runtime
from rlhf.errors import UserError
from rlhf.runtime import offline_without_network
from rlhf.sampling import Sampling, real_tokens, sample

GGUF, GGUF_PACKAGES = ".gguf", ("gguf", "accelerate")
FUSED_GELU = "gelu_pytorch_tanh"
RECORD = "metrics.json"  # in a model's folder: what it reached, and how it was made
NO_TOKEN = -1  # no token has this id
MADE_BY = {
    "models/cls": "run train_cls.py first",
    "models/nlg": "run train_nlg.py first",
    "models/nlg_ppo": "run finetuning_nlg.py first",
}

# models from scratch

MAX_POSITIONS, HEAD_WIDTH = 256, 32  # the longest text in tokens, and the width of an attention head
VOCABULARY = 4096  # tokens at most
LONGEST_WORD = 50  # characters that the tokenizer learns from in one piece
ARCHITECTURES = {  # the settings that only this architecture has
    "gpt2": {"activation_function": FUSED_GELU, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": True},
}
SCRATCH = re.compile(rf"scratch(?::({'|'.join(ARCHITECTURES)})(?::([1-9]\d?)x([1-9]\d{{1,3}}))?)?")
SCRATCH_HELP = (
    "scratch (a GPT-2 of 2 layers of 128), scratch:ARCHITECTURE:LAYERSxWIDTH, a folder, .gguf file or hub name"
)


def scratch_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, learned from these texts. A text that it encodes ends with <|endoftext|>."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # what is longer is no word, or a language without spaces, and takes the trainer minutes in one piece
    texts = (re.sub(rf"(\S{{{LONGEST_WORD}}})", r"\1 ", text) for text in texts)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=MAX_POSITIONS,
    )


def is_scratch(name: str) -> bool:
    """Whether --model names a new model, such as scratch or scratch:llama:4x256."""
    if not recipes.is_new(name):
        return False
    match = SCRATCH.fullmatch(name)
    if not match or int(match[3] or HEAD_WIDTH) % HEAD_WIDTH:
        raise UserError(
            f"--model {name} is no model: give scratch or scratch:ARCHITECTURE:LAYERSxWIDTH, like scratch:llama:4x256, "
            f"of {', '.join(ARCHITECTURES)} and a width that {HEAD_WIDTH} divides"
        )
    return True


def scratch_config(tokenizer, name: str = "scratch") -> PretrainedConfig:
    """The configuration of a new model: a GPT-2 of 2 layers of 128, unless the name gives others."""
    architecture, layers, width = SCRATCH.fullmatch(name).groups()
    architecture, layers, width = architecture or "gpt2", int(layers or 2), int(width or 128)
    return AutoConfig.for_model(
        architecture,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=MAX_POSITIONS,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        from_scratch=True,  # for recipes.py; the models that are fine-tuned from this one inherit it
        **ARCHITECTURES[architecture],
        **({} if architecture == "gpt2" else {"intermediate_size": 4 * width}),
    )


# loading


def load_pretrained(
    auto_class: type, name: str, flag: str, is_chat: bool = False, new_head: bool = False, **options
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model, in float32, and its tokenizer.

    auto_class: such as AutoModelForCausalLM. name: a folder, a GGUF file or a hub name. flag: for messages. is_chat:
    whether it must have a chat template. new_head: whether weights that are missing may be random, for a model that is
    still to be trained. options: as from_pretrained takes them.
    """
    source, file = (name, {}) if Path(name).suffix != GGUF else gguf_file(Path(name), flag)
    if not Path(source).is_dir():
        if name.startswith((".", "/", "models/")):
            raise UserError(
                f"{flag} {name}: there is no such folder; {MADE_BY.get(name, 'give a model folder or hub name')}"
            )
        offline_without_network()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **file)
        if len(tokenizer) < 2:
            raise ValueError("it holds no tokenizer")
        if is_chat and not tokenizer.chat_template:
            raise ValueError("its tokenizer has no chat template, which --chat needs")
        if file:  # weights that can be trained and saved, not the file's few bits
            options["quantization_config"] = GgufConfig(**file, dequantize=True)
        model, info = auto_class.from_pretrained(
            source, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **file, **options
        )
        if info["missing_keys"] and not new_head:
            raise ValueError(f"its weights lack {', '.join(sorted(info['missing_keys'])[:3])}; they would be random")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise ValueError("its tokenizer has neither a padding nor an end-of-text token")
        with torch.no_grad():
            model.eval()(torch.arange(2).unsqueeze(0))  # finds a configuration that cannot be run
    except Exception as error:
        raise UserError(f"{flag} {name} cannot be loaded: {error}") from error
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise UserError(f"{flag} {name}: its tokenizer has {len(tokenizer)} tokens, more than its model")
    model.config.pad_token_id = tokenizer.pad_token_id
    fuse_gelu(model)
    return model, tokenizer


def load_config(name: str, flag: str) -> PretrainedConfig:
    """The configuration of a model that a flag names, without its weights."""
    if is_scratch(name):
        return scratch_config(_TokenizerOfFullSize(), name)
    name = lora.base_of_folder(name, flag) or name
    source, file = (name, {}) if Path(name).suffix != GGUF else gguf_file(Path(name), flag)
    if not Path(source).is_dir():
        offline_without_network()
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **file)
    except Exception as error:
        raise UserError(f"{flag} {name} has no configuration that can be read: {error}") from error


class _TokenizerOfFullSize:
    """What `scratch_config` asks of a tokenizer; data give a smaller one at most."""

    eos_token_id, pad_token_id = 0, 1

    def __len__(self) -> int:
        return VOCABULARY


def gguf_file(path: Path, flag: str) -> tuple[str, dict[str, str]]:
    """The folder of a GGUF file, and the option of from_pretrained that names it there."""
    if missing := [package for package in GGUF_PACKAGES if importlib.util.find_spec(package) is None]:
        raise UserError(f"{flag} {path}: a GGUF file needs the package {missing[0]}; pip install {missing[0]}")
    if not path.is_file():
        raise UserError(f"{flag} {path}: there is no such file")
    return str(path.parent), {"gguf_file": path.name}


def fuse_gelu(model: PreTrainedModel) -> None:
    """Replace GPT-2's activation by its fused kernel: the same function in one pass over memory instead of eight."""
    if getattr(model.config, "activation_function", None) == "gelu_new":
        model.config.activation_function = FUSED_GELU
        for layer in model.modules():
            if isinstance(getattr(layer, "act", None), NewGELUActivation):
                layer.act = ACT2FN[FUSED_GELU]


def load_policy(name: str, flag: str, is_chat: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model that PPO can train, and its tokenizer. Adapters of a folder are merged into it."""
    base = lora.base_of_folder(name, flag)
    model, tokenizer = load_pretrained(AutoModelForCausalLM, base or name, flag, is_chat)
    if base:
        model = lora.merge_folder(model, name, flag)
    if tokenizer.eos_token is None:
        raise UserError(f"{flag} {name}: its tokenizer has no end-of-text token; give another model")
    ids = torch.arange(2).unsqueeze(0)
    with torch.no_grad():
        out, needed = model.base_model(ids, use_cache=True), []
        if not torch.allclose(model.get_output_embeddings()(out.last_hidden_state), model(ids).logits, atol=1e-4):
            needed.append("logits that are the output layer of the last hidden states")
        if getattr(out, "past_key_values", None) is None:
            needed.append("a cache of keys and values")
    if needed:
        raise UserError(f"{flag} {name}: PPO needs {' and '.join(needed)}; give another model")
    return model, tokenizer


def max_length(model, tokenizer) -> int:
    """The length of the longest text that the model can read, in tokens."""
    positions = getattr(model.config, "max_position_embeddings", None) or 10**9
    for layer in model.modules():
        if isinstance(layer, nn.Embedding) and layer.num_embeddings == positions and layer.padding_idx is not None:
            positions -= layer.padding_idx + 1  # RoBERTa counts positions from behind its padding's
    return min(tokenizer.model_max_length, positions)


def check_length(model, tokenizer, tokens: int, flags: str) -> None:
    """Refuse texts of so many tokens if the model cannot read them; `flags` are those that ask for them."""
    tokens += querying.begins_texts(tokenizer)
    if tokens > (limit := max_length(model, tokenizer)):
        raise UserError(f"{flags}: {tokens} tokens are more than the {limit} that the model can read")


def stop_token(tokenizer, stop: str | None) -> int:
    """The id of the token that ends a response: `stop`, or the tokenizer's end of text."""
    if stop is None:
        return tokenizer.eos_token_id
    ids = tokenizer.encode(stop, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(f"--stop {stop!r} is {len(ids)} tokens of this policy's tokenizer, not one")
    return ids[0]


def with_a_token(tokenizer, texts: list[str]) -> list[str]:
    """The texts, with the end-of-text token in place of an empty one that would have no token."""
    nothing = "" if tokenizer("")["input_ids"] else tokenizer.eos_token
    return [text or nothing for text in texts]


# what a policy writes


def decode(tokenizer, ids: Tensor, mask: Tensor) -> list[str]:
    """The real tokens of every row [B, T] as a text."""
    rows = ids.where(mask.bool(), NO_TOKEN).tolist()  # one copy to the host, which waits for a GPU
    return tokenizer.batch_decode([[i for i in row if i != NO_TOKEN] for row in rows], skip_special_tokens=True)


@torch.no_grad()
def continuations(
    model, prompts, queries: list[str], sampling: Sampling, generator: torch.Generator, batch: int = 256
) -> list[str]:
    """What is seen of a response of `model` to each query; prompts: one of the two classes in rlhf/prompting.py."""
    texts = []
    for start in range(0, len(queries), batch):
        few = queries[start : start + batch]
        query_ids, query_mask = prompts.encode(few, model.device)
        response_ids, _ = sample(model, query_ids, query_mask, sampling, generator)
        response_mask, _ = real_tokens(response_ids, sampling)
        texts += prompts.texts(few, query_ids, query_mask, response_ids, response_mask)
    return texts


def generation_config(tokenizer, sampling: Sampling) -> GenerationConfig:
    """The settings with which `generate` draws from the policy as it was trained: no top-k, no top-p."""
    return GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=sampling.length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sampling.stop_id,
        pad_token_id=tokenizer.pad_token_id,
    )


# saving


def head_options(model: PreTrainedModel) -> dict:
    """What from_pretrained must be told to give a model the classification head that this one has, if it has one."""
    names = ("id2label", "label2id") if model.get_output_embeddings() is None else ()
    return {name: getattr(model.config, name) for name in names}


@distributed.main_process_only
def save_folder(folder: str | Path, model, tokenizer, card: str, metrics: dict | None = None) -> None:
    """Write model, tokenizer, README.md (the model card) and metrics.json, all or nothing.

    A model with adapters is written merged, in float32, and the adapters in a folder inside.
    """
    folder = Path(folder)
    fresh, old = (folder.with_name(f".{folder.name}.{name}") for name in ("new", "old"))  # nobody's own
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        if lora.has_adapters(model):
            lora.save_adapters(model, fresh / lora.FOLDER)
            base, _ = load_pretrained(
                type(model), lora.base_name(model), "the adapters' base", new_head=True, **head_options(model)
            )
            model = lora.merge(model, base)
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        (fresh / "README.md").write_text(card, encoding="utf-8")
        if metrics is not None:
            runtime.write_json(fresh / RECORD, metrics)
    except Exception as error:  # a full disk is an OSError here and a SafetensorError there
        shutil.rmtree(fresh, ignore_errors=True)
        raise UserError(f"{folder} cannot be written ({error}); what was there before still is") from error
    for file in fresh.rglob("*"):
        if file.is_file():
            runtime.sync(file)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
