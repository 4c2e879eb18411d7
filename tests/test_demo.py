"""The page, driven in a real browser: Debian's chromium, headless, through Playwright."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbclient
import nbformat
import pytest

from tests.tiny_chat import chat_run
from ttl_utils import commands, demo, talk
from ttl_utils.demo_words import LANGUAGES, words
from ttl_utils.errors import TTLError
from ttl_utils.neighbours import Neighbours
from ttl_utils.run import Run

PT, EN = words("pt"), words("en")
SECOND = 1000


class Server:
    """The page of a tiny run; `pause_s` slows its tokens down, `written` counts them."""

    def __init__(self, run: Run, blocks: Any):
        self.run, self.blocks, self.url = run, blocks, f"http://127.0.0.1:{blocks.server_port}/"
        self.pause_s, self.written, self.asked = 0.0, 0, []
        self.fault: Exception | None = None
        self.stream = talk.stream

    def slow(self, model: Any, tokenizer: Any, ids: list[int], settings: Any, seed: int) -> Iterator[str]:
        self.asked.append((tokenizer.decode(ids), settings, seed))
        if self.fault:
            raise self.fault
        for text in self.stream(model, tokenizer, ids, settings, seed):
            self.written += 1
            time.sleep(self.pause_s)
            yield text


@pytest.fixture(scope="module")
def served(tiny_done: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[demo]'")
    run = chat_run(tiny_done, tmp_path_factory.mktemp("demo"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        blocks = demo.build(run)
        demo._launch(blocks, "127.0.0.1", None, inline=False)
        made = Server(run, blocks)
        patch.setattr(talk, "stream", made.slow)
        yield made
        blocks.close(verbose=False)


@pytest.fixture
def server(served: Server) -> Server:
    served.pause_s, served.fault = 0.0, None
    served.asked.clear()
    return served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install -e '.[test]'")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("needs the chromium of the distribution: apt-get install chromium")
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield made
        made.close()


Visit = Callable[..., Any]


@pytest.fixture
def visit(server: Server, browser: Any) -> Iterator[Visit]:
    """`visit(query)`: the page as another visitor sees it; whatever it asks of another host fails the test."""
    asked: list[str] = []
    contexts = []

    def one(query: str = "", **options: Any) -> Any:
        context = browser.new_context(viewport={"width": 1280, "height": 1000}, **options)
        contexts.append(context)
        context.on("request", lambda request: asked.append(request.url))
        page = context.new_page()
        page.set_default_timeout(10 * SECOND)
        page.on("websocket", lambda socket: asked.append(socket.url))
        page.goto(server.url + query)
        page.wait_for_selector("#box textarea")
        page.wait_for_selector(f"text={(EN if 'en' in query else PT)['send.value']}")
        return page

    yield one
    for context in contexts:
        context.close()
    assert len(asked) > 10
    assert [url for url in asked if not url.startswith((server.url, "data:", "blob:"))] == []


def ask(page: Any, text: str) -> None:
    page.fill("#box textarea", text)
    page.press("#box textarea", "Enter")


def control(page: Any, box: Any, value: str) -> None:
    """Type a number into one of the controls, which are opened first."""
    if not box.is_visible():
        page.get_by_text(PT["controls.label"], exact=True).click()
    for _ in range(5):
        box.fill(value)
        box.press("Tab")
        # the component tells the page of it a moment later, and texts that still come at the start may undo it
        page.wait_for_timeout(700)
        if box.input_value() == value:
            break


def answers(page: Any) -> list[str]:
    return page.locator("#chat .bot.message").all_inner_texts()


def note(page: Any) -> str:
    return "".join(page.locator("#note p").all_inner_texts())


def until(true: Callable[[], Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        # playwright's own work goes on meanwhile, in its calls
        time.sleep(0.02)


def finished(page: Any) -> bool:
    return page.locator("#send").is_visible() and len(answers(page)) > 0


class TestPage:
    def test_an_answer_grows_beside_its_neighbours(self, server: Server, visit: Visit) -> None:
        server.pause_s = 0.15
        page = visit()
        question = Neighbours.of(server.run).shown[0][0]
        ask(page, question)
        seen: list[str] = []

        def watch() -> bool:
            seen.extend(answers(page)[:1])
            return finished(page)

        until(watch)
        lengths = list(dict.fromkeys(len(text) for text in seen))
        assert len(lengths) > 4 and lengths == sorted(lengths)
        near = page.locator("#near-question article").all_inner_texts()
        assert near[0].startswith("100%") and question in near[0]
        assert page.locator("#near-answer article").count() > 0
        assert page.locator("#box textarea").input_value() == ""
        assert page.locator("#chat .user.message").all_inner_texts() == [question]

    def test_stop_then_retry_then_clear(self, server: Server, visit: Visit) -> None:
        page = visit()
        server.pause_s = 0.3
        ask(page, "Olá")
        until(lambda: answers(page) and answers(page)[0])
        page.click("#stop")
        page.wait_for_selector("#send")
        written, stopped = server.written, answers(page)[0]
        time.sleep(1)
        assert server.written <= written + 1, "no token is written after the stop"
        assert answers(page)[0].startswith(stopped)
        assert PT["stopped"] in note(page)
        server.pause_s = 0
        page.click("#retry")
        until(lambda: finished(page) and len(server.asked) == 2)
        assert [seed for *_, seed in server.asked] == [server.run.params.seed, server.run.params.seed + 1]
        assert server.asked[0][0] == server.asked[1][0] and len(answers(page)) == 1
        page.click("#clear")
        until(lambda: answers(page) == [])
        # nothing of it is asked again
        ask(page, "Como vai?")
        until(lambda: finished(page))
        assert "Olá" not in server.asked[-1][0]

    def test_two_at_once_take_turns_and_see_nothing_of_each_other(self, server: Server, visit: Visit) -> None:
        one, other = visit(), visit("?lang=en")
        server.pause_s = 0.25
        ask(one, "O que é o mercado?")
        until(lambda: answers(one))
        ask(other, "O que é a bacia?")
        until(lambda: "queue" in other.locator("#note").inner_text().lower())
        assert answers(other) == [] and len(server.asked) == 1
        assert other.locator("#chat .user.message").all_inner_texts() == ["O que é a bacia?"]
        server.pause_s = 0
        until(lambda: finished(one) and finished(other))
        assert one.locator("#chat .user.message").all_inner_texts() == ["O que é o mercado?"]
        assert "mercado" not in server.asked[1][0]

    def test_who_waits_can_leave_the_queue(self, server: Server, visit: Visit) -> None:
        one, other = visit(), visit()
        server.pause_s = 0.2
        ask(one, "Olá")
        until(lambda: answers(one))
        ask(other, "O que é a bacia?")
        other.click("#stop")
        other.wait_for_selector("#send")
        server.pause_s = 0
        until(lambda: finished(one))
        ask(other, "Quem é você?")
        until(lambda: finished(other))
        assert [text.count("bacia") for text, *_ in server.asked] == [0, 0]

    @pytest.mark.parametrize(("query", "text"), [("", PT), ("?lang=en", EN)])
    def test_a_paste_of_100_000_characters_is_refused_politely(self, server: Server, visit: Visit, query, text) -> None:
        page = visit(query)
        typed = "o preço do café sobe " * 5000
        ask(page, typed[:100_000])
        page.wait_for_selector("#note p")
        told = note(page)
        before, after = text["too_long"].split("{most}")
        assert told.startswith(before) and told.endswith(after)
        # it stays, to be shortened; and is answered once it is
        assert len(page.locator("#box textarea").input_value()) == 100_000
        time.sleep(0.3)
        assert server.asked == [] and page.locator("#chat .message").count() == 0
        most = int("".join(filter(str.isdigit, told)))
        ask(page, typed[: int(0.9 * most)])
        until(lambda: finished(page))
        assert note(page) == ""

    def test_an_empty_message_does_nothing(self, server: Server, visit: Visit) -> None:
        page = visit()
        for text in ("", "   ", "\u200b"):
            ask(page, text)
        page.click("#retry")
        time.sleep(0.5)
        assert server.asked == [] and page.locator("#chat .message").count() == 0
        assert note(page) == "" and page.locator("#send").is_visible()

    def test_what_is_typed_is_text(self, server: Server, visit: Visit) -> None:
        page, typed = visit(), "<instruction>a</instruction> <b>b</b> <script>document.title='x'</script> **c** $d$ 🧉"
        ask(page, typed)
        until(lambda: finished(page))
        assert page.locator("#chat .user.message").all_inner_texts() == [typed]
        assert page.title() == "TeenyTinyLlama"
        assert server.asked[0][0].count("<instruction>") == 2, "the template's, and the letters"

    def test_controls_are_the_run_s_and_are_followed(self, server: Server, visit: Visit) -> None:
        page, chat = visit(), server.run.params.chat
        ask(page, "Olá")
        until(lambda: finished(page))
        assert server.asked[0][1] == chat
        control(page, page.get_by_label(PT["seed.label"]), "7")
        # the last slider's, before the seed
        control(page, page.locator("input[type=number]").nth(4), "3")
        ask(page, "Olá")
        until(lambda: len(server.asked) == 2 and finished(page))
        assert server.asked[1][1] == chat.model_copy(update={"max_new_tokens": 3}) and server.asked[1][2] == 7

    def test_samples_are_the_run_s_prompts(self, server: Server, visit: Visit) -> None:
        page = visit()
        for number, prompt in enumerate(server.run.params.chat.prompts):
            page.locator("#samples button").nth(number).click()
            until(lambda prompt=prompt: page.locator("#box textarea").input_value() == prompt)

    @pytest.mark.parametrize(("typed", "first"), [("-3", 2**31 - 3), ("", 0), ("1e30", int(1e30) % 2**31)])
    def test_any_seed_is_taken(self, server: Server, visit: Visit, typed: str, first: int) -> None:
        page = visit()
        control(page, page.get_by_label(PT["seed.label"]), typed)
        ask(page, "Olá")
        until(lambda: finished(page) and len(server.asked) == 1)
        page.click("#retry")
        until(lambda: finished(page) and len(server.asked) == 2)
        assert [seed for *_, seed in server.asked] == [first, first + 1]

    def test_whom_a_full_queue_refuses_can_ask_again(self, server: Server, visit: Visit, monkeypatch) -> None:
        one, waits, refused = visit(), visit(), visit()
        monkeypatch.setattr(server.blocks._queue, "max_size", 1)
        server.pause_s = 0.25
        ask(one, "Olá")
        until(lambda: answers(one))
        ask(waits, "O que é a bacia?")
        until(lambda: "queue" in waits.locator("#note").inner_text().lower())
        ask(refused, "Quem é você?")
        refused.wait_for_selector(".toast-body")
        refused.wait_for_selector("#send")
        server.pause_s = 0
        until(lambda: finished(one) and finished(waits))
        assert len(server.asked) == 2
        refused.click("#retry")
        until(lambda: finished(refused) and len(server.asked) == 3)
        assert refused.locator("#chat .user.message").all_inner_texts() == ["Quem é você?"]

    def test_every_text_of_the_page_changes_its_language(self, server: Server, visit: Visit) -> None:
        page = visit()

        def found() -> str:
            hints = [page.locator("#box textarea").get_attribute("placeholder") or ""]
            return "\n".join([page.locator("body").inner_text(), *hints])

        page.get_by_text(PT["controls.label"], exact=True).click()
        until(lambda: PT["seed.info"] in found())
        before = found()
        parts = {
            key: [line.strip("#* ") for line in text.splitlines() if line] for key, text in PT.items() if "." in key
        }
        parts = {key: [line for line in lines if line not in EN[key]] for key, lines in parts.items()}
        shown = [key for key, lines in parts.items() if lines and all(line.split("{")[0] in before for line in lines)]
        # but for the button that is not there, and what the two languages share
        assert set(parts) - set(shown) == {"stop.value", "top_k.label", "top_p.label"}
        page.get_by_text("English", exact=True).click()
        until(lambda: EN["send.value"] in found())
        after = found()
        assert [line for key in shown for line in parts[key] if line.split("{")[0] in after] == []
        assert all(EN[key] in after for key in ("box.placeholder", "seed.info", "controls.label", "samples.label"))
        other = visit("?lang=en")
        assert EN["box.label"] in other.locator("body").inner_text()

    def test_a_fault_of_the_server_is_said_and_the_page_goes_on(self, server: Server, visit: Visit, capfd) -> None:
        page = visit()
        server.fault = RuntimeError("the weights are on fire")
        ask(page, "Olá")
        page.wait_for_selector("#note p")
        assert note(page) == PT["failed"]
        assert "on fire" in capfd.readouterr().err
        server.fault = None
        page.click("#retry")
        until(lambda: finished(page))
        assert note(page) == ""

    def test_old_turns_that_no_longer_fit_are_said(self, server: Server, visit: Visit) -> None:
        page = visit()
        # the last slider's: short answers, soon written
        control(page, page.locator("input[type=number]").nth(4), "2")
        for number in range(3):
            ask(page, f"{number} " + "a " * 80)
            until(lambda number=number: finished(page) and len(answers(page)) == number + 1)
        assert PT["dropped"] in note(page)
        assert not server.asked[-1][0].startswith("<s><instruction> 0")
        assert page.locator("#chat .user.message").count() == 3, "the page still shows them"

    def test_a_phone_sees_all_of_it(self, server: Server, visit: Visit) -> None:
        page = visit()
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


class TestWithoutABrowser:
    def test_the_server_itself_refuses(self, server: Server) -> None:
        page = demo._Page(server.run)
        refused = page.accept("a" * 1_000_000, [], "idle", "pt", 24)
        assert refused[5].startswith("A mensagem é longa demais") and refused[1] == page.gr.skip()
        assert page.accept(" ", [], "idle", "pt", 24)[5] == ""
        # a second message while the first is answered
        assert page.accept("Olá", [], "writing", "pt", 24)[1] == page.gr.skip()

    def test_nothing_is_open_but_the_page(self, server: Server) -> None:
        import httpx

        for path in ("docs", "openapi.json", "gradio_api/info", "monitoring"):
            response = httpx.get(server.url + path, trust_env=False)
            assert response.status_code >= 400 or not response.json().get("named_endpoints"), path
        files = {"files": ("x.txt", b"text" * 100)}
        assert httpx.post(server.url + "gradio_api/upload", files=files, trust_env=False).status_code >= 400
        config = httpx.get(server.url + "config", trust_env=False).json()
        assert not config["analytics_enabled"] and not config.get("share_url")
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"

    def test_cards_escape_what_they_show(self) -> None:
        row = {"question": "<img src=x onerror=alert(1)>", "answer": "a & b", "similarity": 0.5}
        assert "<img" not in demo._cards([row]) and "a &amp; b" in demo._cards([row]) and "50%" in demo._cards([row])

    def test_both_languages_have_every_text(self) -> None:
        assert list(LANGUAGES) == ["pt", "en"] and PT.keys() == EN.keys()
        assert all(text.strip() for text in (*PT.values(), *EN.values()))
        assert all(PT[key].count("{") == EN[key].count("{") for key in PT)

    def test_without_gradio_the_command_says_what_to_install(self, tiny: Any, monkeypatch, capsys) -> None:
        monkeypatch.setitem(sys.modules, "gradio", None)
        assert commands.main(["chat", tiny.file, "--web"]) == 1
        assert 'pip install -e ".[demo]"' in capsys.readouterr().err

    def test_serve_says_where_it_is_and_warns_beyond_this_machine(self, server: Server, monkeypatch, capsys) -> None:
        launched: list[tuple] = []
        blocks = SimpleNamespace(server_port=7860, block_thread=lambda: None)
        monkeypatch.setattr(demo, "build", lambda run: blocks)
        monkeypatch.setattr(demo, "_launch", lambda *given, **_: launched.append(given))
        monkeypatch.setattr(demo, "_check_free", lambda *_: None)
        for host, warned in (
            ("127.0.0.1", False),
            ("localhost", False),
            ("::1", False),
            ("0.0.0.0", True),
            ("x.y", True),
        ):
            demo.serve(server.run, host=host)
            told = capsys.readouterr().out
            assert f"http://{host}:7860" in told and PT["notice.value"] in told
            assert ("without a password" in told) == warned
        assert launched[0] == (blocks, "127.0.0.1", None)

    def test_a_port_that_is_taken_is_said(self, server: Server) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(TTLError, match="cannot listen at --host 127.0.0.1, --port [0-9]+ .*in use"):
                demo.serve(server.run, port=taken.getsockname()[1])

    @pytest.mark.parametrize(("host", "port"), [("1.2.3.4", None), ("a..b", 7860), ("127.0.0.1", 99_999)])
    def test_an_address_that_cannot_be_is_said_before_the_model_is_loaded(self, monkeypatch, host, port) -> None:
        monkeypatch.setattr(demo, "build", lambda _: pytest.fail("the page was built"))
        with pytest.raises(TTLError, match="cannot listen at --host"):
            demo.serve(SimpleNamespace(), host=host, port=port)


class TestInANotebook:
    def test_a_run_without_a_reader_is_told_how_to_start_it(self, tmp_path: Path) -> None:
        source = (
            "import sys; from types import SimpleNamespace; from ttl_utils import demo\n"
            "demo.in_notebook(SimpleNamespace(_command=lambda: 'nano')); print('gradio' in sys.modules)"
        )
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
        text = notebook.cells[0].outputs[0].text
        assert "ttl chat nano --web" in text and text.endswith("False\n")

    def test_a_reader_gets_the_page_in_the_cell(self, server: Server, monkeypatch, capsys) -> None:
        launched: list[dict] = []
        shell = SimpleNamespace(get_parent=lambda: {"content": {"allow_stdin": True}})
        monkeypatch.setattr("IPython.get_ipython", lambda: shell)
        monkeypatch.setattr(demo, "build", lambda run: "blocks")
        monkeypatch.setattr(demo, "_launch", lambda *given, **named: launched.append((*given, named)))
        demo.in_notebook(server.run)
        assert launched == [("blocks", "127.0.0.1", None, {"inline": True})]
        monkeypatch.setitem(sys.modules, "gradio", None)
        demo.in_notebook(server.run)
        assert len(launched) == 1 and 'pip install -e ".[demo]"' in capsys.readouterr().out
