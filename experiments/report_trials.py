"""Questions about what was tried with pretrained models, a function a section, as in experiments/report_ppo.py."""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.grids import GRIDS
from experiments.markdown import claim, figure, files, lines, load, section, table
from experiments.report_methods import TRAINERS
from experiments.report_pretrained import WHOLE_WAY, evaluation_of, gains
from rlhf import plots

CHOSEN = WHOLE_WAY["sentiment"][0]  # the settings that became the defaults


def trials_of(results: Path) -> pd.DataFrame:
    """A row a trial, and one for what was chosen; means over the last fifth of the updates."""
    rows = {}
    trials = sorted(path.parent for path in (results / "pretrained/trials").glob("*/log.csv"))
    for folder in [*trials, results / CHOSEN]:
        settings, log = load(folder / "config.json")["settings"], pd.read_csv(folder / "log.csv")
        end = log.tail(len(log) // 5).mean(numeric_only=True)
        rows[folder.name] = settings | {name: end[name] for name in ("score", "ethics", "kl", "terminated")}
        rows[folder.name] |= {"log": log, "fine_tuned": settings["policy"] != "models/smollm2"}
    table = pd.DataFrame(rows).T.sort_values(["fine_tuned", "episodes", "lr"], kind="stable")
    return table.loc[[*table.index.drop(Path(CHOSEN).name), Path(CHOSEN).name]]


def baseline_of(run) -> str:
    if run.leave_one_out:
        return "leave-one-out, 4 answers"
    return f"a critic, alone for {run.critic_warmup} updates" if run.value_coef else "none"


def trials(results: Path) -> str:
    """Runs that look for the settings of `make pretrained`."""
    runs = trials_of(results)
    raw = runs[~runs.fine_tuned.astype(bool)]
    chosen, untuned = runs.loc[Path(CHOSEN).name], runs.loc["leave_one_out_lr_5e-5_kl_coef_0.1"]
    longer, strongest = raw[raw.episodes == 10_240], raw.score.idxmax()
    fifths = [log.score.groupby(log.index * 5 // len(log)).mean() for log in longer.log]
    alone, others = raw.loc["kl_coef_0.3"], raw.loc["leave_one_out_kl_coef_0.3"]
    rows = [
        [
            "on SST-2" if run.fine_tuned else "no",
            plots.short(run.lr) + ("" if pd.isna(run.lora) else f", LoRA of rank {run.lora:.0f}"),
            f"{run.kl_coef:g}",
            baseline_of(run),
            f"{run.episodes:,}",
            str(run.seed),
            f"{run.ethics:.2f}",
            f"{run.score:.2f}",
            f"{run.kl:.2f}",
        ]
        for run in runs.itertuples()
    ]
    header = "fine-tuned|learning rate|KL coefficient|baseline|episodes|seed|reward model's mean|score (SD)|KL (nats)"
    return section(
        "Which settings does a pretrained model want?",
        "Trials on the sentiment task.",
        lines(header.split("|"), rows),
        "Means over the last fifth of the updates, of the policy that PPO trains, whatever `--interpolate` writes.",
        claim(
            chosen.ethics > untuned.ethics + 0.1 and chosen.kl < untuned.kl + 0.5,
            "The last row has the defaults. Without the pass over SST-2's sentences nearly the same settings end at "
            f"{untuned.ethics:.2f} and {untuned.kl:.1f} nats instead of {chosen.ethics:.2f} and {chosen.kl:.1f}: as it "
            "comes, the model follows the opening of a review with quotation marks, brackets and new lines, and often "
            "does not end. PPO then pays for removing these first.",
        ),
        claim(
            not ((raw.ethics > 0.85) & (raw.kl < 6)).any(),
            "From the model as it comes, no trial brings the reward model's mean over 0.85 within 6 nats.",
        ),
        claim(
            (longer.kl_coef == 0.3).all() and all(np.ptp(means.iloc[2:]) < 0.1 for means in fifths),
            "With a KL coefficient of 0.3 the score hardly moves after two fifths of 10,240 episodes.",
        ),
        claim(
            raw.kl_coef.astype(float).idxmin() == strongest and raw.kl.astype(float).idxmax() == strongest,
            "The lowest coefficient, with a higher learning rate, gains most and goes furthest.",
        ),
        claim(
            others.score > alone.score and others.kl < alone.kl,
            f"Leave-one-out ends at the higher score ({others.score:.2f} against {alone.score:.2f}) and the lower KL "
            f"({others.kl:.2f} against {alone.kl:.2f} nats), in one seed. It is the default for pretrained models, "
            "unless a flag asks for a critic.",
        ),
        of_critic(results, runs.loc["critic_first"]),
        files(results, "finetuning_nlg.py ...", "pretrained/trials")
        + " The whole command of each trial is in its `config.json`. A grid around the default, not run yet: "
        "`python -m experiments.study recipe --seeds 1`.",
    )


def of_critic(results: Path, critic: pd.Series) -> str:
    """Against leave-one-out on the same models, which are not those of the other trials: OURS."""
    log = pd.read_csv(results / OURS / "log.csv")
    default = log.tail(len(log) // 5).mean(numeric_only=True)
    explained = critic.log.explained_variance.tail(len(critic.log) // 5).mean()
    return claim(
        critic.score < default.score and abs(critic.kl - default.kl) < 0.2 and 0 < explained < 0.3,
        f"A critic that learns first, with a learning rate of {critic.value_lr:g}, explains {explained:.0%} of the "
        f"returns' variance by the end, and ends at a score of {critic.score:.2f} ({critic.kl:.1f} nats) instead of "
        f"{default.score:.2f} ({default.kl:.1f} nats), with which leave-one-out ends on the same models.",
    )


# the default, but for the whole way; on the models that the peer and the runs of `lora` and `reviews` have
OURS = "peer/sentiment_seed0"
PEERS = {
    "sentiment_seed0": "this code, `--interpolate 1`",
    "trl_pretrained_our_settings_seed0": "TRL, settings of this code",
}


def peer(results: Path) -> str:
    runs = pd.DataFrame([evaluation_of(results / "peer" / name) for name in PEERS], index=list(PEERS))
    runs["minutes"] = pd.read_csv(results / "peer.csv").set_index("run").minutes
    rows = {PEERS[name]: gains(runs.loc[[name]]) | {"minutes": f"{runs.minutes[name]:.0f}"} for name in PEERS}
    ours, trl = runs.itertuples()
    all_of_ours = pd.Series([evaluation_of(results / run)["judge"] for run in WHOLE_WAY["sentiment"]])
    return section(
        "How does TRL's PPOTrainer do with the pretrained model?",
        "TRL 1.12.0 on the sentiment task, one seed: the same reference, reward model, judge, queries, episodes, batch "
        "size, learning rate, KL coefficient, minibatches and passes over a batch, but a value network as large as the "
        "policy. Each had a core of its own of an AMD EPYC; TRL's products are in float32, this code's in bfloat16.",
        table("run", rows),
        claim(
            all_of_ours.min() < trl.judge < all_of_ours.max() and ours.judge > trl.judge and ours.kl < trl.kl,
            f"The texts are alike: TRL's share lies within that of three seeds of this code ({all_of_ours.min():.1%} "
            f"to {all_of_ours.max():.1%}, another machine and reward model, above).",
        ),
        claim(
            trl.minutes > 3 * ours.minutes,
            f"TRL took {trl.minutes / ours.minutes:.1f} times as long.",
        ),
        files(results, "make peer RUN=pretrained/sentiment_seed0", "peer.csv", "peer"),
    )


FAR = "pretrained/interpolation/lr_1e-4_kl_coef_0.05_seed0_interpolate_1"  # a run of this code that goes as far as GRPO


def grpo_on_reviews(results: Path) -> str:
    """Beside the run of the grid `reviews` with the defaults, on its models."""
    ours, names = "default_seed0", {"default_seed0": "this code, `--interpolate 1`"}
    listed = pd.read_csv(results / "peers_reviews.csv").set_index("run")
    minutes = listed.minutes
    folders = {ours: results / "reviews" / ours}
    for folder in sorted((results / "peers_reviews").glob("*_seed*")):
        folders[folder.name], names[folder.name] = folder, TRAINERS[folder.name.partition("_")[0]]
    runs = pd.DataFrame([evaluation_of(folder) for folder in folders.values()], index=list(folders))
    settings = load(folders[ours] / "config.json")["settings"]
    rows = {names[run]: gains(runs.loc[[run]]) | {"minutes": f"{minutes[run]:.0f}"} for run in folders}
    default, others = runs.loc[ours], runs.drop(ours)
    grpo, far = others.iloc[0], evaluation_of(results / FAR)
    lengths = [load(folder / "evaluation.json")["response_length"] for folder in folders.values()]
    pairs = pd.read_csv(folders[grpo.name] / "pairs.csv", keep_default_na=False)
    praise = pairs.response_after.str.contains(PRAISE).sum()
    command = "python -m experiments.peers_today"
    return section(
        "How does TRL's GRPO do with the pretrained model?",
        "TRL 1.16.0 on the sentiment task, one seed: the same reference, reward model, judge, queries, "
        f"{settings['episodes']:,} sampled texts, batches of {settings['batch_size']} in {settings['minibatches']} "
        f"minibatches, K = {settings['ppo_epochs']}, learning rate {plots.short(settings['lr'])} and KL coefficient "
        f"{settings['kl_coef']:g}, which were found for this code; nothing was searched for TRL's. GRPO has 8 texts to "
        "a query, this code 4. Each had a core of a busy AMD EPYC; TRL's products are in float32, this code's "
        "in bfloat16.",
        table("trainer", rows),
        claim(
            set(others.index) == {grpo.name}
            and grpo.judge > default.judge
            and grpo.kl > 1.5 * default.kl
            and np.allclose(listed.kl[list(folders)], runs.kl, atol=1e-4),
            f"GRPO ends higher, at {grpo.judge:.1%}, and goes {grpo.kl / default.kl:.1f} times as far: it divides the "
            "scores of a query's texts by their deviation, so that the same coefficient weighs the KL less.",
        ),
        claim(
            grpo.judge > far["judge"] and grpo.distinct > far["distinct"] + 0.1 and abs(grpo.kl - far["kl"]) < 0.5,
            "At this KL it is ahead of this code: with half of the coefficient and twice the learning rate, on other "
            f"models of the same kind, this code ends at {far['judge']:.1%} and {far['kl']:.1f} nats, with "
            f"{far['distinct']:.2f} of the distinct pairs of words where GRPO has {grpo.distinct:.2f}.",
        ),
        claim(
            abs(lengths[1]["after"] - lengths[1]["before"]) < 0.5 and lengths[0]["after"] < lengths[0]["before"] - 3,
            f"One difference shows in the texts: GRPO's stay as long as they were ({lengths[1]['after']:.1f} tokens), "
            f"this code's shrink from {lengths[0]['before']:.1f} to {lengths[0]['after']:.1f}. Here the KL of the "
            "tokens to come is a part of the return, so that an early end pays; in GRPO it is a term of each token's "
            "own loss only. Whether that, the 8 texts to a query or the division keeps the words varied has not been "
            "tested.",
        ),
        claim(
            praise < 5,
            f"In {praise} of {len(pairs)} random texts of GRPO (`pairs.csv`) something is *entertaining*, "
            "*remarkable*, *beautiful*, *heartwarming* or *inspiring*.",
        ),
        claim(
            minutes[grpo.name] > 2 * minutes[ours],
            f"GRPO took {minutes[grpo.name] / minutes[ours]:.1f} times as long, beside other programs. RLOO and DPO "
            "have not been run here yet.",
        ),
        files(results, f"{command} --run data_results/reviews/{ours} ...", "peers_reviews.csv", "peers_reviews")
        + " The settings are in the `config.json` of each run.",
    )


LORA = [f"pretrained/trials/lora_seed{seed}" for seed in range(3)]


def lora(results: Path) -> str:
    """On the models of peer/sentiment_seed0; the three seeds of full fine-tuning have models of another machine."""
    groups = {
        "LoRA of rank 8, 3 seeds": LORA,
        "all weights, one seed on the same models": [OURS],
        "all weights, 3 seeds on models made on another machine": WHOLE_WAY["sentiment"],
    }
    runs = {name: pd.DataFrame([evaluation_of(results / run) for run in some]) for name, some in groups.items()}
    adapters, same, others = runs.values()
    all_weights = pd.concat([same, others])
    settings, of_all = (load(results / run / "config.json")["settings"] for run in (LORA[0], OURS))
    return section(
        "Is LoRA as good as training all weights?",
        f"SmolLM2 on film reviews, {settings['episodes']:,} episodes, `--interpolate 1`, the default "
        "learning rates: "
        f"{plots.short(settings['lr'])} with LoRA, {plots.short(of_all['lr'])} for all weights.",
        table("trained", {name: gains(some) for name, some in runs.items()}),
        claim(
            adapters.judge.min() > others.judge.min() and adapters.kl.mean() < others.kl.mean() < same.kl.mean(),
            f"It is: the judge finds {adapters.judge.min():.0%} to {adapters.judge.max():.0%} of the texts positive, "
            f"at {adapters.kl.min():.1f} to {adapters.kl.max():.1f} nats.",
        ),
        claim(
            same.judge.item() > adapters.judge.max(),
            f"The one run with all weights on the same models ends higher, at {same.judge.item():.0%} and "
            f"{same.kl.item():.1f} nats.",
        ),
        claim(
            abs(adapters.distinct.mean() - all_weights.distinct.mean()) < 0.05,
            f"The texts repeat themselves as much: {adapters.distinct.min():.2f} to {adapters.distinct.max():.2f} of "
            f"the reference's distinct pairs of words, with all weights {all_weights.distinct.min():.2f} to "
            f"{all_weights.distinct.max():.2f}.",
        ),
        files(results, "finetuning_nlg.py ... --lora 8", "pretrained/trials")
        + " The whole command is in the `config.json` of `lora_seed0` to `lora_seed2`.",
    )


PRAISE = "entertaining|remarkable|beautiful|heartwarming|inspiring"


def reviews(results: Path) -> str:
    """Runs around OURS, on its models."""
    rows = {
        "with a KL penalty": OURS,
        "no KL penalty": "reviews/no_price_seed0",
        "the judge's 250 answers": "reviews/answers_250_seed0",
        "with a KL penalty, models made anew": "reviews/default_seed0",
    }
    runs = pd.DataFrame([evaluation_of(results / run) for run in rows.values()], index=list(rows))
    default, free, taught, anew = runs.itertuples()
    kl = pd.read_csv(results / "reviews.csv").set_index("variant").kl
    learned = pd.read_csv(results / rows[taught.Index] / "reward_model.csv").iloc[-1]
    pairs = pd.read_csv(results / rows[free.Index] / "pairs.csv", keep_default_na=False)
    log = pd.read_csv(results / rows[free.Index] / "log.csv")
    praise = pairs[["response_before", "response_after"]].apply(lambda texts: texts.str.contains(PRAISE).sum())
    other = load(results / rows[taught.Index] / "evaluation_by_minilm.json")
    return section(
        "How do film reviews end without a KL penalty, or with 250 answers?",
        "SmolLM2 on film reviews, one seed, the same models but in the last row, `--interpolate 1`. The reward model "
        f"is MiniLM, with 3,460 labels. In the third row the judge says of {learned.labels:.0f} texts of the reference "
        "whether they are good; SmolLM2 learns from that, and is the reward model (`--reward human`).",
        table("run", {name: gains(runs.loc[[name]]) for name in rows}),
        claim(
            taught.judge > 0.9 and taught.kl > default.kl + 1,
            f"{learned.labels:.0f} answers are enough here: the judge that gave them finds {taught.judge:.0%} of the "
            f"texts positive, and MiniLM, which has no part in that run, {other['gold']['ethical_after']:.0%} of "
            f"{other['texts']} of them. In the [shipped world](#how-many-answers-does-a-reward-model-need), with a "
            "small model from scratch and the best of four texts as an answer, as many teach next to nothing: no word "
            "there tells right from wrong. But the policy goes further, "
            f"to {kl['answers_250']:.1f} nats instead of {default.kl:.1f}.",
        ),
        claim(
            free.kl > 2 * default.kl and free.distinct < default.distinct and free.judge >= default.judge,
            f"Without a penalty the policy goes to {kl['no_price']:.0f} nats, and the judge likes its texts as well "
            f"({free.judge:.1%}), but {1 - free.distinct:.0%} of the distinct pairs of words are gone.",
        ),
        claim(
            praise.response_after > praise.response_before + 8,
            f"In {praise.response_after} of {len(pairs)} random texts (`pairs.csv`) something is *entertaining*, "
            f"*remarkable*, *beautiful*, *heartwarming* or *inspiring*, before PPO in {praise.response_before}.",
        ),
        claim(
            (log.gold_ethical > log.ethics).tail(10).all(),
            "The judge's share stays above the reward model's mean to the end: a judge of the same kind of labels does "
            "not see what a reader sees.",
        ),
        claim(
            abs(anew.judge - default.judge) < 0.01 and abs(anew.kl - default.kl) < 0.5,
            "With generator, reward model and judge made anew, from the same seeds on another day, the run with the "
            f"penalty ends alike, at {anew.judge:.1%} and {anew.kl:.1f} nats.",
        ),
        figure("reviews", "The reward model's mean and the judge's share against the KL, in the runs of this grid"),
        files(results, "python -m experiments.study reviews --seeds 1", "reviews.csv", "reviews")
        + f" The grid has {len(GRIDS['reviews'].variants)} settings; these three have been run.",
    )


QUESTIONS = (peer, grpo_on_reviews, lora, reviews, trials)
