"""The questions of feedback.py on a browser page that this machine serves to itself, for --page."""

import html
import os
import queue
import signal
import threading
import time
from dataclasses import dataclass, field

from rlhf.errors import UserError
from rlhf.human.feedback import COMMANDS, QUIT, Ask, View

TICK = 0.5  # seconds between the page's own looks for a new question
LEARNING = "The reward model and the policy are learning. The next questions come by themselves."
SAVED = "All answers are saved. You can close this page."
STYLE = """
.gradio-container {width: 100%; max-width: 60rem !important; margin: auto; font-size: 1.1rem}
#progress, #query, .sample {line-height: 1.5; padding: .8rem 1.1rem; margin: .6rem 0; border-radius: .5rem}
#query {font-weight: 600; border-left: .3rem solid #0072b2}
.sample {border: 1px solid #8886}
.sample b {display: inline-block; width: 2rem; color: #0072b2}
"""
KEYS = """() => document.addEventListener("keydown", (event) => {
    if (!event.repeat && !event.ctrlKey && !event.metaKey && !event.altKey && /^[a-z0-9]$/i.test(event.key))
        document.querySelector(`#key-${event.key.toLowerCase()}`)?.click()
})"""


@dataclass
class Shown:
    """What the page shows: the view, or None while there is nothing to ask, and a number that counts the changes."""

    view: View | None = None
    message: str = LEARNING
    number: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def set(self, view: View | None, message: str = LEARNING) -> None:
        with self.changed:
            self.view, self.message, self.number = view, message, self.number + 1
            self.changed.notify_all()


def asker(choices: dict[str, str]) -> Ask:
    """Starts the page, whose buttons are these choices, and says where it is."""
    shown, answers, theme = Shown(), queue.SimpleQueue(), load_gradio().themes.Default(primary_hue="blue")
    _, address, _ = build(choices, shown, answers).launch(
        prevent_thread_lock=True, quiet=True, footer_links=[], theme=theme, css=STYLE, js=KEYS
    )
    print(f"the questions are on {address}", flush=True)

    def ask(view: View) -> str:
        before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda *_: answers.put(QUIT))
        try:
            shown.set(view)
            key = answers.get()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        shown.set(None, SAVED if key == QUIT else LEARNING)
        if key == QUIT:
            time.sleep(2 * TICK)  # the page sees it before the process ends
        return key

    return ask


def build(choices: dict[str, str], shown: Shown, answers: queue.SimpleQueue):
    """The page. A key counts once, and only for the question that was on the page when it was pressed."""
    gr = load_gradio()
    with gr.Blocks(title="Which text is better?", analytics_enabled=False) as page:
        seen, question = gr.State(-1), gr.HTML()
        with gr.Row():
            buttons = {
                key: gr.Button(f"{key}: {what}", elem_id=f"key-{key}", variant="primary")
                for key, what in choices.items()
            }
        with gr.Row():
            buttons |= {
                key: gr.Button(f"{key}: {what}", elem_id=f"key-{key}", size="sm") for key, what in COMMANDS.items()
            }
        outputs = [seen, question, *buttons.values()]

        def show() -> list:
            can = [gr.update(interactive=shown.view is not None) for _ in buttons]
            return [shown.number, as_html(shown), *can]

        def look(number: int) -> list | dict:
            return gr.skip() if number == shown.number else show()

        def press(key: str, number: int) -> list:
            with shown.changed:
                if number == shown.number and shown.view is not None:
                    shown.view = None
                    answers.put(key)
                    shown.changed.wait_for(lambda: shown.view is not None, timeout=TICK)
            return show()

        quiet = {"outputs": outputs, "show_progress": "hidden"}
        page.load(show, **quiet)
        gr.Timer(TICK).tick(look, seen, **quiet)
        for key, button in buttons.items():
            button.click(lambda number, key=key: press(key, number), seen, **quiet)
    return page


def as_html(shown: Shown) -> str:
    """Progress, query and what follows it; the texts are a model's, and mean nothing to the browser."""
    view = shown.view
    if view is None:
        return f'<div id="progress">{shown.message}</div>'
    query, samples = view.question
    cards = [f'<div id="progress">{view.progress}</div><div id="query">{html.escape(query)} …</div>']
    for number, sample in enumerate(samples, 1):
        label = f"<b>{number}</b>" if len(samples) > 1 else ""
        cards.append(f'<div class="sample">{label}… {html.escape(sample.strip())}</div>')
    return "".join(cards)


def load_gradio():
    """Needed by few, and slow to import."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise UserError("--page needs Gradio: pip install -r requirements-page.txt") from error
    return gradio
