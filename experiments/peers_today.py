"""What people use today in PPO's place, TRL 1.16's GRPO, RLOO and DPO, on the same task and evaluated alike.

    make peers                               # installs trl 1.16.0 into experiments/.venv, and runs this there
    python -m experiments.peers_today --methods grpo --lr 3e-4 --beta 0.05 --batch-size 256 --epochs 2

Reference, reward model and its standardization, queries, temperature and lengths are those of --run, a run of
finetuning_nlg.py whose models are in models/. DPO is offline: it learns from the best and the worst of every --answers
texts of the reference to one query, and all of these count as episodes.

Without the flags TRL's own defaults hold: batch size 8, one optimizer step a batch, learning rate 1e-6; GRPO 8 answers
to a query, K 1, beta 0 (no KL); RLOO 2 answers, K 1, beta 0.05; DPO K 3, beta 0.1, and 2 answers, the fewest. The rest
is TRL's default everywhere (AdamW, linear decay to 0, gradient norm 1, clip range 0.2, plain sampling), but for float32
on the CPU and no gradient checkpointing. grpo-unscaled is GRPO with scale_rewards="none". Two things are repaired: TRL
encodes a prompt with the end token that a tokenizer from scratch puts behind a text, and gives GPT-2 no position ids
for prompts that are padded on the left. DPO learns from log-probabilities at temperature 1, whatever the temperature of
the samples; TRL has no setting for it.

--search tries the same number of learning rates and betas for each method with a quarter of the episodes, and trains
with the best by score - kl_coef * KL on queries that neither training nor the evaluation asks. Writes run folders
(config.json, trl_log.csv, evaluation.json) to --results, the tables RESULTS.csv and RESULTS_search.csv beside it, and
policies to the folder of models/ with its name.
"""

import rlhf.environment  # noqa: F401, I001  (before torch is loaded)
import argparse
import copy
import dataclasses
import itertools
import json
from pathlib import Path

import pandas as pd
import trl
from datasets import Dataset
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from experiments import peer_task
from experiments.commands import start
from rlhf import cli, plots, runtime
from rlhf.errors import UserError

RESULTS = "data_results/peers"
SEARCH_PART = 4  # a search's runs have the episodes divided by this
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
BETAS = {"grpo": (0.05, 0.15), "grpo-unscaled": (0.05, 0.15), "rloo": (0.05, 0.15), "dpo": (0.1, 0.3)}
TRL_NAMES = {"batch_size": "per_device_train_batch_size", "lr": "learning_rate", "beta": "beta"}
ONLINE_NAMES = TRL_NAMES | {"epochs": "num_iterations", "answers": "num_generations"}
DPO_NAMES = TRL_NAMES | {"epochs": "num_train_epochs"}
FEWEST_ANSWERS = 2


@dataclasses.dataclass
class UnscaledGRPOConfig(GRPOConfig):
    """GRPO without the division by the deviation of a query's scores, as Dr. GRPO (Liu et al. 2025) has it."""

    scale_rewards: str = "none"


class PairsTrainer(DPOTrainer):
    """DPO on token ids. From texts, TRL would make other tokens than were sampled, and close those that did not end."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


METHODS = {
    "grpo": (GRPOConfig, GRPOTrainer),
    "grpo-unscaled": (UnscaledGRPOConfig, GRPOTrainer),
    "rloo": (RLOOConfig, RLOOTrainer),
    "dpo": (DPOConfig, PairsTrainer),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of one run of a method. Without a value: TRL's default."""

    method: str
    episodes: int  # sampled texts in all
    seed: int
    minibatches: int  # optimizer steps per pass over a batch
    batch_size: int | None = None  # sampled texts; of DPO, pairs
    epochs: int | None = None  # K, passes over a batch; of DPO, over all pairs
    answers: int | None = None  # texts to one query
    lr: float | None = None
    beta: float | None = None

    @property
    def run(self) -> str:
        return f"{self.method}_K{self.epochs}_lr_{plots.short(self.lr)}_beta_{self.beta:g}_seed{self.seed}"

    @property
    def in_the_projects_names(self) -> dict:
        own = {"ppo_epochs": self.epochs, "kl_coef": self.beta, "optimizer": "adamw"}
        return own | {
            name: getattr(self, name) for name in ("episodes", "seed", "batch_size", "minibatches", "lr", "answers")
        }

    def filled(self) -> "Settings":
        """The same with TRL's defaults."""
        of_trl = {field.name: field.default for field in dataclasses.fields(METHODS[self.method][0])}
        names = DPO_NAMES if self.method == "dpo" else ONLINE_NAMES
        defaults = {"answers": FEWEST_ANSWERS} | {name: of_trl[theirs] for name, theirs in names.items()}
        given = {name: value for name, value in vars(self).items() if value is not None}
        return Settings(**defaults | {"epochs": int(defaults["epochs"])} | given)

    def check(self) -> None:
        """Refuse numbers that do not go together. For settings that are filled."""
        if self.batch_size % self.minibatches:
            raise UserError(f"--batch-size {self.batch_size} cannot be divided into --minibatches {self.minibatches}")
        if self.method != "dpo" and self.batch_size % self.answers:
            raise UserError(
                f"--batch-size {self.batch_size} cannot be divided into --answers {self.answers} to a query of "
                f"{self.method}"
            )
        least = self.answers if self.method == "dpo" else self.batch_size
        if self.episodes < least:
            raise UserError(f"--episodes {self.episodes} is less than the {least} that {self.method} begins with")


def trl_options(settings: Settings, task: peer_task.Task, out: Path) -> dict:
    """The settings as TRL's configurations take them. bfloat16 on a GPU only, as everywhere in this project."""
    cuda = task.reference.device.type == "cuda"
    options = {
        "output_dir": str(out),
        "seed": settings.seed,
        "learning_rate": settings.lr,
        "beta": settings.beta,
        "per_device_train_batch_size": settings.batch_size // settings.minibatches,
        "use_cpu": not cuda,
        "bf16": cuda,
        "gradient_checkpointing": False,  # saves memory, which is not short here, and changes no number
        "logging_steps": 0.005,  # of all steps
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if settings.method == "dpo":
        return options | {"num_train_epochs": settings.epochs}
    return options | {
        "num_iterations": settings.epochs,
        "steps_per_generation": settings.minibatches,
        "max_steps": settings.episodes // settings.batch_size * settings.minibatches * settings.epochs,
        "num_generations": settings.answers,
        "max_completion_length": task.sampling.length,
        "temperature": task.sampling.temperature,
    }


def new_trainer(settings: Settings, task: peer_task.Task, out: Path):
    """TRL's trainer of a copy of the reference."""
    config, trainer = METHODS[settings.method]
    arguments = config(**trl_options(settings, task, out))
    policy = copy.deepcopy(task.reference).requires_grad_(True)
    peer_task.count_real_positions(policy)
    shared = {"model": policy, "args": arguments}
    shared["processing_class"] = peer_task.without_special_tokens(task.tokenizer)
    if settings.method == "dpo":
        pairs = peer_task.sample_pairs(task, settings.episodes, settings.answers, settings.seed)
        if not pairs:
            raise UserError("all answers to a query score the same: there are no pairs; give more --episodes")
        return trainer(**shared, ref_model=copy.deepcopy(task.reference), train_dataset=Dataset.from_list(pairs))
    score = peer_task.score_function(task.reward, task.sampling.stop_id)
    queries = Dataset.from_dict({"prompt": task.queries})
    trainer = trainer(**shared, reward_funcs=score, train_dataset=queries)
    if trainer.ref_model is not None:  # with beta 0 there is none
        peer_task.count_real_positions(trainer.ref_model)
    return trainer


def train(settings: Settings, task: peer_task.Task, config: dict, run: Path, out: Path) -> dict:
    """Train a policy, unless this has been done, and write it to `out` and its run folder. Returns config.json.

    config: config.json of the run to compare with.
    """
    if out.exists() and (run / "config.json").exists():  # the latter is written last
        record = json.loads((run / "config.json").read_text(encoding="utf-8"))
        if record["trl"] == vars(settings) and record["score_mean"] == config["score_mean"]:  # with the same models
            return record
    print(f"\n{run}", flush=True)
    clock = runtime.Clock(task.reference.device)
    trainer = new_trainer(settings, task, out)  # DPO samples its texts here
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    clock.lap("all")
    trainer.model.save_pretrained(out)
    task.tokenizer.save_pretrained(out)
    run.mkdir(parents=True, exist_ok=True)
    log = pd.DataFrame(row for row in trainer.state.log_history if "train_runtime" not in row)
    log.to_csv(run / "trl_log.csv", index=False, lineterminator="\n")
    provenance = runtime.provenance(task.reference.device)
    provenance["versions"] |= {"trl": trl.__version__}
    peer_task.write_config(
        run, config, out, settings.in_the_projects_names, trl=vars(settings), minutes=clock.laps["all"] / 60,
        validation=peer_task.validate(task, trainer.model, settings.seed), **provenance,
    )  # fmt: skip
    record = json.loads((run / "config.json").read_text(encoding="utf-8"))
    print(f"{record['minutes']:.1f} minutes; on validation queries {record['validation']}")
    return record


def search(settings: Settings, task: peer_task.Task, config: dict, results: Path) -> Settings:
    """The settings with the best of LEARNING_RATES and of the method's BETAS. Adds its runs to the table."""
    rows = []
    for lr, beta in itertools.product(LEARNING_RATES, BETAS[settings.method]):
        tried = dataclasses.replace(settings, lr=lr, beta=beta, episodes=settings.episodes // SEARCH_PART)
        record = train(tried, task, config, *folders(results, f"search/{tried.run}"))
        rows.append(vars(tried) | record["validation"] | {"minutes": record["minutes"]})
    table, path = pd.DataFrame(rows), Path(f"{results}_search.csv")
    if path.exists():
        before = pd.read_csv(path)
        table = pd.concat([before[(before.method != settings.method) | (before.seed != settings.seed)], table])
    table.round(6).to_csv(path, index=False, lineterminator="\n")
    print(pd.DataFrame(rows).round(4).to_string(index=False))
    best = max(rows, key=lambda row: row["objective"])
    return dataclasses.replace(settings, lr=best["lr"], beta=best["beta"])


def folders(results: Path, name: str) -> tuple[Path, Path]:
    """Of a run and of its policy."""
    return results / name, Path("models") / results.name / name


def write_table(ours: list[Path], results: Path) -> pd.DataFrame:
    """A row for every run to compare with, and for every evaluated run of a peer."""
    rows = {run.name: peer_task.quality(run, peer_task.minutes_of(run)) for run in ours}
    for run in sorted(path.parent for path in results.glob("*/evaluation.json")):
        minutes = json.loads((run / "config.json").read_text(encoding="utf-8"))["minutes"]
        rows[run.name] = peer_task.quality(run, minutes)
    table = pd.DataFrame(rows).T.rename_axis("run").round(6)
    table.to_csv(f"{results}.csv", lineterminator="\n")
    return table


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of TRL")
    parser.add_argument(
        "--run", nargs="+", default=["data_results/K2_lr_1e-3_seed0"],
        help="folder of the run to compare with; those that follow, of other seeds, are put into the table as they are",
    )  # fmt: skip
    parser.add_argument("--episodes", type=cli.COUNT, help="sampled texts in all (default: as many as the run)")
    parser.add_argument("--batch-size", type=cli.COUNT, help="sampled texts of a batch; of DPO, pairs")
    parser.add_argument("--minibatches", type=cli.COUNT, default=1, help="optimizer steps per pass over a batch")
    parser.add_argument("--epochs", type=cli.COUNT, help="K, passes over a batch; of DPO, over all pairs")
    parser.add_argument("--answers", type=cli.number(int, FEWEST_ANSWERS, 1000), help="sampled texts to a query")
    parser.add_argument("--lr", type=cli.POSITIVE, help="learning rate")
    parser.add_argument("--beta", type=cli.number(float, 0), help="KL coefficient; of DPO, its beta")
    parser.add_argument("--seed", type=cli.SEED, default=0, help="seed of every run")
    parser.add_argument("--evaluation", default="", metavar="FLAGS", help="of evaluate_nlg.py, in quotation marks")
    parser.add_argument("--results", type=cli.folder, default=RESULTS, help="folder to write run folders to")
    parser.add_argument("--search", action="store_true", help="choose learning rate and beta by short runs first")
    args = parser.parse_args()
    if args.search and (args.lr or args.beta is not None):
        raise UserError("--search chooses learning rate and beta itself; leave out --lr and --beta")
    if "dpo" in args.methods and args.beta == 0:
        raise UserError("--beta 0: DPO learns nothing with it; give one above 0, or --methods grpo rloo")
    return args


def all_settings(args: argparse.Namespace, episodes: int) -> list[Settings]:
    """Of every method. Refuses what the shortest run could not do."""
    names = [field.name for field in dataclasses.fields(Settings) if field.name not in ("method", "episodes")]
    given = {name: getattr(args, name) for name in names}
    every = [Settings(method, args.episodes or episodes, **given).filled() for method in args.methods]
    for settings in every:
        settings.check()
        dataclasses.replace(settings, episodes=settings.episodes // (SEARCH_PART if args.search else 1)).check()
    return every


def is_evaluated(run: Path) -> bool:
    return (run / "evaluation.json").exists()


def main() -> None:
    args = parse_args()
    ours, results = [Path(run) for run in args.run], Path(args.results)
    config, *_ = [peer_task.load_config(run) for run in ours]
    if unknown := [run for run in ours[1:] if not is_evaluated(run)]:
        raise UserError(f"--run {unknown[0]} has not been evaluated: python evaluate_nlg.py --run {unknown[0]}")
    every = all_settings(args, config["settings"]["episodes"])
    device = runtime.set_up("auto", args.seed)
    task, runs = peer_task.load(config, device), [run for run in ours if not is_evaluated(run)]
    for settings in every:
        chosen = search(settings, task, config, results) if args.search else settings
        run, out = folders(results, chosen.run)
        train(chosen, task, config, run, out)
        runs.append(run)
    if start("evaluate_nlg.py", ["--run", *runs, *args.evaluation.split()]).returncode:
        raise UserError("evaluate_nlg.py failed; it says why above")
    print(write_table(ours, results).to_string())


if __name__ == "__main__":
    cli.run(main)
