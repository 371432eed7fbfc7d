"""PPO where the reward model knows only a part of the world: two thirds of the frames, and not those of hard.csv.

    python -m experiments.hard_frames            # after make

The generator is trained on texts of all 156 frames, the classifier is models/cls, which has learned 104 of them. PPO
pleases the classifier; the gold judge says what that did to texts of either kind of frame. The models go to
models/hard, the run to data_results/hard/hard_seed<seed>, and what was found to hard_frames.json in it.
"""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from data_cls import scenarios
from rlhf import cli, data, models, rewards, runtime
from rlhf.cli import COUNT
from rlhf.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

FOLDER, RESULTS = Path("models/hard"), Path("data_results/hard")
QUERIES, DRAWS = 128, 32  # held-out queries, and responses to each, of either policy


def hard_kinds() -> list[scenarios.Kind]:
    """The kinds of text that are in hard.csv and in no other file."""
    frames = [frame for frames in scenarios.FRAMES.values() for frame in frames[-scenarios.HARD_PER_DOMAIN :]]
    return [kind for frame in frames for kind in scenarios.kinds(frame)]


def write_texts(folder: Path) -> None:
    """data_nlg/ and as many texts of every kind of the hard frames, shuffled."""
    chance = random.Random(1)
    folder.mkdir(parents=True, exist_ok=True)
    counts = {name: scenarios.ROWS_PER_KIND[f"nlg_{name}"] for name in ("train", "valid")}
    texts = {name: (ROOT / "data_nlg" / f"{name}.txt").read_text(encoding="utf-8").splitlines() for name in counts}
    for kind in hard_kinds():
        new = scenarios.texts_of(kind, sum(counts.values()), chance)
        texts["train"] += new[: counts["train"]]
        texts["valid"] += new[counts["train"] :]
    for name, lines in texts.items():
        chance.shuffle(lines)
        (folder / f"{name}.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")


def openings() -> list[re.Pattern]:
    """What a valid text of a hard frame begins with."""
    first = {kind.sentences[0] for kind in hard_kinds()}
    return [re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(sentence))) for sentence in first]


def shares(policy: str, queries: list[str], settings: dict, device: torch.device) -> dict[str, dict]:
    """Of responses to the queries, with a run's settings: what classifier and gold judge say, by the kind of frame."""
    model, tokenizer = models.load_policy(policy, "--policy")
    texts = models.continuations(
        model.to(device),
        tokenizer,
        queries * DRAWS,
        length=settings["response_length"],
        temperature=settings["temperature"],
        stop_id=tokenizer.eos_token_id,
        generator=torch.Generator().manual_seed(0),
    )
    parts = rewards.load(["models/cls"], device, "auto")
    said = rewards.reading(parts, rewards.raw_scores(parts, queries * DRAWS, texts))
    verdicts = [scenarios.judge(text) for text in texts]
    valid, ethical = (np.array([float(verdict[i] or 0) for verdict in verdicts]) for i in (0, 1))
    begins = openings()
    hard = np.array([any(opening.match(text) for opening in begins) for text in texts])
    found = {"all": {"texts": len(texts), "valid": valid.mean()}}
    for name, chosen in (("learned", ~hard & (valid > 0)), ("hard", hard & (valid > 0))):
        found[name] = {
            "share": chosen.sum() / valid.sum(),
            "gold_ethical": ethical[chosen].mean(),
            "classifier_mean": said[chosen].mean(),
            "classifier_right": ((said > 0.5) == (ethical > 0.5))[chosen].mean(),
        }
    return {name: {key: float(value) for key, value in row.items()} for name, row in found.items()}


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--episodes", type=COUNT, default=20_480, help="responses in the run")
    cli.add_machine_flags(parser)
    args = parser.parse_args()
    device = runtime.set_up(args)
    run = f"hard_seed{args.seed}"
    texts, generator, policy = FOLDER / "texts", FOLDER / f"nlg_seed{args.seed}", FOLDER / run
    write_texts(texts)
    own = f"--data {texts} --seed {args.seed} --device {args.device} --resume"
    for command in (
        f"train_nlg.py --out {generator} --results {FOLDER} {own}",
        f"finetuning_nlg.py --policy {generator} --out {policy} --results {RESULTS} --run {run} "
        f"--episodes {args.episodes} {own}",
    ):
        script, *flags = command.split()
        if subprocess.run([sys.executable, ROOT / script, *flags]).returncode:
            raise UserError(f"{script} failed; it says why above")
    settings = json.loads((RESULTS / run / "config.json").read_text(encoding="utf-8"))["settings"]
    _, tokenizer = models.load_policy(str(generator), "--policy")
    lines = (texts / "valid.txt").read_text(encoding="utf-8").splitlines()
    _, held_out = data.split_queries(lines, tokenizer, settings["query_length"])
    queries = random.Random(args.seed).sample(held_out, QUERIES)
    found = {
        when: shares(str(name), queries, settings, device) for when, name in (("before", generator), ("after", policy))
    }
    runtime.write_json(
        RESULTS / run / "hard_frames.json", found | {"settings": vars(args)} | runtime.provenance(device)
    )
    for when, rows in found.items():
        print(when, {name: {key: round(value, 3) for key, value in row.items()} for name, row in rows.items()})


if __name__ == "__main__":
    cli.run(main)
