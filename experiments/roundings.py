"""The three scripts on processors that round differently, five seeds of PPO each: does every machine end the same?

    python -m experiments.roundings        # hours; goes on where it stopped

ATEN_CPU_CAPABILITY lets PyTorch compute as on an older processor: with vectors of 512 bits (as this machine has them),
of 256, or without any. The generator and the classifier are made anew under each. The runs with all that this
machine has are those of data_results/, with the models of models/; the others have folders called `roundings`. Writes
data_results/roundings.csv.
"""

import json
from pathlib import Path

import pandas as pd

from experiments.commands import run
from experiments.study import row_of
from rlhf import cli

CAPABILITIES = {"native": "", "avx2": "avx2", "no_vectors": "default"}  # name -> ATEN_CPU_CAPABILITY
SEEDS = 5


def folders(name: str) -> tuple[Path, Path]:
    """Where this rounding's models and its runs are."""
    return tuple(Path(top) / ("" if name == "native" else f"roundings/{name}") for top in ("models", "data_results"))


def commands(name: str) -> list[str]:
    """The commands that train under this rounding."""
    models, results = folders(name)
    shared = " --resume" if name == "native" else f" --resume --results {results}"
    cls, nlg = (f"{models}/{model}" for model in ("cls", "nlg"))
    train = [f"train_cls.py --out {cls}{shared}", f"train_nlg.py --out {nlg}{shared}"]
    for seed in range(SEEDS):
        out = f"{nlg}_ppo" + (f"_seed{seed}" if seed else "")
        train.append(f"finetuning_nlg.py --policy {nlg} --reward {cls} --out {out} --seed {seed}{shared}")
    return train


def main() -> None:
    cli.Parser(__doc__).parse_args()
    rows = []
    for name, capability in CAPABILITIES.items():
        environment = {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        for command in commands(name):
            run(command, **environment)
        runs = sorted(folders(name)[1].glob("K*_seed*"))
        if not all((folder / "evaluation.json").exists() for folder in runs):
            run(f"evaluate_nlg.py --run {' '.join(map(str, runs))}", **environment)
        rows += [{"rounding": name} | row(folder) for folder in runs]
        pd.DataFrame(rows).round(6).to_csv("data_results/roundings.csv", index=False, lineterminator="\n")
    table = pd.DataFrame(rows)
    print(table.drop(columns=["variant", "broken"]).to_string(index=False, float_format="%.3f"))
    print("table: data_results/roundings.csv")


def row(folder: Path) -> dict:
    """A run's row of the table, with what the gold judge said before PPO, and the worst query."""
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    worst = {f"worst_query_{name}": evaluation["worst_query"][name] for name in ("query", "valid", "ethics")}
    return row_of(folder) | {"gold_valid_before": evaluation["gold"]["valid_before"]} | worst


if __name__ == "__main__":
    cli.run(main)
