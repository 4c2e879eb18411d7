"""Text and published tokens as packed tokens, a file at a time, so that a stopped run goes on where it was."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from ttl_utils import hub
from ttl_utils.blocks import DTYPE, TokenWriter
from ttl_utils.corpus import documents
from ttl_utils.encoding import Codec, plain_ids
from ttl_utils.errors import SourceError, TTLError
from ttl_utils.progress import Progress
from ttl_utils.run import Stage
from ttl_utils.schema import TextSet, Tokenizer, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# of text encoded at a time: the more, the fewer of its words are new; some 100 MB of memory
BATCH_CHARACTERS = 2**22
# where the Hugging Face form encodes, which takes more memory for a token
PLAIN_CHARACTERS = 2**20
BATCH_ROWS = 512
LICENCE = "licence "
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def batches(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Lists of texts of together at most `characters`, or of one longer text."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > characters:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def framed(ids: np.ndarray, lengths: np.ndarray, bos: int, eos: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The documents of a batch, each within its control tokens: ids (16 bits) one after another, and the starts."""
    whole = lengths + (1 if eos is None else 2)
    ends = np.cumsum(whole)
    starts = ends - whole
    inner = np.ones(ends[-1], dtype=bool)
    result = np.empty(ends[-1], dtype=DTYPE)
    inner[starts], result[starts] = False, bos
    if eos is not None:
        inner[ends - 1], result[ends - 1] = False, eos
    result[inner] = ids
    return result, starts


def byte_pieces(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """(vocabulary,) bool: the pieces of byte fallback, except a line break, which is always its byte."""
    found = np.zeros(len(tokenizer), dtype=bool)
    for piece, index in tokenizer.get_vocab().items():
        found[index] = bool(_BYTE.fullmatch(piece)) and piece != "<0x0A>"
    return found


def first_difference(codec: Codec, texts: list[str]) -> str | None:
    """Where the Hugging Face form gives other ids than the codec does, if it does."""
    ids, lengths = codec.encode(texts)
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    for text, one, other in zip(texts, parts, plain_ids(codec.tokenizer, texts), strict=True):
        if (one := one.tolist()) != other:
            place = next((n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), -1)
            return f"token {place} of {text[:80]!r}"
    return None


def check_parity(codec: Codec, texts: list[str]) -> None:
    if place := first_difference(codec, texts):
        raise TTLError(
            f"SentencePiece and the Hugging Face tokenizer disagree at {place}: the model would be trained on other "
            "ids than users get. If the tokenizer's folder was not changed by hand, please report that text"
        )


def pack_texts(corpus: Stage, stage: Stage, codec: Codec, settings: Tokenizer, side: str, total: int) -> dict:
    """Encode one side of the corpus; returns what was counted, and `paths`."""
    writer = TokenWriter(stage.folder / "tokens", side, settings.shard_tokens)
    writer.resume()
    done = writer.totals["documents"]
    tokenizer, fallback = codec.tokenizer, byte_pieces(codec.tokenizer)
    eos = tokenizer.eos_token_id if settings.append_eos else None
    with Progress(f"{side} documents to tokens", total, stage.folder / "status.json", done=done) as progress:
        licences: deque[str] = deque()

        def read() -> Iterator[str]:
            for row in documents(corpus, "corpus", side, ["text", "licence"], skip=done):
                licences.append(row["licence"])
                yield row["text"]

        # a file ends with a batch: small files, small batches
        most = BATCH_CHARACTERS if codec.model else PLAIN_CHARACTERS
        for batch in batches(read(), min(most, settings.shard_tokens)):
            compared = 0
            # an imported tokenizer was compared before
            if not settings.source:
                wanted, before = settings.parity_documents, writer.totals["parity_documents"]
                compared = len(batch) if wanted is None else min(len(batch), max(0, wanted - before))
                for part in batches(batch[:compared], PLAIN_CHARACTERS):
                    check_parity(codec, part)
            plain, lengths = codec.encode(batch)
            ids, starts = framed(plain, lengths, tokenizer.bos_token_id, eos)
            counts = {
                "bytes": sum(len(text.encode("utf-8")) for text in batch),
                "words": sum(len(text.split()) for text in batch),
                "text_tokens": len(plain),
                # of text alone: in some vocabularies a control token is the unknown one too
                "byte_tokens": int(np.count_nonzero(fallback[plain])),
                "unknown_tokens": int(np.count_nonzero(plain == tokenizer.unk_token_id)),
                "parity_documents": compared,
            }
            # what a permissive corpus would cost: control tokens are not counted
            for length in lengths.tolist():
                name = f"{LICENCE}{licences.popleft()}"
                counts[name] = counts.get(name, 0) + length
            writer.add(ids, starts, counts)
            progress.update(writer.totals["documents"])
    return {"paths": writer.close(), **writer.totals}


def pack_tokens(stage: Stage, codec: Codec, settings: Tokenizer, side: str) -> dict:
    """Write one side of a published, tokenized set as it is: its rows in order, whatever their length.

    A document begins at each `bos`, and at the side's first token. So rows that are documents stay documents, and
    in rows that were cut at a fixed length a document runs on over rows, and over files.

    Raises:
        TTLError: a row holds something else than ids of the tokenizer.
        SourceError: the set cannot be read, or has no such column.
    """
    tokens, tokenizer = settings.tokens, codec.tokenizer
    writer = TokenWriter(stage.folder / "tokens", side, settings.shard_tokens)
    writer.resume()
    stream = _open_tokens(tokens, side, writer.state and writer.state["reader"])
    bos, fallback = tokenizer.bos_token_id, byte_pieces(tokenizer)
    inner, first = token_bytes(tokenizer)
    control = np.zeros(len(tokenizer), bool)
    control[[bos, tokenizer.eos_token_id]] = True
    last = writer.state["last"] if writer.state else bos
    records = iter(stream)
    label, done = f"{side} rows of tokens", writer.totals["rows"]
    with Progress(label, None, stage.folder / "status.json", done=done) as progress:
        while rows := list(islice(records, BATCH_ROWS)):
            parts = [
                _row_ids(row[tokens.column], len(tokenizer), f"{tokens.dataset!r}, {stream.item.split}, row {number}")
                for number, row in enumerate(rows, start=writer.totals["rows"])
            ]
            ids = np.concatenate(parts)
            before = np.concatenate(([last], ids))
            last = int(before[-1])
            begins = ids == bos
            if not writer.totals["tokens"]:
                begins[:1] = True
            counts = {
                "rows": len(rows),
                # of text, known without decoding it
                "bytes": int(np.where(before[:-1] == bos, first[ids], inner[ids]).sum()),
                "byte_tokens": int(np.count_nonzero(fallback[ids])),
                "unknown_tokens": int(np.count_nonzero((ids == tokenizer.unk_token_id) & ~control[ids])),
            }
            writer.add(ids, np.flatnonzero(begins), counts, {"reader": stream.state(), "last": last})
            progress.update(writer.totals["rows"])
    if writer.totals["documents"] == 1 < writer.totals["rows"]:
        print(f"{tokens.dataset!r}: no row holds {tokenizer.bos_token!r}, so where documents begin is not known")
    return {"paths": writer.close(), "version": stream.version, **writer.totals}


def _open_tokens(tokens: Tokens, side: str, state: dict | None) -> hub.Stream:
    place = tokens.model_dump(include={"dataset", "config", "revision"})
    split = tokens.train_split if side == "train" else tokens.test_split

    def choose(columns: list[str]) -> list[str]:
        if tokens.column not in columns:
            raise SourceError(
                f"data set {tokens.dataset!r} has no column {tokens.column!r}; it has {', '.join(columns)}: "
                "set tokenizer.tokens.column"
            )
        return [tokens.column]

    return hub.Stream(TextSet(name=split, split=split, columns=[tokens.column], **place), choose, state)


def _row_ids(row: Any, vocab_size: int, where: str) -> np.ndarray:
    try:
        ids = np.asarray(row)
    except ValueError:
        ids = np.asarray(None)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise TTLError(f"data set {where}: {str(row)[:60]!r} is not a list of token ids; set tokenizer.tokens.column")
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise TTLError(
            f"data set {where}: id {wrong[0]} is not of this tokenizer, which has {vocab_size} pieces; give "
            "tokenizer.source the tokenizer that made these tokens"
        )
    return ids.astype(np.int64)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """(vocabulary,) each: the bytes of text that an id stands for within a text, and at its beginning.

    So the bytes of a text are known without decoding it, wherever its tokens were cut into rows.
    """
    anchor = plain_ids(tokenizer, ["a"])[0][-1]
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    alone = tokenizer.batch_decode([[index] for index in range(len(pieces))], **settings)
    after = tokenizer.batch_decode([[anchor, index] for index in range(len(pieces))], **settings)
    head = len(tokenizer.decode([anchor], **settings))

    def size(piece: str, text: str) -> int:
        # a piece that is no whole character: one byte by name, or one a letter (byte-level BPE)
        if "\ufffd" in text and "\ufffd" not in piece:
            return 1 if _BYTE.fullmatch(piece) else len(piece)
        return len(text.encode())

    first = [size(piece, text) for piece, text in zip(pieces, alone, strict=True)]
    inner = [size(piece, text[head:]) for piece, text in zip(pieces, after, strict=True)]
    return np.array(inner), np.array(first)
