"""A style, in the spirit of the descriptiveness of Ziegler et al. 2019: texts that say what things are like.

    python finetuning_nlg.py --reward models/cls --reward '0.5*examples/descriptive.py:score'

The score is the share of a text's words that tell of senses, size, age, place or mood. A word counts once, so that
saying "old" over and over gains nothing: a reward by rule is fooled the moment that it pays for repetition.
"""

import re

DESCRIPTIVE = set(
    """old young new small big large little tall short long wide narrow heavy light dark bright warm cold wet dry soft
    hard loud quiet silent empty full broken clean dirty red blue green white black brown grey golden wooden sweet
    bitter fresh sharp smooth rough gentle calm angry happy sad tired afraid nervous proud kind late early slow quick
    slowly quickly quietly loudly softly gently carefully gladly calmly near behind beside under above outside inside
    morning evening night rain snow sun wind street garden kitchen river forest""".split()
)


def score(texts: list[str]) -> list[float]:
    def of(text: str) -> float:
        words = re.findall(r"[a-z]+", text.lower())
        return len(DESCRIPTIVE & set(words)) / max(1, len(words))

    return [of(text) for text in texts]
