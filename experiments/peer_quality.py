"""TRL's PPOTrainer, in the last release that has one, on the same task, evaluated with evaluate_nlg.py.

    make peer                                # installs trl 1.12.0 into benchmarks/.venv, and runs this there

Reference, reward model, queries, episodes, batch size, temperature and lengths are those of --run, a run of
finetuning_nlg.py whose models are in models/. TRL trains once with its own defaults and a higher learning rate, and
once with this project's settings where it has them. Writes its policies to models/peer/, their run folders to
data_results/peer/, and the table to data_results/peer.csv.
"""

import copy
import json
import subprocess
import sys
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
from rlhf import cli, data, prompting, runtime
from rlhf.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
OURS = {"kl_coef": 0.15, "lam": 1.0, "num_ppo_epochs": 2, "num_mini_batches": 4}
VARIANTS = {
    # the default, 3e-6, is for models a thousand times larger: it moves this policy by 0.005 nats in a whole run
    "trl_defaults_lr_5e-4": {"learning_rate": 5e-4},
    "trl_our_settings": {"learning_rate": 5e-4, **OURS},
}


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
    policy, reward, tokenizer, query_ids: list[list[int]], *, batch_size: int, bf16: bool | None = None, **options
) -> PPOTrainer:
    """TRL's trainer. A rollout and an update have `batch_size` rows, as in this project.

    options: as PPOConfig takes them. bf16: by default on a GPU only.
    """
    arguments = PPOConfig(
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=batch_size,
        stop_token="eos",
        missing_eos_penalty=1.0,
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
        value_model=copy.deepcopy(reward),  # as in TRL's examples
        train_dataset=Dataset.from_dict({"input_ids": query_ids}),
        eval_dataset=Dataset.from_dict({"input_ids": query_ids[:8]}),
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def train(options: dict, config: dict, seed: int, out: Path) -> float:
    """Train a policy with TRL, and write it to `out`. Returns the minutes it took.

    options: as PPOConfig takes them. config: config.json of the run to compare with.
    """
    settings = config["settings"]
    tokenizer = AutoTokenizer.from_pretrained(settings["policy"], padding_side="left")
    source = [settings[name] for name in ("data", "data_config", "data_revision", "text_column")]
    queries = prompting.Texts(tokenizer).training_queries(data.load_texts(*source), settings["query_length"])
    trl_trainer = trainer(
        AutoModelForCausalLM.from_pretrained(settings["policy"]),
        reward_with_one_output(settings["reward"][0], config["score_mean"][0], config["score_std"][0]),
        tokenizer,
        tokenizer(queries, add_special_tokens=False)["input_ids"],  # no end-of-text token: it would end the query
        batch_size=settings["batch_size"],
        output_dir=str(out),
        seed=seed,
        total_episodes=settings["episodes"],
        response_length=settings["response_length"],
        temperature=settings["temperature"],
        logging_steps=10,
        **options,
    )
    start = time.perf_counter()
    trl_trainer.train()
    minutes = (time.perf_counter() - start) / 60
    trl_trainer.save_model(str(out))
    tokenizer.save_pretrained(out)
    return minutes


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--run", default="data_results/K2_lr_1e-3_seed0", help="folder of the run to compare with")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="settings of TRL")
    parser.add_argument("--seed", type=cli.SEED, default=0, help="seed of TRL's runs")
    args = parser.parse_args()
    ours = Path(args.run)
    config = json.loads((ours / "config.json").read_text(encoding="utf-8"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = Path("data_results/peer")
    minutes = {}
    for name in args.variants:
        run = f"{name}_seed{args.seed}"
        out = Path("models/peer") / run
        if not (out / "tokenizer_config.json").exists():  # train writes it last
            took = train(VARIANTS[name], config, args.seed, out)
            record = config | {"settings": config["settings"] | {"out": str(out)}, "minutes": took}
            record |= {"trl": VARIANTS[name]} | runtime.provenance(device)
            runtime.write_json(results / run / "config.json", record)
        minutes[run] = json.loads((results / run / "config.json").read_text(encoding="utf-8"))["minutes"]
    runs = [results / run for run in minutes]
    if subprocess.run([sys.executable, ROOT / "evaluate_nlg.py", "--run", ours, *runs]).returncode:
        raise UserError("evaluate_nlg.py failed; it says why above")
    minutes[ours.name] = peer_task.minutes_of(ours)
    rows = {run.name: peer_task.quality(run, minutes[run.name]) for run in (ours, *runs)}
    table = pd.DataFrame(rows).T.rename_axis("run").round(4)
    table.to_csv("data_results/peer.csv", lineterminator="\n")
    print(table.to_string())


if __name__ == "__main__":
    cli.run(main)
