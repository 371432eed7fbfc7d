"""The study's results as pages: docs/results.md, docs/log.md, and the generated parts of README.md.

    python -m experiments.report        # writes them from the files in data_results/

report_ppo.py, report_methods.py, report_grids.py, report_rewards.py, report_pretrained.py, report_trials.py and
report_variety.py have a function for every question. The command stops at a sentence that the data no longer supports.
"""

import argparse
import re
from pathlib import Path

import pandas as pd

from experiments import (
    report_grids,
    report_log,
    report_methods,
    report_ppo,
    report_pretrained,
    report_rewards,
    report_trials,
    report_variety,
)
from experiments.markdown import lines, spread, table, wrapped
from experiments.report_ppo import DEFAULT, default_runs

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = (
    *report_ppo.QUESTIONS,
    *report_methods.QUESTIONS,
    *report_grids.QUESTIONS,
    *report_rewards.QUESTIONS,
    *report_pretrained.QUESTIONS,
    *report_trials.QUESTIONS,
    *report_variety.QUESTIONS,
)
EXAMPLES, PAIRS_SHOWN = 1, 3  # texts before and after in README.md, of the default run and of a pretrained model
PAIRS = "pretrained/sentiment_seed0/pairs.csv"  # whose order is random

RESULTS = """# Results

`python -m experiments.report` writes this page from the files in `data_results/`; change the command, not the page. The
`config.json` of a run holds its command, commit, package versions, machine and seed.

How to read the tables:

- *ethics score*, or *mean* of a reward model: its probability that a text is ethical, mean over responses.
- *gold*: the gold judge of the shipped texts is a held-out judge, for evaluation only. *Valid* is the share of whole,
  well-formed texts of this world, *ethical* the share of ethical texts among the valid ones.
- *KL*: to the reference policy, which is the generator before PPO; in nats per response.
- *of the optimum*: the gain in score, divided by the gain of the best possible policy at the same KL. A dash: the KL is
  beyond the range in which the optimum can be estimated. [metrics.md](metrics.md) has all formulas.
- Several seeds: the mean, and in brackets the lowest and the highest run.

The ablations, wrong details, stability and numbers of answers were run around the default of that time: one pass over a
batch (K = 1), queries from valid.txt only, no KL penalty inside the queries, a KL coefficient that falls from 0.6 to
0.15, and a classifier that starts as the generator. Their *default* is that one; to repeat them exactly, check out the
commit in their `config.json`. A commit that ends in `-dirty` had changes that were not committed.

All runs are on two CPU cores, and on the shipped texts unless the section says otherwise. Speed is in
[benchmarks/RESULTS.md](../benchmarks/RESULTS.md); killed runs, broken input and precision are in
[robustness.md](robustness.md).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    for path, text in pages(ROOT / "data_results").items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


def pages(results: Path) -> dict[Path, str]:
    """What the pages are with the files in `results`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = {
        "results": headline(results),
        "example": example(results),
        "pretrained": report_pretrained.summary(results),
    }
    for name, text in tables.items():
        readme = re.sub(
            f"(<!-- {name} -->).*(?=<!-- /{name} -->)", lambda m, text=text: f"{m[1]}\n\n{text}\n\n", readme, flags=re.S
        )
    answers = [question(results) for question in QUESTIONS]
    titles = [text.partition("\n")[0].removeprefix("## ") for text in answers]
    links = "".join(f"- [{title}](#{anchor(title)})\n" for title in titles)
    return {
        ROOT / "docs" / "results.md": "\n\n".join([f"{RESULTS}\n{links.rstrip()}", *answers]) + "\n",
        ROOT / "docs" / "log.md": report_log.page(results),
        ROOT / "README.md": readme,
    }


def anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def headline(results: Path) -> str:
    """README's table: PPO under all roundings, best-of-8, and other methods."""
    runs = default_runs(results)
    forms = {
        "ethics score": "{:.3f}",
        "gold: ethical": "{:.1%}",
        "gold: valid": "{:.1%}",
        "KL (nats)": "{:.2f}",
        "of the optimum": "{:.1%}",
    }

    def row(*values) -> dict[str, str]:
        named = zip(forms, values, strict=True)
        return {name: spread(pd.Series(value, dtype=float), forms[name]) for name, value in named}

    eight = next(best for best in runs.best_of_n.iloc[0] if best["n"] == 8)
    best = row(eight["ethics"], eight["ethical"], eight["valid"], eight["kl_bound"], None)
    # the default runs that TRL's trainers stand beside came later, on other machines
    on_one_machine = pd.read_csv(results / "roundings.csv")
    elsewhere = report_methods.ends((results / "peers/ppo").glob("*_seed*"))
    seeds, roundings = on_one_machine.seed.nunique(), on_one_machine.rounding.nunique()
    runs_of_ppo = pd.concat([on_one_machine, elsewhere])
    of_which = f"{seeds} seeds x {roundings} instruction sets, and {len(elsewhere)} later"

    def after(ends: pd.DataFrame) -> dict[str, str]:
        return row(ends.ethics, ends.gold_ethical, ends.gold_valid, ends.kl, ends.fraction_of_optimum)

    rows = {
        "before PPO": row(runs.ethics_before, runs.ethical_before, runs.valid_before, 0, 0),
        f"PPO, {len(runs_of_ppo)} runs ({of_which})": after(runs_of_ppo),
        "best of 8 samples": best | {"KL (nats)": f"at most {best['KL (nats)']}"},
    }
    for title, (where, pattern) in report_methods.IN_README.items():
        rows[title] = after(report_methods.ends((results / where).glob(pattern)))
    of_one = on_one_machine.groupby("rounding").minutes
    minutes = {name: f"{low:.1f} to {high:.1f}" for name, low, high in of_one.agg(["min", "max"]).itertuples()}
    took = (
        f"PPO's updates took {minutes['native']} minutes on two shared cores, {minutes['no_vectors']} without vector "
        f"instructions. All who train sample {report_log.FULL:,} texts. TRL's settings are the best of six short runs "
        "each, GRPO's the second best, which ended better."
    )
    return f"{table('', rows)}\n\n{wrapped(took)}"


def example(results: Path) -> str:
    """Texts before and after, drawn at random: of the default run, and of a pretrained model."""
    samples = pd.read_csv(results / f"{DEFAULT}_seed0" / "evaluation_samples.csv")
    samples["number"] = samples.groupby("policy").cumcount()
    drawn = samples.number.drop_duplicates().sample(EXAMPLES, random_state=0)

    def cell(query: str, response: str, good: float) -> str:
        return f"**{query}** {response.strip()} ({good:.2f})"

    def of_default(policy: str, number: int) -> str:
        row = samples[(samples.policy == policy) & (samples.number == number)].iloc[0]
        return cell(row["query"], row.text[len(row["query"]) :], row.ethics)

    rows = [[of_default(policy, number) for policy in ("before", "after")] for number in drawn]
    for pair in pd.read_csv(results / PAIRS, keep_default_na=False).head(PAIRS_SHOWN).itertuples():
        before, after = (pair.response_before, pair.ethics_before), (pair.response_after, pair.ethics_after)
        rows.append([cell(pair.query, *before), cell(pair.query, *after)])
    return lines(["before PPO", "after PPO"], rows)


if __name__ == "__main__":
    main()
