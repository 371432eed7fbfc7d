"""The browser page of --page in a real browser: needs Gradio, Playwright for Python and Chromium, and skips without."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from rlhf.human import page
from rlhf.human.feedback import Question, View
from tests.conftest import ROOT, TINY_RUN, refused

FLAGS = ["--reward", "human", "--page", "--feedback", "best-of-3", "--labels", "4", "--label-rounds", "2"]


def test_what_a_model_writes_is_text_to_the_browser():
    view = View(
        Question("<b>", ("<script>alert(1)</script>", "& so on")), {"1": "text 1", "2": "text 2"}, "0 of 2 labels"
    )
    shown = page.as_html(page.Shown(view))
    assert "<script>" not in shown
    assert '<div id="query">&lt;b&gt; …</div>' in shown
    assert '<div class="sample"><b>2</b>… &amp; so on</div>' in shown


def test_without_gradio_one_line_says_what_to_install(chain, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    said = refused("finetuning_nlg", *TINY_RUN, *FLAGS, "--run", "page", "--out", "models/page", cwd=chain[0])
    assert said == "error: --page needs Gradio: pip install -r requirements-page.txt"


@pytest.fixture
def browser():
    """A page of Chromium."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as started:
        instance = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield instance.new_page()
        instance.close()


@pytest.fixture
def asks(chain, tmp_path):
    """Starts a run that asks on the page; returns the process, the page's address and the file of the answers."""
    started = []

    def start(*more):
        flags = [
            *TINY_RUN,
            *FLAGS,
            "--run",
            "page",
            "--out",
            "models/page",
            "--feedback-file",
            tmp_path / "f.jsonl",
            *more,
        ]
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "finetuning_nlg.py"), *map(str, flags)],
            cwd=chain[0],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )
        started.append(process)
        address = next(filter(None, (re.search(r"on (http://127\S+)", line) for line in process.stdout)))[1]
        return process, address, tmp_path / "f.jsonl"

    yield start
    for process in started:
        process.kill()


def wait_for(browser, text):
    browser.wait_for_function("text => document.querySelector('#progress')?.innerText.includes(text)", arg=text)


def answers(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_keys_and_buttons_answer_until_the_policy_is_there(browser, asks):
    process, address, file = asks()
    browser.goto(address)
    wait_for(browser, "0 of 2 labels")
    assert browser.locator(".sample").count() == 3
    query = browser.inner_text("#query").removesuffix(" …")
    browser.keyboard.press("3")
    wait_for(browser, "1 of 2 labels, text 3: 1")
    assert (answers(file)[0]["query"].strip(), answers(file)[0]["best"]) == (query, 2)
    browser.keyboard.press("u")
    wait_for(browser, "0 of 2 labels")
    assert answers(file) == []
    assert browser.inner_text("#query").removesuffix(" …") == query  # the same question comes back
    browser.click("#key-1")
    wait_for(browser, "1 of 2 labels")
    browser.keyboard.press("s")
    wait_for(browser, "skipped: 1")
    browser.keyboard.press("2")
    wait_for(browser, "2 of 4 labels")  # the second round, about the policy as it is now
    browser.keyboard.press("1")
    wait_for(browser, "the reward model agrees in")
    browser.keyboard.press("1")
    assert process.wait(60) == 0
    assert [row["best"] for row in answers(file)] == [0, 1, 0, 0]


def test_quitting_and_interrupting_save_and_a_reload_changes_nothing(browser, asks):
    process, address, file = asks()
    browser.goto(address)
    browser.wait_for_selector(".sample")
    browser.keyboard.press("2")
    wait_for(browser, "1 of 2 labels")
    browser.reload()
    wait_for(browser, "1 of 2 labels")
    browser.keyboard.press("q")
    wait_for(browser, page.SAVED)
    assert process.wait(30) == 128 + signal.SIGINT
    assert "1 labels are in" in process.stderr.read()

    process, address, _ = asks("--resume")
    browser.goto(address)
    wait_for(browser, "1 of 2 labels")  # nothing is asked twice
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 128 + signal.SIGINT
    assert len(answers(file)) == 1
