"""What experiments/report.py writes with: sentences that the data must support, tables, figures, links."""

import json
import textwrap
from pathlib import Path

import pandas as pd

GOLD = ["gold_ethical", "gold_valid", "kl"]
# column of a table of runs -> its title on the page, and its format
COLUMNS = {
    "fraction_of_optimum": ("of the optimum", "{:.0%}"),
    "exact_fraction": ("of the optimum", "{:.1%}"),
    "gold_ethical": ("gold: ethical", "{:.1%}"),
    "gold_valid": ("gold: valid", "{:.1%}"),
    "kl": ("KL (nats)", "{:.2f}"),
    "kl_bound": ("KL, at most (nats)", "{:.2f}"),
    "score": ("score (SD)", "{:.2f}"),
    "ethics": ("reward model's mean", "{:.2f}"),
    "right": ("reward model: right on test texts", "{:.1%}"),
    "error": ("reward model: wrong on held-out answers (chance: 75%)", "{:.0%}"),
    "approx_kl": ("`approx_kl`", "{:.5f}"),
    "start_score": ("score at the start (SD)", "{:.2f}"),
    "start_kl": ("KL at the start (nats)", "{:.2f}"),
    "entropy": ("entropy (nats per token)", "{:.2f}"),
    "worst_query_kl": ("KL of the worst query", "{:.1f}"),
    "worst_query_valid": ("its valid texts", "{:.0%}"),
    "minutes": ("minutes", "{:.1f}"),
}


def claim(holds: bool, sentence: str) -> str:
    """The sentence, if the data supports it."""
    if not holds:
        raise AssertionError(f'the data no longer supports this sentence, change it in experiments/: "{sentence}"')
    return sentence


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def spread(values: pd.Series, form: str) -> str:
    """Mean (lowest to highest) of the runs that have a number."""
    values = values.dropna()
    if values.empty:
        return "-"  # not known
    mean, low, high = (form.format(x) for x in (values.mean(), values.min(), values.max()))
    return mean if low == high else f"{mean} ({low} to {high})"


def change(before: float, after: float, form: str) -> str:
    return f"{form.format(before)} → {form.format(after)}"


def table(corner: str, rows: dict[str, dict[str, str]]) -> str:
    """A row a name; all rows have the same columns."""
    columns = list(next(iter(rows.values())))
    return lines([corner, *columns], [[name, *(row[column] for column in columns)] for name, row in rows.items()])


def lines(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def table_of_runs(corner: str, runs: pd.DataFrame, names: dict[str, str], columns: list[str]) -> str:
    """A row a variant, in the order of `names`: variant -> its name on the page."""
    variants = runs.groupby("variant")
    return table(
        corner,
        {
            name: {
                title: spread(variants.get_group(variant)[column], form)
                for column in columns
                for title, form in [COLUMNS[column]]
            }
            for variant, name in names.items()
        },
    )


def figure(name: str, shows: str) -> str:
    return f"![{shows}](../data_results/fig_{name}.png)"


def files(results: Path, command: str, *names: str) -> str:
    """The files of a section, and the command that made them."""
    if missing := [name for name in names if not (results / name).exists()]:
        raise AssertionError(f"{results} lacks {missing[0]}, which a section of the page is made from")
    links = ", ".join(f"[{name}](../data_results/{name})" for name in names)
    return f"Files: {links}. Command: `{command}`."


def section(title: str, *blocks: str) -> str:
    """Sentences that follow each other are one paragraph, until one begins with a word in italics; tables, figures and
    file names stand alone."""
    paragraphs = [f"## {title}"]
    alone = True
    for block in blocks:
        prose = not block.startswith(("|", "![", "Files: "))
        if prose and not alone and not block.startswith("*"):
            paragraphs[-1] += f" {block}"
        else:
            paragraphs.append(block)
        alone = not prose
    return "\n\n".join(wrapped(paragraph) for paragraph in paragraphs)


def wrapped(paragraph: str) -> str:
    if paragraph.startswith(("|", "![", "#")):
        return paragraph
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)
