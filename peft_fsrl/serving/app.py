"""A page in the browser: base and trained model side by side, and the features behind each token.

The only file that imports Gradio. Conversations, steering and features are those of ``Chat``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from ..analysis.generations import SteeredToken
from ..analysis.labels.source import printable
from ..extras import install_command
from .chat import Chat

try:
    import gradio as gr
except ImportError as error:
    raise ImportError(f"The app needs Gradio: {install_command('app')}.") from error

N_FEATURES = 12  # shown of each token
NAMES = ("Base", "Trained")
HEADERS = ["feature", "v", "categories", "description"]
_HINT = "Click a token to see the features that steered it."
_STRENGTH = "Strength (0 = base, 1 = as trained)"
_ABOUT = """\
## Base and trained, side by side
A token is tinted by how strongly it was steered where it was predicted.
"""
# The readers' own fonts: a theme's default ones would be asked from somebody else's server.
_FONT, _CODE = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
# Tokens are text that flows, and not boxes; the spaces in Gradio's own markup take no room.
_STYLE = """\
.said .textfield { display: block; font-size: 0; line-height: 1.7; word-break: normal; }
.said .token-container, .said .token { display: inline; margin: 0; padding: 0; }
.said .text { font-size: var(--text-md); background: inherit; padding: 0.15em 0; }
"""
_REFRESH = 0.2


@dataclass
class _Side:
    """One of the two conversations, and what stands on the page of it."""

    chat: Chat
    said: list[SteeredToken] = field(default_factory=list)

    def ask(self, text: str) -> None:
        """Answer, while ``said`` grows."""
        self.said.append(SteeredToken("\n\n" * bool(self.said) + f"> {text}\n\n", (), 0))
        self.chat.say(text, self.said.append)

    def shown(self) -> list[tuple[str, float]]:
        """Each piece with its share of the strongest steering so far."""
        said = list(self.said)
        sizes = [sum(abs(each.value) for each in token.steered) for token in said]
        most = max(sizes, default=0.0) or 1.0
        return [(t.text, size / most) for t, size in zip(said, sizes, strict=True)]


def make_app(new_chat: Callable[[], Chat]) -> gr.Blocks:
    """The page; each visitor has conversations of their own.

    Args:
        new_chat: makes an empty conversation with the model.
    """
    categories = [name for name, members in new_chat().categories.items() if members]

    def begin() -> tuple[_Side, ...]:
        sides = tuple(_Side(new_chat()) for _ in NAMES)
        sides[0].chat.command("/base")
        return sides

    def answer(text: str, sides: Any, strength: float, *scales: float) -> Iterator[Any]:
        sides = sides or begin()
        if not text.strip():
            yield "", sides, *(side.shown() for side in sides)
            return
        sides[1].chat.command(f"/strength {strength}")
        sides[1].chat.scales = dict(zip(categories, scales, strict=True))
        for side in sides:
            with ThreadPoolExecutor(1) as pool:
                answered = pool.submit(side.ask, text.strip())
                while not answered.done():
                    wait([answered], _REFRESH)
                    yield "", sides, *(each.shown() for each in sides)
                answered.result()

    def show(sides: Any, number: int, event: gr.SelectData) -> tuple[str, list[list[Any]]]:
        side = sides[number]
        token = side.said[event.index]
        rows = []
        for steered in token.steered:
            label = side.chat.labels.get(steered.feature)
            words = (", ".join(label.categories), label.description or "") if label else ("", "")
            rows.append([steered.feature, round(steered.value, 4), *words])
        count = f"{token.n_steered} features steered" if token.n_steered else "Nothing was steered"
        return f"{count} where {NAMES[number].lower()} said {printable(token.text)!r}.", rows

    with gr.Blocks(title="peft_fsrl", analytics_enabled=False) as app:
        sides = gr.State(None)
        gr.Markdown(_ABOUT)
        with gr.Row(equal_height=True):
            panels = [gr.HighlightedText(label=name, elem_classes="said") for name in NAMES]
        question = gr.Textbox(label="Message", placeholder="Enter sends it", max_lines=6)
        with gr.Row():
            send = gr.Button("Send", variant="primary")
            clear = gr.Button("Clear")
        with gr.Row():
            with gr.Column():
                strength, *scales = [
                    gr.Slider(-1, 3, 1, step=0.1, label=name) for name in (_STRENGTH, *categories)
                ]
            with gr.Column():
                which = gr.Textbox(_HINT, label="Token", interactive=False)
                table = gr.Dataframe(headers=HEADERS, label="Features", interactive=False)
        shown = [question, sides, *panels]
        for event in (question.submit, send.click):
            event(answer, [question, sides, strength, *scales], shown)
        clear.click(lambda: ("", None, [], [], _HINT, []), None, [*shown, which, table])
        for number, panel in enumerate(panels):
            panel.select(show, [sides, gr.State(number)], [which, table])
    return app


def run_app(new_chat: Callable[[], Chat], host: str, port: int) -> None:
    """Show the page until interrupted.

    Nothing leaves the machine: no link to share, no statistics, no record of what was said.
    """
    make_app(new_chat).launch(
        server_name=host,
        server_port=port,
        theme=gr.themes.Default(font=_FONT, font_mono=_CODE),
        css=_STYLE,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
    )
