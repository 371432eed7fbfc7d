"""docs/log.md: what was tried on the way to the default settings, a line a trial, from data_results/trials.csv."""

from pathlib import Path

import pandas as pd

from experiments.markdown import claim, lines, section, spread

INTRO = """# What was tried

`python -m experiments.report` writes this page from [trials.csv](../data_results/trials.csv): runs on the way to the
default settings, most of them with one seed. [results.md](results.md) has the comparisons with several seeds. *score*,
*KL* and *explained variance* are means of the last eight updates, *of the optimum* is on held-out queries.
"""
FULL = 56_320  # episodes of a default run
FULL_COLUMNS = ["change", "settings", "seed", "episodes", "kl", "share", "classifier", "commit"]
# column of trials.csv -> its title on the page, and its format
COLUMNS = {
    "change": ("change", "{}"),
    "settings": ("settings", "{}"),
    "seed": ("seed", "{}"),
    "episodes": ("episodes", "{:,}"),
    "score": ("score", "{:.2f}"),
    "kl": ("KL", "{:.2f}"),
    "explained_variance": ("explained variance", "{:.2f}"),
    "share": ("of the optimum", "{:.1%}"),
    "worst_kl": ("worst query: KL", "{:.2f}"),
    "worst_valid": ("valid", "{:.0%}"),
    "classifier": ("classifier", "{}"),
    "commit": ("commit", "{:.7}"),
}
NUMBERS = {  # name here -> column of trials.csv, empty where it was not measured
    "share": "fraction_of_optimum_held_out",
    "score": "score_last_8_updates",
    "kl": "kl_last_8_updates",
    "explained_variance": "explained_variance_last_8_updates",
    "gold_ethical": "gold_ethical_held_out",
    "worst_kl": "worst_query_kl_held_out",
    "worst_valid": "worst_query_valid_held_out",
}


def page(results: Path) -> str:
    trials = pd.read_csv(results / "trials.csv", keep_default_na=False)
    trials["change"] = trials.change.replace("", "none")
    trials["settings"] = trials.settings.str.replace("minibatches 4, ", "")
    for new, column in NUMBERS.items():
        trials[new] = pd.to_numeric(trials[column])
    early, inside = trials.classifier == "label at every token", trials.change.str.contains("KL inside")
    last = trials.change.str.startswith("queries of")
    sections = critic(trials[early]), later(trials[~early & ~last & ~inside]), rare_queries(trials[last])
    return f"{INTRO}\n" + "\n\n".join([*sections, inside_queries(trials[inside])]) + "\n"


def trial_table(trials: pd.DataFrame, columns: list[str]) -> str:
    rows = [
        ["" if pd.isna(trial[column]) else COLUMNS[column][1].format(trial[column]) for column in columns]
        for _, trial in trials.iterrows()
    ]
    return lines([COLUMNS[column][0] for column in columns], rows)


def critic(trials: pd.DataFrame) -> str:
    with_it = trials[trials.change == "critic"]
    longer = with_it[with_it.episodes == 20_480]
    small, large = (longer[longer.settings.str.contains(f"lambda {x}")].score.item() for x in ("0.7", "0.95"))
    best = with_it[with_it.episodes == 16_384].score.max()
    without = trials[(trials.change == "none") & (trials.episodes == 16_384)].score.item()
    explained = with_it.explained_variance.max()
    return section(
        "A critic on the reward model's states",
        "In these trials *critic* means a value head on the states of the frozen reward model.",
        claim(
            explained > 0.7 and small < large - 0.2,
            f"It explains up to {explained:.2f} of the variance of the returns with a small lambda, but the score "
            f"rises more slowly: after 20,480 episodes it is {small:.2f} with lambda 0.7 and {large:.2f} with 0.95.",
        ),
        claim(
            without >= best,
            f"Without it a run reaches {without:.2f} in 16,384 episodes, with it {best:.2f} at best. It was not kept.",
        ),
        f"All runs have seed 0 and the code of commit {trials.commit.iloc[0].split()[0]} with the change.",
        trial_table(trials, ["change", "settings", "episodes", "score", "kl", "explained_variance"]),
    )


def later(trials: pd.DataFrame) -> str:
    short = trials[trials.classifier.str.startswith("8 epochs") & (trials.episodes == 30_720)]
    smooth = ~short.classifier.str.contains("smoothing 0,")
    full = trials[(trials.episodes == FULL) & trials.seed.isin((1, 4)) & ~trials.settings.str.contains("lr 0.002")]
    constant, adaptive = full[full.change == "none"], trials[trials.settings.str.contains("target KL")].share.item()
    falling = full[full.change.str.endswith("done")].set_index("change").share
    start = {times: falling[falling.index.str.contains(f"{times} times")] for times in (3, 4, 5)}
    late = full[full.change.str.startswith("learning rate")].share.item()
    seed1 = constant[constant.seed == 1].share.item()
    return section(
        "KL coefficient, label smoothing, length of the run",
        claim(
            short.share[smooth].min() > short.share[~smooth].item(),
            f"With label smoothing the runs end at {short.share[smooth].min():.1%} to {short.share[smooth].max():.1%} "
            f"of the optimum after 30,720 episodes, without it at {short.share[~smooth].item():.1%} (one run each).",
        ),
        claim(adaptive == trials.share.min(), f"An adaptive KL coefficient is the lowest of all, {adaptive:.1%}."),
        claim(
            start[4].mean() > max(start[3].mean(), start[5].mean(), constant.share.mean()),
            f"On seeds 1 and 4 with all {FULL:,} episodes, a constant KL coefficient ends at "
            f"{spread(constant.share, '{:.1%}')}. One that starts three times as high and falls ends at "
            f"{spread(start[3], '{:.1%}')}, four times {spread(start[4], '{:.1%}')}, five times "
            f"{spread(start[5], '{:.1%}')}. Four times, falling to 0.15, became the default.",
        ),
        claim(
            abs(late - seed1) < 0.01,
            f"A learning rate that falls only over the last half ends at {late:.1%}, a linear one at {seed1:.1%} "
            "(seed 1).",
        ),
        trial_table(trials, FULL_COLUMNS),
    )


def rare_queries(trials: pd.DataFrame) -> str:
    before = trials[trials.change.str.startswith("queries of valid.txt only")]
    more = trials[trials.change.str.startswith("queries of train.txt too")]
    small = more[more.classifier == before.classifier.iloc[0]]  # with the classifier of the runs before
    once, twice = small[small.change.str.endswith("no critic (value_coef 0)")].set_index("settings").share
    on_body = small[small.change.str.contains("warmed up")].share.item()
    new = more[more.classifier != before.classifier.iloc[0]]
    without = new.change.str.contains("no critic")
    return section(
        "Rare queries, passes over a batch, and the critic",
        "A query that came up a few times in a run was where the policy settled for the wrong act, and on another "
        "processor one of 64 held-out queries fell apart. The openings of train.txt are many more than those of "
        "valid.txt.",
        claim(
            before.share.max() < once < twice,
            f"With queries of valid.txt alone five seeds end at {spread(before.share, '{:.1%}')} of the optimum. "
            f"With those of train.txt too and no critic, one seed ends at {once:.1%} with K = 1 and {twice:.1%} with "
            "K = 2.",
        ),
        claim(
            on_body < once,
            f"A critic on a copy of the reward model's body, fitted to rollouts of the reference before the policy "
            f"moves, ends lower ({on_body:.1%}), though it explains {more.explained_variance.max():.2f} of the "
            "variance of the returns.",
        ),
        claim(
            new.share.min() > twice and abs(new.share[without].mean() - new.share[~without].mean()) < 0.01,
            "With the classifier that train_cls.py fits from scratch and K = 2, two seeds each end at "
            f"{spread(new.share[without], '{:.1%}')} without the critic and at {spread(new.share[~without], '{:.1%}')} "
            "with it. The critic of the papers stayed.",
        ),
        trial_table(trials, FULL_COLUMNS),
    )


def inside_queries(trials: pd.DataFrame) -> str:
    with_it, without = trials[trials.change.str.startswith("KL")], trials[~trials.change.str.startswith("KL")]
    default = with_it[(with_it.episodes == FULL) & with_it.settings.str.endswith("kl_coef 0.12")]
    lost = default[default.worst_valid < 7 / 8]
    cheap = without[without.settings.str.endswith("kl_coef 0.1")].squeeze()
    short = with_it[with_it.episodes < FULL]
    return section(
        "The KL inside queries, and its price",
        claim(
            cheap.worst_valid < 0.5 and without.worst_valid.max() > 7 / 8,
            "Nothing holds the policy inside a query, where it never writes. A query that ends there, and came up "
            f"seldom, is where it breaks: with a KL coefficient of 0.1, {cheap.worst_valid:.0%} of the texts after one "
            f"of 64 held-out queries are valid, at {cheap.worst_kl:.0f} nats. So the loss holds the exact KL inside "
            "queries too.",
        ),
        claim(
            len(lost) == 1 and lost.worst_kl.item() < 5,
            f"With it and a coefficient that falls to 0.12, ten runs, half of them with 256-bit vectors, end at "
            f"{spread(default.share, '{:.1%}')} of the optimum. One of them lost a query at only "
            f"{lost.worst_kl.item():.1f} nats ({lost.worst_valid.item():.0%} valid). The coefficient went back to 0.15 "
            "([results.md](results.md): fifteen runs).",
        ),
        claim(
            short.share.max() < default.share.mean() and short.gold_ethical.max() < 0.987,
            f"A shorter run, of 40,960 episodes, ends at {spread(short.share, '{:.1%}')}, with a learning rate 1.5 "
            "times as high too.",
        ),
        trial_table(trials, [*FULL_COLUMNS[:6], "worst_kl", "worst_valid", *FULL_COLUMNS[6:]]),
    )
