"""Our tokenizer beside others: table 1's count, and BPE, unigram and WordPiece at equal vocabulary over domains.

Equal vocabulary: each of the three has `tokenizer.vocab_size` pieces, everything counted. That is four special ones
(unknown, begin, end, padding), the 256 bytes of fallback (BPE and unigram; WordPiece has none), single characters
(twice in WordPiece: first in a word, and `##` inside it), and what is learned. All three learn from the same lines,
at the same character coverage, digit by digit where `split_digits` says so.

No count has special tokens in it. Words are what stands between white space, with the comma or full stop that follows
them, which is a piece of its own. WordPiece drops white space, so that a text cannot be put together again from its
pieces; a line break costs it nothing and the others a token, whose share is given.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import sentencepiece as spm
import tokenizers

from ttl_utils import paper, sources
from ttl_utils.cleaning import clean
from ttl_utils.corpus import documents
from ttl_utils.encoders import SPECIAL, Encoder, from_sentencepiece, from_transformers, load, train_wordpiece
from ttl_utils.errors import TTLError
from ttl_utils.files import read_json, write_bytes, write_json
from ttl_utils.progress import Progress
from ttl_utils.resampling import ratio, resample
from ttl_utils.run import Run, Stage
from ttl_utils.schema import TextSet
from ttl_utils.tokenizer import sample_share, sample_texts, train_sentencepiece, training_lines

BATCH, MOST_ORIGINS = 256, 20
# of the sample, however long its documents are: unigram's suffix array takes 21 bytes for each
MOST_CHARACTERS = 60_000_000
DOMAIN_COLUMNS = ("domain", "tokenizer", "role", "tokens_per_word", "against_ours", "bytes_per_token")
DOMAIN_COLUMNS += ("whole_word_share", "byte_fallback_share", "unknown_share", "line_break_share")
# hub ids of table 1's rows
TABLE_1 = {
    "nicholasKluge/TeenyTinyLlama-160m": "TTL",
    "nicholasKluge/TeenyTinyLlama-460m": "TTL",
    "pierreguillou/gpt2-small-portuguese": "GPorTuguese-2",
    "neuralmind/bert-base-portuguese-cased": "BERTimbau",
    "22h/open-cabrita3b": "Cabrita-3B",
    "maritaca-ai/sabia-7b": "Sabiá-7B",
}
TABLE_1_WORDS = 7400
MEASURED, PUBLISHED, NEITHER = "measured here", "published: another text", "neither measured nor published"


def compare(run: Run) -> dict:
    """All of it; kept in `02_tokenizer/reports/comparison.json`, and read from there the next time.

    What could not be reached is asked for again at each call, and all is measured anew once any of it answers. Where
    a folder or file that is named in the parameters changes, delete the report.

    Returns:
        rows: `table_1`, `algorithms` (what each trained tokenizer is), `domains`; and `missing`, reasons by name.
    """
    corpus, stage = run.need("01_data"), run.need("02_tokenizer")
    settings = run.params.tokenizer
    wanted = settings.comparison
    report = stage.folder / "reports" / "comparison.json"
    training_key = _training_key(run, corpus)
    ours_key = stage.manifest()["outputs"]["tokenizer"]["fingerprint"]
    key = {"training": training_key, "ours": ours_key, "words": settings.efficiency_words, **wanted.model_dump()}
    if report.is_file() and (known := read_json(report))["key"] == key and not _answers(run, known["missing"]):
        return known
    with stage.measuring():
        result = {"key": key, **_measured(run, corpus, stage, training_key)}
    write_json(report, result)
    stage.add_metrics(comparison={name: result[name] for name in ("table_1", "domains", "missing")})
    return result


def _measured(run: Run, corpus: Stage, stage: Stage, training_key: dict) -> dict:
    settings, wanted = run.params.tokenizer, run.params.tokenizer.comparison
    others = {name: _attempt(load, name) for name in wanted.tokenizers}
    trained, algorithms = _train(run, corpus, stage.folder / "comparison", training_key)
    ours = _ours(stage)
    encoders = [ours, *trained, *(found for found in others.values() if isinstance(found, Encoder))]
    missing = {name: str(found) for name, found in others.items() if isinstance(found, TTLError)}
    with Progress("documents encoded by each tokenizer", None) as progress:
        measured = measure(encoders, held_out(corpus, wanted.documents), progress)
        for texts in wanted.texts:
            found = _attempt(measure, encoders, further(texts, wanted.documents), progress)
            if isinstance(found, TTLError) or not found:
                missing[texts.name] = str(found or "there is no text with a word in it")
            elif texts.name in measured:
                missing[texts.name] = "another domain has this name: give these texts another one"
            else:
                measured |= found
    first = first_words(
        (row["text"] for row in documents(corpus, "corpus", "test", ["text"])), settings.efficiency_words
    )
    return {
        "table_1": table_1(ours, others, first),
        "algorithms": algorithms,
        "domains": [
            row for name, counts in measured.items() for row in domain_rows(name, encoders, counts, run.params.seed)
        ],
        "missing": missing,
    }


def efficiency_table(result: dict) -> pd.DataFrame:
    """Tokens for the same words by tokenizer; `text` says where the figure comes from, `note` why not from here."""
    columns = ["tokenizer", "vocab_size", "words", "tokens", "tokens_per_word", "whole_word_share", "text", "note"]
    return pd.DataFrame(result["table_1"], columns=columns)


def domain_table(result: dict) -> pd.DataFrame:
    """A row for each domain and tokenizer, and one for each text set or tokenizer that could not be measured."""
    rows = list(result["domains"])
    named = {texts["name"] for texts in result["key"]["texts"]}
    absent = {item["algorithm"]: item["note"] for item in result["algorithms"] if item["note"]} | result["missing"]
    rows += [{"domain" if name in named else "tokenizer": name, "note": note} for name, note in absent.items()]
    table = pd.DataFrame(rows, columns=list(dict.fromkeys([*DOMAIN_COLUMNS, *(name for row in rows for name in row)])))
    words = ["domain", "tokenizer", "role", *(["note"] if absent else [])]
    return table.assign(**table[words].fillna(""))


# what is trained, and what can be had


def _attempt(action: Callable, *values: Any) -> Any:
    """What the action returns, or the error that a user is meant to read."""
    try:
        return action(*values)
    except TTLError as error:
        return error


def _answers(run: Run, missing: dict[str, str]) -> bool:
    """Whether something that was missing can be had now."""
    wanted = run.params.tokenizer.comparison
    tries = [partial(load, name) for name in wanted.tokenizers if name in missing]
    tries += [partial(next, iter(sources.read_texts(texts)), "") for texts in wanted.texts if texts.name in missing]
    return any(not isinstance(_attempt(action), TTLError) for action in tries)


def _ours(stage: Stage) -> Encoder:
    from transformers import AutoTokenizer

    # a base's stage is the base's
    name = f"ours ({stage.folder.parent.name})"
    imported = stage.folder / "import.json"
    # an imported one may differ between its two forms: what packed the corpus is measured
    if imported.is_file() and read_json(imported)["encoder"] != "SentencePiece":
        return from_transformers(name, "ours", AutoTokenizer.from_pretrained(stage.folder))
    return from_sentencepiece(
        name, "ours", spm.SentencePieceProcessor(model_file=str(stage.folder / "tokenizer.model"))
    )


def _training_key(run: Run, corpus: Stage) -> dict:
    """What decides the trained tokenizers."""
    settings = run.params.tokenizer
    names = ("vocab_size", "character_coverage", "max_sentence_length", "split_digits")
    return {
        "seed": run.params.seed,
        "corpus": corpus.manifest()["outputs"]["corpus"]["fingerprint"],
        **{name: getattr(settings, name) for name in names},
        "samples": settings.comparison.samples,
        "versions": {"sentencepiece": spm.__version__, "tokenizers": tokenizers.__version__},
    }


def _train(run: Run, corpus: Stage, folder: Path, key: dict) -> tuple[list[Encoder], list[dict]]:
    """The trained tokenizers and a row about each; one that an earlier call finished is not trained again.

    SentencePiece holds the sample in memory while it trains, so `comparison.samples` is what bounds its need: about
    21 bytes for each character in unigram's suffix array, some 4 for BPE.
    """
    from transformers import PreTrainedTokenizerFast

    settings = run.params.tokenizer
    share = sample_share(corpus, settings.comparison.samples, MOST_CHARACTERS)

    def lines(label: str) -> Iterator[str]:
        texts = sample_texts(corpus, run.params.seed, share)
        for line in training_lines(texts, settings.max_sentence_length):
            progress.update(progress.done + 1, label)
            yield line

    with Progress("lines for the tokenizers compared", None) as progress:
        characters: Counter[str] = Counter()
        count = 0
        for line in lines("alphabet"):
            characters.update(line)
            count += 1
        read = {"lines": count, "characters": characters.total()}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        encoders, rows = [], []
        for algorithm in settings.comparison.algorithms:
            path = folder / f"{algorithm}-{digest}.{'json' if algorithm == 'wordpiece' else 'model'}"
            if not path.is_file():
                if algorithm == "wordpiece":
                    made = _attempt(train_wordpiece, lines(algorithm), settings, characters)
                else:
                    made = _attempt(train_sentencepiece, lines(algorithm), settings, algorithm)
                if isinstance(made, TTLError):
                    rows.append({"algorithm": algorithm, **read, "note": str(made)})
                    continue
                write_bytes(path, made)
            if algorithm == "wordpiece":
                fast = PreTrainedTokenizerFast(tokenizer_file=str(path), unk_token=SPECIAL[0])
                encoder = from_transformers(algorithm, "trained", fast)
            else:
                encoder = from_sentencepiece(algorithm, "trained", spm.SentencePieceProcessor(model_file=str(path)))
            encoders.append(encoder)
            rows.append({"algorithm": algorithm, **read, **encoder.composition(), "note": ""})
    return encoders, rows


# the texts that all are measured on


def first_words(texts: Iterable[str], words: int) -> list[str]:
    """The texts as single lines, up to this many words together."""
    taken: list[str] = []
    for text in texts:
        found = text.split()[:words]
        words -= len(found)
        taken.append(" ".join(found))
        if not words:
            break
    return taken


def held_out(corpus: Stage, most: int) -> Iterator[tuple[str, str]]:
    """(domain, text) of at most `most` held-out documents of each domain, spread over the corpus.

    A domain is the document's origin, where its source is a mixed one, else its source.
    """
    pairs = Counter((r["source"], r["origin"]) for r in documents(corpus, "corpus", "test", ["source", "origin"]))
    origins = Counter(source for source, _ in pairs)
    domains, totals = {}, Counter()
    for (source, origin), count in pairs.items():
        # an origin that differs from document to document, such as an address, names no domain
        mixed = origin and origins[source] <= MOST_ORIGINS
        domains[source, origin] = origin.removeprefix("source:").strip() if mixed else source
        totals[domains[source, origin]] += count
    seen: Counter[str] = Counter()
    for row in documents(corpus, "corpus", "test", ["text", "source", "origin"]):
        domain = domains[row["source"], row["origin"]]
        number, total = seen[domain], totals[domain]
        seen[domain] += 1
        if (number + 1) * most // total > number * most // total:
            yield domain, row["text"]


def further(texts: TextSet, most: int) -> Iterator[tuple[str, str]]:
    """(name, text) of the first texts of a set beside the corpus, cleaned as the corpus is."""
    for text in islice(sources.read_texts(texts), most):
        yield texts.name, clean(text)


# what is measured, and how sure it is


def measure(encoders: list[Encoder], texts: Iterable[tuple[str, str]], progress: Progress) -> dict[str, np.ndarray]:
    """Per domain (documents, 2 + 5 x tokenizers): words, UTF-8 bytes, and the five counts of each tokenizer."""
    found: dict[str, list[np.ndarray]] = {}
    # a text without words has no tokens per word
    worded = ((domain, text) for domain, text in texts if text.split())
    while batch := list(islice(worded, BATCH)):
        domains, plain = np.array([domain for domain, _ in batch]), [text for _, text in batch]
        sizes = np.array([(len(text.split()), len(text.encode("utf-8"))) for text in plain])
        counts = np.concatenate([sizes, *(encoder.count(plain) for encoder in encoders)], axis=1)
        for domain in dict.fromkeys(domains.tolist()):
            found.setdefault(domain, []).append(counts[domains == domain])
        progress.update(progress.done + len(batch))
    return {domain: np.concatenate(parts) for domain, parts in found.items()}


def domain_rows(domain: str, encoders: list[Encoder], counts: np.ndarray, seed: int) -> list[dict]:
    """A row for each tokenizer; `against_ours` compares tokens on the same documents, draw by draw."""
    rows, drawn = [], resample(counts, seed)
    words, size = counts[:, :2].sum(axis=0).tolist()
    for number, encoder in enumerate(encoders):
        column = 2 + 5 * number
        tokens, byte, unknown, breaks, whole = counts[:, column : column + 5].sum(axis=0).tolist()
        rows.append(
            {"domain": domain, "tokenizer": encoder.name, "role": encoder.role}
            | {"documents": len(counts), "words": words, "bytes": size, "tokens": tokens}
            | ratio("tokens_per_word", counts, drawn, column, 0)
            | ratio("bytes_per_token", counts, drawn, 1, column)
            | ratio("against_ours", counts, drawn, column, 2)
            | {"whole_word_share": whole / words}
            # shares of tokens; none where no piece is a byte to fall back to
            | {"byte_fallback_share": byte / tokens if encoder.byte_ids else None, "unknown_share": unknown / tokens}
            | {"line_break_share": breaks / tokens}
        )
    return rows


def table_1(ours: Encoder, others: dict[str, Encoder | TTLError], texts: list[str]) -> list[dict]:
    """Tokens for the same words; where another tokenizer could not be loaded, the published figure and the reason."""
    published = paper.table("table1_tokenizers").set_index("tokenizer")
    words = sum(len(text.split()) for text in texts)
    rows = []
    nothing = TTLError("01_data holds no held-out text of the corpus to measure on")
    for name, encoder in {ours.name: ours, **others}.items():
        encoder = encoder if words else nothing
        row: dict[str, Any] = {"tokenizer": name}
        if isinstance(encoder, TTLError):
            known = TABLE_1.get(name)
            row |= _published(published, known) if known else {"text": NEITHER}
            rows.append(row | {"note": str(encoder)})
            continue
        tokens, *_, whole = encoder.count(texts).sum(axis=0).tolist()
        row |= {"vocab_size": len(encoder.pieces), "words": words, "tokens": tokens, "tokens_per_word": tokens / words}
        rows.append(row | {"whole_word_share": whole / words, "text": MEASURED, "note": ""})
    for name in published.index:
        if name not in {TABLE_1.get(other) for other in others}:
            rows.append({"tokenizer": name, **_published(published, name), "note": "not in comparison.tokenizers"})
    return rows


def _published(table: pd.DataFrame, name: str) -> dict:
    tokens = int(table.tokens[name])
    figures = {"vocab_size": int(table.vocab_size[name]), "words": TABLE_1_WORDS, "tokens": tokens}
    return figures | {"tokens_per_word": tokens / TABLE_1_WORDS, "text": PUBLISHED}
