"""Questions about settings, details and generators, a function a section of docs/results.md: what the grids answer."""

from pathlib import Path

import pandas as pd

from experiments.grids import GRIDS
from experiments.markdown import GOLD, claim, figure, files, load, section, spread, table, table_of_runs
from experiments.report_ppo import default_runs


def ablations(results: Path) -> str:
    flags, runs = GRIDS["ablations"].variants, pd.read_csv(results / "ablations.csv")
    mean = runs.groupby("variant")[["fraction_of_optimum", "kl"]].mean()
    share, kl = mean.fraction_of_optimum.sort_values(ascending=False), mean.kl
    default = share["default"]
    faster = {"lr_2e-3": "twice the learning rate", "K2": "K = 2", "constant_kl_coef": "a constant KL coefficient"}
    slower = {
        "adam_lr_5e-4": "Adam instead of Muon",
        "minibatches_1": "one minibatch per batch",
        "batch_512": "twice the batch",
        "lambda_0.95": "lambda 0.95",
        "leave_one_out": "leave-one-out with four answers to a query",
        "adaptive_kl": "an adaptive KL coefficient",
    }
    clips = ["K4_clip_range_0.05", "K4", "K4_no_clip"]

    def listed(names: dict[str, str]) -> str:
        return ", ".join(f"{title} ({share[name]:.0%})" for name, title in names.items())

    return section(
        "Which settings matter?",
        f"One setting at a time against the default, with {GRIDS['ablations'].episodes:,} episodes (a fifth of a "
        "default run) and three seeds. Runs this short measure speed.",
        claim(
            share[list(faster)].min() > default + 0.03,
            f"Faster than the default ({default:.0%} of the optimum): {listed(faster)}.",
        ),
        claim(share[list(slower)].max() < default - 0.03, f"Slower: {listed(slower)}."),
        claim(
            (share[["no_critic", "sampled_kl"]] - default).abs().max() < 0.04,
            f"Within a few points of it: no critic ({share['no_critic']:.0%}), and the sampled KL of "
            f"openai/lm-human-preferences ({share['sampled_kl']:.0%}, at {kl['sampled_kl']:.2f} nats against "
            f"{kl['default']:.2f}).",
        ),
        claim(
            share[clips].is_monotonic_increasing and runs.broken.isna().all(),
            f"With K = 4 a wider clip range learns faster: {share[clips[0]]:.0%} with 0.05, {share['K4']:.0%} with "
            f"0.2, {share['K4_no_clip']:.0%} without clipping (at {kl['K4_no_clip']:.1f} nats instead of "
            f"{kl['K4']:.1f}). No run breaks.",
        ),
        table_of_runs(
            "flags",
            runs,
            {name: f"`{flags[name]}`" if flags[name] else "**default**" for name in share.index},
            ["fraction_of_optimum", *GOLD],
        ),
        figure("ablations", "Share of the optimum by variant, a dot a seed"),
        files(results, "python -m experiments.study ablations", "ablations.csv", "ablations"),
    )


def full_length(results: Path) -> str:
    trials = pd.read_csv(results / "trials.csv", keep_default_na=False)
    trials = trials[trials.episodes == 56_320].assign(share=lambda x: pd.to_numeric(x.fraction_of_optimum_held_out))
    constant = trials[(trials.change == "") & trials.settings.str.endswith("kl_coef 0.2")].share
    falling = trials[trials.change.str.startswith("queries of valid.txt only")]
    one = trials[(trials.seed == 1) & (trials.commit == "4bab953")]
    lr = one[one.settings.str.contains("lr 0.002")].share.item()
    now, seed1 = default_runs(results).fraction_of_optimum, falling[falling.seed == 1].share.item()
    return section(
        "Does what learns faster also end higher?",
        claim(
            len(constant) == len(falling) == 5 and falling.share.mean() > constant.mean(),
            "With all 56,320 episodes, a constant KL coefficient does not: five seeds with 0.2 end at "
            f"{spread(constant, '{:.1%}')} of the optimum, with one that falls from 0.6 to 0.15 at "
            f"{spread(falling.share, '{:.1%}')}.",
        ),
        claim(
            abs(lr - seed1) < 0.02,
            f"Twice the learning rate ends at {lr:.1%} with one seed, where the single one ends at {seed1:.1%}.",
        ),
        claim(
            now.min() > falling.share.max(),
            "Two passes over a batch do, together with more queries, a KL penalty inside them, a KL coefficient that "
            f"falls to 0.15, and another classifier: the default now, which ends at {spread(now, '{:.1%}')}.",
        ),
        "[log.md](log.md) lists all trials and takes some of these apart.",
        files(results, "python finetuning_nlg.py", "trials.csv"),
    )


DETAILS = {
    "nothing": "nothing wrong",
    "score": "the score is not standardized",
    "advantages": "advantages are not whitened",
    "adam_eps": "Adam's eps is 1e-8 instead of 1e-5",
    "temperature": "log-probabilities ignore the temperature",
    "value_head": "the value head starts at random",
    "positions": "position ids count the left padding",
    "dropout": "dropout stays on, in rollout and update",
}


def details(results: Path) -> str:
    runs = pd.read_csv(results / "details.csv")
    mean = runs.groupby("variant")[["fraction_of_optimum", *GOLD]].mean()
    share, kl, dropout = mean.fraction_of_optimum, mean.kl, runs[runs.variant == "dropout"]
    return section(
        "What happens if one detail is wrong?",
        "Mistakes that code for PPO on language models has made somewhere, one at a time, with the episodes and "
        "seeds of the ablations.",
        claim(
            dropout.broken.notna().all() and dropout.kl.min() > 100 and dropout.gold_valid.max() < 0.01,
            f"Dropout breaks every run: {dropout.kl.min():.0f} nats and more, and no valid texts.",
        ),
        claim(
            share.positions < 0.25,
            f"Wrong positions keep {share.positions:.0%} of the optimum, right ones {share.nothing:.0%}.",
        ),
        claim(share.value_head < share.nothing - 0.03, f"A random value head: {share.value_head:.0%}."),
        claim(
            kl.score > 2 * kl.nothing and kl.temperature > 1.2 * kl.nothing,
            "A score that is not standardized, or log-probabilities that ignore the temperature, change the scale of "
            f"the KL coefficient: these runs go to {kl.score:.1f} and {kl.temperature:.1f} nats instead of "
            f"{kl.nothing:.1f}, the former with fewer valid texts ({mean.gold_valid.score:.1%}).",
        ),
        claim(
            (share[["advantages", "adam_eps"]] - share.nothing).abs().max() < 0.03,
            "Whitening and Adam's eps change it by less than three points.",
        ),
        table_of_runs("detail", runs, DETAILS, ["fraction_of_optimum", *GOLD]),
        figure("details", "Share of the optimum by detail, a dot a seed, a cross a broken run"),
        files(results, "python -m experiments.study details", "details.csv", "details"),
    )


def stability(results: Path) -> str:
    runs = pd.read_csv(results / "stability.csv")
    runs[["K", "lr"]] = runs.variant.str.extract(r"(K\d+)_lr_(.+)")
    runs["good"], broken = runs.gold_ethical * runs.gold_valid, runs.broken.notna()
    fast, one_pass = runs.lr == "1e-2", runs.K == "K1"
    valid, rates = runs.groupby("variant").gold_valid.mean(), sorted(runs.lr.unique(), key=float)

    def cell(group: pd.DataFrame) -> str:
        count = group.broken.notna().sum()
        return f"{group.good.mean():.0%}" + (f", {count} of {len(group)} broken" if count else "")

    rows = {
        f"K = {epochs}": {f"lr {lr}": cell(runs[runs.variant == f"K{epochs}_lr_{lr}"]) for lr in rates}
        for epochs in (1, 2, 4, 8)
    }
    return section(
        "How stable is PPO?",
        f"PPO epochs K against the learning rate, {GRIDS['stability'].episodes:,} episodes, five seeds each. What "
        "counts as broken was fixed before the runs (`collapse` in `experiments/study.py`): a KL above 20 nats, "
        "fewer than half of the texts valid, the entropy under a tenth of the reference's, or half of the gain lost "
        "by the end.",
        claim(not broken[~fast].any(), f"Up to 3e-3 none of {(~fast).sum()} runs breaks, whatever K."),
        claim(
            broken[fast & ~one_pass].all() and broken[fast & one_pass].sum() == 1,
            f"At 1e-2 all {(fast & ~one_pass).sum()} runs with K > 1 break, and one of {(fast & one_pass).sum()} with "
            "K = 1.",
        ),
        claim(
            (runs.broken[broken] == "KL above 20 nats").all() and max(valid["K2_lr_1e-2"], valid["K8_lr_1e-2"]) < 0.5,
            f"All break in the same way: the KL goes to {int(runs.kl[broken].min())} nats and more, and the texts are "
            f"no longer valid ({valid['K2_lr_1e-2']:.1%} of them with K = 2, {valid['K8_lr_1e-2']:.1%} with K = 8).",
        ),
        "Steps that are too long break a run, and more passes over a batch make them longer; the clip range does not "
        "prevent it.",
        claim(runs[runs.lr == "1e-5"].gold_ethical.mean() < 0.53, "At 1e-5 nothing is learned."),
        "The table has the share of texts that are valid and ethical.",
        table("", rows),
        figure("stability", "Share of valid and ethical texts by K and learning rate, with the number of broken runs"),
        files(results, "python -m experiments.study stability --seeds 5", "stability.csv", "stability"),
    )


def generators(results: Path) -> str:
    runs = pd.read_csv(results / "models.csv")
    share = runs.groupby("variant").fraction_of_optimum
    mean, between_seeds, smallest = share.mean(), share.max() - share.min(), runs.variant == "gpt2_1x64"
    folders = [results / "models" / f"{run.variant}_seed{run.seed}" for run in runs.itertuples()]
    valid = pd.Series({folder.name: load(folder / "evaluation.json")["worst_query"]["valid"] for folder in folders})
    most, few = valid[valid >= 0.8], valid[valid < 0.8]
    exceptions = [f"{value:.0%} with {name.replace('_', ' ')}" for name, value in few.items()]
    return section(
        "Does it work with other generators?",
        "GPT-2 in three sizes, GPT-NeoX and Llama (layers x width), each trained from scratch on the shipped texts; "
        f"then PPO with the default settings, {GRIDS['models'].episodes:,} episodes, with three seeds of generator and "
        "PPO and one classifier.",
        claim(
            (runs.groupby("variant").seed.nunique() == 3).all() and runs.gold_ethical.min() > 0.85,
            f"It does: all policies end at {runs.gold_ethical.min():.1%} gold ethical or more.",
        ),
        claim(
            mean.max() - mean.min() < between_seeds.max(),
            f"No size and no architecture is ahead: the means lie between {mean.min():.0%} and {mean.max():.0%} of the "
            f"optimum, and the seeds of one generator differ by up to {100 * between_seeds.max():.0f} points.",
        ),
        claim(
            runs[smallest].gold_valid.max() < runs[~smallest].gold_valid.min(),
            f"The smallest writes fewer valid texts, {runs[smallest].gold_valid.mean():.0%} instead of "
            f"{runs[~smallest].gold_valid.min():.0%} and more.",
        ),
        claim(
            runs.worst_query_kl.max() < 5 and len(few) == 2,
            f"The query with the largest KL is at {runs.worst_query_kl.min():.1f} to {runs.worst_query_kl.max():.1f} "
            f"nats. {most.min():.0%} of its texts and more are valid in all runs but two: {' and '.join(exceptions)}.",
        ),
        "(With one seed, one pass over a batch and queries from valid.txt only, GPT-NeoX and Llama had ended at 63% "
        "and a GPT-2 of their size at 75%: `git show 1710b10:data_results/models.csv`. With the present default they "
        "are level.)",
        table_of_runs(
            "generator",
            runs,
            {name: name.replace("_", " ") for name in GRIDS["models"].variants},
            ["fraction_of_optimum", *GOLD],
        ),
        figure("models", "Share of the optimum by generator, a dot a seed"),
        files(results, "python -m experiments.study models --seeds 3", "models.csv", "models"),
    )


CRITICS = {
    "default": "**default**",
    "no_critic": "no critic: `--value-coef 0`",
    "value_lr_1e-2": "ten times the learning rate: `--value-lr 1e-2`",
    "warmup_4": "the critic first: `--critic-warmup 4`",
    "warmup_4_value_lr_1e-2": "both",
}


def critic(results: Path) -> str:
    runs, folder = pd.read_csv(results / "critic.csv"), results / "critic"
    logs = [pd.read_csv(folder / f"{run.variant}_seed{run.seed}" / "log.csv") for run in runs.itertuples()]
    runs["explained"] = [log.explained_variance[log["update"] > 4].mean() for log in logs]
    mean = runs.groupby("variant")[["fraction_of_optimum", "explained"]].mean()
    share, explained = mean.fraction_of_optimum, mean.explained
    return section(
        "Should the critic learn first?",
        f"The default with {GRIDS['critic'].episodes:,} episodes, 40 updates, three seeds each. With a warm-up of four "
        "updates the value head alone learns in the first tenth of the run.",
        claim(
            share.max() == share["default"] and share["default"] - share.min() < 0.05,
            f"No variant gains on the default ({share['default']:.0%} of the optimum): the critic first ends at "
            f"{share['warmup_4']:.0%}, which a tenth fewer updates of the policy would explain, and no critic at "
            f"{share['no_critic']:.0%}. The ranges of most overlap.",
        ),
        claim(
            explained.max() < 0.01,
            "What the value head says first cannot help, because it learns nothing: with each of these settings it "
            "explains none of the returns' variance. What a text is worth depends on two things together, and a "
            "linear function of the generator's states does not hold that.",
        ),
        "So `--critic-warmup` is off by default. With a pretrained model it has not been tried.",
        table_of_runs("critic", runs, CRITICS, ["fraction_of_optimum", *GOLD]),
        figure("critic", "Share of the optimum by variant, a dot a seed"),
        files(results, "python -m experiments.study critic", "critic.csv", "critic")
        + " The commit of most of these runs was not kept.",
    )


QUESTIONS = (ablations, full_length, critic, details, stability, generators)
