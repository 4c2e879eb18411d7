"""Texts to ids: SentencePiece, each word once and on all cores; or the Hugging Face form, where there is no other."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING

import numpy as np
import sentencepiece as spm

from ttl_utils.blocks import DTYPE
from ttl_utils.errors import TTLError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# characters of the words that a process remembers: some 60 MB
KEPT_CHARACTERS = 2**22
# batches before other processes are worth their start
ALONE = 4
_SPACE = "\u2581"


class Words:
    """A SentencePiece model that remembers words: most words of a text were encoded before.

    Where no piece holds a space but at its beginning, no merge crosses a space: the ids of a text are those of its
    words, one after another. Models that are otherwise encode whole texts.
    """

    def __init__(self, model: bytes):
        self.processor = spm.SentencePieceProcessor(model_proto=model)
        self.known: dict[str, bytes] = {}
        self.characters = 0
        pieces = [self.processor.id_to_piece(index) for index in range(self.processor.vocab_size())]
        self.begins = np.array([piece.startswith(_SPACE) for piece in pieces])
        one, spaces = self.processor.encode("a"), self.processor.encode(" ")
        # a text begins with a space of its own, so that one space is two
        self.space = spaces[: len(spaces) // 2]
        self.apart = not any(_SPACE in piece[1:] for piece in pieces)
        self.apart &= self.processor.encode("a a  a") == [*one, *one, *self.space, *one]

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        if not self.apart:
            return [ids.astype(DTYPE) for ids in self.processor.encode(texts, return_type="numpy")]
        return [np.frombuffer(self._joined(text), dtype=DTYPE) for text in texts]

    def _joined(self, text: str) -> bytes:
        if not text:
            return b""
        if self.characters > KEPT_CHARACTERS or not self.known:
            self.known = {"": np.array(self.space, dtype=DTYPE).tobytes()}
            self.characters = 0
        words = text.split(" ")
        parts = list(map(self.known.get, words))
        if None in parts:
            new = list(dict.fromkeys(word for word, part in zip(words, parts, strict=True) if part is None))
            self.known.update(zip(new, self._each(new), strict=True))
            self.characters += sum(map(len, new))
            parts = map(self.known.__getitem__, words)
        return b"".join(parts)

    def _each(self, words: list[str]) -> list[bytes]:
        # as one text, since a call costs more than a word; cut where pieces begin with a space
        ids = self.processor.encode(" ".join(words), return_type="numpy")
        cuts = np.flatnonzero(self.begins[ids]).tolist()
        if len(cuts) != len(words):
            # the mark itself stands in a word
            return [ids.astype(DTYPE).tobytes() for ids in self.processor.encode(words, return_type="numpy")]
        joined, size = ids.astype(DTYPE).tobytes(), DTYPE.itemsize
        return [joined[size * one : size * other] for one, other in pairwise([*cuts, len(ids)])]


@dataclass(frozen=True)
class Codec:
    """A tokenizer as packing uses it: the Hugging Face form, and SentencePiece's model where that encodes."""

    tokenizer: PreTrainedTokenizerBase
    model: bytes | None

    @cached_property
    def _words(self) -> Words | None:
        return Words(self.model) if self.model else None

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, without those that frame a document; a control token in a text is letters."""
        if self._words:
            return self._words.encode(texts)
        return [np.array(ids, dtype=DTYPE) for ids in plain_ids(self.tokenizer, texts)]

    def encode_all(
        self, batches: Iterable[list[str]], processes: int | None = None
    ) -> Iterator[tuple[list[str], list[np.ndarray]]]:
        """Each batch with its ids, in order; the Hugging Face form has threads of its own."""
        batches = iter(batches)
        processes = processes or os.cpu_count() or 1
        for batch in islice(batches, ALONE if self.model and processes > 1 else None):
            yield batch, self.encode(batch)
        first = list(islice(batches, 1))
        if not first:
            return
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker, (self.model,)) as pool:
            window: deque = deque()
            try:
                for batch in chain(first, batches):
                    window.append((batch, pool.submit(_encode_in_worker, batch)))
                    # a few batches ahead of the workers, never the whole corpus
                    if len(window) > 2 * processes:
                        batch, ids = window.popleft()
                        yield batch, ids.result()
                for batch, ids in window:
                    yield batch, ids.result()
            except BrokenProcessPool:
                raise TTLError(
                    "encoding: a worker process was ended from outside, most likely for want of memory; what was done "
                    "is kept: run again where more memory is free"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)


_worker: Words | None = None


def _start_worker(model: bytes) -> None:
    global _worker
    _worker = Words(model)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # a parent that is killed cannot tell its workers, which would wait for ever
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> list[np.ndarray]:
    assert _worker is not None
    return _worker.encode(texts)


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The Hugging Face form's ids without control tokens; one that is written in a text is letters."""
    return tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )["input_ids"]
