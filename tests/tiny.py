"""A corpus made by code and parameters far below nano: the whole pipeline in seconds, without a network."""

from __future__ import annotations

import csv
import hashlib
import io
import random
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ttl_utils.params import bundled


def words(text: str, sep: str | None = None) -> list[str]:
    return text.split(sep)


NOUNS = words(
    "mercado empresa bacia rocha análise governo preço café açúcar rio cidade escola música estação técnica "
    "água ação jogo livro campo porto avião médico árvore poço óleo gás lição jornal história"
)
ADJECTIVES = words("grande novo antigo rápido estável público português seguro difícil possível ótimo péssimo")
VERBS = words("mostra indica explica altera produz compra vende observa descreve mantém reduz amplia")
PLACES = words("na costa|no Brasil|em São Paulo|na região|no sul|em março|na época|no relatório", "|")
TICKERS = words("PETR4 VALE5 OIBR4 ITUB4 BBDC4 GGBR4")
# (words, the columns with 1): what a tweet says decides its label, so that a classifier can learn it
MOODS = (
    ("vai subir muito, confio na empresa", ("TRU", "JOY")),
    ("vai cair, não acredito em nada disso", ("DIS", "SAD")),
    ("subiu de novo, bom papel para guardar", ("TRU",)),
    ("caiu outra vez, que diretoria ruim é essa?", ("DIS", "ANG")),
    ("fechou no mesmo preço de ontem", ()),
    ("será que sobe amanhã?", ("ANT",)),
)
COLUMNS = ("TRU", "DIS", "JOY", "SAD", "ANT", "SUR", "ANG", "FEA", "NEUTRAL")
PETROGOLD_SENTENCES, NEWS_SENTENCES, TWEETS, CONVERSATIONS = 420, 320, 260, 150


@dataclass(frozen=True)
class Tiny:
    """Where the parameter file and the cache with the two wheels stand."""

    root: Path
    file: str
    cache: Path


def sentence(rng: random.Random) -> str:
    """Looks like Portuguese, never holds a contraction written apart."""
    one, two = rng.sample(NOUNS, 2)
    text = f"{rng.choice(('O', 'Este', 'Cada'))} {one} {rng.choice(ADJECTIVES)} {rng.choice(VERBS)} que o {two}"
    text += f" {rng.choice(VERBS)} {rng.choice(NOUNS)} {rng.choice(PLACES)}"
    return text + rng.choice((".", ".", f", com {rng.randint(2, 999)} metros.", f" e {rng.choice(PLACES)}!"))


def conllu(sentences: list[tuple[str, str]], text_first: bool = False) -> str:
    """Blocks of two comments, in either order, and token lines."""
    blocks = []
    for name, text in sentences:
        comments = [f"# sent_id = {name}", f"# text = {text}"]
        tokens = [f"{number}\t{word}\t_\t_\t_\t_\t_\t_\t_\t_" for number, word in enumerate(text.split(), 1)]
        blocks.append("\n".join([*(comments[::-1] if text_first else comments), *tokens]))
    return "\n\n".join(blocks) + "\n\n"


def table(header: tuple[str, ...], rows: list[tuple]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return text.getvalue()


def petrogold(rng: random.Random) -> str:
    """Six documents, one after another; a few lines that the quality rules reject."""
    lines = [sentence(rng) for _ in range(PETROGOLD_SENTENCES)]
    per = PETROGOLD_SENTENCES // 6
    named = [(f"247-2014-MONOGRAFIA_{number // per}-{number % per + 1}", line) for number, line in enumerate(lines)]
    # a last document of one short line
    return conllu([*named, ("247-2014-MONOGRAFIA_9-1", "FIM")], text_first=True)


def porttinari(rng: random.Random) -> str:
    """Tokens apart; every 16th sentence has a contraction written apart."""
    named = []
    for number in range(NEWS_SENTENCES):
        text = sentence(rng).replace(",", " ,").replace(".", " .").replace("!", " !")
        if number % 16 == 7:
            text = f"O preço de o {rng.choice(NOUNS)} subiu em a {text}"
        elif number % 16 == 3:
            text = f'" {text[:-2]} " , disse o ministro ( {rng.randint(20, 80)} ) .'
        named.append((f"FOLHA_DOC{number // 10:06}_SENT{number % 10:03}", text))
    return "# newdoc id = news.conllu\n" + conllu(named)


def tweet(rng: random.Random, mood: str) -> str:
    text = f"{rng.choice(TICKERS)} a {rng.randint(3, 90)},{rng.randint(10, 99)} {mood}"
    text += f" {rng.choice(NOUNS)} {rng.choice(ADJECTIVES)}"
    extras = (
        "",
        f" @{rng.choice(NOUNS)}_{rng.randint(1, 99)}",
        f" http://t.co/{rng.randrange(16**8):08x}",
        f" www.bolsa.com.br/{rng.randint(1, 99)}",
        f" {rng.choice(NOUNS)}.{rng.randint(1, 99)}@exemplo.com.br",
        f" {rng.randrange(10**9, 10**11)}",
        f"\\n#{rng.choice(NOUNS)} … 🚀",
    )
    return text + rng.choice(extras)


def dantestocks(rng: random.Random) -> tuple[str, str]:
    """base.csv and emotion.csv; some tweets stand twice, some again but for case, numbers and a handle."""
    base: list[tuple] = []
    emotions: list[tuple] = []
    for number in range(TWEETS):
        mood, found = rng.choice(MOODS)
        text = tweet(rng, mood)
        if number % 20 == 19:
            text = base[-1][1]
        elif number % 20 == 9:
            text = f"RT @{rng.choice(NOUNS)}: {base[-1][1].upper()}"
        if number % 20 in (9, 19) and emotions:
            found = tuple(name for name, value in zip(COLUMNS, emotions[-1][1:], strict=False) if value == 1)
        values = [int(name in found) for name in COLUMNS[:-1]]
        # no agreement on anything: such a tweet makes no instruction
        values = [-1] * len(values) if number % 25 == 24 else values
        name = f"dante_01_{440_000_000_000_000_000 + number}l"
        base.append((name, text))
        emotions.append((name, *values, int(not found and number % 25 != 24), "1.0", 3))
    # in another order, and one tweet without labels
    order = sorted(emotions[1:], key=lambda row: row[0][::-1])
    return table(("Tweet_ID", "Content"), base), table(("Tweet_ID", *COLUMNS, "Conf_Tru_Dis", "Num_Annot"), order)


def chatterbot(rng: random.Random) -> dict[str, str]:
    """Conversations of two turns, of four, of an odd number, and pairs that share a question."""
    named: dict[str, list] = {"conversations": [], "greetings": [], "trivia": []}
    for number in range(CONVERSATIONS):
        one, two = rng.sample(NOUNS, 2)
        question = f"O que é {rng.choice(('um', 'o'))} {one} {rng.choice(ADJECTIVES)}?"
        turns = [question, f"É um {two} {rng.choice(ADJECTIVES)}."]
        if number % 5 == 1:
            turns += [f"E o {two}, {rng.choice(VERBS)} o quê?", f"O {two} {rng.choice(VERBS)} {one}."]
        if number % 10 == 7:
            turns.append("Obrigado pela resposta.")
        named[list(named)[number % 3]].append(turns)
    named["greetings"] += [["Olá", "Oi, tudo bem?"], ["Sim"], ["Quanto é dois mais dois?", 4]]
    return {
        f"chatterbot_corpus/data/portuguese/{name}.yml": yaml.safe_dump(
            {"categories": [name], "conversations": turns}, allow_unicode=True
        )
        for name, turns in named.items()
    }


def wheel_files(seed: int = 0) -> dict[str, dict[str, str]]:
    """The files of both wheels, by package."""
    rng = random.Random(seed)
    base, emotion = dantestocks(rng)
    return {
        "dante-corpora": {
            "dante/data/petrogold/annotated.conllu": petrogold(rng),
            "dante/data/porttinari/annotated.conllu": porttinari(rng),
            "dante/data/dantestocks/base.csv": base,
            "dante/data/dantestocks/emotion.csv": emotion,
        },
        "chatterbot-corpus": chatterbot(rng),
    }


def write_wheel(cache: Path, package: str, version: str, files: dict[str, str]) -> str:
    """Put a zip of the files where the cache keeps this wheel; returns its SHA-256."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            # a fixed date: the same files are the same bytes
            archive.writestr(zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0)), text.encode(), zipfile.ZIP_DEFLATED)
    digest = hashlib.sha256(data.getvalue()).hexdigest()
    path = cache / "wheels" / f"{package}-{version}-{digest[:16]}.whl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.getvalue())
    return digest


SMALLER: dict[str, Any] = {
    "data": {"passage_sentences": 4},
    "tokenizer": {"vocab_size": 512, "efficiency_words": 200, "shard_tokens": 20_000},
    "model": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    "pretraining": {
        "max_steps": 12,
        "tokens_per_step": 256,
        "per_device_train_batch_size": 2,
        "warmup_steps": 2,
        "device": "cpu",
        "precision": "fp32",
        "logging_steps": 2,
        "eval_steps": 4,
        "eval_tokens": 2048,
        "save_steps": 4,
        "search_steps": None,
        "prompts": ["O mercado", "Qual é"],
        "max_new_tokens": 4,
    },
    "evaluation": {
        "harness_limit": 4,
        "downstream_epochs": 1,
        "inference": {"batch_sizes": [1, 2], "prompt_tokens": 8, "new_tokens": 4},
    },
    "chat": {
        "num_train_epochs": 1,
        "tokens_per_step": 512,
        "per_device_train_batch_size": 2,
        "warmup_steps": 1,
        "device": "cpu",
        "precision": "fp32",
        "logging_steps": 2,
        "save_steps": 4,
        "prompts": ["Olá", "O que é o mercado?"],
        "max_new_tokens": 4,
    },
}


def write_tiny(root: Path) -> Tiny:
    """Both wheels in a cache, and a copy of nano's parameters that names itself, cut down to seconds."""
    cache, file = root / "cache", root / "tiny.yaml"
    values = yaml.safe_load((bundled("params") / "nano.yaml").read_text(encoding="utf-8"))
    versions = {source["package"]: source["version"] for source in values["data"]["sources"]}
    hashes = {name: write_wheel(cache, name, versions[name], files) for name, files in wheel_files().items()}
    for source in values["data"]["sources"]:
        source["sha256"] = hashes[source["package"]]
    for section, smaller in SMALLER.items():
        assert smaller.keys() <= values[section].keys()
        values[section] |= smaller
    values["evaluation"]["generation"] |= {"samples": 1, "max_new_tokens": 4}
    for item in values["evaluation"]["downstream"]:
        item["max_length"] = SMALLER["model"]["max_position_embeddings"]
    values |= {"file": str(file), "size": "tiny"}
    file.write_text(yaml.safe_dump(values, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return Tiny(root, str(file), cache)
