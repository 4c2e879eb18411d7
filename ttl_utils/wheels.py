"""Portuguese text from two wheels of the package index, read as data archives and never installed."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml

from ttl_utils.cleaning import clean
from ttl_utils.errors import SourceError
from ttl_utils.files import sha256
from ttl_utils.grouping import group_contained, group_conversations
from ttl_utils.privacy import mask
from ttl_utils.schema import Data, Source

# preposition and article, written apart in some news sentences where the newspaper wrote them as one word
_ARTICLES = "[oa]s?|el[ea]s?|est[ea]s?|ess[ea]s?|isto|isso|aquel[ea]s?|aquilo"
_SPLIT = re.compile(
    rf"(?<!\S)(?:(?:de|em) (?:{_ARTICLES})|por (?:[oa]s?)|a (?:[oa]s?|aquel[ea]s?))(?!\S)", re.IGNORECASE
)


def cache_folder() -> Path:
    """`TTL_CACHE`, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttl"
    return Path(os.environ.get("TTL_CACHE") or default).expanduser()


def fetch(source: Source) -> Path:
    """The wheel in the cache, its hash checked; fetched with pip from the configured index when it is not there.

    Raises:
        SourceError: the index cannot be reached, or the bytes are not the expected ones.
    """
    folder = cache_folder() / "wheels"
    kept = folder / f"{source.package}-{source.version}-{source.sha256[:16]}.whl"
    if kept.is_file():
        _check(kept, source, f"delete {kept} and run again")
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--retries", "2", "--dest", scratch]
        done = subprocess.run([*command, f"{source.package}=={source.version}"], capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise SourceError(
                f"source {source.name!r}: could not fetch {source.package} {source.version} from the package index "
                f"({(lines or ['pip gave no reason'])[0].strip()}). Check the network and pip's index settings, "
                f"or put the wheel at {kept}, and run again"
            )
        _check(wheels[0], source, "the package index serves another file; nothing was kept")
        os.replace(wheels[0], kept)
    return kept


def _check(path: Path, source: Source, advice: str) -> None:
    found = sha256(path)
    if found != source.sha256:
        raise SourceError(
            f"source {source.name!r}: the wheel {source.package} {source.version} has SHA-256 {found}, expected "
            f"{source.sha256}: {advice}"
        )


def _text(archive: zipfile.ZipFile, name: str) -> str:
    try:
        return archive.read(name).decode("utf-8")
    except KeyError:
        raise SourceError(f"{archive.filename} holds no {name}: it is not the expected release") from None


def read(source: Source, data: Data, counts: Counter) -> Iterator[dict]:
    """Rows {text, unit} (and turns, or label) of one wheel source; what is left out is counted by its reason."""
    if source.reader not in READERS:
        raise SourceError(f"source {source.name!r}: no reader is named {source.reader!r}; known: {', '.join(READERS)}")
    with zipfile.ZipFile(fetch(source)) as archive:
        yield from READERS[source.reader](archive, data, counts)


def _sentences(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[str, str]]:
    """(sentence id, raw text) of a CoNLL-U file; the two comments come in either order."""
    for block in _text(archive, name).split("\n\n"):
        comments = dict(re.findall(r"^# (sent_id|text) = (.*)$", block, re.MULTILINE))
        if {"sent_id", "text"} <= set(comments):
            yield comments["sent_id"], comments["text"]


def _passages(sentences: Iterator[tuple[str, str]], size: int) -> Iterator[dict]:
    """Up to `size` consecutive sentences of one document, so that a split falls between passages."""
    document, passages = None, []
    for name, text in sentences:
        if name != document or len(passages[-1]) == size:
            passages.append([])
        document = name
        passages[-1].append(text)
    texts = ["\n".join(passage) for passage in passages]
    for text, unit in zip(texts, group_contained(texts), strict=True):
        yield {"text": text, "unit": unit}


def _petrogold(archive: zipfile.ZipFile, data: Data, counts: Counter) -> Iterator[dict]:
    """Technical prose; a sentence's id ends in its number."""
    pairs = _sentences(archive, "dante/data/petrogold/annotated.conllu")
    return _passages(((name.rsplit("-", 1)[0], text) for name, text in pairs), data.passage_sentences)


def join_punctuation(text: str) -> str:
    """News text as printed, from text whose tokens stand apart."""
    text = " ".join(text.split())
    text = re.sub(r" ([,.;:!?%…)\]}»])", r"\1", text)
    text = re.sub(r"([(\[{«]) ", r"\1", text)
    for quote in "\"'":
        text = re.sub(rf"(?<!\S){quote} (.*?) {quote}(?=[\s,.;:!?)]|$)", rf"{quote}\1{quote}", text)
    text = text.replace("“ ", "“").replace(" ”", "”")
    return re.sub(r"(R|US|A) \$", r"\1$", text)


def _porttinari(archive: zipfile.ZipFile, data: Data, counts: Counter) -> Iterator[dict]:
    def kept() -> Iterator[tuple[str, str]]:
        for name, text in _sentences(archive, "dante/data/porttinari/annotated.conllu"):
            if _SPLIT.search(text):
                counts["sentence with a split contraction"] += 1
            else:
                yield name.rsplit("_", 1)[0], join_punctuation(text)

    return _passages(kept(), data.passage_sentences)


def _tweets(archive: zipfile.ZipFile) -> Iterator[tuple[str, str, str]]:
    """(id, masked text, unit): the id only joins the two tables and goes no further."""
    rows = list(csv.DictReader(io.StringIO(_text(archive, "dante/data/dantestocks/base.csv"))))
    # cleaned first: an invisible character in a handle or link must not hide it from the mask
    texts = [mask(clean(row["Content"].replace("\\n", "\n"))) for row in rows]
    for row, text, unit in zip(rows, texts, group_contained(texts), strict=True):
        yield row["Tweet_ID"], text, unit


def _dantestocks(archive: zipfile.ZipFile, data: Data, counts: Counter) -> Iterator[dict]:
    for _, text, unit in _tweets(archive):
        yield {"text": text, "unit": unit}


# Plutchik's emotions: column, name, its opposite's column
EMOTIONS = {
    "TRU": ("confiança", "DIS"),
    "DIS": ("desconfiança", "TRU"),
    "JOY": ("alegria", "SAD"),
    "SAD": ("tristeza", "JOY"),
    "ANT": ("expectativa", "SUR"),
    "SUR": ("surpresa", "ANT"),
    "ANG": ("raiva", "FEA"),
    "FEA": ("medo", "ANG"),
}
_OPEN = (
    ("Que emoções aparecem neste comentário sobre a bolsa?\n{text}", "Aparecem estas emoções: {emotions}."),
    ("Leia a mensagem e diga o que o autor sente.\n{text}", "O autor sente {emotions}."),
    ("{text}\nQual é o sentimento de quem escreveu isto?", "Quem escreveu mostra {emotions}."),
    ("Classifique a emoção do texto a seguir: {text}", "Emoção: {emotions}."),
    ("Um investidor escreveu: {text}\nComo ele se sente?", "Ele sente {emotions}."),
)
_CLOSED = (
    ("O autor desta mensagem demonstra {asked}?\n{text}", "{yes}, a mensagem mostra {emotions}."),
    ("{text}\nHá {asked} neste comentário?", "{yes}. O comentário expressa {emotions}."),
    ("Diga se há sinal de {asked} no texto: {text}", "{yes}, o que se lê no texto é {emotions}."),
    ("Neste comentário sobre ações, {asked} é uma das emoções?\n{text}", "{yes}; a emoção é {emotions}."),
)


def _emotions(row: dict) -> list[str]:
    """The emotions that the annotators agreed on (value 1); 0 is absent, negative values are no agreement."""
    return [column for column in EMOTIONS if row[column] == "1"]


def _labelled(archive: zipfile.ZipFile) -> Iterator[tuple[str, str, dict]]:
    table = csv.DictReader(io.StringIO(_text(archive, "dante/data/dantestocks/emotion.csv")))
    labels = {row["Tweet_ID"]: row for row in table}
    for name, text, unit in _tweets(archive):
        if name in labels:
            yield text, unit, labels[name]


def _dantestocks_emotions(archive: zipfile.ZipFile, data: Data, counts: Counter) -> Iterator[dict]:
    """Each labelled tweet asked about in `instruction_copies` phrasings; the phrasing follows from its place."""
    for number, (text, unit, row) in enumerate(_labelled(archive)):
        found = _emotions(row)
        if not found and row["NEUTRAL"] != "1":
            counts["tweet without an agreed emotion"] += 1
            continue
        names = " e ".join(EMOTIONS[column][0] for column in found) or "uma atitude neutra"
        columns = list(EMOTIONS)
        for copy in range(data.instruction_copies):
            turn = number + copy
            if copy % 2 == 0:
                question, answer = _OPEN[turn % len(_OPEN)]
                asked = ""
            else:
                question, answer = _CLOSED[turn % len(_CLOSED)]
                # ask for an emotion that is there, and for one that is not, in turn
                present = found and turn % 4 < 2
                column = found[turn % len(found)] if present else columns[turn % len(columns)]
                asked = EMOTIONS[column][0]
            yes = "Sim" if asked and asked in names.split(" e ") else "Não"
            turns = [question.format(text=text, asked=asked), answer.format(emotions=names, yes=yes)]
            yield {"text": "\n\n".join(turns), "unit": unit}


def _dantestocks_trust(archive: zipfile.ZipFile, data: Data, counts: Counter) -> Iterator[dict]:
    for text, unit, row in _labelled(archive):
        trust, distrust = row["TRU"] == "1", row["DIS"] == "1"
        if trust == distrust:
            counts["neither trust nor distrust"] += 1
        else:
            yield {"text": text, "unit": unit, "label": int(trust)}


def _chatterbot(archive: zipfile.ZipFile, data: Data, counts: Counter) -> Iterator[dict]:
    names = [name for name in archive.namelist() if re.fullmatch(r"chatterbot_corpus/data/portuguese/\w+\.yml", name)]
    if not names:
        raise SourceError(f"{archive.filename} holds no Portuguese conversations: it is not the expected release")
    conversations = []
    for name in sorted(names):
        for turns in yaml.safe_load(_text(archive, name))["conversations"]:
            turns = [" ".join(str(turn).split()) for turn in turns]
            if len(turns) % 2:
                counts["last turn without an answer"] += 1
                turns = turns[:-1]
            if turns and all(turns):
                conversations.append(turns)
            else:
                counts["conversation without an answer"] += 1
    for turns, unit in zip(conversations, group_conversations(conversations), strict=True):
        yield {"text": "\n\n".join(turns), "turns": turns, "unit": unit}


READERS = {
    "petrogold": _petrogold,
    "porttinari": _porttinari,
    "dantestocks": _dantestocks,
    "dantestocks_emotions": _dantestocks_emotions,
    "dantestocks_trust": _dantestocks_trust,
    "chatterbot": _chatterbot,
}
