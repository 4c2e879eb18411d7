"""Stage 02: a SentencePiece tokenizer as a Llama folder, or an imported one; its efficiency; the corpus as tokens."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import sentencepiece as spm

from ttl_utils.cleaning import is_held_out
from ttl_utils.corpus import documents
from ttl_utils.encoding import Codec
from ttl_utils.errors import TTLError
from ttl_utils.files import read_json, sha256, write_bytes, write_json, write_text
from ttl_utils.licences import look_up
from ttl_utils.packing import LICENCE, pack_texts, pack_tokens
from ttl_utils.progress import Progress
from ttl_utils.run import Run, Stage
from ttl_utils.schema import Tokenizer
from ttl_utils.tokenizer_import import TOKENIZER_FILES, prepare_import

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("train", "test")
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
    write_bytes(folder / "tokenizer.model", model)
    # loading converts tokenizer.model; saving writes the conversion as tokenizer.json
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def sample_share(corpus: Stage, samples: int, characters: float = math.inf) -> float:
    """The share of the training documents that is about `samples` of them, or about as many `characters` if fewer."""
    reports = [report for report in corpus.metrics()["sources"] if report["use"] == "corpus"]
    limits = ((samples, "train_documents"), (characters, "train_characters"))
    there = {name: sum(report[name] for report in reports) for _, name in limits}
    return min([1.0, *(limit / there[name] for limit, name in limits if there[name])])


def sample_texts(stage: Stage, seed: int, share: float) -> Iterator[str]:
    """About this share of the training documents, spread over the whole corpus, the same ones at every run."""
    for number, row in enumerate(documents(stage, "corpus", "train", ["text"])):
        if share >= 1 or is_held_out(f"tokenizer {number}", seed, share):
            yield row["text"]


def train_tokenizer(corpus: Stage, stage: Stage, seed: int, context: int) -> tuple[Codec, dict]:
    """The stage's own tokenizer and what it was trained on; trained once, however often the stage is stopped."""
    settings = stage.run.params.tokenizer
    path, record = stage.folder / "tokenizer.model", stage.folder / "training.json"
    found = read_json(record) if record.is_file() else {}
    if path.is_file() and sha256(path) == found.get("sha256"):
        print("the tokenizer was trained before, going on with it")
        model, read = path.read_bytes(), found["read"]
    else:
        read = {"documents": 0, "lines": 0, "characters": 0}
        # SentencePiece holds its lines in memory, 4 to 8 bytes for each of text
        share = sample_share(corpus, settings.train_samples, settings.train_characters)
        if share < sample_share(corpus, settings.train_samples):
            print(
                f"tokenizer.train_characters {settings.train_characters:,} allows {share:.1%} of the training "
                f"documents, fewer than the {settings.train_samples:,} of train_samples"
            )
        texts = sample_texts(corpus, seed, share)
        with Progress("lines for the tokenizer", None, stage.folder / "status.json") as progress:
            lines = _counted(training_lines(_counting(texts, read), settings.max_sentence_length), read, progress)
            model = train_sentencepiece(lines, settings)
        write_bytes(path, model)
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


def count_efficiency(codec: Codec, texts: Iterable[str], words: int) -> dict:
    """Tokens for the first `words` words of the texts (the paper's table 1 counts 7,400 words)."""
    counted, tokens = 0, 0
    for text in texts:
        taken = text.split()[: words - counted]
        if taken:
            tokens += len(codec.encode([" ".join(taken)])[0])
        counted += len(taken)
        if counted == words:
            break
    return {
        "words": counted,
        "tokens": tokens,
        "tokens_per_word": tokens / counted if counted else None,
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
            codec, read = train_tokenizer(corpus, stage, run.params.seed, context)
        if settings.tokens:
            sides = {side: pack_tokens(stage, codec, settings, side) for side in SIDES}
        else:
            sides = {side: pack_texts(corpus, stage, codec, settings, side, available[side]) for side in SIDES}
        if not sides["train"]["tokens"]:
            raise TTLError(f"{settings.tokens.dataset!r}, {settings.tokens.train_split}: the set holds no tokens")
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
        "tokens_by_licence": _by_licence(sides),
        "published_tokens": {side: found["version"] for side, found in sides.items() if "version" in found} or None,
    }


def _by_licence(sides: dict) -> list[dict]:
    """Tokens of text, control tokens aside, by licence, with what it lets a model be used for."""
    found: Counter = Counter()
    for side in sides.values():
        found.update({name: count for name, count in side.items() if name.startswith(LICENCE)})
    return [
        {"licence": (licence := name.removeprefix(LICENCE)), "tokens": count, "share": count / found.total()}
        | {"model_use": look_up(licence).model_use}
        for name, count in sorted(found.items())
    ]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
