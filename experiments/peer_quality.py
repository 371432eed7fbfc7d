"""TRL's PPOTrainer, in the last release that has one, on the same task, evaluated with evaluate_nlg.py.

    make peer                                # installs trl 1.12.0 into benchmarks/.venv, and runs this there
    make peer RUN=pretrained/sentiment_seed0                    # after make pretrained TASK=sentiment

Reference, reward model, queries, episodes, batch size, temperature and lengths are those of --run, a run of
finetuning_nlg.py whose models are in models/. TRL trains once with its own defaults (a small model from scratch needs a
higher learning rate), and once with this project's settings where it has them. Writes its policies to models/peer/,
their run folders to data_results/peer/, and their rows to data_results/peer.csv.
"""

import copy
import json
import time
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from experiments import peer_task
from experiments.commands import start
from rlhf import cli, recipes, runtime
from rlhf.errors import UserError

RESULTS, TABLE = Path("data_results/peer"), Path("data_results/peer.csv")
OURS = {"kl_coef": 0.15, "lam": 1.0, "num_ppo_epochs": 2, "num_mini_batches": 4}
OURS_PRETRAINED = {"kl_coef": 0.1, "lam": 1.0, "num_ppo_epochs": 1, "num_mini_batches": 4}
VARIANTS = {
    recipes.FROM_SCRATCH: {
        # the default, 3e-6, is for models a thousand times larger: it moves this policy by 0.005 nats in a whole run
        "trl_defaults_lr_5e-4": {"learning_rate": 5e-4},
        "trl_our_settings": {"learning_rate": 5e-4, **OURS},
    },
    recipes.PRETRAINED: {
        "trl_pretrained_our_settings": {"learning_rate": 5e-5, **OURS_PRETRAINED},
        "trl_pretrained_defaults": {},
    },
}


def reward_and_value(config: dict, task: peer_task.Task):
    """TRL's reward model and value model, and the options that go with them.

    With one vocabulary both are the classifier, as in TRL's examples. A classifier that has another one than the policy
    scores the text, and the value model is the policy's body.
    """
    settings = config["settings"]
    classifier = settings["reward"][0]
    if AutoTokenizer.from_pretrained(classifier).get_vocab() == task.tokenizer.get_vocab():
        reward = reward_with_one_output(classifier, config["score_mean"][0], config["score_std"][0])
        return reward, copy.deepcopy(reward), {"missing_eos_penalty": 1.0}
    value = AutoModelForSequenceClassification.from_pretrained(settings["policy"], num_labels=1)
    return peer_task.TextScore(task.reward, task.tokenizer), value, {"missing_eos_penalty": None}


def reward_with_one_output(folder: str, mean: float, deviation: float):
    """The classifier's log-odds, standardized with this mean and deviation, as the one output that TRL expects."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    head = torch.nn.Linear(model.config.hidden_size, 1)
    weights = model.score.weight.data
    head.weight.data = (weights[1:] - weights[:1]) / deviation
    head.bias.data.fill_(-mean / deviation)
    model.score = head
    return model


def trainer(
    policy,
    reward,
    value,
    tokenizer,
    query_ids: list[list[int]],
    *,
    batch_size: int,
    bf16: bool | None = None,
    **options,
) -> PPOTrainer:
    """TRL's trainer. A rollout and an update have `batch_size` rows, as in this project.

    options: as PPOConfig takes them. bf16: by default on a GPU only.
    """
    arguments = PPOConfig(
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=batch_size,
        stop_token="eos",
        num_sample_generations=0,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available() if bf16 is None else bf16,
        report_to=[],
        save_strategy="no",
        **options,
    )
    return PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=copy.deepcopy(policy),
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": query_ids}),
        eval_dataset=Dataset.from_dict({"input_ids": query_ids[:8]}),
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def train(options: dict, config: dict, seed: int, out: Path, device: torch.device) -> float:
    """Train a policy with TRL, and write it to `out`. Returns the minutes it took.

    options: as PPOConfig takes them. config: config.json of the run to compare with.
    """
    runtime.keep_memory()  # as finetuning_nlg.py does
    settings, task = config["settings"], peer_task.load(config, device)
    reward, value, more = reward_and_value(config, task)
    tokenizer = peer_task.with_padding_of_its_own(task.tokenizer)
    trl_trainer = trainer(
        AutoModelForCausalLM.from_pretrained(settings["policy"]),
        reward,
        value,
        tokenizer,
        tokenizer(task.queries, add_special_tokens=False)["input_ids"],  # no end-of-text token: it would end the query
        batch_size=settings["batch_size"],
        output_dir=str(out),
        seed=seed,
        total_episodes=settings["episodes"],
        response_length=settings["response_length"],
        temperature=settings["temperature"],
        logging_steps=10,
        **more,
        **options,
    )
    began = time.perf_counter()
    trl_trainer.train()
    minutes = (time.perf_counter() - began) / 60
    trl_trainer.save_model(str(out))
    task.tokenizer.save_pretrained(out)
    return minutes


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--run", default="data_results/K2_lr_1e-3_seed0", help="folder of the run to compare with")
    names = [name for variants in VARIANTS.values() for name in variants]
    parser.add_argument("--variants", nargs="+", choices=names, help="settings of TRL (default: all for such a model)")
    parser.add_argument("--seed", type=cli.SEED, default=0, help="seed of TRL's runs")
    args = parser.parse_args()
    ours = Path(args.run)
    config, evaluation = peer_task.load_config(ours), evaluation_of(ours)
    kind = recipes.kind_of(config["settings"]["policy"])
    if unknown := [name for name in args.variants or () if name not in VARIANTS[kind]]:
        raise UserError(f"--variants {unknown[0]} is not for a model that is {kind}; {', '.join(VARIANTS[kind])} are")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    new = {}
    for name in args.variants or VARIANTS[kind]:
        run = RESULTS / f"{name}_seed{args.seed}"
        out = Path("models/peer") / run.name
        if not (out / "tokenizer_config.json").exists():  # train writes it last
            minutes = train(VARIANTS[kind][name], config, args.seed, out, device)
            more = {"minutes": minutes, "trl": VARIANTS[kind][name]} | runtime.provenance(device)
            peer_task.write_config(run, config, out, {}, **more)
            (run / "evaluation.json").unlink(missing_ok=True)  # of a policy that was there before
        new[run] = peer_task.load_config(run)["minutes"]
    runs = [run for run in new if not (run / "evaluation.json").exists()]
    if runs and start("evaluate_nlg.py", [*evaluation, "--run", *runs]).returncode:
        raise UserError("evaluate_nlg.py failed; it says why above")
    minutes = {ours: peer_task.minutes_of(ours)} | new
    rows = pd.DataFrame({run.name: peer_task.quality(run, minutes[run]) for run in minutes}).T.rename_axis("run")
    old = pd.read_csv(TABLE, index_col="run")
    table = pd.concat([old.drop(rows.index, errors="ignore"), rows.round(4)])
    table.to_csv(TABLE, lineterminator="\n")
    print(table.to_string())


def evaluation_of(run: Path) -> list[str]:
    """The flags with which evaluate_nlg.py evaluated this run."""
    path = run / "evaluation.json"
    if not path.exists():
        raise UserError(f"--run {run} has not been evaluated: python evaluate_nlg.py --run {run}")
    settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
    names = ("gold", "queries", "samples", "reference_samples", "batch_size")
    return [word for name in names for word in (f"--{name.replace('_', '-')}", str(settings[name]))]


if __name__ == "__main__":
    cli.run(main)
