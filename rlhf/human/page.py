"""Questions on a browser page that this machine serves to itself (--page)."""

import html
import os
import queue
import signal
import threading
import time
from dataclasses import dataclass, field

from rlhf.errors import UserError
from rlhf.human.questions import COMMANDS, QUIT, Ask, View

POLL_INTERVAL = 0.5  # seconds between two requests of the page for a new question
TRAINING = "The reward model and the policy are being trained. The next questions will appear by themselves."
SAVED = "All answers are saved. You can close this page."
STYLE = """
.gradio-container {width: 100%; max-width: 60rem !important; margin: auto; font-size: 1.1rem}
#progress, #query, .sample {line-height: 1.5; padding: .8rem 1.1rem; margin: .6rem 0; border-radius: .5rem}
#query, .sample {white-space: pre-line}
#query {font-weight: 600; border-left: .3rem solid #0072b2}
.sample {border: 1px solid #8886}
.sample b {display: inline-block; width: 2rem; color: #0072b2}
"""
# a key presses its button
KEYS = """() => document.addEventListener("keydown", (event) => {
    if (!event.repeat && !event.ctrlKey && !event.metaKey && !event.altKey && /^[a-z0-9]$/i.test(event.key))
        document.querySelector(`#key-${event.key.toLowerCase()}`)?.click()
})"""


@dataclass
class PageState:
    """What the page shows, shared by the run and the threads of the server."""

    view: View | None = None  # None while no question waits for an answer
    message: str = TRAINING  # in place of a question
    version: int = 0  # counts the calls of `show`
    changed: threading.Condition = field(default_factory=threading.Condition)

    def show(self, view: View | None, message: str = TRAINING) -> None:
        with self.changed:
            self.view, self.message, self.version = view, message, self.version + 1
            self.changed.notify_all()


def start(answer_keys: dict[str, str]) -> Ask:
    """Serve the page, with a button for each of these keys, and print its address."""
    state, pressed_keys, theme = PageState(), queue.SimpleQueue(), load_gradio().themes.Default(primary_hue="blue")
    _, address, _ = build(answer_keys, state, pressed_keys).launch(
        prevent_thread_lock=True, quiet=True, footer_links=[], theme=theme, css=STYLE, js=KEYS
    )
    print(f"the questions are on {address}", flush=True)

    def ask(view: View) -> str:
        handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, lambda *_: pressed_keys.put(QUIT))
        try:
            state.show(view)
            key = pressed_keys.get()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        state.show(None, SAVED if key == QUIT else TRAINING)
        if key == QUIT:
            time.sleep(2 * POLL_INTERVAL)  # for the page to show it before the process ends
        return key

    return ask


def build(answer_keys: dict[str, str], state: PageState, pressed_keys: queue.SimpleQueue):
    """The page. A key counts once, and only for the question that the page showed when it was pressed."""
    gr = load_gradio()
    with gr.Blocks(title="Which text is better?", analytics_enabled=False) as page:
        shown_version, question = gr.State(-1), gr.HTML()
        with gr.Row():
            buttons = {
                key: gr.Button(f"{key}: {meaning}", elem_id=f"key-{key}", variant="primary")
                for key, meaning in answer_keys.items()
            }
        with gr.Row():
            buttons |= {
                key: gr.Button(f"{key}: {meaning}", elem_id=f"key-{key}", size="sm")
                for key, meaning in COMMANDS.items()
            }

        def render() -> list:
            """The new values of all outputs."""
            button_updates = [gr.update(interactive=state.view is not None) for _ in buttons]
            return [state.version, as_html(state), *button_updates]

        def poll(version: int) -> list | dict:
            return gr.skip() if version == state.version else render()

        def press(key: str, version: int) -> list:
            with state.changed:
                if version == state.version and state.view is not None:
                    state.view = None
                    pressed_keys.put(key)
                    state.changed.wait_for(lambda: state.view is not None, timeout=POLL_INTERVAL)
            return render()

        event = {"outputs": [shown_version, question, *buttons.values()], "show_progress": "hidden"}
        page.load(render, **event)
        gr.Timer(POLL_INTERVAL).tick(poll, shown_version, **event)
        for key, button in buttons.items():
            button.click(lambda version, key=key: press(key, version), shown_version, **event)
    return page


def as_html(state: PageState) -> str:
    """Progress, query and samples. They are escaped, as a model may write anything."""
    view = state.view  # read once: another thread may set it to None
    if view is None:
        return f'<div id="progress">{state.message}</div>'
    query, samples = view.question
    blocks = [f'<div id="progress">{view.progress}</div><div id="query">{html.escape(query)} …</div>']
    for number, sample in enumerate(samples, 1):
        label = f"<b>{number}</b>" if len(samples) > 1 else ""
        blocks.append(f'<div class="sample">{label}… {html.escape(sample.strip())}</div>')
    return "".join(blocks)


def load_gradio():
    """Import Gradio, which is slow and optional."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise UserError("--page needs Gradio: pip install -r requirements-page.txt") from error
    return gradio
