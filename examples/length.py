"""A length target: the score is highest for responses of TARGET words, and falls by one for each word more or less.

python finetuning_nlg.py --reward models/cls --reward '0.5*examples/length.py:score'
"""

TARGET = 12


def score(queries: list[str], responses: list[str]) -> list[float]:
    return [-abs(len(response.split()) - TARGET) for response in responses]
