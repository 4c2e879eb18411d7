"""Tokenizers as they are measured: ours, other people's, and WordPiece trained beside them."""

from __future__ import annotations

import os
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import sentencepiece as spm
import tokenizers

from ttl_utils import hub
from ttl_utils.errors import SourceError, TTLError, reason
from ttl_utils.schema import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# WordPiece's, in the roles of <unk>, <s>, </s>, <pad>
SPECIAL = ("[UNK]", "[CLS]", "[SEP]", "[PAD]")
_BYTE = re.compile("<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Encoder:
    """A tokenizer as it is measured: texts to ids without special tokens, and its pieces."""

    name: str
    role: str  # ours, trained (for this comparison) or loaded
    encode: Callable[[list[str]], list[list[int]]]
    pieces: dict[str, int]
    unknown: int | None

    @cached_property
    def byte_ids(self) -> list[int]:
        """The bytes that a rare character falls back to; a line break is always its byte, so it is not among them."""
        return [index for piece, index in self.pieces.items() if _BYTE.fullmatch(piece) and piece != "<0x0A>"]

    @property
    def line_break(self) -> int | None:
        # the second is its name in byte-level tokenizers
        return self.pieces.get("<0x0A>", self.pieces.get("Ċ"))

    def composition(self) -> dict[str, int]:
        """How many pieces there are: special ones, bytes, single characters, learned ones."""
        byte = sum(bool(_BYTE.fullmatch(piece)) for piece in self.pieces)
        single = sum(len(piece.removeprefix("##")) == 1 for piece in self.pieces)
        size, special = len(self.pieces), len(SPECIAL)
        learned = size - special - byte - single
        return {"vocab_size": size, "special": special, "bytes": byte, "single": single, "learned": learned}

    def whole(self, words: Iterable[str]) -> set[str]:
        """The words that are one piece, and not the unknown one, after another word."""
        words = list(words)
        before = len(self.encode(["a"])[0])
        encoded = self.encode([f"a {word}" for word in words])
        return {
            word for word, ids in zip(words, encoded, strict=True) if len(ids) == before + 1 and ids[-1] != self.unknown
        }

    def count(self, texts: list[str]) -> np.ndarray:
        """(texts, 5): tokens, bytes of fallback, unknown tokens, line breaks, words kept whole."""
        encoded = self.encode(texts)
        owner = np.repeat(np.arange(len(texts)), [len(ids) for ids in encoded])
        ids = np.fromiter(chain.from_iterable(encoded), np.int64, len(owner))
        known = self.whole({word for text in texts for word in text.split()})
        marked = (np.ones(len(ids), bool), np.isin(ids, self.byte_ids), ids == self.unknown, ids == self.line_break)
        counts = [np.bincount(owner[where], minlength=len(texts)) for where in marked]
        return np.stack([*counts, [sum(word in known for word in text.split()) for text in texts]], axis=1)


def from_sentencepiece(name: str, role: str, processor: spm.SentencePieceProcessor) -> Encoder:
    threads = os.cpu_count() or 1
    pieces = {processor.id_to_piece(index): index for index in range(processor.vocab_size())}
    return Encoder(name, role, lambda texts: processor.encode(texts, num_threads=threads), pieces, processor.unk_id())


def from_transformers(name: str, role: str, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    def encode(texts: list[str]) -> list[list[int]]:
        # verbose: a text longer than the model's context is no fault here
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        # it fails on an empty list
        return tokenizer(texts, **options)["input_ids"] if texts else []

    return Encoder(name, role, encode, tokenizer.get_vocab(), tokenizer.unk_token_id)


def load(name: str) -> Encoder:
    """A tokenizer of the hub or of a folder; raises SourceError with the reason where it cannot be loaded."""
    from transformers import AutoTokenizer

    where = hub.model_folder(name, None)
    try:
        # never the code that comes with a model; said outright, since otherwise a terminal is asked
        return from_transformers(name, "loaded", AutoTokenizer.from_pretrained(where, trust_remote_code=False))
    except Exception as error:  # a folder made by others fails in ways that cannot be foreseen
        raise SourceError(f"tokenizer {name!r} does not load ({type(error).__name__}: {reason(error)})") from error


def alphabet(characters: Counter[str], coverage: float) -> set[str]:
    """The commonest characters that make up this share of all, as SentencePiece counts `character_coverage`."""
    kept, covered, total = set(), 0, characters.total()
    for character, count in sorted(characters.items(), key=lambda item: (-item[1], item[0])):
        if covered >= coverage * total:
            break
        kept.add(character)
        covered += count
    return kept


def train_wordpiece(lines: Iterable[str], settings: Tokenizer, characters: Counter[str]) -> bytes:
    """WordPiece with BERT's splitting, case and accents kept; a word that cannot be spelt is [UNK].

    The pieces are learned by merges, as `tokenizers` does (BERT's own trainer was never published), and a word is
    spelt by the longest piece that fits. `characters` are counted over the same lines. Memory: the different words.

    Raises:
        TTLError: the text has too few different pieces for the vocabulary.
    """
    pre = tokenizers.pre_tokenizers
    splits = [pre.BertPreTokenizer()] + [pre.Digits(individual_digits=True)] * settings.split_digits
    kept = alphabet(characters, settings.character_coverage)
    rare = str.maketrans(dict.fromkeys(characters.keys() - kept, " "))
    # the trainer meets `##` characters in the order of a hash table, another one in every process, and that order
    # decides between merges of equal count: given beforehand they stand in ours
    inside = [f"##{character}" for character in sorted(kept) if not _stands_alone(character, settings.split_digits)]
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=settings.vocab_size, special_tokens=[*SPECIAL, *inside], show_progress=False
    )
    learner = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = pre.Sequence(splits)
    learner.train_from_iterator((line.translate(rare) for line in lines), trainer)
    pieces = learner.get_vocab()
    if len(pieces) != settings.vocab_size:
        raise TTLError(
            f"tokenizer.vocab_size {settings.vocab_size}: WordPiece finds {len(pieces)} pieces in this text. Give "
            f"{'a smaller' if len(pieces) < settings.vocab_size else 'a larger'} vocabulary, or more text"
        )
    # a new one: the trained one would take a literal "##a" in a text for a special token
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre.Sequence(splits)
    return tokenizer.to_str().encode()


def _stands_alone(character: str, split_digits: bool) -> bool:
    """Whether the splitting makes a word of this character, so that it is never inside one."""
    category = unicodedata.category(character)[0]
    return character.isspace() or character in string.punctuation or category in ("PN" if split_digits else "P")
