"""The estimate of rlhf/memory.py beside the peak resident memory of two PPO updates on the CPU: benchmarks/memory.json.

    python -m benchmarks.memory             # all cases, each in a process of its own
    python -m benchmarks.memory "6 layers"  # those whose name has these words; writes nothing

The models are random, and the score of a text is its first token's number, so that no reward model is loaded.
"""

import ctypes
import dataclasses
import json
import multiprocessing
import re
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

import ppo
from benchmarks import cases
from rlhf import activations, lora, memory, optim, precision, runtime
from rlhf.policy import PolicyWithValue
from rlhf.rollout import collect, shuffled_minibatches
from rlhf.sampling import Sampling

SIX_LAYERS = LlamaConfig(
    num_hidden_layers=6,
    hidden_size=384,
    intermediate_size=1024,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=16_000,
    tie_word_embeddings=True,
    max_position_embeddings=256,
)
TINY = LlamaConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2, vocab_size=50)
MODELS = {"Llama, 6 layers of 384": SIX_LAYERS, "GPT-2 124M": cases.GPT2, "SmolLM2-135M": cases.SMOLLM2}
SETTINGS = memory.Settings(
    device="cpu",
    precision="float32",
    batch_size=64,
    minibatches=2,
    forward_batch=32,
    query_length=24,
    response_length=24,
    optimizer="adam",
    lora=None,
    activation_checkpointing=False,
    separate_value=False,
)
CHANGES = {
    "all weights": {},
    "LoRA": {"lora": 8},
    "LoRA, checkpointing": {"lora": 8, "activation_checkpointing": True},
    "bfloat16": {"precision": "bfloat16"},
}
UPDATES, STOP = 2, 0
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
PPO = dataclasses.replace(cases.PPO, forward_batch=SETTINGS.forward_batch)


def resident(name: str) -> int:
    """VmRSS, the bytes that are resident now, or VmHWM, the most that ever were."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", status)[1])


def map_every_tensor() -> None:
    """Make glibc give every tensor a mapping of its own, which is gone with it.

    Otherwise the gaps between tensors count: freed memory of the forward pass, which the backward pass, in a thread of
    its own, does not use again. A run on a CPU has them (`runtime.keep_memory`); on a GPU another allocator works.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)


def measure(config: PretrainedConfig, settings: memory.Settings, connection) -> None:
    """Send the peak of two updates, less what was resident before the model was made.

    A tiny model's updates come first: they load what the libraries load when it is needed.
    """
    map_every_tensor()
    run_updates(TINY, dataclasses.replace(settings, batch_size=4))
    before = resident("VmRSS")
    run_updates(config, settings)
    connection.send(resident("VmHWM") - before)


def run_updates(config: PretrainedConfig, settings: memory.Settings) -> None:
    reference = AutoModelForCausalLM.from_config(config).eval()
    dtype = precision.choose(settings.precision, settings.on, reference)
    model = lora.trained_beside(reference, dtype, settings.lora, "random")
    if settings.activation_checkpointing:
        activations.checkpoint_layers(model)
    policy = PolicyWithValue(model, settings.separate_value, dtype).eval()
    optimizer, generator = optim.ppo_optimizer(policy, 1e-6, muon=False), torch.Generator().manual_seed(0)
    sampling = Sampling(settings.response_length, PPO.temperature, STOP, stop_after=settings.response_length)
    for _ in range(UPDATES):
        ids = torch.randint(1, config.vocab_size, (settings.batch_size, settings.query_length), generator=generator)
        minibatches = shuffled_minibatches(settings.batch_size, settings.minibatches, generator)
        rollout = collect(
            policy, reference, ids, torch.ones_like(ids), sampling, generator,
            forward_batch=settings.forward_batch, minibatches=minibatches,
        )  # fmt: skip
        scores = rollout.response_ids[:, 0] / config.vocab_size
        targets = ppo.targets(rollout, ppo.rewards(rollout, scores, 0.1, PPO), 0.1, PPO)
        ppo.update(policy, reference, optimizer, rollout, targets, PPO, generator)


def measured(config: PretrainedConfig, settings: memory.Settings) -> int:
    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(config, settings, sender))
    process.start()
    sender.close()
    peak = receiver.recv()
    process.join()
    return peak


def main() -> None:
    words, rows = " ".join(sys.argv[1:]), []
    for name, config in MODELS.items():
        for training, changes in CHANGES.items():
            case = f"{name}, {training}"
            if words not in case or (training == "bfloat16" and not precision.is_fast(SETTINGS.on)):
                continue  # without instructions for it, it takes hours
            settings = dataclasses.replace(SETTINGS, **changes)
            peak, estimate = measured(config, settings), memory.estimate(config, [], settings).peak
            rows.append({"case": case, "measured": peak, "estimate": estimate})
            print(f"{case}: measured {peak / memory.GIB:.2f} GiB, estimate {estimate / peak - 1:+.0%}", flush=True)
    if not words:
        cases = {"settings": dataclasses.asdict(SETTINGS), "rows": rows}
        runtime.write_json(
            Path("benchmarks/memory.json"), json.loads(json.dumps(cases)) | runtime.provenance(SETTINGS.on)
        )


if __name__ == "__main__":
    main()
