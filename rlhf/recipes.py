"""Default settings that depend on the model: what suits a small model from scratch destroys a pretrained one.

A model that train_cls.py or train_nlg.py built from scratch knows it, in its configuration, and so do the models that
were fine-tuned from it. Every other model counts as pretrained.
"""

import argparse
import json
from pathlib import Path
from typing import Any

FROM_SCRATCH, PRETRAINED = "from scratch", "pretrained"
Recipe = dict[str, tuple[Any, Any]]  # flag -> its default from scratch, and for a pretrained model
GENERATOR: Recipe = {"optimizer": ("muon", "adamw"), "lr": (8e-3, 5e-5), "epochs": (4, 2)}
CLASSIFIER: Recipe = {
    "optimizer": ("muon", "adamw"),
    "lr": (1e-3, 2e-5),
    "epochs": (12, 3),
    "revisit": (0.1, 1.0),
    "label_smoothing": (0.05, 0.0),
}
PPO: Recipe = {
    "optimizer": ("muon", "adam"),
    "lr": (1e-3, 5e-5),
    "kl_coef": (0.15, 0.1),
    "kl_start": (4.0, 1.0),
    "value_coef": (0.1, 0.0),
    "leave_one_out": (False, True),
    "answers": (1, 4),
    "episodes": (56_320, 5120),
    "batch_size": (256, 128),
    "ppo_epochs": (2, 1),
    "query_kl": (True, False),
    "interpolate": (1.0, 0.8),
    "reference_samples": (4096, 1024),
}
PEOPLE: Recipe = {"reward_lr": (1e-3, 5e-5)}  # of the reward model, which starts as the policy
LENGTHS: Recipe = {"query_length": (5, 256), "response_length": (40, 128)}  # flag -> its default for texts, with --chat
LORA_LR = 10  # learning rates of adapters, relative to full fine-tuning with Adam ("LoRA Without Regret", 2025)
MUON_LR = 3  # Muon's learning rates, relative to Adam's


def is_new(name: str) -> bool:
    """Whether a flag names a model that is yet to be made: scratch, or scratch:ARCHITECTURE:LAYERSxWIDTH."""
    return name.partition(":")[0] == "scratch"


def kind_of(name: str) -> str:
    """The kind of a model that a flag names: scratch..., a folder, or a hub name."""
    if is_new(name):
        return FROM_SCRATCH
    base = _setting(Path(name) / "adapter_config.json", "base_model_name_or_path")
    from_scratch = _setting(Path(base or name) / "config.json", "from_scratch")
    return FROM_SCRATCH if from_scratch else PRETRAINED


def _setting(file: Path, name: str) -> Any:
    """Of a model's configuration file; None where there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError):  # loading the model says what is wrong with it
        return None


def with_lora(recipe: Recipe, rank: int | None) -> Recipe:
    """The recipe for adapters of this rank: with Adam, at higher learning rates. Without a rank the recipe itself."""
    if rank is None:
        return recipe
    (_, optimizer), (from_scratch, pretrained) = recipe["optimizer"], recipe["lr"]
    return recipe | {
        "optimizer": (optimizer, optimizer),
        "lr": tuple(float(f"{lr:.2g}") for lr in (from_scratch * LORA_LR / MUON_LR, pretrained * LORA_LR)),
    }


def fill(args: argparse.Namespace, recipe: Recipe, name: str) -> None:
    """Give every flag of the recipe that the user did not set its default for the model `name`."""
    choose(args, recipe, kind_of(name) == PRETRAINED)


def choose(args: argparse.Namespace, recipe: Recipe, is_second: bool) -> None:
    """Give every flag of the recipe that the user did not set the first or the second of its defaults."""
    for flag, defaults in recipe.items():
        if getattr(args, flag) is None:
            setattr(args, flag, defaults[is_second])


def summary(args: argparse.Namespace, recipe: Recipe, name: str) -> str:
    """What a run says of its settings that depend on the model `name`."""
    values = ", ".join(f"--{flag.replace('_', '-')} {getattr(args, flag)}" for flag in recipe)
    return f"settings for a model {'that is ' if kind_of(name) == PRETRAINED else ''}{kind_of(name)}: {values}"


def described(recipe: Recipe, flag: str, text: str) -> str:
    """The --help text of a flag of the recipe, with both defaults."""
    from_scratch, pretrained = recipe[flag]
    return f"{text} (default: {from_scratch} from scratch, {pretrained} pretrained)"
