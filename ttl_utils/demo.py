"""A web page to talk to the chat model (paper, section 4.3), with the training conversations nearest to each answer."""

from __future__ import annotations

import html
import os
import socket
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttl_utils.demo_words import LANGUAGES, words
from ttl_utils.errors import TTLError
from ttl_utils.neighbours import Neighbours
from ttl_utils.run import Run

if TYPE_CHECKING:
    import gradio

# seconds between two pictures of a growing answer, and people who may wait for their turn
PAUSE_S, WAITING = 0.05, 32
# of sampling: lowest, highest (wider, where the parameters are beyond it) and step
RANGES = {
    "temperature": (0.05, 2.0, 0.05),
    "top_k": (1, 200, 1),
    "top_p": (0.0, 1.0, 0.01),
    "repetition_penalty": (1.0, 2.0, 0.05),
    "max_new_tokens": (1, 1, 1),
}


def _gradio() -> Any:
    # it reads this when it is imported
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise TTLError('the page needs gradio, which is not installed: pip install -e ".[demo]"') from None
    return gradio


def _cards(rows: list[dict]) -> str:
    """Neighbours as HTML; their words are text, whatever they hold."""
    cards = [
        f'<article><header><meter max="1" value="{row["similarity"]:.3f}"></meter>{row["similarity"]:.0%}</header>'
        f"<p>{html.escape(row['question'])}</p><p>{html.escape(row['answer'])}</p></article>"
        for row in rows
    ]
    return f'<div class="near">{"".join(cards) or "–"}</div>'


def _shown(turns: list[dict]) -> list[dict]:
    """The turns for the chat component, which takes a tag that someone typed for one of the page's."""
    return [turn | {"content": html.escape(turn["content"], quote=False)} for turn in turns]


def _seed(typed: float | None) -> int:
    """A seed of whatever a number field held: nothing, less than none, or more than a browser counts to."""
    return int(typed or 0) % 2**31


class _Page:
    """What the events do. A visitor's turns and state (idle, asked, writing) are in the session, nothing of it here."""

    def __init__(self, run: Run):
        from ttl_utils import talk

        self.gr, self.talk, self.settings, self.seed = _gradio(), talk, run.params.chat, run.params.seed
        self.model, self.tokenizer = talk.load(run)
        self.context = self.model.config.max_position_embeddings
        self.neighbours = Neighbours.of(run)
        self.same = [self.gr.skip()] * 11

    def told(self, error: Exception, language: str) -> str:
        """Why there is no answer; what is not the visitor's to mend goes to the terminal."""
        if isinstance(error, self.talk.EmptyMessage):
            return ""
        if isinstance(error, self.talk.TooLong):
            most = f"{error.most:,}".replace(",", "." if language == "pt" else ",")
            return words(language)["too_long"].format(most=most)
        if isinstance(error, TTLError):
            return html.escape(str(error))
        traceback.print_exception(error)
        return words(language)["failed"]

    def near(self, text: str, side: str) -> str:
        return _cards(self.neighbours.nearest(text, side=side))

    def switches(self, state: str) -> list:
        """Updates of send, retry, clear and stop, and the state."""
        idle = state == "idle"
        return [*(self.gr.update(visible=shown) for shown in (idle, idle, idle, not idle)), state]

    def accept(self, typed: str, turns: list, state: str, language: str, max_new_tokens: int) -> list:
        """A message that can be asked, shown at once; one that cannot stays in the box, with the reason."""
        if state != "idle":
            return self.same
        try:
            asked = self.talk.question(typed)
            self.talk.fit([asked], self.tokenizer, self.settings, self.context, int(max_new_tokens))
        except TTLError as error:
            return [*self.same[:5], self.told(error, language), *self.same[:5]]
        # a question that was stopped before its answer began is asked no more
        turns = [*turns[: len(turns) // 2 * 2], asked]
        return ["", turns, _shown(turns), "", "", "", *self.switches("asked")]

    def again(self, turns: list, state: str, seed: float | None) -> list:
        """The last question once more, by the next seed."""
        if state != "idle" or not turns:
            return self.same
        turns = turns[: (len(turns) - 1) // 2 * 2 + 1]
        return [_seed(_seed(seed) + 1), turns, _shown(turns), "", "", "", *self.switches("asked")]

    def answer(self, turns: list, state: str, language: str, seed: float | None, *sampling: float) -> Iterator[list]:
        """Turns, chat, both neighbours, the note and the switches, as the answer grows."""
        same, talk = self.same, self.talk
        if state != "asked":
            yield same[:10]
            return
        try:
            given = {name: type(getattr(self.settings, name))(v) for name, v in zip(RANGES, sampling, strict=True)}
            settings = type(self.settings).model_validate(self.settings.model_dump() | given)
            ids, dropped = talk.fit(turns, self.tokenizer, settings, self.context, settings.max_new_tokens)
            note = words(language)["dropped"] if dropped else ""
            yield [*same[:2], self.near(turns[-1]["content"], "question"), "", note, *self.switches("writing")]
            text, shown = "", 0.0
            for text in talk.stream(self.model, self.tokenizer, ids, settings, _seed(seed)):
                if time.monotonic() > shown + PAUSE_S:
                    grown, shown = [*turns, {"role": "assistant", "content": text}], time.monotonic()
                    yield [grown, _shown(grown), *same[:8]]
            grown = [*turns, {"role": "assistant", "content": text}]
            yield [grown, _shown(grown), same[0], self.near(text, "answer"), same[0], *self.switches("idle")]
        except Exception as error:
            yield [*same[:4], self.told(error, language), *self.switches("idle")]

    def stopped(self, turns: list, language: str) -> list:
        near = self.near(turns[-1]["content"], "answer") if len(turns) % 2 == 0 else ""
        return [near, words(language)["stopped"], *self.switches("idle")]


def build(run: Run) -> gradio.Blocks:
    """The page, with the model and the index of neighbours in memory.

    Raises:
        TTLError: gradio is not installed, there is no chat model, or no training conversation.
    """
    page, parts = _Page(run), {}
    gr, settings = page.gr, page.settings
    about = {
        "run": run.name,
        "folder": Path(page.tokenizer.name_or_path).name,
        "parameters": f"{sum(one.numel() for one in page.model.parameters()) / 1e6:.0f}",
    }

    def texts(name: str, language: str) -> dict[str, str]:
        """A component's label, value and so on."""
        found = {
            key.removeprefix(f"{name}."): text for key, text in words(language).items() if key.startswith(f"{name}.")
        }
        return {attribute: text.format(**about) for attribute, text in found.items()}

    def part(name: str, kind: Any, **options: Any) -> Any:
        parts[name] = kind(elem_id=name, **options, **texts(name, "pt"))
        return parts[name]

    with gr.Blocks(title="TeenyTinyLlama", analytics_enabled=False, fill_width=True) as blocks:
        turns, state = gr.State([]), gr.State("idle")
        with gr.Row(elem_id="top"):
            part("title", gr.Markdown)
            radio = {"show_label": False, "container": False, "scale": 0, "min_width": 240, "elem_id": "language"}
            language = gr.Radio([(name, key) for key, name in LANGUAGES.items()], value="pt", **radio)
        part("notice", gr.Markdown)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                chat = part("chat", gr.Chatbot, height=420, render_markdown=False, buttons=[], feedback_options=None)
                note = gr.Markdown(elem_id="note")
                box = part("box", gr.Textbox, max_lines=6, autofocus=True)
                with gr.Row():
                    send = part("send", gr.Button, variant="primary", min_width=90)
                    retry, clear = part("retry", gr.Button, min_width=90), part("clear", gr.Button, min_width=90)
                    stop = part("stop", gr.Button, variant="stop", min_width=90, visible=False)
                samples = part("samples", gr.Dataset, components=[box], samples=[[one] for one in settings.prompts])
                with part("controls", gr.Accordion, open=False):
                    part("defaults", gr.Markdown)
                    sliders = []
                    for name, (low, high, step) in RANGES.items():
                        value, high = getattr(settings, name), page.context // 2 if name == "max_new_tokens" else high
                        limits = {"minimum": min(low, value), "maximum": max(high, value)}
                        sliders.append(part(name, gr.Slider, value=value, step=step, **limits))
                    seed = part("seed", gr.Number, value=page.seed)
            with gr.Column(scale=2, min_width=300):
                part("neighbours", gr.Markdown)
                near_question = gr.HTML(elem_id="near-question")
                part("answers", gr.Markdown)
                near_answer = gr.HTML(elem_id="near-answer")

        # these wait neither for the model nor for other visitors
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        panels, switches = [near_question, near_answer, note], [send, retry, clear, stop, state]

        def relabel(to: str) -> list:
            return [gr.update(**texts(name, to)) for name in parts]

        asked_for = "() => new URLSearchParams(location.search).get('lang') === 'en' ? 'en' : 'pt'"
        blocks.load(None, None, language, js=asked_for).then(relabel, language, [*parts.values()], **quick)
        language.input(relabel, language, [*parts.values()], **quick)
        samples.click(lambda row: row[0], samples, box, **quick)
        # of a paste of megabytes no more is sent than shows that it is too long
        cut = f"(typed, ...rest) => [typed.slice(0, {page.talk.LONGEST_PIECE * page.context + 1}), ...rest]"
        asking = [box, turns, state, language, parts["max_new_tokens"]]
        begun = [turns, chat, *panels, *switches]
        asked = gr.on([box.submit, send.click], page.accept, asking, [box, *begun], js=cut, **quick)
        asked_again = retry.click(page.again, [turns, state, seed], [seed, *begun], **quick)
        model: dict[str, Any] = {"concurrency_id": "model", "show_progress_on": [note], "api_visibility": "private"}
        inputs = [turns, state, language, seed, *sliders]
        answers = [event.success(page.answer, inputs, begun, **model) for event in (asked, asked_again)]
        for event in answers:
            # refused before it was begun, as by a full queue, which the page says itself: it can be asked again
            event.failure(lambda: page.switches("idle"), None, switches, **quick)
        stop.click(page.stopped, [turns, language], [near_answer, note, *switches], cancels=answers, **quick)
        clear.click(lambda: ([], [], "", "", ""), None, [turns, chat, *panels], **quick)
    return blocks


def _launch(blocks: gradio.Blocks, host: str, port: int | None, inline: bool) -> None:
    gr = _gradio()
    looks = {
        "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        "css_paths": Path(__file__).with_suffix(".css"),
    }
    # nothing leaves this machine and nothing is kept: no tunnel, no fonts of other hosts, no records, no uploads
    closed = {"share": False, "ssr_mode": False, "mcp_server": False, "pwa": False, "enable_monitoring": False}
    closed |= {"run_history": False, "footer_links": [], "max_file_size": 1}
    blocks.queue(default_concurrency_limit=1, max_size=WAITING, api_open=False)
    try:
        where = {"server_name": host, "server_port": port, "inline": inline, "height": 900}
        blocks.launch(**where, **looks, **closed, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise TTLError(f"the page cannot listen at {host}, port {port or '7860 and those after it'}: {error}") from None


def _check_free(host: str, port: int | None) -> None:
    """Gradio itself takes an address that is not this machine's for a port that is taken, and tries a hundred."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((address[0], port or 0, *address[2:]))
    except (OSError, OverflowError, UnicodeError) as error:
        raise TTLError(
            f"the page cannot listen at --host {host}, --port {port or 'any'} ({error}): name an address of "
            "this machine and a free port up to 65535, or leave both out"
        ) from None


def serve(run: Run, host: str = "127.0.0.1", port: int | None = None) -> None:
    """The page, until Ctrl-C; a warning where other machines can reach it.

    Raises:
        TTLError: as `build`; or the address or port cannot be had.
    """
    _gradio()
    _check_free(host, port)
    blocks = build(run)
    _launch(blocks, host, port, inline=False)
    print(*(words(language)["notice.value"] for language in LANGUAGES), sep="\n")
    print(f"\nhttp://{host}:{blocks.server_port} (Ctrl-C ends it)")
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(f"warning: at {host} every machine that reaches this one can use the page, without a password")
    blocks.block_thread()


def in_notebook(run: Run) -> None:
    """The page inside a notebook whose reader is there; else, or where gradio is missing, a line says how to get it.

    Raises:
        TTLError: there is no chat model, or no training conversation.
    """
    from IPython import get_ipython

    shell = get_ipython()
    # a front end that can ask its reader something says so with each cell; papermill and nbconvert say that they cannot
    if shell is None or not shell.get_parent().get("content", {}).get("allow_stdin"):
        print(f"to talk, open this notebook in JupyterLab or Colab, or run `ttl chat {run._command()} --web`")
        return
    try:
        _gradio()
    except TTLError as error:
        # the rest of the notebook does not need it
        print(error)
        return
    _launch(build(run), "127.0.0.1", None, inline=True)
