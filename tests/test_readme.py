"""README is short, and every link and file that it names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
IN_A_RUN_FOLDER = {"config.json", "log.csv", "samples.csv", "evaluation.json"}


def test_it_is_read_in_two_minutes():
    assert len(README.splitlines()) <= 130


def test_every_link_and_file_it_names_is_there():
    named = re.findall(r"\]\(([^)#]+)", README)
    named += re.findall(r"`([\w/.]+(?:\.(?:py|json|csv|ipynb|md|txt)|/))`", README)
    missing = {name for name in named if "://" not in name and not (ROOT / name).exists()}
    assert missing == IN_A_RUN_FOLDER
