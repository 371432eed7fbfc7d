"""What a run writes beside its log: its settings, and models with their cards."""

import argparse
import json
from pathlib import Path

import pandas as pd

from rlhf import checkpoint, model_card, models, rewards, runtime
from rlhf.errors import UserError
from rlhf.human import feedback
from rlhf.run_log import REWARD_MODEL
from rlhf.sampling import Sampling


def write_config(args: argparse.Namespace, reward: rewards.Reward, folder: Path, provenance: dict) -> None:
    """config.json of a run folder: the settings, how the scores are standardized, and where and how it was run."""
    runtime.write_json(folder / "config.json", {"settings": vars(args), **reward.state_dict()} | provenance)


def settings_of(config: dict) -> dict:
    """The settings in a config.json; a run that is older than a flag had what is its default."""
    return {"chat": False, "reward_sees": "both", "bounded_score": False, "interpolate": 1.0} | config["settings"]


def stopped_folder(out: str) -> str:
    """Of the last good policy of a run that the guard has stopped."""
    return f"{out}_stopped"


def refuse_to_replace(out: str, policy: str, rewards_of_run: list[str], gold: str) -> None:
    """Refuse an --out if it, or what is written beside it, would take the place of a model with which the run is
    evaluated later, or of a folder that is no model."""
    needed = {"--policy": [policy], "--reward": [rewards.weight_and_reward(x)[1] for x in rewards_of_run]}
    written = [out, stopped_folder(out), *[rewards.human_folder(out)] * rewards.includes_people(rewards_of_run)]
    for folder in written:
        for flag, names in (needed | {"--gold": [gold]}).items():
            if Path(folder).resolve() in [Path(name).resolve() for name in names]:
                raise UserError(
                    f"--out {out} would replace {flag} {folder}, which evaluate_nlg.py needs, too; give another folder"
                )
        checkpoint.refuse_other_than_model(folder)


def refuse_policy_of_another_run(run: Path, settings: dict) -> None:
    """Refuse a run whose --out holds the policy of another one by now. settings: the run's."""
    refuse_model_of_another_run(settings["out"], run, settings, "name its policy with --policy")


def refuse_reward_of_another_run(run: Path, settings: dict) -> None:
    """Refuse a run beside whose --out lies what people's answers taught in another one by now."""
    if rewards.includes_people(rewards.as_list(settings["reward"])):
        instead = "put the folder back that its answers taught"
        refuse_model_of_another_run(rewards.human_folder(settings["out"]), run, settings, instead)


def refuse_model_of_another_run(folder: str, run: Path, settings: dict, instead: str) -> None:
    """instead: what else the user can do."""
    record = Path(folder) / models.RECORD
    if not record.exists():  # older models have none
        return
    try:
        made = json.loads(record.read_text(encoding="utf-8"))["settings"]
        whose = f"{made['results']}/{made.get('run')}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record} does not say of which run its model is ({error!r}); train it again") from error
    names = sorted((made.keys() | settings.keys()) - checkpoint.MAY_CHANGE)
    if other := [name for name in names if made.get(name) != settings.get(name)]:
        raise UserError(
            f"{folder} has the model of {whose}, which is not {run} as it is now: --{other[0].replace('_', '-')} was "
            f"{made.get(other[0])}. Train every run with an --out of its own, and to its end, or {instead}"
        )


def metrics_file(args: argparse.Namespace) -> Path:
    """Of a classifier or a generator."""
    return Path(args.results) / f"{Path(args.out).name}_{models.RECORD}"


def save_trained(
    args: argparse.Namespace, model, tokenizer, title: str, task: str, results: pd.DataFrame, record: dict
) -> None:
    """A classifier or a generator with its model card, and the record of its training, which --results gets too."""
    models.save_folder(args.out, model, tokenizer, model_card.text(title, task, args.data, record, results), record)
    path = runtime.write_json(metrics_file(args), record)
    print(f"model: {args.out}; metrics: {path}")


def save_policy(
    args: argparse.Namespace, out: str, model, tokenizer, sampling: Sampling, title: str, results: pd.DataFrame,
    provenance: dict,
) -> None:  # fmt: skip
    """The policy with its model card."""
    card = model_card.text(title, "text-generation", args.data, {"settings": vars(args)} | provenance, results)
    model.generation_config = models.generation_config(tokenizer, sampling)
    record = {"results": results.to_dict(), "settings": vars(args)} | provenance
    models.save_folder(out, model, tokenizer, card, record)


def save_reward_model(args: argparse.Namespace, human: feedback.HumanFeedback, folder: Path, provenance: dict) -> None:
    """The reward model that learned people's answers, in a folder beside the policy."""
    table = pd.read_csv(folder / REWARD_MODEL).set_index("labels")
    title, record = "What people's answers taught", {"settings": vars(args)} | provenance
    card = model_card.text(title, "text-classification", args.feedback_file, record, table)
    models.save_folder(rewards.human_folder(args.out), human.model, human.tokenizer, card, record)
