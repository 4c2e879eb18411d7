"""Texts to ids: SentencePiece, for each word of a batch once; or the Hugging Face form, where there is no other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import sentencepiece as spm

from ttl_utils.blocks import DTYPE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# words that are encoded as one text: a call costs more than a word, and a long text more than its parts
TOGETHER = 128
# how SentencePiece writes a space
_SPACE = "\u2581"
_PROBE = "\u00a0\u3000\t\n\u200b\u00ad\ufb01\u2026\u00b2e\u0301"


class Words:
    """A SentencePiece model that encodes the different words of a batch, and puts the texts together from them.

    Where no piece holds a space but at its beginning, no merge crosses a space: the ids of a text are those of its
    words, one after another. A model that is otherwise encodes whole texts.
    """

    def __init__(self, model: bytes):
        self.processor = spm.SentencePieceProcessor(model_proto=model)
        pieces = [self.processor.id_to_piece(index) for index in range(self.processor.vocab_size())]
        self.begins = np.array([piece.startswith(_SPACE) for piece in pieces])
        # a text begins with a space of its own, so that one space is two
        spaces = self.processor.encode(" ")
        self.apart = len(spaces) == 2 and not any(_SPACE in piece[1:] for piece in pieces)
        # nothing but spaces is written otherwise: no character becomes a space, or goes
        self.apart &= self.processor.normalize(_PROBE) == _SPACE + _PROBE

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the texts one after another (16 bits), and how many each text has."""
        if not (self.apart and texts and all(texts)):
            return self._whole(texts)
        words = pc.split_pattern(pa.array(texts), " ")
        coded = words.flatten().dictionary_encode()
        which = coded.indices.to_numpy()
        new = coded.dictionary.to_pylist()
        lines = [" ".join(new[n : n + TOGETHER]) for n in range(0, len(new), TOGETHER)]
        if not all(lines) or any(_SPACE in line for line in lines):
            # nothing to cut at, or the mark of a space in a text
            return self._whole(texts)
        different = np.concatenate(self.processor.encode(lines, num_threads=os.cpu_count() or 1, return_type="numpy"))
        begins = np.flatnonzero(self.begins[different])
        sizes = np.diff(begins, append=len(different))
        ends = np.cumsum(sizes[which])
        # the place of each id: that of its word's first, and its own within the word
        places = np.arange(ends[-1]) + np.repeat(begins[which] - ends + sizes[which], sizes[which])
        text_ends = ends[words.offsets.to_numpy()[1:] - 1]
        return different.astype(DTYPE)[places], np.diff(text_ends, prepend=0)

    def _whole(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return _joined(self.processor.encode(texts, num_threads=os.cpu_count() or 1, return_type="numpy"))


def _joined(parts: list) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return np.concatenate([np.empty(0, DTYPE), *(np.asarray(part, dtype=DTYPE) for part in parts)]), lengths


@dataclass(frozen=True)
class Codec:
    """A tokenizer as packing uses it: the Hugging Face form, and SentencePiece's model where that encodes."""

    tokenizer: PreTrainedTokenizerBase
    model: bytes | None

    @cached_property
    def _words(self) -> Words | None:
        return Words(self.model) if self.model else None

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the texts one after another, and how many each has; a control token in a text is letters."""
        return self._words.encode(texts) if self._words else _joined(plain_ids(self.tokenizer, texts))


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The Hugging Face form's ids without control tokens; one that is written in a text is letters."""
    return tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )["input_ids"]
