"""Sources of every kind as rows of one form: columns, conversations, what is left out, where to go on, estimates."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ttl_utils import local_files, sources, wheels
from ttl_utils.errors import SourceError
from ttl_utils.schema import Source, TextSet

DATASET = "alguem/conjunto"
ANY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BASE = {"name": "livros", "use": "corpus", "kind": "plain", "filter": "prose", "licence": "CC0"}


def source(**changes: object) -> Source:
    return Source(**{**BASE, **changes})


def read(item: Source, left_out: Counter | None = None, state: dict | None = None) -> list[dict]:
    return list(sources.open_source(item, None, Counter() if left_out is None else left_out, state))


@pytest.fixture
def make(tmp_path, monkeypatch):
    """`make(rows, kind, **keys)`: a source that holds these rows, as files or as a mirrored set of the hub."""
    monkeypatch.setenv("TTL_MIRROR", str(tmp_path / "mirror"))

    def make(rows: list[dict], kind: str = "jsonl", group: int = 4, **keys: object) -> Source:
        if kind == "hub":
            folder = tmp_path / "mirror" / DATASET / "data"
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet", row_group_size=group)
            return source(dataset=DATASET, split="train", **{"columns": ["text"], **keys})
        path = tmp_path / f"livros.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return source(files=[str(path)], **keys)

    return make


KINDS = pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])


@KINDS
def test_text_and_origin(make, kind):
    rows = [{"text": "Um porto.", "metadata": "source: a", "x": 1}, {"text": None, "metadata": None, "x": 2}]
    assert read(make(rows, kind, origin_column="metadata")) == [
        {"text": "Um porto.", "origin": "source: a"},
        {"text": "", "origin": None},
    ]
    assert read(make(rows, kind))[0] == {"text": "Um porto.", "origin": None}


@KINDS
def test_columns_are_joined_with_a_blank_line_and_empty_ones_skipped(make, kind):
    rows = [
        {"instruction": "Some.", "input": "", "output": "4", "year": 1998},
        {"instruction": "Some.", "input": "2 e 2", "output": None, "year": 1999},
        {"instruction": " \n", "input": None, "output": " 4 ", "year": None},
        {"instruction": None, "input": None, "output": None, "year": None},
    ]
    found = read(make(rows, kind, columns=["instruction", "input", "output"]))
    assert [row["text"] for row in found] == ["Some.\n\n4", "Some.\n\n2 e 2", " 4 ", ""]
    found = read(make(rows, kind, columns=["output", "year"]))
    assert [row["text"] for row in found] == ["4\n\n1998", "1999", " 4 ", ""]


@KINDS
def test_a_column_may_be_named_by_another(make, kind):
    rows = [{"question": "Quem?", "answer0": "Ana", "answer1": "Rui", "label": n} for n in (0, 1, -1)]
    found = read(make(rows, kind, columns=["question", "answer{label}"]))
    assert [row["text"] for row in found] == ["Quem?\n\nAna", "Quem?\n\nRui", ""]
    assert found[2]["problem"] == "no answer{label}"
    with pytest.raises(SourceError, match=r"no column 'choice\{label\}'; it has question, answer0, answer1, label"):
        read(make(rows, kind, columns=["choice{label}"]))
    with pytest.raises(SourceError, match="no column 'gold'"):
        read(make(rows, kind, columns=["answer{gold}"]))


@KINDS
@pytest.mark.parametrize("keys", [{"columns": ["texto"]}, {"where": {"texto": "pt"}}, {"origin_column": "texto"}])
def test_a_missing_column_is_named(make, kind, keys):
    with pytest.raises(SourceError, match="'livros' has no column 'texto'; it has text, lang"):
        read(make([{"text": "um", "lang": "pt"}], kind, **keys))


def test_a_key_that_some_lines_lack_is_empty_there(make):
    rows = [{"instruction": "Some.", "output": "4"}, {"instruction": "Some.", "input": "2 e 2", "output": "4"}]
    found = read(make(rows, columns=["instruction", "input", "output"]))
    assert [row["text"] for row in found] == ["Some.\n\n4", "Some.\n\n2 e 2\n\n4"]


def talk(*turns: str | None, first: int = 0) -> list[dict]:
    return [{"content": turn, "role": ("user", "assistant")[(n + first) % 2]} for n, turn in enumerate(turns)]


@KINDS
def test_conversations(make, kind):
    talks = [
        talk("Oi", "Olá", "Tudo?", "Tudo."),
        talk("Oi, e aí?"),
        talk("a", "b", first=1),
        talk("Oi", None),
    ]
    found = read(make([{"talk": turns, "from": "x"} for turns in talks], kind, columns=["talk"], origin_column="from"))
    assert found[0] == {
        "text": "Oi\n\nOlá\n\nTudo?\n\nTudo.",
        "origin": "x",
        "turns": ["Oi", "Olá", "Tudo?", "Tudo."],
    }
    assert [row.get("problem") for row in found[1:]] == [
        "turns do not alternate",
        "turns do not alternate",
        "turn without text",
    ]
    assert [(row["text"], row["size"], row["origin"]) for row in found[1:]] == [
        ("", 9, "x"),
        ("", 4, "x"),
        ("", 2, "x"),
    ]


@pytest.mark.parametrize("turns", [["Oi", "Olá"], [{"from": "user", "value": "Oi"}], [{"role": "user", "content": 1}]])
def test_conversations_of_another_form_are_named(make, turns):
    with pytest.raises(SourceError, match="a conversation is not a list of {role, content}"):
        read(make([{"talk": turns}], columns=["talk"]))


def test_a_column_that_holds_no_text_is_named(make):
    with pytest.raises(SourceError, match="column 'talk' holds no text, but"):
        read(make([{"text": "um", "talk": talk("Oi", "Olá")}], columns=["text", "talk"]))


def test_what_cannot_be_read_is_a_row_with_its_problem(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "um", "lang": "pt"}\n{\n{"text": "\xff"}\n')
    left_out = Counter()
    found = read(source(files=[str(path)], where={"lang": "pt"}), left_out)
    assert [(row["text"], row.get("problem"), row.get("size")) for row in found] == [
        ("um", None, None),
        ("", "not JSON", 2),
        ("", "not UTF-8", 14),
    ]
    assert not left_out


@KINDS
def test_a_text_above_the_cap_is_a_problem(make, kind, monkeypatch):
    monkeypatch.setattr(sources, "LIMIT", 20)
    found = read(make([{"text": "a" * 20}, {"text": "a" * 21}], kind))
    assert [row.get("problem") for row in found] == [None, "larger than 64 MB"] and found[1]["size"] == 21
    [row] = read(make([{"text": talk("a" * 10, "b" * 20)}], kind))
    assert (row["problem"], row["size"]) == ("larger than 64 MB", 32)


# what is left out

ROWS = [
    {"text": f"texto {n}", "lang": ("pt", "en", "pt")[n % 3], "good": n % 2 == 0, "year": 2000 + n} for n in range(60)
]


@KINDS
def test_where_keeps_the_rows_of_a_value_and_counts_the_others(make, kind):
    left_out = Counter()
    found = read(make(ROWS, kind, where={"lang": "pt", "good": True}), left_out)
    wanted = [row["text"] for row in ROWS if row["lang"] == "pt" and row["good"]]
    assert [row["text"] for row in found] == wanted
    assert left_out == {"other lang": 20, "other good": 20}
    assert [row["text"] for row in read(make(ROWS, kind, where={"year": 2003}))] == ["texto 3"]


def test_a_value_that_no_row_has_is_named(make):
    with pytest.raises(SourceError, match="'livros': `where`: no row has lang 'PT'; met were 'en', 'pt'"):
        read(make(ROWS, where={"lang": "PT"}))


@KINDS
def test_a_share_depends_on_place_and_name_alone(make, kind):
    left_out = Counter()
    found = read(make(ROWS, kind, share=0.5), left_out)
    assert left_out == {"not in the share": 60 - len(found)} and 15 < len(found) < 45
    assert read(make(ROWS, kind, share=0.5)) == found
    # a part of a share is in the larger share
    assert {row["text"] for row in read(make(ROWS, kind, share=0.2))} < {row["text"] for row in found}
    other = {row["text"] for row in read(make(ROWS, kind, share=0.5, name="outros"))}
    assert other != {row["text"] for row in found}


def test_the_share_is_the_same_in_every_version(make):
    found = read(make(ROWS, share=0.2))
    assert [int(row["text"].split()[1]) for row in found] == [4, 10, 15, 17, 18, 23, 26, 28, 37, 42]


@KINDS
def test_a_limit_is_of_the_rows_given(make, kind):
    assert [row["text"] for row in read(make(ROWS, kind, limit=3, where={"lang": "en"}))] == [
        "texto 1",
        "texto 4",
        "texto 7",
    ]
    assert len(read(make(ROWS, kind, limit=100))) == 60


# where to go on

LANGUAGES = st.sampled_from(({}, {"lang": "pt"}))


@KINDS
@given(
    stops=st.lists(st.integers(0, 60), max_size=3),
    share=st.sampled_from((0.3, 1.0)),
    limit=st.sampled_from((None, 5, 40)),
    where=LANGUAGES,
)
@ANY
def test_reading_goes_on_exactly_where_it_stopped(make, kind, stops, share, limit, where):
    item = make(ROWS, kind, share=share, limit=limit, where=where)
    whole_left_out: Counter = Counter()
    whole = read(item, whole_left_out)
    state, found, left_out = None, [], Counter()
    for stop in [*sorted(stops), 1000]:
        # what was left out after the last row given is read again
        counted = Counter()
        reader = sources.open_source(item, None, counted, state)
        for row in reader:
            found.append(row)
            if len(found) >= stop:
                break
        left_out += counted
        state = json.loads(json.dumps(reader.state()))
    assert found == whole
    assert left_out == whole_left_out
    assert read(item, state=state) == []


# wheels

WHEEL = {"package": "dante-corpora", "version": "2.0.5", "sha256": "0" * 64, "reader": "petrogold"}


def test_a_wheel_is_given_as_it_is_and_read_anew(monkeypatch):
    rows = [{"text": f"frase {n}", "unit": str(n), "turns": [], "label": 1} for n in range(9)]

    def wheel(item: Source, data: object, counts: Counter):
        counts["sentence with a split contraction"] += 2
        yield from rows

    monkeypatch.setattr(wheels, "read", wheel)
    left_out = Counter()
    reader = sources.open_source(source(**WHEEL), None, left_out)
    assert list(reader) == rows and reader.state() is None
    assert left_out == {"sentence with a split contraction": 2}
    assert read(source(**WHEEL, limit=4)) == rows[:4]


# plain texts


def test_texts_of_a_set_pass_over_what_cannot_be_read(tmp_path, make):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"q": "um", "a": "1"}\n{\n{"q": "dois", "a": null}\n')
    item = TextSet(name="s", files=[str(path)], columns=["q", "a"])
    assert list(sources.read_texts(item)) == ["um\n\n1", "dois"]
    make([{"text": "um"}, {"text": "dois"}], "hub")
    item = TextSet(name="s", dataset=DATASET, split="train", columns=["text"])
    assert list(sources.read_texts(item)) == ["um", "dois"]
    (tmp_path / "a.txt").write_text("um\n\ndois")
    item = TextSet(name="s", files=[str(tmp_path / "a.txt")], text_documents="blank line")
    assert list(sources.read_texts(item)) == ["um", "dois"]


# estimates


def one(item: Source) -> dict:
    [found] = sources.estimate([item])
    assert found.pop("source") == item.name
    return found


def test_files_and_mirrors_are_estimated_from_footers(make):
    rows = [{"text": f"{n} " + "pedra " * 200, "x": "y" * 900} for n in range(100)]
    length = sum(len(row["text"]) for row in rows)
    for kind in ("parquet", "hub"):
        found = one(make(rows, kind, group=100))
        assert (found["download_bytes"], found["documents"], found["basis"]) == (0, 100, "Parquet footers")
        assert found["text_bytes"] == pytest.approx(length, rel=0.2)
    found = one(make(rows, "hub", group=100, limit=10, share=0.5, where={"x": "y"}))
    assert found["documents"] == 10 and found["basis"] == "Parquet footers; before `where`"
    assert found["text_bytes"] == pytest.approx(length / 10, rel=0.2)


def test_text_files_are_estimated_from_their_sizes(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.txt").write_bytes(b"a" * 100)
    found = one(source(files=[str(tmp_path / "*.txt")]))
    assert found == {"download_bytes": 0, "text_bytes": 300, "documents": 3, "basis": "file sizes"}
    found = one(source(files=[str(tmp_path / "*.txt")], text_documents="line", limit=7))
    assert found["documents"] is None and found["basis"] == "file sizes; limit not taken into account"


def test_a_hub_set_is_estimated_from_its_files_and_card(monkeypatch):
    monkeypatch.delenv("TTL_MIRROR", raising=False)
    item = source(dataset=DATASET, split="train", columns=["text"])
    monkeypatch.setattr("ttl_utils.hub.sizes", lambda _: ([("a", 600), ("b", 400)], 1500, 10))
    assert one(item) == {"download_bytes": 1000, "text_bytes": 1500, "documents": 10, "basis": "card"}
    # half of the rows until 2 are given: 4 of 10 are read
    found = one(item.model_copy(update={"limit": 2, "share": 0.5}))
    assert (found["download_bytes"], found["text_bytes"], found["documents"]) == (400, 300, 2)
    monkeypatch.setattr("ttl_utils.hub.sizes", lambda _: ([("a", 600), ("b", 400)], None, None))
    found = one(item)
    assert (found["download_bytes"], found["text_bytes"], found["documents"]) == (1000, 1750, None)
    assert found["basis"] == "1.75 x the download (the card gives no sizes)"
    monkeypatch.setattr("ttl_utils.hub.sizes", lambda _: ([("a", 600), ("b", None)], None, None))
    assert (one(item)["download_bytes"], one(item)["text_bytes"]) == (None, None)


def test_what_cannot_be_estimated_stops_nothing(monkeypatch, tmp_path):
    monkeypatch.delenv("TTL_MIRROR", raising=False)
    monkeypatch.setenv("TTL_CACHE", str(tmp_path))
    items = [
        source(name="a", dataset=DATASET, split="train", columns=["text"]),
        source(name="b", files=[str(tmp_path / "nada.txt")]),
        source(name="c", **WHEEL),
    ]
    found = sources.estimate(items)
    assert [row["source"] for row in found] == ["a", "b", "c"]
    assert all(row["text_bytes"] is None and row["documents"] is None for row in found)
    assert "cannot be reached" in found[0]["basis"] and "no file fits" in found[1]["basis"]
    assert found[2]["download_bytes"] is None and found[2]["basis"].startswith("small")
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / f"dante-corpora-2.0.5-{'0' * 16}.whl").write_bytes(b"x")
    assert sources.estimate(items)[2]["download_bytes"] == 0


def test_lines_of_a_file_are_documents(tmp_path):
    path = Path(tmp_path / "a.txt")
    path.write_text("um\n\ndois\n")
    assert [row["text"] for row in read(source(files=[str(path)], text_documents="line"))] == ["um", "dois"]
    assert local_files.kind(path) == "text"
