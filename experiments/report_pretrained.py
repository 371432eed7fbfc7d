"""Questions about pretrained models, a function a section of docs/results.md, as in experiments/report_ppo.py."""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.markdown import claim, files, load, section, spread, table
from rlhf import frontier, plots

TASKS = {  # of experiments/pretrained.py, and what the responses are
    "sentiment": "film reviews (SST-2) go on; good is positive",
    "ethics": "what somebody does in a situation (Moral Stories); good is right",
    "world": "the shipped openings go on; good is ethical",
}


# task -> runs like those of `make pretrained`, but with --interpolate 1
WHOLE_WAY = {task: [f"pretrained/{task}/whole_way_seed{seed}" for seed in range(3)] for task in TASKS}


def evaluation_of(folder: Path) -> dict:
    """The row of a run folder."""
    found = load(folder / "evaluation.json")
    perplexity = found["perplexity_under_reference"], found["perplexity_under_reference_before"]
    distinct = (found["diversity"][when]["distinct_2"] for when in ("after", "before"))
    return {
        "task": folder.name.rpartition("_seed")[0],
        "judge_before": found["gold"]["ethical_before"],
        "judge": found["gold"]["ethical_after"],
        "mean_before": found["ethics_before"],
        "mean": found["ethics_after"],
        "kl": found["kl"],
        "perplexity": np.divide(*perplexity),
        "distinct": np.divide(*distinct),
        "fraction_of_optimum": frontier.known_fraction(found),
        "best_of_8": next(best["ethical"] for best in found["best_of_n"] if best["n"] == 8),
    }


def evaluations(results: Path) -> pd.DataFrame:
    """A row a run of `make pretrained`."""
    return pd.DataFrame([evaluation_of(folder) for folder in sorted((results / "pretrained").glob("*_seed*"))])


def gains(runs: pd.DataFrame) -> dict[str, str]:
    """What these runs of a task did to the texts, by the titles of columns."""
    return {
        "judge: good": f"{runs.judge_before.mean():.0%} → {spread(runs.judge, '{:.1%}')}",
        "reward model's mean": f"{runs['mean_before'].mean():.2f} → {spread(runs['mean'], '{:.2f}')}",
        "KL (nats)": spread(runs.kl, "{:.2f}"),
        "of the optimum": spread(runs.fraction_of_optimum, "{:.0%}"),
        "perplexity, relative": spread(runs.perplexity, "{:.2f}"),
        "distinct pairs of words, relative": spread(runs.distinct, "{:.2f}"),
    }


def summary(results: Path) -> str:
    """A table with a row a task."""
    rows = {}
    for task, runs in evaluations(results).groupby("task"):
        best = {"judge: good, best of 8": spread(runs.best_of_8, "{:.1%}")}
        rows[f"{task}, {len(runs)} seed{'s' * (len(runs) > 1)}"] = gains(runs) | best
    return table("task", rows)


def right_on_test(results: Path, task: str) -> str:
    """How often the two models of a task of real text are right."""
    reward, judge = (
        load(results / f"pretrained/{task}/{model}_metrics.json")["results"]["test"]["accuracy"]
        for model in ("reward", "judge")
    )
    return f"on the test texts of *{task}* the reward model is right on {reward:.0%}, the judge on {judge:.0%}"


def pretrained(results: Path) -> str:
    runs = evaluations(results)
    tasks = {task: of_task for task, of_task in runs.groupby("task")}
    real = runs[runs.task != "world"]
    return section(
        "Does it work with a pretrained model?",
        "SmolLM2-135M-Instruct, whose weights come in a package (GGUF of 4 bits, float32 from then on), is fine-tuned "
        "for one pass on texts of the task; that is the reference. The reward model is MiniLM. On real text SmolLM2 is "
        "the judge, too, from the other half of the labels: "
        + "; ".join(right_on_test(results, task) for task in real.task.unique())
        + ".",
        "The tasks: " + "; ".join(f"*{task}*: {TASKS[task]}" for task in TASKS) + ". In *world* the gold judge judges.",
        summary(results),
        *(
            f"![Score against KL: PPO, best-of-n and the optimum ({task})](../data_results/pretrained/fig_{task}.png)"
            for task in TASKS
        ),
        "The lines are the policies that PPO had, the dots those that were written, 0.8 of the way from the reference "
        "to the last of them ([why](#what-does-a-policy-between-the-reference-and-ppos-gain)).",
        "*Perplexity* under the reference and *distinct pairs of words* are relative to the reference's own texts. A "
        "dash: the share of the optimum is not known at this KL.",
        *of_sentiment(tasks["sentiment"]),
        *of_ethics(results, tasks["ethics"]),
        *of_world(results, tasks["world"]),
        "*Published numbers.* RL4LMs has 0.49 → 0.61 for the mean of a reward model with GPT-2 on IMDB, at a "
        "perplexity of 32.2 → 33.5 (allenai/RL4LMs, issue 28), and TRL's notebook gpt2-sentiment a mean logit of "
        "0.16 → 1.69 over 16 texts (commit f5f2472). These are the same kind of number; texts, reward models, lengths "
        "and episodes differ.",
        files(results, "make pretrained TASK=sentiment DATA=... SEEDS=3", "pretrained")
        + " Twenty random pairs of texts before and after PPO are in `pairs.csv` of every run, and in the notebook.",
    )


def of_sentiment(runs: pd.DataFrame) -> list[str]:
    return [
        claim(
            (runs.judge > 0.9).all() and (runs.kl < 3).all() and (runs.perplexity < 1.1).all(),
            "*Film reviews.* The judge agrees with the reward model: with each seed it finds more than nine tenths of "
            "the texts positive, at less than 3 nats, and the reference finds them as likely as its own.",
        ),
        claim(
            runs.distinct.min() > 0.75 and runs.distinct.max() < 0.9,
            f"The policy repeats itself more: the distinct pairs fall to {runs.distinct.min():.2f} to "
            f"{runs.distinct.max():.2f} of the reference's.",
        ),
        claim(
            (runs.kl > 1.5 * frontier.best_of_n_kl_bound(8)).all() and (runs.best_of_8 > 0.9).all(),
            f"It is not cheap: best of 8 has nine tenths too, at {frontier.best_of_n_kl_bound(8):.1f} nats at most.",
        ),
        "Read one by one, the texts are English, and reviews. They turn a negative opening around (*this extremely "
        "unfunny and very funny and purely entertaining film*), are shorter, and praise in stock words: *good*, "
        "*great*, *entertaining*. What a film is about is said less often.",
    ]


STOCK = r"apologi|offer|help|thank"  # what people do in the texts after PPO


def of_ethics(results: Path, runs: pd.DataFrame) -> list[str]:
    folders = sorted((results / "pretrained").glob("ethics_seed*"))
    pairs = pd.concat([pd.read_csv(folder / "pairs.csv", keep_default_na=False) for folder in folders])
    before = pairs.response_before.drop_duplicates()  # the reference's are the same in every run
    stock = {"before": before.str.contains(STOCK), "after": pairs.response_after.str.contains(STOCK)}
    log = pd.concat([pd.read_csv(folder / "log.csv") for folder in folders]).groupby("update").mean(numeric_only=True)
    first, last = log[log.gold_ethical >= 0.9].iloc[0], log.iloc[-10:].mean(numeric_only=True)
    return [
        claim(
            (runs.judge > 0.9).all() and (runs.kl < 4).all() and (runs.perplexity < 1.1).all(),
            f"*Moral stories.* The judge finds {runs.judge.min():.0%} of the actions right and more, with each seed, "
            f"at {runs.kl.min():.1f} to {runs.kl.max():.1f} nats, and the reference finds them nearly as likely as its "
            "own.",
        ),
        claim(
            first.kl < 3 and last.kl > first.kl + 1.5 and last.gold_ethical > first.gold_ethical,
            f"During PPO (figure, means of the seeds) its share is {first.gold_ethical:.0%} at {first.kl:.1f} nats "
            f"already, and {last.gold_ethical:.0%} over the last ten updates, at {last.kl:.1f}; "
            "there is no sign of a turn.",
        ),
        claim(
            runs.distinct.min() > 0.8,
            f"Distinct pairs of words fall to {runs.distinct.min():.2f} to {runs.distinct.max():.2f} of those before.",
        ),
        "![The reward model's mean and the judge's share against the square root of the KL]"
        "(../data_results/pretrained/fig_ethics_judge.png)",
        claim(
            stock["after"].mean() > 0.3 and stock["before"].mean() < 0.1,
            f"The texts say how: somebody *offers*, *helps*, *apologizes* or *thanks* in {stock['after'].sum()} of the "
            f"{len(stock['after'])} texts after PPO in `pairs.csv`, and in {stock['before'].sum() or 'none'} "
            f"of the {len(stock['before'])} before.",
        ),
        "This is English, and often a kind answer to the situation; but it is much the same answer to many of them, "
        "names get mixed up, and some answer nothing (in a cinema: *asks a family member to help him with his "
        "chores*). The judge likes these words as much as the reward model does, and both are wrong on a quarter of "
        "people's sentences: the share says how far two models of such labels agree, not how right the actions are.",
    ]


def of_world(results: Path, runs: pd.DataFrame) -> list[str]:
    default, earlier, generator = (
        load(results / f"pretrained/world/{name}_metrics.json") for name in ("nlg_at_5e-5", "nlg_at_3e-4", "nlg")
    )
    folders = sorted((results / "pretrained").glob("world_seed*"))
    found = [load(folder / "evaluation.json") for folder in folders]
    gold, worst = (pd.DataFrame([run[name] for run in found]) for name in ("gold", "worst_query"))
    frames = [load(folder / "hard_frames.json") for folder in folders]
    learned, hard = (
        [100 * (run["after"][kind]["gold_ethical"] - run["before"][kind]["gold_ethical"]) for run in frames]
        for kind in ("learned", "hard")
    )
    return [
        claim(
            default["results"]["valid_at_0.7"] < 0.3 and generator["results"]["valid_at_0.7"] > 0.9,
            "*The shipped world.* Its texts must be learned exactly. A pass over a quarter of them leaves "
            f"{default['results']['valid_at_0.7']:.0%} of SmolLM2's samples valid with the default learning rate and "
            f"batch, and {earlier['results']['valid_at_0.7']:.0%} with {rate_and_batch(earlier)}. This task has "
            f"{rate_and_batch(generator)} on a fifth of them, which takes less time: "
            f"{generator['results']['valid_at_0.7']:.0%}.",
        ),
        claim(
            (gold.ethical_after > gold.ethical_before + 0.1).all() and runs.fraction_of_optimum.max() < 0.7,
            f"The gold judge finds {gold.ethical_after.min():.0%} to {gold.ethical_after.max():.0%} of the valid texts "
            f"ethical instead of {gold.ethical_before.mean():.0%}, and {gold.valid_after.min():.0%} to "
            f"{gold.valid_after.max():.0%} valid instead of {gold.valid_before.mean():.0%}. That is far from the "
            "optimum at this KL, and the run is short: from scratch the default samples eleven times as many texts.",
        ),
        claim(
            min(learned) > max(hard) > min(hard) > 0,
            f"On frames that the reward model has learned it gains {min(learned):.0f} to {max(learned):.0f} points, on "
            f"the others {min(hard):.0f} to {max(hard):.0f} "
            "([beside the runs from scratch](#what-if-the-reward-model-has-not-learned-some-of-the-texts)).",
        ),
        claim(worst.kl.max() < 5, f"No query falls apart: the worst are at {worst.kl.max():.1f} nats at most."),
        *of_queries(results),
    ]


def rate_and_batch(metrics: dict) -> str:
    """Of a generator's metrics.json."""
    return f"{plots.short(metrics['settings']['lr'])} and {metrics['settings']['batch_size']} texts a step"


def of_queries(results: Path) -> list[str]:
    """The KL penalty inside the queries, in runs on an earlier generator with it and without, where PPO ended."""
    held = [results / run for run in WHOLE_WAY["world"]]
    free = sorted((results / "pretrained/world").glob("without_query_kl_seed*"))
    runs, without = (pd.DataFrame(map(evaluation_of, folders)) for folders in (held, free))
    found, of_free = ([load(folder / "evaluation.json") for folder in folders] for folders in (held, free))
    worst, broken = (pd.DataFrame([run["worst_query"] for run in of_some]) for of_some in (found, of_free))
    return [
        claim(
            len(free) == 3
            and worst.kl.max() < 5
            and broken["query"].nunique() == 1
            and broken.kl.min() / found[0]["queries"] > 0.4 * without.kl.min()
            and broken.valid.max() < 0.2,
            "The openings are the model's own words, so here the KL penalty holds inside the queries too "
            "(`--query-kl`). Six runs with the generator of 8 texts a step show why. Where PPO ends with it, the worst "
            f"queries are at {worst.kl.min():.1f} to {worst.kl.max():.1f} nats. Without it one query of "
            f"{found[0]['queries']}, *{broken['query'][0]}*, falls apart with each seed: {broken.kl.min():.0f} to "
            f"{broken.kl.max():.0f} nats, which is about half of the mean, and at most {broken.valid.max():.0%} of its "
            "texts are valid. The policy begins one story and goes on with another (*Little Oscar, had no fever when "
            "the father called ...*).",
        ),
        claim(
            runs.judge.min() > without.judge.max() and runs.kl.max() < without.kl.min(),
            f"The runs without it end at {without.judge.min():.0%} to {without.judge.max():.0%} ethical and "
            f"{without.kl.min():.1f} to {without.kl.max():.1f} nats, those with it at {runs.judge.min():.0%} to "
            f"{runs.judge.max():.0%} and {runs.kl.min():.1f} to {runs.kl.max():.1f}.",
        ),
    ]


QUESTIONS = (pretrained,)
