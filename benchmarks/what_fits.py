"""Which runs of finetuning_nlg.py fit into 8, 24 and 80 GB, by the estimate of rlhf/memory.py: a Markdown table.

python -m benchmarks.what_fits
"""

from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from rlhf import memory

QUERY, RESPONSE, BATCH, MINIBATCHES, FORWARD_BATCH = 64, 48, 128, 4, 8
SIZES = (8, 24, 80)  # GB


def llama(layers: int, width: int, heads: int, key_heads: int, inner: int, vocabulary: int, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
    )


MODELS: dict[str, PretrainedConfig] = {
    "GPT-2 (124M)": GPT2Config(),
    "1.5B (28 layers of 1536, 152k words)": llama(28, 1536, 12, 2, 8960, 151_936, tied=True),
    "7B (32 layers of 4096, 32k words)": llama(32, 4096, 32, 32, 11_008, 32_000, tied=False),
}
REWARD = GPT2Config()  # as large as GPT-2


def peak(config: PretrainedConfig, rank: int | None, checkpointing: bool) -> float:
    """In GB (10^9 bytes), with matrix products in bfloat16 and Adam."""
    settings = memory.Settings(
        device="cuda",
        precision="bfloat16",
        batch_size=BATCH,
        minibatches=MINIBATCHES,
        forward_batch=FORWARD_BATCH,
        query_length=QUERY,
        response_length=RESPONSE,
        optimizer="adam",
        lora=rank,
        activation_checkpointing=checkpointing,
        separate_value=False,
    )
    return memory.estimate(config, [REWARD], settings).peak / 1e9


def main() -> None:
    print("| model | training | GB | " + " | ".join(f"{size} GB" for size in SIZES) + " |")
    print("| --- " * (3 + len(SIZES)) + "|")
    for name, config in MODELS.items():
        for training, rank in (("all weights", None), ("LoRA, rank 8", 8)):
            for checkpointing in (False, True):
                needed = peak(config, rank, checkpointing)
                fits = " | ".join("yes" if needed < size else "no" for size in SIZES)
                how = training + (", checkpointing" if checkpointing else "")
                print(f"| {name} | {how} | {needed:.1f} | {fits} |")


if __name__ == "__main__":
    main()
