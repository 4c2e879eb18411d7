"""Stage 02: a SentencePiece tokenizer as a Llama folder, its efficiency, and the corpus as packed tokens."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import sentencepiece as spm

from ttl_utils.blocks import TokenWriter
from ttl_utils.corpus import documents
from ttl_utils.errors import TTLError
from ttl_utils.files import write_text
from ttl_utils.filters import is_held_out
from ttl_utils.progress import Progress
from ttl_utils.run import Run, Stage
from ttl_utils.schema import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def train_sentencepiece(lines: Iterable[str], settings: Tokenizer) -> bytes:
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
            model_type="bpe",
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
    (folder / "tokenizer.model").write_bytes(model)
    # loading converts tokenizer.model; saving writes the conversion as tokenizer.json
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def sample_texts(stage: Stage, seed: int, samples: int, available: int) -> Iterator[str]:
    """About `samples` training documents, spread over the whole corpus, the same ones at every run."""
    share = samples / available if available else 1.0
    for number, row in enumerate(documents(stage, "corpus", "train", ["text"])):
        if share >= 1 or is_held_out(f"tokenizer {number}", seed, share):
            yield row["text"]


def count_efficiency(processor: spm.SentencePieceProcessor, texts: Iterable[str], words: int) -> dict:
    """Tokens for the first `words` words of the texts (the paper's table 1 counts 7,400 words)."""
    counted, tokens, whole = 0, 0, 0
    for text in texts:
        taken = text.split()[: words - counted]
        tokens += len(processor.encode(" ".join(taken)))
        whole += sum(len(processor.encode(word)) == 1 for word in taken)
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
    """Make stage 02: train the tokenizer, check it, and pack the corpus.

    Raises:
        TTLError: the two forms of the tokenizer disagree on a document.
    """
    stage = run.stage("02_tokenizer")
    if stage.reuse():
        return stage
    settings = run.params.tokenizer
    with stage.work():
        corpus = run.need("01_data")
        available = sum(
            source.get("train_documents", 0) for source in corpus.metrics()["sources"] if source["use"] == "corpus"
        )
        texts = sample_texts(corpus, run.params.seed, settings.train_samples, available)
        read = {"documents": 0, "lines": 0, "characters": 0}
        with Progress("lines for the tokenizer", None, stage.folder / "status.json") as progress:
            lines = _counted(training_lines(_counting(texts, read), settings.max_sentence_length), read, progress)
            model = train_sentencepiece(lines, settings)
        context = run.params.model.max_position_embeddings
        tokenizer = write_llama_folder(model, stage.folder, context)
        processor = spm.SentencePieceProcessor(model_proto=model)
        sides = {side: _pack(corpus, stage, processor, tokenizer, settings, side, available) for side in SIDES}
        held_out = (row["text"] for row in documents(corpus, "corpus", "test", ["text"]))
        efficiency = count_efficiency(processor, held_out, settings.efficiency_words)
        stage.finish(_metrics(settings, processor, read, sides, efficiency), _outputs(stage, sides))
    return stage


SIDES = ("train", "test")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def _outputs(stage: Stage, sides: dict) -> dict[str, list[Path]]:
    return {
        "tokenizer": [stage.folder / name for name in TOKENIZER_FILES],
        "tokens": list(chain.from_iterable(side["paths"] for side in sides.values())),
    }


def _metrics(settings: Tokenizer, processor: spm.SentencePieceProcessor, read: dict, sides: dict, eff: dict) -> dict:
    stored = sum(path.stat().st_size for side in sides.values() for path in side["paths"])
    tokens = sum(side["tokens"] for side in sides.values())
    words = sum(side["words"] for side in sides.values())
    return {
        "vocab_size": processor.vocab_size(),
        "tokens_per_word": sum(side["text_tokens"] for side in sides.values()) / words if words else None,
        "train_tokens": sides["train"]["tokens"],
        "test_tokens": sides["test"]["tokens"],
        "train_bytes": sides["train"]["bytes"],
        "test_bytes": sides["test"]["bytes"],
        "bytes_per_stored_token": stored / tokens if tokens else None,
        "train_documents": sides["train"]["documents"],
        "test_documents": sides["test"]["documents"],
        "read_for_training": read,
        "efficiency": eff,
        "parity": {"documents": sum(side["parity_documents"] for side in sides.values()), "differences": 0},
        "byte_fallback_share": sum(side["byte_tokens"] for side in sides.values()) / tokens if tokens else None,
    }


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


def _pack(
    corpus: Stage,
    stage: Stage,
    processor: spm.SentencePieceProcessor,
    tokenizer: PreTrainedTokenizerBase,
    settings: Tokenizer,
    side: str,
    available: int,
) -> dict:
    """Encode one side with SentencePiece, the reference, and compare the Hugging Face form on the way."""
    folder = stage.folder / "tokens"
    for old in folder.glob(f"{side}-*"):
        old.unlink()
    writer = TokenWriter(folder, side, settings.shard_tokens)
    counts = dict.fromkeys(("bytes", "words", "text_tokens", "byte_tokens", "parity_documents"), 0)
    byte_ids = {index for index in range(processor.vocab_size()) if processor.is_byte(index)}
    newline = processor.piece_to_id("<0x0A>")
    total = available if side == "train" else None
    with Progress(f"{side} documents to tokens", total, stage.folder / "status.json") as progress:
        texts = (row["text"] for row in documents(corpus, "corpus", side, ["text"]))
        for batch in _batches(texts, 512):
            encoded = processor.encode(batch, num_threads=os.cpu_count() or 1)
            if settings.parity_documents is None or counts["parity_documents"] < settings.parity_documents:
                _check_parity(tokenizer, batch, encoded)
                counts["parity_documents"] += len(batch)
            for text, ids in zip(batch, encoded, strict=True):
                writer.add([BOS, *ids, EOS] if settings.append_eos else [BOS, *ids])
                counts["bytes"] += len(text.encode("utf-8"))
                counts["words"] += len(text.split())
                counts["text_tokens"] += len(ids)
                # a line break is always its byte: it is not what fallback means
                counts["byte_tokens"] += sum(index in byte_ids and index != newline for index in ids)
            progress.update(writer.documents)
    paths = writer.close()
    return {**counts, "paths": paths, "tokens": writer.tokens, "documents": writer.documents}


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    texts = iter(texts)
    while batch := list(islice(texts, size)):
        yield batch


def _check_parity(tokenizer: PreTrainedTokenizerBase, texts: list[str], encoded: list[list[int]]) -> None:
    ours = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for text, one, other in zip(texts, encoded, ours, strict=True):
        if one != other:
            place = next((n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), -1)
            raise TTLError(
                f"SentencePiece and the Hugging Face tokenizer disagree at token {place} of {text[:80]!r}: "
                "the model would be trained on other ids than users get"
            )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
