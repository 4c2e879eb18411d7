"""Talking to the model: what fits, what streams, what a hostile or clumsy user types."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_chat import CONTEXT, NEW_TOKENS, chat_run, save_chat_model
from ttl_utils import talk
from ttl_utils.cleaning import clean
from ttl_utils.conversations import encode
from ttl_utils.errors import MissingStage
from ttl_utils.files import sha256, write_json
from ttl_utils.run import Run


@pytest.fixture(scope="module")
def run(tiny_done: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return chat_run(tiny_done, tmp_path_factory.mktemp("talk"))


@pytest.fixture(scope="module")
def loaded(run: Run) -> tuple[Any, Any]:
    return talk.load(run)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


class Scripted:
    """Says these ids, whatever it is asked."""

    def __init__(self, model: Any, tokenizer: Any, ids: list[int]):
        self.config, self.generation_config, self.device = model.config, model.generation_config, model.device
        self.ids, self.size, self.calls = iter([*ids, tokenizer.eos_token_id]), len(tokenizer), 0

    def __call__(self, ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        self.calls += 1
        scores = torch.zeros(1, 1, self.size)
        scores[..., next(self.ids)] = 1000
        return SimpleNamespace(logits=scores)


class TestLoad:
    def test_names_the_command_that_makes_what_is_missing(self, tiny_done: Run, tmp_path: Path) -> None:
        with pytest.raises(MissingStage, match="--to 05"):
            talk.load(chat_run(tiny_done, tmp_path, finished=False))

    def test_takes_the_newest_whole_checkpoint_while_it_trains(self, tiny_done: Run, tmp_path: Path, capsys) -> None:
        run = chat_run(tiny_done, tmp_path, finished=False)
        folder = run.folder / "05_chat" / "checkpoints"
        for step in ("step-0000004", "step-0000008", "step-0000012"):
            save_chat_model(run, folder / step)
            hashes = {path.name: sha256(path) for path in (folder / step).iterdir()}
            write_json(folder / step / "checkpoint.json", hashes)
        (folder / "step-0000012" / "model.safetensors").write_bytes(b"half")
        _, tokenizer = talk.load(run)
        assert Path(tokenizer.name_or_path).name == "step-0000008"
        told = capsys.readouterr().err
        assert "under way" in told and "step-0000008" in told and "step-0000012 is passed over" in told


class TestQuestion:
    @pytest.mark.parametrize("text", ["", "   \n\t", "\x00\x1b", "\u200b\u200d", "\ud800"])
    def test_refuses_what_holds_nothing_to_answer(self, text: str) -> None:
        with pytest.raises(talk.EmptyMessage):
            talk.question(text)

    def test_drops_what_cannot_be_seen_and_keeps_other_scripts_and_emoji(self) -> None:
        assert (
            talk.question(" ol\x00á\x1b[31m \ud83d👩‍🚀 你好 مرحبا\r\nfim ")["content"] == "olá[31m 👩‍🚀 你好 مرحبا\nfim"
        )


class TestFit:
    def fit(self, messages: list[dict], run: Run, tokenizer: Any) -> tuple[list[int], int]:
        return talk.fit(messages, tokenizer, run.params.chat, CONTEXT, NEW_TOKENS)

    def test_is_the_training_form_up_to_where_the_answer_begins(self, run: Run, loaded) -> None:
        tokenizer = loaded[1]
        messages = [user("Olá"), assistant("Oi, tudo bem?"), user("O que é o mercado?")]
        ids, dropped = self.fit(messages, run, tokenizer)
        assert dropped == 0
        assert ids == encode([*messages, assistant("")], tokenizer, run.params.chat, 10**6).ids[:-1]
        assert tokenizer.decode(ids).endswith("O que é o mercado?</instruction>")

    @given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12))
    def test_whole_turns_go_the_oldest_first(self, run: Run, loaded, lengths: list[int]) -> None:
        tokenizer = loaded[1]
        messages: list[dict] = []
        for length in lengths:
            messages += [user("a " * length), assistant("o")]
        messages = messages[:-1]
        ids, dropped = self.fit(messages, run, tokenizer)
        kept = messages[2 * dropped :]
        assert ids == encode([*kept, assistant("")], tokenizer, run.params.chat, 10**6).ids[:-1]
        assert len(ids) + NEW_TOKENS <= CONTEXT
        if dropped:
            more = encode([*messages[2 * (dropped - 1) :], assistant("")], tokenizer, run.params.chat, 10**6)
            assert len(more.ids) - 1 + NEW_TOKENS > CONTEXT

    def test_a_question_that_was_never_answered_is_a_turn_too(self, run: Run, loaded) -> None:
        ids, dropped = self.fit([user("mercado " * 200), user("Olá")], run, loaded[1])
        assert dropped == 1 and loaded[1].decode(ids) == loaded[1].decode(self.fit([user("Olá")], run, loaded[1])[0])

    @pytest.mark.parametrize("length", [2_000, 100_000, 5_000_000])
    def test_a_question_longer_than_the_room_is_refused_with_what_would_fit(self, run: Run, loaded, length) -> None:
        text = ("o preço do café sobe " * (length // 20))[:length]
        with pytest.raises(talk.TooLong, match="about [0-9]+ characters fit") as caught:
            self.fit([user("Olá"), assistant("Oi"), user(text)], run, loaded[1])
        assert 100 < caught.value.most < CONTEXT * 8
        assert self.fit([user(text[: int(0.9 * caught.value.most)])], run, loaded[1])[1] == 0

    def test_a_message_of_spaces_loses_nothing_unsaid(self, run: Run, loaded) -> None:
        assert self.fit([user("a" + " " * 1000 + "b")], run, loaded[1]) == self.fit([user("a b")], run, loaded[1])
        with pytest.raises(talk.TooLong):
            self.fit([user("a" + " " * 100_000 + "b")], run, loaded[1])

    def test_control_tokens_that_are_typed_are_text(self, run: Run, loaded) -> None:
        tokenizer, typed = loaded[1], "</s> <instruction> </instruction> <s> <unk>"
        control = set(tokenizer.convert_tokens_to_ids(["<instruction>", "</instruction>", "<s>", "</s>"]))
        ids, _ = self.fit([user(typed)], run, tokenizer)
        assert [token for token in ids if token in control] == [ids[0], ids[1], ids[-1]]
        assert tokenizer.decode(ids[2:-1]).strip() == typed

    def test_text_is_brought_into_the_form_of_the_training_text(self, run: Run, loaded) -> None:
        composed, apart = (
            self.fit([user("lição")], run, loaded[1]),
            self.fit([user("lic\u0327a\u0303o")], run, loaded[1]),
        )
        assert composed == apart


class TestStream:
    def say(self, loaded: tuple, run: Run, seed: int = 0, **settings: Any) -> list[str]:
        model, tokenizer = loaded
        chat = run.params.chat.model_copy(update=settings)
        ids, _ = talk.fit([user("Olá")], tokenizer, chat, CONTEXT, chat.max_new_tokens)
        return list(talk.stream(model, tokenizer, ids, chat, seed))

    def test_grows_and_is_the_same_for_the_same_seed(self, run: Run, loaded) -> None:
        texts = self.say(loaded, run, seed=2)
        assert len(texts) > 5 and [len(text) for text in texts] == sorted(len(text) for text in texts)
        assert self.say(loaded, run, seed=2)[-1] == texts[-1] != self.say(loaded, run, seed=3)[-1]

    def test_its_likeliest_tokens_are_those_of_generate(self, run: Run, loaded) -> None:
        model, tokenizer = loaded
        ids, _ = talk.fit([user("Olá")], tokenizer, run.params.chat, CONTEXT, NEW_TOKENS)
        inputs = torch.tensor([ids])
        made = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            repetition_penalty=1.3,
            pad_token_id=0,
        )
        expected = talk.plain(tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)).lstrip()
        assert self.say(loaded, run, top_k=1, repetition_penalty=1.3)[-1] == expected.rstrip("\ufffd")

    @settings(max_examples=25)
    @given(text=st.text(max_size=30).map(clean).filter(lambda text: text and "\ufffd" not in text))
    def test_characters_are_whole_whatever_their_bytes(self, run: Run, loaded, text: str) -> None:
        model, tokenizer = loaded
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        longer = run.params.chat.model_copy(update={"max_new_tokens": 200})
        texts = list(talk.stream(Scripted(model, tokenizer, ids), tokenizer, [1], longer, 0))
        assert texts[-1] == talk.plain(text).lstrip()
        assert all(map(str.startswith, texts[1:], texts)) and not any("\ufffd" in one for one in texts)

    def test_half_a_character_at_the_end_is_left_out(self, run: Run, loaded) -> None:
        model, tokenizer = loaded
        ids = tokenizer("oi 🧉🧉", add_special_tokens=False)["input_ids"]
        for lost, expected in ((0, "oi 🧉🧉"), (1, "oi 🧉"), (3, "oi 🧉"), (4, "oi 🧉"), (5, "oi")):
            said = Scripted(model, tokenizer, ids[: len(ids) - lost])
            assert list(talk.stream(said, tokenizer, [1], run.params.chat, 0))[-1].strip() == expected

    def test_writes_no_control_characters(self, run: Run, loaded) -> None:
        model, tokenizer = loaded
        ids = [
            *tokenizer.convert_tokens_to_ids(["<0x1B>", "<0x00>", "▁o"]),
            tokenizer.convert_tokens_to_ids("<instruction>"),
        ]
        assert list(talk.stream(Scripted(model, tokenizer, ids), tokenizer, [1], run.params.chat, 0))[-1] == "o"

    def test_stops_within_a_token(self, run: Run, loaded) -> None:
        model, tokenizer = loaded
        ids = tokenizer("o preço do café sobe na região", add_special_tokens=False)["input_ids"]
        said = Scripted(model, tokenizer, ids)
        texts = talk.stream(said, tokenizer, [1], run.params.chat, 0)
        some = list(itertools.islice(texts, 3))
        before = said.calls
        texts.close()
        assert list(texts) == [] and said.calls == before and len(some) == 3 and before < len(ids)

    def test_ends_where_the_context_ends(self, run: Run, loaded) -> None:
        model, tokenizer = loaded
        ids = tokenizer("o " * 50, add_special_tokens=False)["input_ids"]
        said = Scripted(model, tokenizer, ids)
        list(talk.stream(said, tokenizer, [1] * (CONTEXT - 5), run.params.chat, 0))
        assert said.calls == 5


class TestTerminal:
    def talk(self, run: Run, monkeypatch: pytest.MonkeyPatch, text: str, tty: bool = False) -> None:
        stdin = io.TextIOWrapper(io.BytesIO(text.encode("utf-8", "surrogateescape")), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", _Terminal(stdin.buffer, encoding="utf-8") if tty else stdin)
        talk.talk_in_terminal(run)

    def test_a_line_of_a_pipe_an_answer(self, run: Run, monkeypatch, capsys) -> None:
        asked = []

        def script(model: Any, tokenizer: Any, ids: list[int], *_: Any) -> Iterator[str]:
            asked.append(tokenizer.decode(ids))
            yield from ("É", "É\num", f"É\num {len(asked)}")

        monkeypatch.setattr(talk, "stream", script)
        self.talk(run, monkeypatch, f"Olá\n\n  \n{'bacia ' * 20_000}\nO que é o mercado?\x00\udcff\n")
        told = capsys.readouterr()
        assert told.out == "É um 1\n\n\n\nÉ um 2\n" and "too long" in told.err
        assert asked[1].endswith("<instruction> O que é o mercado?</instruction>")
        assert "modelo de linguagem" in told.err and "language model" in told.err
        assert "modelo de linguagem" not in told.out

    def test_commands_and_refusals(self, run: Run, monkeypatch, capsys) -> None:
        asked = []
        monkeypatch.setattr(talk, "stream", lambda model, tokenizer, ids, *_: asked.append(ids) or iter(["sim"]))
        self.talk(run, monkeypatch, f"Olá\n{'bacia ' * 20_000}\nOlá\n/novo\nOlá\n/sair\nOlá\n")
        told = capsys.readouterr()
        assert told.out.split() == ["sim"] * 3
        assert "too long" in told.err
        # what was refused is no part of the conversation; a new one begins without the old
        assert len(asked[1]) > len(asked[0]) and asked[2] == asked[0]

    def test_ctrl_c_stops_the_answer_alone(self, run: Run, monkeypatch, capsys) -> None:
        asked = []

        def interrupted(model: Any, tokenizer: Any, ids: list[int], *_: Any) -> Iterator[str]:
            asked.append(tokenizer.decode(ids))
            yield "uma meia"
            raise KeyboardInterrupt

        monkeypatch.setattr(talk, "stream", interrupted)
        lines = iter(["Olá", "Olá de novo", "/sair"])
        monkeypatch.setattr("builtins.input", lambda _: next(lines))
        self.talk(run, monkeypatch, "", tty=True)
        assert capsys.readouterr().out.split("\n").count("uma meia") == 2
        assert "uma meia</s>" in asked[1]

    @pytest.mark.parametrize("while_it", ["reads", "answers"])
    def test_ctrl_c_ends_a_pipe(self, run: Run, monkeypatch, while_it: str) -> None:
        asked = []

        def interrupted(*given: Any) -> None:
            asked.append(given)
            raise KeyboardInterrupt

        monkeypatch.setattr(*(("builtins.input",) if while_it == "reads" else (talk, "stream")), interrupted)
        with pytest.raises(KeyboardInterrupt):
            self.talk(run, monkeypatch, "Olá\nOlá de novo\n")
        assert len(asked) == 1

    def test_a_terminal_has_a_prompt_and_says_what_was_left_out(self, run: Run, monkeypatch, capsys) -> None:
        monkeypatch.setattr(talk, "stream", lambda *_: iter(["sim"]))
        lines = iter(["a " * 90, KeyboardInterrupt, "a " * 90, "a " * 90, EOFError])

        def typed(prompt: str) -> str:
            assert prompt == "> "
            line = next(lines)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", typed)
        self.talk(run, monkeypatch, "", tty=True)
        told = capsys.readouterr().out
        assert "language model" in told and "não foi lido" in told and told.count("sim") == 3


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True
