"""The sets of table 5 as classifiers read them: texts in parts, classes, and ids (paper, section 4.1)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any

import numpy as np

from ttl_utils import hub
from ttl_utils.corpus import documents
from ttl_utils.encoding import plain_ids
from ttl_utils.errors import SourceError, TTLError
from ttl_utils.run import Stage
from ttl_utils.schema import Downstream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("train", "test")
# as a format writes them, whatever the tokenizer's own are called
BOS, EOS = "<s>", "</s>"
# texts encoded at once: their ids stand in memory as Python numbers until they are packed
_TOGETHER = 1000


@dataclass(frozen=True)
class Examples:
    """A set before any tokenizer.

    `pieces`: the format, cut at its control tokens. `texts`: by side, for each piece that is text, the examples'.
    `labels`: by side, places in `names`.
    """

    item: Downstream
    pieces: list[str]
    texts: dict[str, list[list[str]]]
    labels: dict[str, np.ndarray]
    names: list[str]
    fingerprint: str
    from_mirror: bool


@dataclass(frozen=True)
class Rows:
    """One side for one tokenizer: ids and (for encoders that have them) token types of each example, and its class."""

    ids: list[np.ndarray]
    types: list[np.ndarray] | None
    labels: np.ndarray
    # examples longer than max_length, whose end is not read
    cut: int

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.ids])


def wrong(item: Downstream, what: str) -> TTLError:
    return TTLError(f"downstream {item.name!r}: {what}")


def cut_format(item: Downstream) -> tuple[list[str], list[str]]:
    """The format's pieces ("<s>", "</s>", and what stands between), and the columns it names."""
    pieces = [piece for piece in re.split(f"({BOS}|{EOS})", item.text) if piece]
    try:
        columns = [name for _, name, _, _ in Formatter().parse(item.text) if name is not None]
    except ValueError as error:
        raise wrong(
            item, f"the format {item.text!r} cannot be read ({error}): a brace of its own is written twice"
        ) from None
    if not columns:
        raise wrong(item, f"the format {item.text!r} names no {{column}}")
    return pieces, list(dict.fromkeys(columns))


def load_examples(item: Downstream, corpus: Stage) -> Examples:
    """A set of stage 01 or of the hub.

    Raises:
        SourceError: the hub cannot be reached, or has no such set or split.
        TTLError: a column that is not there, an empty side, a label that is no class or only in the test set.
    """
    pieces, columns = cut_format(item)
    texts, labels, feature = {}, {}, None
    for side in SIDES:
        rows, feature = _read(item, corpus, side, columns)
        texts[side] = [_texts(item, piece, rows, side, columns) for piece in pieces if piece not in (BOS, EOS)]
        labels[side] = [row[item.label] for row in rows]
    if not all(labels.values()):
        raise wrong(item, f"{len(labels['train'])} training and {len(labels['test'])} test examples")
    classes, names = _classes(item, labels, feature)
    place = {label: index for index, label in enumerate(classes)}
    numbers = {side: np.array([place[label] for label in found]) for side, found in labels.items()}
    digest = hashlib.blake2b(json.dumps([pieces, names]).encode(), digest_size=16)
    for side in SIDES:
        for text in (text for part in texts[side] for text in part):
            digest.update(text.encode("utf-8") + b"\0")
        digest.update(numbers[side].tobytes())
    mirror = bool(item.dataset and hub.mirrored(item.dataset))
    return Examples(item, pieces, texts, numbers, names, digest.hexdigest(), mirror)


def _read(item: Downstream, corpus: Stage, side: str, columns: list[str]) -> tuple[list[dict], Any]:
    """The rows of a side, with the columns that are needed, and what `datasets` knows of the label."""
    needed = list(dict.fromkeys([*columns, item.label]))
    if item.source:
        rows = [row for row in documents(corpus, "downstream", side) if row["source"] == item.source]
        there, feature = list(rows[0]) if rows else needed, None
    else:
        split = item.train_split if side == "train" else item.test_split
        rows = hub.load(item.dataset, item.config, split, item.revision, streaming=False)
        there, feature = rows.column_names, rows.features.get(item.label)
    for name in needed:
        if name not in there:
            raise wrong(item, f"there is no column {name!r}; there are {', '.join(there)}")
    return [dict(row) for row in (rows if item.source else rows.select_columns(needed))], feature


def _texts(item: Downstream, piece: str, rows: list[dict], side: str, columns: list[str]) -> list[str]:
    for number, row in enumerate(rows):
        empty = [name for name in columns if row[name] is None]
        if empty:
            raise wrong(item, f"row {number:,} of the {side} side has nothing in column {empty[0]!r}")
    return [piece.format(**row) for row in rows]


def _classes(item: Downstream, labels: dict[str, list], feature: Any) -> tuple[list, list[str]]:
    """The different labels of the training side, in order, and their names: the data set's own where it gives them."""
    for side in SIDES:
        for number, label in enumerate(labels[side]):
            if not isinstance(label, str | int):
                raise wrong(
                    item, f"label {label!r} of row {number:,} of the {side} side is no class: a word or whole number is"
                )
    known = getattr(feature, "names", None)
    for side in SIDES if known else ():
        outside = sorted(set(labels[side]) - set(range(len(known))))
        if outside:
            raise wrong(
                item,
                f"label {outside[0]} of the {side} side is outside the set's classes, {', '.join(known)}: "
                "hub sets mark by -1 what has no label, often a whole split",
            )
    # numbers by size, then words
    classes = sorted(set(labels["train"]), key=lambda label: (isinstance(label, str), label))
    unseen = sorted(set(labels["test"]) - set(classes), key=str)
    if unseen:
        raise wrong(item, f"label {unseen[0]!r} of the test set is not in the training set")
    if len(classes) < 2:
        raise wrong(item, f"all training examples have the label {classes[0]!r}: there is nothing to learn")
    return classes, [known[label] if known else str(label) for label in classes]


def fed_pieces(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The format as a decoder is fed: it begins with one <s>, the format's or the one its tokenizer puts first."""
    adds = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return examples.pieces if examples.pieces[0] == BOS or not adds else [BOS, *examples.pieces]


def decoder_rows(examples: Examples, side: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Rows:
    """Ids with the format's control tokens; one that is written in a column's text is letters."""
    control = {BOS: tokenizer.bos_token_id, EOS: tokenizer.eos_token_id}
    pieces = fed_pieces(examples, tokenizer)
    for piece in pieces:
        if control.get(piece, 0) is None:
            raise wrong(examples.item, f"its format holds {piece}, and the model's tokenizer has no such token")

    def encode(part: slice) -> list[list[int]]:
        texts = iter(examples.texts[side])
        columns = [None if piece in control else plain_ids(tokenizer, next(texts)[part]) for piece in pieces]
        count = max(len(column) for column in columns if column is not None)
        return [
            [
                token
                for piece, column in zip(pieces, columns, strict=True)
                for token in ([control[piece]] if column is None else column[number])
            ]
            for number in range(count)
        ]

    ids, cut = [], 0
    for part in _parts(examples, side):
        rows = encode(part)
        cut += sum(len(row) > max_length for row in rows)
        ids += [np.array(row[:max_length], np.int64) for row in rows]
    return Rows(ids, None, examples.labels[side], cut)


def encoder_rows(examples: Examples, side: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Rows:
    """One text, or a pair where the format holds several, with the encoder's own control tokens and truncation."""
    first, *more = examples.texts[side]
    second = [" ".join(texts) for texts in zip(*more, strict=True)] if more else None
    ids, types, cut = [], [], 0
    for part in _parts(examples, side):
        found = tokenizer(
            first[part],
            second[part] if second else None,
            truncation=True,
            max_length=max_length,
            split_special_tokens=True,
            return_attention_mask=False,
        )
        cut += sum(bool(one.overflowing) for one in found.encodings)
        ids += [np.array(row, np.int64) for row in found["input_ids"]]
        types += [np.array(row, np.int64) for row in found.get("token_type_ids", [])]
    return Rows(ids, types or None, examples.labels[side], cut)


def _parts(examples: Examples, side: str) -> list[slice]:
    return [slice(start, start + _TOGETHER) for start in range(0, len(examples.labels[side]), _TOGETHER)]


def make_rows(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, encoder: bool, max_length: int, vocab_size: int
) -> dict[str, Rows]:
    """Both sides.

    Raises:
        SourceError: the tokenizer has ids that the model has no row for.
    """
    make: Callable[..., Rows] = encoder_rows if encoder else decoder_rows
    rows = {side: make(examples, side, tokenizer, max_length) for side in SIDES}
    highest = max(int(row.max()) for found in rows.values() for row in found.ids if len(row))
    if highest >= vocab_size:
        raise SourceError(
            f"the tokenizer gives id {highest}, and the model has {vocab_size} rows: they do not belong together"
        )
    return rows
