"""Wheels as data archives: fetched whole or not at all, and read as the sources they hold."""

from __future__ import annotations

import re
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import COLUMNS, PETROGOLD_SENTENCES, TWEETS, conllu, table, wheel_files, write_wheel
from ttl_utils import grouping, wheels
from ttl_utils.cleaning import unit_key
from ttl_utils.errors import SourceError
from ttl_utils.files import sha256
from ttl_utils.privacy import mask
from ttl_utils.schema import Source


def source(reader: str, package: str, digest: str, version: str = "2.0.5") -> Source:
    return Source(
        name="probe",
        use="corpus",
        kind="plain",
        filter="prose",
        licence="none",
        package=package,
        version=version,
        sha256=digest,
        reader=reader,
    )


@pytest.fixture
def read(tiny_run, tmp_path, monkeypatch):
    """`read(reader, files)` -> (rows, counts) of a wheel that holds just these files."""
    data = tiny_run().params.data
    monkeypatch.setenv("TTL_CACHE", str(tmp_path / "own"))

    def of(reader: str, files: dict[str, str]) -> tuple[list[dict], Counter]:
        counts: Counter = Counter()
        probe = source(reader, "dante-corpora", write_wheel(tmp_path / "own", "dante-corpora", "2.0.5", files))
        return list(wheels.read(probe, data, counts)), counts

    return of


# fetching


@pytest.fixture
def pip_alone(tmp_path, monkeypatch):
    """An empty cache, and a pip that knows no index but what a test names."""
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("TTL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def installable(folder: Path) -> Path:
    """A wheel that pip accepts."""
    folder.mkdir()
    path = folder / "ttl_probe-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ttl_probe/data.txt", "água")
        archive.writestr("ttl_probe-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: ttl-probe\nVersion: 1.0\n")
        archive.writestr("ttl_probe-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("ttl_probe-1.0.dist-info/RECORD", "")
    return path


def kept(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def test_a_wheel_is_fetched_once(pip_alone, monkeypatch):
    wheel = installable(pip_alone / "links")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    probe = source("petrogold", "ttl-probe", sha256(wheel), "1.0")
    path = wheels.fetch(probe)
    assert path.read_bytes() == wheel.read_bytes()
    assert kept(pip_alone / "cache") == [path]
    wheel.unlink()
    assert wheels.fetch(probe) == path


def test_other_bytes_from_the_index_are_not_kept(pip_alone, monkeypatch):
    wheel = installable(pip_alone / "links")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with pytest.raises(
        SourceError, match=rf"(?s)'probe'.*ttl-probe 1\.0.*{sha256(wheel)}.*{'0' * 64}.*nothing was kept"
    ):
        wheels.fetch(source("petrogold", "ttl-probe", "0" * 64, "1.0"))
    assert kept(pip_alone / "cache") == []


def test_a_damaged_wheel_in_the_cache_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TTL_CACHE", str(tmp_path))
    digest = write_wheel(tmp_path, "ttl-probe", "1.0", {"a": "b"})
    path = tmp_path / "wheels" / f"ttl-probe-1.0-{digest[:16]}.whl"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SourceError, match=f"delete {re.escape(str(path))}"):
        wheels.fetch(source("petrogold", "ttl-probe", digest, "1.0"))


def test_an_unreachable_index_is_one_message(pip_alone, monkeypatch):
    # nothing listens on the discard port
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    began = time.monotonic()
    with pytest.raises(SourceError) as caught:
        wheels.fetch(source("petrogold", "ttl-probe", "0" * 64, "1.0"))
    assert time.monotonic() - began < 20
    message = str(caught.value)
    assert "'probe'" in message and "ttl-probe 1.0" in message and "\n" not in message
    assert "Check the network" in message
    assert str(pip_alone / "cache" / "wheels" / f"ttl-probe-1.0-{'0' * 16}.whl") in message
    assert kept(pip_alone / "cache") == []


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TTL_CACHE", "~/there")
    assert wheels.cache_folder() == Path.home() / "there"
    monkeypatch.delenv("TTL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert wheels.cache_folder() == tmp_path / "ttl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert wheels.cache_folder() == Path.home() / ".cache" / "ttl"


@pytest.mark.parametrize("reader", wheels.READERS)
def test_a_wheel_without_the_file_is_named(read, reader):
    with pytest.raises(SourceError, match=r"dante-corpora-2\.0\.5-\w+\.whl holds no "):
        read(reader, {"dante/data/other.csv": "a"})


def test_an_unknown_reader_is_named(read):
    with pytest.raises(SourceError, match="no reader is named 'petrogld'; known: petrogold,"):
        read("petrogld", {"a": "b"})


# prose and news


def test_passages_are_whole_and_stay_in_their_document(read):
    names = [f"2-A_0-{n}" for n in range(1, 6)] + ["2-B_0-1"] + [f"3-B_0-{n}" for n in range(1, 5)]
    pairs = [(name, f"Frase {name}.") for name in names]
    for text_first in (True, False):
        rows, _ = read("petrogold", {"dante/data/petrogold/annotated.conllu": conllu(pairs, text_first)})
        lines = [row["text"].split("\n") for row in rows]
        # four sentences to a passage in size tiny
        assert [len(passage) for passage in lines] == [4, 1, 1, 4]
        assert [line for passage in lines for line in passage] == [text for _, text in pairs]


def test_tiny_prose_is_read_whole(read):
    rows, counts = read("petrogold", wheel_files()["dante-corpora"])
    assert sum(len(row["text"].split("\n")) for row in rows) == PETROGOLD_SENTENCES + 1
    assert not counts


@pytest.mark.parametrize(
    ("apart", "printed"),
    [
        ("Eu sei , todo dia tem um .", "Eu sei, todo dia tem um."),
        ('" Não vou " , disse .', '"Não vou", disse.'),
        ('Ele disse : " Não vou "', 'Ele disse: "Não vou"'),
        ('" Um " e " dois " .', '"Um" e "dois".'),
        ("Diz ' sim ' a todos", "Diz 'sim' a todos"),
        ("“ Não vou ” , disse", "“Não vou”, disse"),
        ("A bolsa ( SP ) caiu 3 % hoje ; e daí ?", "A bolsa (SP) caiu 3% hoje; e daí?"),
        ("Custa R $ 10 ou US $ 5", "Custa R$ 10 ou US$ 5"),
        ("guarda-chuva  e d'água", "guarda-chuva e d'água"),
        ("« Sim » [ nota ]…", "«Sim» [nota]…"),
    ],
)
def test_news_is_joined_as_printed(apart, printed):
    assert wheels.join_punctuation(apart) == printed


ITEM = st.sampled_from(["a casa", "o dia", "ontem", "3 %|3%", "( SP )|(SP)", '" sim "|"sim"', "“ não ”|“não”", "R$ 10"])


@given(st.lists(st.tuples(ITEM, st.sampled_from(["", " ,|,", " ;|;", " ?|?"])), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_joining_restores_what_was_set_apart(items):
    apart = " ".join(item.split("|")[0] + mark.split("|")[0] for item, mark in items) + " ."
    printed = " ".join(item.split("|")[-1] + mark.split("|")[-1] for item, mark in items) + "."
    assert wheels.join_punctuation(apart) == printed
    assert wheels.join_punctuation(printed) == printed


SPLIT = [
    "preço de o pão",
    "Em a casa",
    "foi por o rio",
    "ir a as aulas",
    "de este ano",
    "em aquela rua",
    "a aquele dia",
]
WHOLE = ["preço do pão", "a casa de ouro", "por ora", "de onde em onde", "da o", "mede o rio", "e a os", "dea o"]


def test_sentences_with_a_split_contraction_are_left_out_and_counted(read):
    assert [text for text in SPLIT if not wheels._SPLIT.search(text)] == []
    pairs = [(f"FOLHA_DOC1_SENT{n:03}", f"{text} .") for n, text in enumerate([*SPLIT, *WHOLE[:3]])]
    rows, counts = read("porttinari", {"dante/data/porttinari/annotated.conllu": conllu(pairs)})
    assert counts == {"sentence with a split contraction": len(SPLIT)}
    assert [row["text"] for row in rows] == ["preço do pão.\na casa de ouro.\npor ora."]


# tweets

HEADER = ("Tweet_ID", *COLUMNS)


def tweets(*rows: tuple) -> dict[str, str]:
    """Files with (text, values) rows; values None: no label."""
    return {
        "dante/data/dantestocks/base.csv": table(
            ("Tweet_ID", "Content"), [(f"dante_01_{n:018}l", text) for n, (text, _) in enumerate(rows)]
        ),
        "dante/data/dantestocks/emotion.csv": table(
            HEADER, [(f"dante_01_{n:018}l", *values) for n, (_, values) in enumerate(rows) if values][::-1]
        ),
    }


def values(*found: str, absent: int = 0) -> tuple:
    return tuple(1 if name in found else absent for name in COLUMNS)


def test_tweets_are_masked_and_their_line_breaks_restored(read):
    rows, _ = read(
        "dantestocks",
        tweets(
            ("@fulano_1 veja http://t.co/abC1 e\\nwww.b3.com.br/x", None),
            ('aspas "e, vírgula" a.b@c.com 123456789012', None),
            # an invisible character, or an accent of its own, must not hide a name from the mask
            ("@\u200bfulano e @joa\u0303o e ht\u200btps://t.co/ab 12345\ufeff6789", None),
        ),
    )
    assert [row["text"] for row in rows] == [
        "[usuário] veja [link] e\n[link]",
        'aspas "e, vírgula" [e-mail] [id]',
        "[usuário] e [usuário] e [link] [id]",
    ]


@pytest.mark.parametrize("reader", ["dantestocks", "dantestocks_emotions", "dantestocks_trust"])
def test_no_reader_lets_personal_data_through(read, reader):
    rows, _ = read(reader, wheel_files()["dante-corpora"])
    for row in rows:
        assert not re.search(r"@|https?:|www\.|\d{9}|dante_01", row["text"])
    assert any("[usuário]" in row["text"] for row in rows)


def asked_emotion(text: str) -> tuple[str, str] | None:
    """(emotion, Sim or Não) where the text is one of the yes-or-no questions."""
    for question, answer in wheels._CLOSED:
        pattern = re.escape(question + "\n\n" + answer)
        for name in ("text", "asked", "yes", "emotions"):
            pattern = pattern.replace(re.escape("{" + name + "}"), f"(?P<{name}>.*?)")
        if match := re.fullmatch(pattern, text, re.DOTALL):
            return match["asked"], match["yes"]
    return None


def test_questions_and_answers_agree_with_the_labels(read):
    names = {column: name for column, (name, _) in wheels.EMOTIONS.items()}
    sets = [(), *((column,) for column in names), ("TRU", "JOY"), ("DIS", "ANG", "SAD")]
    labelled = [(f"tuíte de número z{'x' * n}", values(*found or ("NEUTRAL",))) for n, found in enumerate(sets * 4)]
    rows, counts = read("dantestocks_emotions", tweets(*labelled))
    assert not counts and len(rows) == 3 * len(labelled)
    seen: Counter = Counter()
    felt = 0
    for place, row in enumerate(rows):
        text, found = labelled[place // 3][0], {names[name] for name in sets[place // 3 % len(sets)]}
        question, answer = row["text"].split("\n\n")
        assert row["unit"] == unit_key(text) and text in question
        assert {name for name in names.values() if re.search(rf"\b{name}\b", answer)} == found
        assert ("neutra" in answer) == (not found)
        if closed := asked_emotion(row["text"]):
            asked, yes = closed
            assert yes == ("Sim" if asked in found else "Não")
            seen[yes] += 1
            felt += bool(found)
    # a third of the copies asks for one emotion: in turn one that is there, and any
    assert seen.total() == len(labelled) and seen["Sim"] >= 0.45 * felt and seen["Não"] >= 0.25 * felt


def test_tweets_without_agreement_or_label_make_no_instruction(read):
    files = tweets(
        ("um dois", values("JOY")),
        ("dois três", values(absent=-1)),
        ("três quatro", values(absent=-2)),
        ("quatro cinco", None),
        ("cinco seis", values("NEUTRAL")),
    )
    rows, counts = read("dantestocks_emotions", files)
    assert {row["unit"] for row in rows} == {"um dois", "cinco seis"}
    assert counts == {"tweet without an agreed emotion": 2}


def test_trust_is_1_and_distrust_0(read):
    files = tweets(
        ("um", values("TRU")), ("dois", values("DIS", "ANG")), ("três", values("TRU", "DIS")), ("quatro", values())
    )
    rows, counts = read("dantestocks_trust", files)
    assert [(row["text"], row["label"]) for row in rows] == [("um", 1), ("dois", 0)]
    assert counts == {"neither trust nor distrust": 2}


def test_every_tweet_of_the_tiny_set_is_read(read):
    files = wheel_files()["dante-corpora"]
    assert len(read("dantestocks", files)[0]) == TWEETS
    rows, counts = read("dantestocks_emotions", files)
    # one tweet has no label
    assert len(rows) == 3 * (TWEETS - 1 - counts.total())
    assert {row["unit"] for row in rows} <= {unit_key(mask(row["text"])) for row in read("dantestocks", files)[0]}


# conversations


def conversations(**named: list) -> dict[str, str]:
    return {
        f"chatterbot_corpus/data/portuguese/{name}.yml": yaml.safe_dump({"conversations": turns}, allow_unicode=True)
        for name, turns in named.items()
    }


def test_conversations_end_with_an_answer(read):
    files = conversations(
        b=[["Olá", "Oi,  tudo\nbem?"], ["Quanto é 2 + 2?", 4], ["um", "dois", "três"]],
        a=[["só"], [], ["um", ""], ["a", "b", "c", "d"]],
    )
    files["chatterbot_corpus/data/english/greetings.yml"] = "conversations: [[Hello, Hi]]"
    rows, counts = read("chatterbot", files)
    wanted = [["a", "b", "c", "d"], ["Olá", "Oi, tudo bem?"], ["Quanto é 2 + 2?", "4"], ["um", "dois"]]
    assert [row["turns"] for row in rows] == wanted
    assert [row["text"] for row in rows] == ["\n\n".join(turns) for turns in wanted]
    # cut to nothing is counted on both lines; an empty turn only on the second
    assert counts == {"last turn without an answer": 2, "conversation without an answer": 3}


TURN = st.sampled_from(["Sim", "Não sei", "qual é a sua?", "QUAL é a sua", "eu não sei bem", "você é um robô", "Oi!"])


@given(st.lists(st.lists(TURN, min_size=2, max_size=4), max_size=8))
@settings(max_examples=300, deadline=None)
def test_conversations_that_share_a_turn_are_one_unit(talks):
    units = grouping.group_conversations(talks)

    def linked(one: list[str], other: list[str]) -> bool:
        # a first turn always counts, others from three words up
        keys = [{unit_key(t) for n, t in enumerate(turns) if n == 0 or len(t.split()) >= 3} for turns in (one, other)]
        return bool(keys[0] & keys[1])

    groups = list(range(len(talks)))
    for _ in talks:
        for i, one in enumerate(talks):
            for j, other in enumerate(talks):
                if linked(one, other):
                    groups[i] = groups[j] = min(groups[i], groups[j])
    for i in range(len(talks)):
        for j in range(len(talks)):
            assert (units[i] == units[j]) == (groups[i] == groups[j])
