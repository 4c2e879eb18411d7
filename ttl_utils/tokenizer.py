"""Stage 02: a SentencePiece tokenizer as a Llama folder, or an imported one; its efficiency; the corpus as tokens."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import sentencepiece as spm

from ttl_utils import hub
from ttl_utils.cleaning import is_held_out
from ttl_utils.corpus import documents
from ttl_utils.encoding import Codec, plain_ids
from ttl_utils.errors import SourceError, TTLError
from ttl_utils.files import read_json, sha256, write_json, write_text
from ttl_utils.packing import PLAIN_CHARACTERS, batches, first_difference, pack_texts, pack_tokens
from ttl_utils.progress import Progress
from ttl_utils.run import Run, Stage
from ttl_utils.schema import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("train", "test")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
UNK, BOS, EOS, PAD = 0, 1, 2, 3
CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "add_bos_token": True,
    "add_eos_token": False,
    "padding_side": "right",
    "clean_up_tokenization_spaces": False,
}


def training_lines(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Lines for the trainer, none longer than it reads: it would skip a longer one without a word."""
    for text in texts:
        for line in text.split("\n"):
            while len(line.encode("utf-8")) > max_bytes:
                # a character is at most 4 bytes; cut at a space where there is one
                most = max(1, max_bytes // 4)
                cut = line.rfind(" ", 1, most)
                cut = cut if cut > 0 else most
                yield line[:cut]
                line = line[cut:].lstrip()
            if line:
                yield line


def train_sentencepiece(lines: Iterable[str], settings: Tokenizer, model_type: str = "bpe") -> bytes:
    """A BPE model with byte fallback whose conversion to the Hugging Face form is exact.

    No normaliser, since the conversion drops it, and no folding of spaces: what is encoded is what was written.

    Raises:
        TTLError: the text has too few different pieces for the vocabulary.
    """
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=model_type,
            vocab_size=settings.vocab_size,
            character_coverage=settings.character_coverage,
            max_sentence_length=settings.max_sentence_length,
            split_digits=settings.split_digits,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=PAD,
            minloglevel=2,
        )
    except RuntimeError as error:
        # the reason stands after the place in SentencePiece's source
        reason = " ".join(str(error).split()).rpartition("] ")[2][:200]
        larger = "smaller than required_chars" in reason
        raise TTLError(
            f"tokenizer.vocab_size {settings.vocab_size}: SentencePiece cannot train on this text ({reason}). Give "
            + ("a larger vocabulary, or a lower character_coverage" if larger else "a smaller vocabulary, or more text")
        ) from None
    return model.getvalue()


def write_llama_folder(model: bytes, folder: Path, context: int) -> PreTrainedTokenizerBase:
    """A folder that `AutoTokenizer.from_pretrained` opens, with `tokenizer.model` beside it for llama.cpp."""
    from transformers import AutoTokenizer

    write_text(folder / "tokenizer_config.json", json.dumps({**CONFIG, "model_max_length": context}))
    (folder / "tokenizer.json").unlink(missing_ok=True)
    _write_bytes(folder / "tokenizer.model", model)
    # loading converts tokenizer.model; saving writes the conversion as tokenizer.json
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _write_bytes(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def sample_texts(stage: Stage, seed: int, samples: int, available: int) -> Iterator[str]:
    """About `samples` training documents, spread over the whole corpus, the same ones at every run."""
    share = samples / available if available else 1.0
    for number, row in enumerate(documents(stage, "corpus", "train", ["text"])):
        if share >= 1 or is_held_out(f"tokenizer {number}", seed, share):
            yield row["text"]


def train_tokenizer(corpus: Stage, stage: Stage, seed: int, context: int, available: int) -> tuple[Codec, dict]:
    """The stage's own tokenizer and what it was trained on; trained once, however often the stage is stopped."""
    settings = stage.run.params.tokenizer
    path, record = stage.folder / "tokenizer.model", stage.folder / "training.json"
    found = read_json(record) if record.is_file() else {}
    if path.is_file() and sha256(path) == found.get("sha256"):
        print("the tokenizer was trained before, going on with it")
        model, read = path.read_bytes(), found["read"]
    else:
        read = {"documents": 0, "lines": 0, "characters": 0}
        texts = sample_texts(corpus, seed, settings.train_samples, available)
        with Progress("lines for the tokenizer", None, stage.folder / "status.json") as progress:
            lines = _counted(training_lines(_counting(texts, read), settings.max_sentence_length), read, progress)
            model = train_sentencepiece(lines, settings)
        _write_bytes(path, model)
        write_json(record, {"sha256": sha256(path), "read": read})
    tokenizer = write_llama_folder(model, stage.folder, context)
    return Codec(tokenizer, model), read


def _counting(texts: Iterable[str], read: dict) -> Iterator[str]:
    for text in texts:
        read["documents"] += 1
        yield text


def _counted(lines: Iterable[str], read: dict, progress: Progress) -> Iterator[str]:
    for line in lines:
        read["lines"] += 1
        read["characters"] += len(line)
        progress.update(read["lines"])
        yield line


def import_tokenizer(settings: Tokenizer, folder: Path, context: int) -> dict:
    """Save the named tokenizer (a folder, or a hub id) in `folder`; returns where it is from.

    As every later stage expects, an encoding begins with the token of the beginning, and there is a token to pad
    with: where there was none it is the unknown or the end token, so that the vocabulary stays as it was.

    Raises:
        SourceError: it cannot be had, or is not a tokenizer.
        TTLError: it is not one that the stages can use.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError
    from transformers import AutoTokenizer

    name = settings.source
    where = hub.model_folder(name, settings.revision)
    try:
        if isinstance(where, str):
            wanted = ["*.json", "*.model", "*.txt"]
            where = Path(snapshot_download(where, revision=settings.revision, allow_patterns=wanted))
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except (OSError, HTTPError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SourceError(f"tokenizer.source {name!r} does not open as a tokenizer: {reason}") from error
    _check_usable(tokenizer, settings)
    tokenizer.add_bos_token, tokenizer.add_eos_token = True, False
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        print(f"tokenizer: no token to pad with, so {tokenizer.pad_token} is")
    # stage 05 gives a template of its own
    tokenizer.model_max_length, tokenizer.chat_template = context, None
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)
    files = {file: where / file for file in TOKENIZER_FILES if (where / file).is_file()}
    if "tokenizer.model" in files:
        _write_bytes(folder / "tokenizer.model", files["tokenizer.model"].read_bytes())
    opened = load_tokenizer(folder)
    if opened("a")["input_ids"] != [opened.bos_token_id, *plain_ids(opened, ["a"])[0]]:
        raise TTLError(f"tokenizer.source {name!r}: its encodings cannot be made to begin with {opened.bos_token}")
    # the hub's cache keeps a commit's files in a folder of its name
    commit = where.name if where.parent.name == "snapshots" else None
    return {"name": name, "commit": commit, "sha256": {file: sha256(path) for file, path in files.items()}}


def _check_usable(tokenizer: PreTrainedTokenizerBase, settings: Tokenizer) -> None:
    place = f"tokenizer.source {settings.source!r}"
    if not tokenizer.is_fast:
        raise TTLError(f"{place} has no fast form (tokenizer.json): save one with transformers, and give its folder")
    missing = [kind for kind in ("bos_token", "eos_token") if getattr(tokenizer, kind) is None]
    if missing:
        raise TTLError(
            f"{place} has no {' and no '.join(missing)}, which documents begin and end with: choose another one"
        )
    if len(tokenizer) > 2**16:
        raise TTLError(f"{place} has {len(tokenizer):,} pieces; tokens are stored in 16 bits, for at most {2**16:,}")
    if len(tokenizer) != settings.vocab_size:
        raise TTLError(
            f"{place} has {len(tokenizer):,} pieces, and tokenizer.vocab_size is {settings.vocab_size:,}: "
            f"set tokenizer.vocab_size to {len(tokenizer)}"
        )


def prepare_import(corpus: Stage, stage: Stage, context: int) -> tuple[Codec, dict]:
    """The imported tokenizer and where it is from.

    SentencePiece, which is faster, encodes where the source has its model and both forms agree on the first
    `parity_documents`; the form that users load is the reference, so otherwise (or where all are to be compared) it
    encodes itself.
    """
    settings, record = stage.run.params.tokenizer, stage.folder / "import.json"
    model = stage.folder / "tokenizer.model"
    if not record.is_file():
        found = import_tokenizer(settings, stage.folder, context)
        compared = 0
        if settings.parity_documents and not settings.tokens and _is_sentencepiece(model):
            codec = Codec(load_tokenizer(stage.folder), model.read_bytes())
            texts = (row["text"] for row in documents(corpus, "corpus", "train", ["text"]))
            for batch in batches(islice(texts, settings.parity_documents), PLAIN_CHARACTERS):
                if place := first_difference(codec, batch):
                    print(f"tokenizer: its two forms differ at {place}, so the Hugging Face form encodes")
                    compared = 0
                    break
                compared += len(batch)
        encoder = "SentencePiece" if compared else "Hugging Face"
        write_json(record, {**found, "encoder": encoder, "parity_documents": compared})
    found = read_json(record)
    used = model.read_bytes() if found["encoder"] == "SentencePiece" else None
    return Codec(load_tokenizer(stage.folder), used), found


def _is_sentencepiece(path: Path) -> bool:
    try:
        return path.is_file() and bool(spm.SentencePieceProcessor(model_file=str(path)))
    except (OSError, RuntimeError):
        # a file of that name in another format
        return False


def count_efficiency(codec: Codec, texts: Iterable[str], words: int) -> dict:
    """Tokens for the first `words` words of the texts (the paper's table 1 counts 7,400 words)."""
    counted, tokens, whole = 0, 0, 0
    for text in texts:
        taken = text.split()[: words - counted]
        if taken:
            tokens += len(codec.encode([" ".join(taken)])[0])
            whole += int(np.count_nonzero(codec.encode(taken)[1] == 1))
        counted += len(taken)
        if counted == words:
            break
    return {
        "words": counted,
        "tokens": tokens,
        "tokens_per_word": tokens / counted if counted else None,
        "whole_word_share": whole / counted if counted else None,
    }


def prepare_tokenizer(run: Run) -> Stage:
    """Make stage 02: train the tokenizer and check it, or import one; pack the corpus, or published tokens.

    What was done is kept when it is stopped: the trained tokenizer, and every whole file of tokens.

    Raises:
        TTLError: the two forms of the tokenizer disagree on a document, or there is nothing to pack.
    """
    stage = run.stage("02_tokenizer")
    if stage.reuse():
        return stage
    settings, context = run.params.tokenizer, run.params.model.max_position_embeddings
    with stage.work():
        corpus = run.need("01_data")
        available = {side: _count_documents(corpus, side) for side in SIDES}
        if not settings.tokens and not available["train"]:
            raise TTLError("01_data has no document to train on: give data.sources one with use: corpus")
        read = imported = None
        if settings.source:
            codec, imported = prepare_import(corpus, stage, context)
        else:
            codec, read = train_tokenizer(corpus, stage, run.params.seed, context, available["train"])
        if settings.tokens:
            sides = {side: pack_tokens(stage, codec, settings, side) for side in SIDES}
        else:
            sides = {side: pack_texts(corpus, stage, codec, settings, side, available[side]) for side in SIDES}
        held_out = (row["text"] for row in documents(corpus, "corpus", "test", ["text"]))
        efficiency = count_efficiency(codec, held_out, settings.efficiency_words)
        metrics = _metrics(codec, sides) | {
            "read_for_training": read,
            "imported": imported,
            "efficiency": efficiency,
        }
        if imported:
            metrics["parity"]["documents"] = imported["parity_documents"]
        stage.finish(metrics, _outputs(stage, sides))
    return stage


def _count_documents(corpus: Stage, side: str) -> int:
    paths = [path for path in corpus.files("corpus") if path.name.startswith(f"{side}-")]
    return sum(pq.read_metadata(path).num_rows for path in paths)


def _outputs(stage: Stage, sides: dict) -> dict[str, list[Path]]:
    return {
        "tokenizer": [path for name in TOKENIZER_FILES if (path := stage.folder / name).is_file()],
        "tokens": list(chain.from_iterable(side["paths"] for side in sides.values())),
    }


def _metrics(codec: Codec, sides: dict) -> dict:
    def total(name: str) -> int:
        return sum(side.get(name, 0) for side in sides.values())

    stored = sum(path.stat().st_size for side in sides.values() for path in side["paths"])
    tokens = total("tokens")
    return {
        "vocab_size": len(codec.tokenizer),
        "tokens_per_word": total("text_tokens") / total("words") if total("words") else None,
        **{f"{side}_{name}": sides[side].get(name, 0) for name in ("tokens", "bytes", "documents") for side in SIDES},
        "bytes_per_stored_token": stored / tokens if tokens else None,
        "parity": {"documents": total("parity_documents"), "differences": 0},
        "byte_fallback_share": total("byte_tokens") / tokens if tokens else None,
        "unknown_share": total("unknown_tokens") / tokens if tokens else None,
        "published_tokens": {side: found["version"] for side, found in sides.items() if "version" in found} or None,
    }


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
