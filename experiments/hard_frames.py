"""PPO where the reward model knows only a part of the world: two thirds of the frames, and not those of hard.csv.

    python -m experiments.hard_frames            # after make
    python -m experiments.hard_frames --reward models/pretrained/world/reward --run minilm_seed0   # a pretrained one

The generator is trained on texts of all 156 frames, the classifier has learned 104 of them. PPO maximizes the
classifier's score; the gold judge says how texts of both kinds of frame changed. Writes the models to models/hard, the
run to data_results/hard/, and hard_frames.json beside its log.
"""

import argparse
import json
import random
import re
from pathlib import Path

import numpy as np
import torch

from data_cls import scenarios
from experiments.commands import ROOT, run
from rlhf import cli, flags, models, outputs, precision, prompting, querying, rewards, runtime
from rlhf.cli import COUNT
from rlhf.errors import UserError
from rlhf.sampling import Sampling

FOLDER, RESULTS = Path("models/hard"), Path("data_results/hard")
QUERIES, SAMPLES = 128, 32  # held-out queries, and responses to each


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--episodes", type=COUNT, default=20_480, help="responses in the run")
    parser.add_argument("--reward", default="models/cls", help="classifier of the texts of data_cls/")
    parser.add_argument("--run", help="name of the run folder (default: hard_seed<seed>)")
    flags.add_machine_flags(parser)
    args = parser.parse_args()
    device = runtime.set_up(args.device, args.seed)
    name = args.run or f"hard_seed{args.seed}"
    texts, generator, policy = FOLDER / "texts", FOLDER / f"nlg_seed{args.seed}", FOLDER / name
    refuse_another(RESULTS / name, args)
    write_texts(texts)
    shared = f"--data {texts} --seed {args.seed} --device {args.device} --resume"
    run(f"train_nlg.py --out {generator} --results {FOLDER} {shared}")
    where = f"--out {policy} --results {RESULTS} --run {name}"
    run(f"finetuning_nlg.py --policy {generator} --reward {args.reward} {where} --episodes {args.episodes} {shared}")
    evaluate(RESULTS / name, device)


def refuse_another(run_folder: Path, args: argparse.Namespace) -> None:
    """What was trained with other flags is not trained again, and must not pass for a run with these."""
    if (run_folder / "config.json").exists():
        made = json.loads((run_folder / "config.json").read_text(encoding="utf-8"))["settings"]
        if (made["reward"], made["episodes"], made["seed"]) != ([args.reward], args.episodes, args.seed):
            raise UserError(
                f"{run_folder} is of --reward {made['reward'][0]} --episodes {made['episodes']} --seed {made['seed']}; "
                "give another --run"
            )


def evaluate(run_folder: Path, device: torch.device, samples: int = SAMPLES) -> None:
    """Write hard_frames.json beside the log of a run on `write_texts`, with so many samples a query, and print it."""
    settings = outputs.settings_of(json.loads((run_folder / "config.json").read_text(encoding="utf-8")))
    _, tokenizer = models.load_policy(settings["policy"], "--policy")
    lines = (Path(settings["data"]) / "valid.txt").read_text(encoding="utf-8").splitlines()
    _, held_out = querying.split_queries(lines, tokenizer, settings["query_length"])
    queries = random.Random(settings["seed"]).sample(held_out, QUERIES) * samples
    measures = {
        when: measure(settings[folder], queries, settings, device)
        for when, folder in (("before", "policy"), ("after", "out"))
    }
    runtime.write_json(run_folder / "hard_frames.json", measures | runtime.provenance(device))
    for when, kinds in measures.items():
        print(when, {kind: {name: round(x, 3) for name, x in row.items()} for kind, row in kinds.items()})


def hard_kinds() -> list[scenarios.Kind]:
    """The kinds of text that are in hard.csv and in no other file."""
    frames = [frame for frames in scenarios.FRAMES.values() for frame in frames[-scenarios.HARD_PER_DOMAIN :]]
    return [kind for frame in frames for kind in scenarios.kinds(frame)]


def write_texts(folder: Path, every: int = 1) -> None:
    """data_nlg/ and as many texts of every kind of the hard frames, shuffled; of these one in `every`."""
    rng = random.Random(1)
    folder.mkdir(parents=True, exist_ok=True)
    counts = {name: scenarios.ROWS_PER_KIND[f"nlg_{name}"] for name in ("train", "valid")}
    texts = {name: (ROOT / "data_nlg" / f"{name}.txt").read_text(encoding="utf-8").splitlines() for name in counts}
    for kind in hard_kinds():
        new = scenarios.texts_of(kind, sum(counts.values()), rng)
        texts["train"] += new[: counts["train"]]
        texts["valid"] += new[counts["train"] :]
    for name, lines in texts.items():
        rng.shuffle(lines)
        text = "".join(line + "\n" for line in lines[::every])
        (folder / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")


def hard_openings() -> list[re.Pattern]:
    """What the valid texts of hard frames begin with."""
    first_sentences = {kind.sentences[0] for kind in hard_kinds()}
    return [re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(sentence))) for sentence in first_sentences]


def measure(policy: str, queries: list[str], settings: dict, device: torch.device) -> dict[str, dict[str, float]]:
    """What reward model and gold judge say of a policy's responses to the queries, with the settings of a run.

    Of all texts, of the valid ones of the frames that the classifier has learned, and of those of the hard frames.
    """
    model, tokenizer = models.load_policy(policy, "--policy")
    model = precision.freeze(model.to(device), precision.choose("auto", device, model))
    sampling = Sampling(settings["response_length"], settings["temperature"], tokenizer.eos_token_id)
    prompts, generator = prompting.Texts(tokenizer), torch.Generator().manual_seed(0)
    texts = models.continuations(model, prompts, queries, sampling, generator)
    of_reward = settings["reward"], settings["missing_stop_score"], device, "auto", settings["bounded_score"]
    reward = rewards.load(*of_reward)
    ethics = reward.ethics(reward.raw_scores(queries, texts))
    verdicts = [scenarios.judge(text) for text in texts]
    valid = np.array([verdict.valid for verdict in verdicts])
    ethical = np.array([bool(verdict.label) for verdict in verdicts])
    openings = hard_openings()
    hard = np.array([any(opening.match(text) for opening in openings) for text in texts])

    def of(chosen: np.ndarray) -> dict[str, float]:
        return {
            "share": float(chosen.sum() / valid.sum()),
            "gold_ethical": float(ethical[chosen].mean()),
            "classifier_mean": float(ethics[chosen].mean()),
            "classifier_right": float(((ethics > 0.5) == ethical)[chosen].mean()),
        }

    every = {"texts": float(len(texts)), "valid": float(valid.mean())}
    return {"all": every, "learned": of(~hard & valid), "hard": of(hard & valid)}


if __name__ == "__main__":
    cli.run(main)
