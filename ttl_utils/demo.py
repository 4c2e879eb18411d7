"""A web page to talk to the chat model (paper, section 4.3), with the training conversations nearest to each answer."""

from __future__ import annotations

import html
import ipaddress
import os
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

# seconds between two pictures of a growing answer
PAUSE_S = 0.05
# people who may wait for their turn
WAITING = 32
CSS = """
.gradio-container {max-width: 1180px !important; margin: 0 auto !important}
#notice {border-left: 4px solid #d97706; padding: .4rem .8rem; background: color-mix(in srgb, #d97706 10%, transparent)}
#note:has(p) {border-left: 4px solid var(--border-color-accent); padding: .2rem .8rem}
#language .wrap {flex-wrap: nowrap}
#near-question .html-container, #near-answer .html-container {padding: 0}
#chat .icon-button-wrapper {display: none}
.near article {margin: 0 0 .6rem; padding: .5rem .7rem; border: 1px solid var(--border-color-primary);
  border-radius: 8px; background: var(--background-fill-primary)}
.near header {display: flex; gap: .6rem; align-items: center; font-variant-numeric: tabular-nums}
.near meter {flex: 1; height: .6rem}
.near p {margin: .25rem 0 0; overflow-wrap: anywhere}
.near .q {font-weight: 600}
@media (max-width: 600px) {#top {flex-direction: column-reverse} h1 {font-size: 1.5rem !important}}
footer {display: none !important}
"""


def _gradio() -> Any:
    # read when it is imported
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
        f'<p class="q">{html.escape(row["question"])}</p><p>{html.escape(row["answer"])}</p></article>'
        for row in rows
    ]
    return f'<div class="near">{"".join(cards) or "–"}</div>'


class _Page:
    """What the page's events do; all that belongs to one visitor is in the session's state."""

    def __init__(self, run: Run):
        from ttl_utils import talk

        self.gr, self.talk, self.run = _gradio(), talk, run
        self.model, self.tokenizer = talk.load(run)
        self.context = self.model.config.max_position_embeddings
        self.neighbours = Neighbours.of(run)

    def refusal(self, error: Exception, language: str) -> str:
        """What the visitor is told, as Markdown; what is not theirs to mend goes to the terminal."""
        text = words(language)
        if isinstance(error, self.talk.EmptyMessage):
            return ""
        if isinstance(error, self.talk.TooLong):
            most = f"{error.most:,}"
            return text["too_long"].format(most=most.replace(",", ".") if language == "pt" else most)
        if isinstance(error, TTLError):
            return html.escape(str(error))
        traceback.print_exception(error)
        return text["failed"]

    def switches(self, state: str) -> tuple:
        """Updates of send, stop, retry, clear, and the state: idle, asked (an answer is due) or writing."""
        idle = state == "idle"
        return *(self.gr.update(visible=shown) for shown in (idle, not idle, idle, idle)), state

    def accept(self, typed: str, turns: list, state: str, language: str, max_new_tokens: int) -> tuple:
        """A message that can be asked, shown at once; one that cannot stays in the box, with the reason."""
        skip = self.gr.skip()
        if state != "idle":
            return (skip,) * 11
        try:
            asked = self.talk.question(typed)
            settings = self.run.params.chat
            self.talk.fit([asked], self.tokenizer, settings, self.context, int(max_new_tokens))
        except TTLError as error:
            return *(skip,) * 5, self.refusal(error, language), *(skip,) * 5
        # a question that was stopped before its answer began is asked no more
        turns = [*turns[: len(turns) // 2 * 2], asked]
        return "", turns, turns, "", "", "", *self.switches("asked")

    def again(self, turns: list, state: str, seed: int) -> tuple:
        """The last question once more, by the next seed."""
        if state != "idle" or not turns:
            return (self.gr.skip(),) * 11
        turns = turns[: (len(turns) - 1) // 2 * 2 + 1]
        return int(seed) + 1, turns, turns, "", "", "", *self.switches("asked")

    def answer(self, turns: list, state: str, language: str, seed: int, *sampling: float) -> Iterator[tuple]:
        """Chat and turns, both neighbours, the note and the switches, as the answer grows."""
        same, talk = (self.gr.skip(),) * 5, self.talk
        if state != "asked":
            yield *same, *same
            return
        try:
            chat = self.run.params.chat
            given = {name: type(getattr(chat, name))(value) for name, value in zip(SLIDERS, sampling, strict=True)}
            settings = type(chat).model_validate(chat.model_dump() | given)
            ids, dropped = talk.fit(turns, self.tokenizer, settings, self.context, settings.max_new_tokens)
            note = f"{words(language)['dropped']}" if dropped else ""
            near = _cards(self.neighbours.nearest(turns[-1]["content"]))
            yield *same[:2], near, same[0], note, *self.switches("writing")
            text, shown = "", 0.0
            for text in talk.stream(self.model, self.tokenizer, ids, settings, abs(int(seed))):
                if time.monotonic() > shown + PAUSE_S:
                    grown, shown = [*turns, {"role": "assistant", "content": text}], time.monotonic()
                    yield grown, grown, *same[:3], *same
            grown = [*turns, {"role": "assistant", "content": text}]
            near = _cards(self.neighbours.nearest(text, side="answer"))
            yield grown, grown, same[0], near, same[0], *self.switches("idle")
        except Exception as error:
            yield *same[:4], self.refusal(error, language), *self.switches("idle")

    def stopped(self, turns: list, language: str) -> tuple:
        near = _cards(self.neighbours.nearest(turns[-1]["content"], side="answer")) if len(turns) % 2 == 0 else ""
        return near, f"{words(language)['stopped']}", *self.switches("idle")


SLIDERS = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")


def build(run: Run) -> gradio.Blocks:
    """The page, with the model and the index of neighbours in memory.

    Raises:
        TTLError: gradio is not installed, there is no chat model, or no training conversation.
    """
    page = _Page(run)
    gr, chat, text = page.gr, run.params.chat, words("pt")
    labelled: dict[str, Any] = {}
    ranges = {
        "temperature": (min(0.05, chat.temperature), max(2.0, chat.temperature), 0.05),
        "top_k": (1, max(200, chat.top_k), 1),
        "top_p": (0.0, 1.0, 0.01),
        "repetition_penalty": (min(1.0, chat.repetition_penalty), max(2.0, chat.repetition_penalty), 0.05),
        "max_new_tokens": (1, max(page.context // 2, chat.max_new_tokens), 1),
    }
    model = {
        "run": run.name,
        "folder": Path(page.tokenizer.name_or_path).name,
        "parameters": f"{sum(one.numel() for one in page.model.parameters()) / 1e6:.0f}",
    }
    with gr.Blocks(title="TeenyTinyLlama", analytics_enabled=False, fill_width=True) as blocks:
        turns, state = gr.State([]), gr.State("idle")
        with gr.Row(elem_id="top"):
            title = gr.Markdown()
            labelled["language"] = language = gr.Radio(
                [(name, key) for key, name in LANGUAGES.items()],
                value="pt",
                show_label=False,
                container=False,
                scale=0,
                min_width=240,
                elem_id="language",
            )
        notice = gr.Markdown(elem_id="notice")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                labelled["chat"] = shown = gr.Chatbot(
                    height=420, render_markdown=False, buttons=[], feedback_options=None, elem_id="chat"
                )
                note = gr.Markdown(elem_id="note")
                labelled["box"] = box = gr.Textbox(
                    lines=1, max_lines=6, autofocus=True, elem_id="box", submit_btn=False
                )
                with gr.Row():
                    labelled["send"] = send = gr.Button(variant="primary", min_width=90, elem_id="send")
                    labelled["stop"] = stop = gr.Button(variant="stop", min_width=90, visible=False, elem_id="stop")
                    labelled["retry"] = retry = gr.Button(min_width=90, elem_id="retry")
                    labelled["clear"] = clear = gr.Button(min_width=90, elem_id="clear")
                prompts = dict.fromkeys([text["figure_3"], *chat.prompts])
                labelled["samples"] = samples = gr.Dataset(
                    components=[box], samples=[[prompt] for prompt in prompts], elem_id="samples"
                )
                with gr.Accordion(open=False) as controls:
                    sliders = [
                        gr.Slider(*ranges[name][:2], value=getattr(chat, name), step=ranges[name][2])
                        for name in SLIDERS
                    ]
                    seed = gr.Number(run.params.seed, precision=0, minimum=0, maximum=2**31)
                labelled |= {"controls": controls, "seed": seed, **dict(zip(SLIDERS, sliders, strict=True))}
            with gr.Column(scale=2, min_width=300):
                neighbours, near_question = gr.Markdown(), gr.Markdown()
                question_cards = gr.HTML(elem_id="near-question")
                near_answer = gr.Markdown()
                answer_cards = gr.HTML(elem_id="near-answer")

        def relabel(to: str) -> list:
            """All texts of the page, in the order of `texts`."""
            word = words(to if to in LANGUAGES else "pt")
            updates: list[Any] = [
                f"# {word['title']}\n{word['model'].format(**model)}",
                f"⚠️ {word['notice']}",
                *(word[name] for name in ("neighbours", "near_question", "near_answer")),
            ]
            for name in labelled:
                extra = {"info": word[f"{name}_info"]} if f"{name}_info" in word else {}
                extra |= (
                    {"placeholder": word[{"chat": "empty", "box": "hint"}[name]]} if name in ("chat", "box") else {}
                )
                kind = "value" if name in ("send", "stop", "retry", "clear") else "label"
                updates.append(gr.update(**{kind: word[name]}, **extra))
            return updates

        texts = [title, notice, neighbours, near_question, near_answer, *labelled.values()]
        # at once: neither the network's queue nor the model is waited for
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        switches = [send, stop, retry, clear, state]
        panels = [question_cards, answer_cards, note]

        for component, update in zip(texts, relabel("pt"), strict=True):
            for name, value in (update if isinstance(update, dict) else {"value": update}).items():
                setattr(component, name, value)
        asked_for = "() => new URLSearchParams(location.search).get('lang') === 'en' ? 'en' : 'pt'"
        blocks.load(None, None, language, js=asked_for).then(relabel, language, texts, **quick)
        language.input(relabel, language, texts, **quick)
        samples.click(lambda row: row[0], samples, box, **quick)
        # of a paste of megabytes no more is sent than shows that it is too long
        cut = f"(typed, ...rest) => [typed.slice(0, {page.talk.LONGEST_PIECE * page.context + 1}), ...rest]"
        accepted = gr.on(
            [box.submit, send.click],
            page.accept,
            [box, turns, state, language, sliders[-1]],
            [box, turns, shown, *panels, *switches],
            js=cut,
            **quick,
        )
        retried = retry.click(page.again, [turns, state, seed], [seed, turns, shown, *panels, *switches], **quick)
        answers = [
            event.success(
                page.answer,
                [turns, state, language, seed, *sliders],
                [shown, turns, *panels, *switches],
                concurrency_id="model",
                show_progress_on=[note],
                api_visibility="private",
            )
            for event in (accepted, retried)
        ]
        stop.click(page.stopped, [turns, language], [answer_cards, note, *switches], cancels=answers, **quick)
        clear.click(lambda: ([], [], "", "", ""), None, [turns, shown, *panels], **quick)
    return blocks


def _launch(blocks: gradio.Blocks, host: str, port: int | None, inline: bool) -> None:
    gr = _gradio()
    blocks.queue(default_concurrency_limit=1, max_size=WAITING, api_open=False)
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            inline=inline,
            height=900,
            # nothing leaves this machine: no tunnel, no fonts of other hosts, no records, no uploads
            share=False,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=CSS,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            max_file_size=1,
        )
    except OSError as error:
        raise TTLError(f"the page cannot listen at {host}, port {port or '7860 and those after it'}: {error}") from None


def serve(run: Run, host: str = "127.0.0.1", port: int | None = None) -> None:
    """The page, until Ctrl-C; a warning where other machines can reach it.

    Raises:
        TTLError: as `build`; or the address or port cannot be had.
    """
    blocks = build(run)
    _launch(blocks, host, port, inline=False)
    print(f"{words('pt')['notice']}\n{words('en')['notice']}\n\nhttp://{host}:{blocks.server_port}  (Ctrl-C ends it)")
    if not _loopback(host):
        print(f"warning: at {host} every machine that reaches this one can use the page, without a password")
    blocks.block_thread()


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def in_notebook(run: Run) -> None:
    """The page inside a notebook whose reader is there; a run without one is told how to start it.

    Raises:
        TTLError: as `build`.
    """
    from IPython import get_ipython

    shell = get_ipython()
    # a front end that can ask its reader something says so with each cell; papermill and nbconvert say that they cannot
    if shell is None or not shell.get_parent().get("content", {}).get("allow_stdin"):
        print(f"nobody is here to talk: open this notebook in JupyterLab or Colab, or run `ttl chat {run.name} --web`")
        return
    _launch(build(run), "127.0.0.1", None, inline=True)
