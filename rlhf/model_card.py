"""The text of a model card, which the hub shows with a model: README.md in the model's folder."""

import pandas as pd

LIMITS = (
    "A research artefact. It knows the texts it was trained on and little else: what it calls ethical is what its "
    "training labels call so, and it can be fooled by texts unlike them. Do not use it to judge people."
)


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
