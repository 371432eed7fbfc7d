"""The pages in docs/ name what there is: columns, fields, flags, files."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import torch

import ppo
from rlhf import runtime
from rlhf.evaluation import COLUMNS

ROOT = Path(__file__).parents[1]
OTHERS = ("CONTRIBUTING.md", "README.md", "benchmarks/RESULTS.md", "data_cls/README.md", "data_nlg/README.md")
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in OTHERS)]
METRICS = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
CODE = (".", "rlhf", "rlhf/human", "experiments", "benchmarks", "tests/stress")  # where flags are defined
RUN = ROOT / "data_results" / "K2_lr_1e-3_seed0"
OPTIONAL_COLUMNS = {"labels", "score_<part>", *COLUMNS}  # --reward human; several rewards; --eval-every
OPTIONAL_COLUMNS |= {"guard"}  # which older logs lack
OPTIONAL_COLUMNS |= {"train_loss", "valid_loss"}  # experiments.without_ppo
ROW = re.compile(r"^\| (`[^|]*`) \|", re.MULTILINE)


def section(heading: str) -> str:
    return METRICS.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def documented(tables: str) -> list[str]:
    """The names in the first cells of tables."""
    return [name for cell in ROW.findall(tables) for name in re.findall(r"`([^`]+)`", cell)]


def columns() -> set[str]:
    return set(pd.read_csv(RUN / "log.csv", nrows=1).columns) | set(ppo.METRICS) | OPTIONAL_COLUMNS


def fields(value, name: str = "") -> set[str]:
    """The names of all numbers in evaluation.json, as in gold.valid_after or frontier[].kl."""
    if isinstance(value, dict) and name not in ("settings", "versions"):
        return set().union(*(fields(x, f"{name}.{key}" if name else key) for key, x in value.items()))
    if isinstance(value, list) and isinstance(value[0], dict):
        return fields(value[0], f"{name}[]")
    return {name}


def evaluation_fields() -> set[str]:
    written = json.loads((RUN / "evaluation.json").read_text(encoding="utf-8"))
    written |= {"worst_query": dict.fromkeys(("query", "kl", "valid", "ethics"))}  # older files lack it
    return fields(written | runtime.provenance(torch.device("cpu")))


SECTIONS = [("log.csv", columns), ("evaluation.json", evaluation_fields)]


@pytest.mark.parametrize(("heading", "written"), SECTIONS)
def test_every_number_is_explained(heading, written):
    names = documented(section(heading))
    assert len(names) == len(set(names))
    assert set(names) == written()


@pytest.mark.parametrize(("heading", "written"), SECTIONS)
def test_a_missing_row_is_found(heading, written):
    tables, expected = section(heading), written()
    for line in tables.splitlines(keepends=True):
        if ROW.match(line):
            assert set(documented(tables.replace(line, ""))) < expected, line


def test_every_row_has_four_cells():
    rows = [line for line in METRICS.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {5}


def test_every_committed_log_has_documented_columns():
    names = set(documented(section("log.csv")))
    for path in (ROOT / "data_results").glob("*/*/log.csv"):
        assert set(pd.read_csv(path, nrows=0).columns) <= names, path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_and_files_are_there(page):
    text = page.read_text(encoding="utf-8")
    code = "\n".join(path.read_text(encoding="utf-8") for folder in CODE for path in (ROOT / folder).glob("*.py"))
    known = set(re.findall(r'"(--[a-z][a-z-]*)"', code))
    two_ways = re.findall(r'"--([a-z-]+)",\s+action=argparse\.BooleanOptionalAction', code)
    known |= {f"--no-{name}" for name in two_ways}
    known |= {"--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"}  # torchrun
    known |= {"--user", "--name", "--gpus", "--wrap"}  # SLURM
    known |= {"--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) <= known
    links = re.findall(r"\]\(([^)#]+)", text)
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
    named = re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
    commands = re.findall(r"python -m ((?:experiments|benchmarks|tests)[\w.]+)", text)
    assert [name for name in commands if not (ROOT / f"{name.replace('.', '/')}.py").exists()] == []


def test_versions_are_pinned_once():
    """pre-commit and pyproject.toml have those of requirements-dev.txt."""
    dev = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line for line in dev if "==" in line]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["dependency-groups"]["dev"] == pinned
    ruff = next(line.partition("==")[2] for line in pinned if line.startswith("ruff"))
    assert f"rev: v{ruff} " in (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")


def test_make_help_prints_the_top_of_the_makefile():
    said = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.startswith("make  ") and "make help" in said and "PYTHON" not in said
