"""The page of --page: its HTML, its keys with a stand-in for Gradio, and all of it in a real browser.

The tests in the browser need Gradio, Playwright for Python and Chromium, and skip without them.
"""

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import types

import pytest

from rlhf.human import page
from rlhf.human.questions import COMMANDS, Question, View, answer_keys
from tests.conftest import ROOT, TINY_RUN, refused

FLAGS = ["--reward", "human", "--page", "--feedback", "best-of-3", "--labels", "4", "--label-rounds", "2"]


PAIR = View(Question("On Monday", (" she lied.", " she helped.")), answer_keys(2), "0 of 2 labels")


def test_what_a_model_writes_is_text_to_the_browser():
    view = View(Question("<b>", ("<script>alert(1)</script>", "& so on")), answer_keys(2), "0 of 2 labels")
    shown = page.as_html(page.PageState(view))
    assert "<script>" not in shown
    assert '<div id="query">&lt;b&gt; …</div>' in shown
    assert '<div class="sample"><b>2</b>… &amp; so on</div>' in shown


def test_without_a_question_the_page_shows_a_message():
    assert page.as_html(page.PageState(None, page.SAVED)) == f'<div id="progress">{page.SAVED}</div>'


@pytest.fixture
def gradio(monkeypatch):
    """A stand-in for Gradio. The attribute `functions` has what the page calls on every event of a component."""

    class Component:
        def __init__(self, *_, **options):
            self.name = options.get("elem_id", type(self).__name__)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def on(self, function, *_, **__):
            module.functions[self.name] = function

        load = tick = click = on

        def launch(self, **_):
            return None, "http://127.0.0.1:1", None

    module = types.ModuleType("gradio")
    module.functions = {}
    for name in ("Blocks", "Row", "State", "HTML", "Button", "Timer"):
        setattr(module, name, type(name, (Component,), {}))
    module.update, module.skip = (lambda interactive: interactive), (lambda: "skip")
    module.themes = types.SimpleNamespace(Default=lambda **_: None)
    monkeypatch.setitem(sys.modules, "gradio", module)
    return module


def test_a_key_counts_once_and_only_for_the_question_on_the_page(gradio, monkeypatch):
    monkeypatch.setattr(page, "POLL_INTERVAL", 0.01)
    state, pressed_keys = page.PageState(), queue.SimpleQueue()
    page.build(answer_keys(2), state, pressed_keys)
    assert set(gradio.functions) == {"Blocks", "Timer", "key-1", "key-2", *(f"key-{key}" for key in COMMANDS)}
    load, poll, press = (gradio.functions[name] for name in ("Blocks", "Timer", "key-2"))
    version, html, *enabled = load()
    assert page.TRAINING in html and enabled == [False] * 5
    press(version)  # no question waits for an answer
    state.show(PAIR)
    press(version)  # the page has not shown the question yet
    assert pressed_keys.empty()
    version, html, *enabled = poll(version)
    assert "she lied." in html and enabled == [True] * 5
    assert poll(version) == "skip"
    gradio.functions["key-1"](version)
    press(version)  # a double click
    assert pressed_keys.get_nowait() == "1" and pressed_keys.empty()


def test_a_press_returns_the_next_question(gradio):
    state, pressed_keys = page.PageState(), queue.SimpleQueue()
    page.build(answer_keys(2), state, pressed_keys)
    state.show(PAIR)

    def answer():
        pressed_keys.get()
        state.show(PAIR._replace(progress="1 of 2 labels"))

    thread = threading.Thread(target=answer)
    thread.start()
    version, html, *enabled = gradio.functions["key-1"](state.version)
    thread.join()
    assert version == 2 and "1 of 2 labels" in html and enabled == [True] * 5


def test_asking_waits_for_a_key_and_a_signal_quits(gradio, monkeypatch, capsys):
    monkeypatch.setattr(page, "POLL_INTERVAL", 0.01)
    ask = page.start(answer_keys(2))
    assert capsys.readouterr().out == "the questions are on http://127.0.0.1:1\n"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def later(function, *arguments):
        timer = threading.Timer(0.2, function, arguments)
        timer.start()
        return timer

    for function, arguments, key, message in (
        (lambda: gradio.functions["key-2"](gradio.functions["Blocks"]()[0]), (), "2", page.TRAINING),
        (os.kill, (os.getpid(), signal.SIGTERM), "q", page.SAVED),
    ):
        timer = later(function, *arguments)
        assert ask(PAIR) == key
        timer.join()
        assert message in gradio.functions["Blocks"]()[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_without_gradio_one_line_says_what_to_install(chain, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    error = refused("finetuning_nlg", *TINY_RUN, *FLAGS, "--run", "page", "--out", "models/page", cwd=chain[0])
    assert error == "error: --page needs Gradio: pip install -r requirements-page.txt"


@pytest.fixture
def browser():
    """A page of Chromium."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as started:
        instance = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield instance.new_page()
        instance.close()


@pytest.fixture
def asks(chain, tmp_path):
    """A function that starts a run with a page. It returns the process, the page's address and the file of answers."""
    started = []

    def start(*more):
        flags = [*TINY_RUN, *FLAGS, "--run", "page", "--out", "models/page"]
        flags += ["--feedback-file", tmp_path / "f.jsonl", *more]
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
