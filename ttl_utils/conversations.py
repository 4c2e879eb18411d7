"""Conversations as ids: the template, what is learned of them, and rows that hold several without leaks."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch

from ttl_utils.corpus import documents
from ttl_utils.errors import ParameterError, TTLError
from ttl_utils.loss import IGNORED
from ttl_utils.progress import Progress
from ttl_utils.run import Run
from ttl_utils.schema import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# why a conversation is not learned whole
LATER, CUT, NO_ROOM = "later turns left out", "first answer cut at the context", "no room for an answer"
PROBE = [{"role": "user", "content": "Olá"}, {"role": "assistant", "content": "Oi."}] * 2


def chat_template(settings: Chat) -> str:
    """The paper's template in Jinja: the user's words between two tokens, each answer closed by `</s>`.

    The space before the words is the one that the tokenizer puts before a text, and not after a control token:
    with it the template gives the ids of `encode`.
    """
    return (
        "{{ bos_token }}{% for message in messages %}{% set words = message['content'] | trim %}"
        "{% if words %}{% set words = ' ' + words %}{% endif %}{% if message['role'] == 'user' %}"
        f"{{{{ '{settings.user_open}' + words + '{settings.user_close}' }}}}"
        "{% else %}{{ words + eos_token }}{% endif %}{% endfor %}"
    )


def prepare_chat_tokenizer(tokenizer: PreTrainedTokenizerBase, settings: Chat) -> PreTrainedTokenizerBase:
    """Add the template and its two tokens (32,000 + 2 rows in the paper).

    Raises:
        ParameterError: the tokenizer lacks a control token, or splits text in a way that the template does not suit.
    """
    if missing := [name for name in ("bos_token", "eos_token") if getattr(tokenizer, name) is None]:
        raise ParameterError(f"{tokenizer.name_or_path}: its tokenizer has no {' and no '.join(missing)}: name another")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.add_tokens([settings.user_open, settings.user_close], special_tokens=True)
    tokenizer.chat_template = chat_template(settings)
    if tokenizer.apply_chat_template(PROBE)["input_ids"] != encode(PROBE, tokenizer, settings, 1000).ids:
        raise ParameterError(
            f"{tokenizer.name_or_path}: the chat template does not suit its tokenizer, which begins a text otherwise "
            "than Llama 2's: name a model with a SentencePiece tokenizer like the paper's"
        )
    return tokenizer


@dataclass
class Example:
    """One conversation as ids and labels of the same length; a label is IGNORED where nothing is learned.

    `lost` says why it is not the whole conversation, if it is not.
    """

    ids: list[int]
    labels: list[int]
    lost: str = ""


def encode(messages: list[dict], tokenizer: PreTrainedTokenizerBase, settings: Chat, context: int) -> Example | None:
    """Learned: the assistant's words and the end token after them. None where nothing learned fits the context.

    Of a conversation that is too long, the turns up to the last answer that fits; a first answer that does not fit is
    learned as far as it does, without an end. A user who types a control token types text.
    """
    opened, closed = tokenizer.convert_tokens_to_ids([settings.user_open, settings.user_close])
    ids, labels, whole = [tokenizer.bos_token_id], [IGNORED], 0
    for message in messages:
        text = message["content"].strip()
        words = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if message["role"] == "user":
            ids += [opened, *words, closed]
            labels += [IGNORED] * (len(words) + 2)
        else:
            ids += [*words, tokenizer.eos_token_id]
            labels += [*words, tokenizer.eos_token_id]
            whole = len(ids) if len(ids) <= context else whole
    if len(ids) <= context:
        return Example(ids, labels) if whole else None
    fits = whole or context
    learned = any(label != IGNORED for label in labels[:fits])
    return Example(ids[:fits], labels[:fits], LATER if whole else CUT) if learned else None


def load_examples(run: Run, tokenizer: PreTrainedTokenizerBase, side: str) -> tuple[list[Example], dict]:
    """The conversations of a side, "train" or "test"; those that are not learned whole are counted by reason.

    Raises:
        TTLError: there is none.
    """
    context = run.params.model.max_position_embeddings
    examples, counts = [], {"conversations": 0, LATER: 0, CUT: 0, NO_ROOM: 0}
    with Progress(f"conversations encoded ({side})", None) as progress:
        for row in documents(run.need("01_data"), "chat", side, ["messages"]):
            counts["conversations"] += 1
            progress.update(counts["conversations"])
            example = encode(row["messages"], tokenizer, run.params.chat, context)
            if example is not None:
                examples.append(example)
            if lost := NO_ROOM if example is None else example.lost:
                counts[lost] += 1
    if not examples:
        raise TTLError(
            f"01_data has no conversation for chat ({side}; {counts['conversations']:,} read, {counts[NO_ROOM]:,} with "
            f"no room for an answer in the context of {context:,}): give data.sources one with use: chat"
        )
    return examples, counts


def answer_ids(example: Example) -> list[list[int]]:
    """The ids of each answer."""
    return [list(part) for learned, part in groupby(example.labels, lambda label: label != IGNORED) if learned]


def learned_tokens(examples: Iterable[Example]) -> int:
    return sum(label != IGNORED for example in examples for label in example.labels[1:])


def pack(lengths: Iterable[int], context: int) -> list[list[int]]:
    """Rows of example indices whose lengths sum to at most `context`: best fit, longest first."""
    rows: list[list[int]] = []
    # (free, row), sorted: the fullest row with room is found by bisection
    room: list[tuple[int, int]] = []
    lengths = list(lengths)
    for index in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        place = bisect_left(room, (lengths[index], 0))
        free, row = room.pop(place) if place < len(room) else (context, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(room, (free - lengths[index], row))
    return rows


def rows_of(examples: list[Example], context: int, faithful: bool = False) -> list[list[int]]:
    """Rows of example indices: packed, or the authors' way, where each has a row to itself."""
    return [[n] for n in range(len(examples))] if faithful else pack([len(one.ids) for one in examples], context)


def collate(
    examples: list[Example], rows: list[list[int]], context: int, pad: int, faithful: bool = False
) -> dict[str, torch.Tensor]:
    """Tensors (batch, context): positions start again at each conversation, which keeps them apart.

    `faithful`: a row is one document, and all of it is learned: the user's turn and the padding too.
    """
    ids = np.full((len(rows), context), pad, dtype=np.int64)
    labels = np.full((len(rows), context), IGNORED, dtype=np.int64)
    positions = np.zeros((len(rows), context), dtype=np.int64)
    for number, row in enumerate(rows):
        start = 0
        for index in row:
            example = examples[index]
            stop = start + len(example.ids)
            ids[number, start:stop] = example.ids
            # the first token is predicted from another conversation's last: never a target
            labels[number, start:stop] = [IGNORED, *example.labels[1:]]
            positions[number, start:stop] = np.arange(stop - start)
            start = stop
        # the padding is a document of its own
        positions[number, start:] = np.arange(context - start)
        if faithful and row:
            labels[number] = ids[number]
    made = {"input_ids": ids, "labels": labels} | ({} if faithful else {"position_ids": positions})
    return {key: torch.from_numpy(value) for key, value in made.items()}
