"""The text of a model card, which the hub shows with a model: README.md in the model's folder."""

from typing import NamedTuple

import pandas as pd

LIMITS = (
    "A research artefact. It knows the texts it was trained on and little else: what it calls ethical is what its "
    "training labels call so, and it can be fooled by texts unlike them. Do not use it to judge people."
)


class Chosen(NamedTuple):
    """A policy that is not the one after the last update."""

    update: int  # after which it was taken
    reason: str
    results: dict[str, float | None]


def of_ppo(row: dict, ethics_before: float, chosen: Chosen | None, interpolate: float) -> tuple[str, pd.DataFrame]:
    """Title and results of a fine-tuned policy: the last update's row of log.csv, or those of a chosen one.

    interpolate: where the policy lies between the reference and the one of these results.
    """
    title = "A generator fine-tuned with PPO"
    if interpolate < 1:
        title += f", at {interpolate:g} of the way in weights from the reference to the policy of these results"
    if chosen:
        numbers = {name: x for name, x in chosen.results.items() if x is not None}
        column = f"after update {chosen.update}"
        return f"{title}: {column}, {chosen.reason}", pd.DataFrame({column: numbers}, dtype=float)
    after = {name: row[name] for name in ("ethics", "improvement_ma", "score", "kl", "entropy", "terminated")}
    before = {"ethics": ethics_before, "score": 0.0, "kl": 0.0}
    return title, pd.DataFrame({"before": before, "after": after}).loc[list(after)]


def text(title: str, task: str, source: str, record: dict, results: pd.DataFrame) -> str:
    """A short model card in the hub's form: what the model is, its results, its limits and its settings.

    task: the hub's name of what the model does. source: the training data. record: "settings" beside the fields of
    runtime.provenance().
    """
    settings = "\n".join(f"- `{name}`: {value}" for name, value in record["settings"].items() if value is not None)
    return f"""---
pipeline_tag: {task}
---
# {title}

Made by `{record["command"]}` (commit {record["commit"]}, {record["machine"]}) from `{source}`.

## Results

```
{results.to_string(float_format="%.4f")}
```

## Limits

{LIMITS}

## Settings

{settings}
"""
