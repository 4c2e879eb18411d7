"""Talking to the chat model (paper, section 4.3): history that fits the context, answers as they come, a terminal."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from ttl_utils import checkpoints
from ttl_utils.cleaning import clean
from ttl_utils.conversations import encode
from ttl_utils.demo_words import words
from ttl_utils.errors import TTLError
from ttl_utils.model import choose_hardware
from ttl_utils.run import Run
from ttl_utils.sampling import Draw, end_tokens
from ttl_utils.schema import Chat
from ttl_utils.subject import load_model
from ttl_utils.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# characters of the longest piece that SentencePiece makes: no message of more for each token of the context can fit
LONGEST_PIECE = 16
# what a decoder writes for bytes that are no character (yet)
_BROKEN = "\ufffd"


class EmptyMessage(TTLError):
    """A message without a word to answer."""


class TooLong(TTLError):
    """A message that does not fit; `most` characters of it would, about."""

    def __init__(self, most: int):
        self.most = most
        super().__init__(f"the message is too long: about {most:,} characters fit, so shorten it")


def load(run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The chat model of stage 05; while fine-tuning is under way its newest whole checkpoint, with a line that says so.

    Raises:
        MissingStage: there is neither.
        SourceError: the folder does not open as a model.
    """
    stage = run.stage("05_chat")
    folder = stage.folder / "model"
    if not stage.finished:
        folder = checkpoints.latest_whole(stage.folder / "checkpoints")
        if folder is None:
            run.need("05_chat")
        print(f"05_chat of run {run.name!r} is under way: this is its {folder.name}", file=sys.stderr)
    return load_model(folder, choose_hardware(run.params.chat)), load_tokenizer(folder)


def plain(text: str) -> str:
    """The text without what no one can see or type: control characters but line ends and tabs, halves of characters."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(one for one in text if one in "\n\t" or unicodedata.category(one) not in ("Cc", "Cs"))


def question(text: str) -> dict[str, str]:
    """What a user typed, as a message.

    Raises:
        EmptyMessage: there is nothing to answer.
    """
    text = plain(text).strip()
    if not clean(text):
        raise EmptyMessage("the message is empty: write something to answer")
    return {"role": "user", "content": text}


def fit(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase, settings: Chat, context: int, max_new_tokens: int
) -> tuple[list[int], int]:
    """Ids of the newest turns that leave room for the answer, up to where it begins, and how many turns were dropped.

    They are in the form of the training text: emoji that were joined (U+200D) stand apart, as the model read them.
    Whole turns go, the oldest first; a control token that was typed is text. The last message is the user's.

    Raises:
        TooLong: the last turn alone does not fit.
    """
    begins = [place for place, message in enumerate(messages) if message["role"] == "user"]
    turns = [messages[start:stop] for start, stop in itertools.pairwise([*begins, len(messages)])]
    room, kept, ids = context - max_new_tokens - 1, 0, []
    for turn in reversed(turns):
        # of megabytes no more than shows that they do not fit
        most, raw = LONGEST_PIECE * context, len(turn[0]["content"])
        turn = [message | {"content": clean(message["content"][:most])} for message in turn]
        # with the answer to come: its end token, the last id, is not there yet
        encoded = encode([*turn, {"role": "assistant", "content": ""}], tokenizer, settings, sys.maxsize).ids[:-1]
        if len(ids) + len(encoded) - 1 > room or raw > most:
            break
        ids, kept = [*encoded[1:], *ids], kept + 1
    if not kept:
        raise TooLong(max(0, room - 2) * len(turn[0]["content"]) // (len(encoded) - 1))
    return [encoded[0], *ids], len(turns) - kept


@torch.inference_mode()
def stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], settings: Chat, seed: int
) -> Iterator[str]:
    """The answer so far, whenever a token has made it longer; the same seed gives the same answer.

    A character whose bytes are still coming is held back. To stop it, close it: nothing is computed ahead.
    """
    from transformers import DynamicCache

    longest = min(settings.max_new_tokens, model.config.max_position_embeddings - len(ids))
    step = said = torch.tensor([ids], device=model.device)
    numbers = torch.from_numpy(np.random.default_rng(seed).random((1, longest)))
    draw = Draw(settings, torch.zeros_like(said, dtype=torch.bool), numbers)
    ends, cache = end_tokens(model, tokenizer), DynamicCache(config=model.config)
    new: list[int] = []
    text = shown = ""
    while len(new) < longest:
        scores = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        step = draw(said, scores).argmax(-1, keepdim=True)
        said = torch.cat([said, step], dim=1)
        if (token := step.item()) in ends:
            break
        new.append(token)
        text = _decode(tokenizer, new)
        if not text.endswith(_BROKEN) and text != shown:
            yield (shown := text)
    for missing in range(1, 4):
        # the last character may have lost up to three of its bytes
        if text.endswith(_BROKEN) and not (rest := _decode(tokenizer, new[:-missing])).endswith(_BROKEN):
            text = rest
    if text != shown:
        yield text


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return plain(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)).lstrip()


def talk_in_terminal(run: Run) -> None:
    """Read questions, write answers, until the end of the input.

    From a pipe, each question has its line of the output: the answer on one line, an empty one where it was refused.
    """
    model, tokenizer = load(run)
    tty, context, settings = sys.stdin.isatty(), model.config.max_position_embeddings, run.params.chat
    for file in (sys.stdin, sys.stdout):
        if isinstance(file, io.TextIOWrapper):
            # bytes that are no text, and letters that an old console lacks, end no conversation
            file.reconfigure(errors="replace")
    if tty:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() then edits lines
    told = sys.stdout if tty else sys.stderr
    for language in ("pt", "en"):
        print(words(language)["notice.value"], words(language)["commands"], sep="\n", end="\n\n", file=told)
    messages: list[dict] = []
    while True:
        try:
            line = input("> " if tty else "").strip()
            if line in ("/sair", "/exit"):
                break
            if line in ("/novo", "/new"):
                messages = []
                continue
            asked = [*messages, question(line)]
            ids, dropped = fit(asked, tokenizer, settings, context, settings.max_new_tokens)
        except EOFError:
            break
        except KeyboardInterrupt:
            if not tty:
                raise
            print()
            continue
        except TTLError as error:
            if not isinstance(error, EmptyMessage):
                print(error, file=sys.stderr)
            print(flush=True)
            continue
        if dropped:
            print(f"({words('pt')['dropped']} {words('en')['dropped']})", file=told)
        text = ""
        # it stops the answer; without a terminal, all
        with contextlib.suppress(*[KeyboardInterrupt] * tty):
            for longer in stream(model, tokenizer, ids, settings, run.params.seed + len(messages) // 2):
                more = longer[len(text) :]
                print(more if tty else more.replace("\n", " "), end="", flush=True)
                text = longer
        print(flush=True)
        messages = [*asked, {"role": "assistant", "content": text}]
    print(file=told)
