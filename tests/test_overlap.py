"""Overlap of training text with what is scored: against sets of word runs; kept, continued, and honest about gaps."""

from __future__ import annotations

import contextlib
import json
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import sentence
from ttl_utils import overlap
from ttl_utils.errors import DamagedFile, SourceError
from ttl_utils.schema import Overlap, TextSet

POEM = "Sobe a maré e leva a areia, desce a maré e deixa a concha na praia deserta da ilha grande"


def write_corpus(folder: Path, side: str, files: list[list[str]]) -> list[Path]:
    """Parquet files with row groups smaller than the file."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{side}-{number:05}.parquet" for number in range(len(files))]
    for path, texts in zip(paths, files, strict=True):
        table = pa.table({"source": ["s"] * len(texts), "text": pa.array(texts, pa.string())})
        pq.write_table(table, path, row_group_size=3)
    return paths


def runs(text: str, size: int) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return [" ".join(words[start : start + size]) for start in range(len(words) - size + 1)]


def reference(items: list[str], training: list[str], ngram: int) -> dict:
    """The definition, with Python's sets."""
    sizes = [min(ngram, len(runs(item, 1))) for item in items]
    checked = [(item, size) for item, size in zip(items, sizes, strict=True) if size >= overlap.SHORTEST]
    read = {size: {run for text in training for run in runs(text, size)} for size in set(sizes)}
    hits = [[run in read[size] for run in runs(item, size)] for item, size in checked]
    wanted = {size: {run for item, s in checked if s == size for run in runs(item, size)} for size in set(sizes)}
    concerned = sum(any(wanted[size] & set(runs(text, size)) for size in wanted) for text in training)
    return {
        "name": "a",
        "items": len(items),
        "checked": len(checked),
        "found": sum(map(any, hits)),
        "share": sum(map(any, hits)) / len(checked) if checked else None,
        "mean_ngram_share": pytest.approx(sum(sum(hit) / len(hit) for hit in hits) / len(hits)) if hits else None,
        "training_documents": concerned if checked else None,
    }


# pieces of one poem, so that runs are shared; some differ in case and punctuation only
PIECES = st.tuples(st.integers(0, 19), st.integers(1, 12), st.booleans()).map(
    lambda piece: " ".join((POEM.upper() if piece[2] else POEM).split()[piece[0] : piece[0] + piece[1]])
)
TEXTS = st.lists(PIECES, max_size=3).map("; ".join)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(TEXTS, max_size=5),
    st.lists(TEXTS, max_size=3),
    st.lists(st.lists(TEXTS, max_size=5), max_size=3),
    st.integers(6, 9),
)
def test_rows_are_the_definitions(items: list[str], others: list[str], files: list[list[str]], ngram: int) -> None:
    training = [text for texts in files for text in texts]
    with tempfile.TemporaryDirectory() as name, patch.multiple(overlap, _BITS=8, _WORDS=20):
        train = write_corpus(Path(name), "train", files)
        sets = {"a": items, "b": others}
        names = [{"name": "a"}, {"name": "b"}]
        rows = overlap.measure(names, lambda item: sets[item["name"]], train, Path(name) / "work", ngram, workers=1)
    for row, texts in zip(rows, (items, others), strict=True):
        examples = row.pop("examples")
        assert row == reference(texts, training, ngram) | {"name": row["name"]}
        assert bool(examples) == bool(row["found"]) and len(examples) <= overlap.EXAMPLES
        for example in examples:
            size = len(example.split())
            assert any(example in runs(text, size) for text in texts)
            assert any(example in runs(text, size) for text in training)


def test_a_run_over_two_documents_stands_in_none(tmp_path: Path) -> None:
    half = POEM.index("desce")
    train = write_corpus(tmp_path, "train", [[POEM[:half], POEM[half:], POEM[:half]]])
    row = overlap.measure([{"name": "a"}], lambda _: [POEM, POEM[:half]], train, tmp_path / "work", 9, workers=1)[0]
    # of the poem's 12 runs the 5 of its second half; the first half is an item of its own
    assert (row["found"], row["training_documents"], row["mean_ngram_share"]) == (2, 3, (5 / 12 + 1) / 2)


def test_an_example_stands_once(tmp_path: Path) -> None:
    train = write_corpus(tmp_path, "train", [[POEM]])
    items = [POEM, POEM.upper(), *(" ".join(POEM.split()[start:]) for start in range(1, 7))]
    row = overlap.measure([{"name": "a"}], lambda _: items, train, tmp_path / "work", 13, workers=1)[0]
    assert row["found"] == 8 and row["examples"] == [runs(POEM, 13)[start] for start in range(overlap.EXAMPLES)]


def test_more_sets_than_a_byte_has_bits(tmp_path: Path) -> None:
    train = write_corpus(tmp_path, "train", [[f"{POEM} número {number}" for number in range(19)]])
    sets = [{"name": str(number)} for number in range(19)]
    rows = overlap.measure(
        sets, lambda item: [f"da ilha grande número {item['name']}"], train, tmp_path / "work", 13, workers=1
    )
    assert [(row["name"], row["found"], row["training_documents"]) for row in rows] == [
        (str(number), 1, 1) for number in range(19)
    ]


class FakeStage:
    """What `check` asks of stage 01 when it is finished."""

    def __init__(self, folder: Path, train: list[list[str]], test: list[list[str]]):
        self.folder, self.fingerprint, self.added = folder, "f1", {}
        corpus = folder / "corpus"
        self.paths = [*write_corpus(corpus, "train", train), *write_corpus(corpus, "test", test)]

    def manifest(self) -> dict:
        return {"outputs": {"corpus": {"fingerprint": self.fingerprint}}}

    def measuring(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def metrics(self) -> dict:
        return self.added

    def add_metrics(self, **more) -> None:
        self.added |= more

    def files(self, group: str) -> list[Path]:
        assert group == "corpus"
        return self.paths


@pytest.fixture
def stage(tmp_path: Path) -> FakeStage:
    rng = random.Random(5)
    texts = [" ".join(sentence(rng) for _ in range(4)) for _ in range(40)]
    texts[7] += f" Disse o poeta: {POEM.upper()}!"
    texts[31] = f"{POEM}. {texts[31]}"
    test = [f"{POEM}, e nada mais foi dito naquele dia de chuva.", " ".join(f"nova{n}" for n in range(60)), "Oi."]
    return FakeStage(tmp_path, [texts[:20], texts[20:30], texts[30:]], [test])


SETS = {
    "versos": [POEM, "Outro poema, que não foi escrito por ninguém nesta terra nem em outra qualquer", "curto demais"],
    "perguntas": ["deixa a concha na praia", "quem leva a concha da praia"],
}


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The texts that sets have, by name; a set that is missing here cannot be reached."""
    given = dict(SETS)

    def read(text_set: TextSet) -> Iterator[str]:
        if text_set.name not in given:
            raise SourceError(f"data set {text_set.name!r} cannot be reached")
        yield from given[text_set.name]

    monkeypatch.setattr(overlap, "read_texts", read)
    return given


def run_of(*names: str, ngram: int = 13, workers: int = 1) -> SimpleNamespace:
    sets = [TextSet(name=name, files=[f"{name}.txt"]) for name in names]
    data = SimpleNamespace(overlap=Overlap(ngram=ngram, sets=sets), workers=workers)
    return SimpleNamespace(params=SimpleNamespace(data=data))


def count_scans(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[str]:
    scanned: list[str] = []
    real: Callable = overlap._scan

    def scan(path: Path, work: Path) -> None:
        if len(scanned) == stop_at:
            raise KeyboardInterrupt
        scanned.append(path.name)
        real(path, work)

    monkeypatch.setattr(overlap, "_scan", scan)
    return scanned


def test_the_report_of_a_corpus(stage: FakeStage, texts: dict) -> None:
    report = overlap.check(run_of("versos", "perguntas"), stage)
    assert report["ngram"] == 13
    held_out, versos, perguntas = report["sets"]
    first = "sobe a maré e leva a areia desce a maré e deixa a"
    assert versos == {
        "name": "versos",
        "items": 3,
        "checked": 2,
        "found": 1,
        "share": 0.5,
        "mean_ngram_share": 0.5,
        "examples": [first],
        "training_documents": 2,
    }
    assert (perguntas["found"], perguntas["checked"], perguntas["examples"]) == (1, 2, ["deixa a concha na praia"])
    # the poem's 8 runs of 13 words, of the 17 of that document
    assert (held_out["name"], held_out["items"], held_out["checked"], held_out["share"]) == ("held out", 3, 2, 0.5)
    assert held_out["mean_ngram_share"] == pytest.approx(8 / 17 / 2)
    # plain data, and nothing but the report is left
    assert json.loads(json.dumps(report)) == report
    assert {path.name for path in (stage.folder / "reports").iterdir()} <= {"overlap.json", ".overlap.lock"}


def test_several_processes_give_the_same(stage: FakeStage, texts: dict) -> None:
    one = overlap.check(run_of("versos"), stage)
    (stage.folder / "reports" / "overlap.json").unlink()
    assert overlap.check(run_of("versos", workers=2), stage) == one


def test_a_report_is_kept_as_long_as_the_corpus_is_the_same(
    stage: FakeStage, texts: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned = count_scans(monkeypatch)
    first = overlap.check(run_of("versos"), stage)
    assert len(scanned) == 3
    assert overlap.check(run_of("versos"), stage) == first
    assert len(scanned) == 3
    # a further set is looked for alone
    both = overlap.check(run_of("versos", "perguntas"), stage)
    assert both["sets"][:2] == first["sets"] and len(both["sets"]) == 3
    assert len(scanned) == 6
    assert overlap.check(run_of("versos"), stage) == first
    assert len(scanned) == 6
    overlap.check(run_of("versos", ngram=12), stage)
    assert len(scanned) == 9
    stage.fingerprint = "f2"
    overlap.check(run_of("versos", ngram=12), stage)
    assert len(scanned) == 12


def test_a_set_that_cannot_be_reached_is_not_checked_until_it_can(stage: FakeStage, texts: dict) -> None:
    del texts["perguntas"]
    report = overlap.check(run_of("versos", "perguntas"), stage)
    assert report["sets"][1]["found"] == 1
    why = "data set 'perguntas' cannot be reached"
    assert report["sets"][2] == {"name": "perguntas", "not_checked": why}
    assert overlap.check(run_of("versos", "perguntas"), stage) == report
    texts["perguntas"] = SETS["perguntas"]
    again = overlap.check(run_of("versos", "perguntas"), stage)
    assert again["sets"][:2] == report["sets"][:2] and again["sets"][2]["found"] == 1


def test_a_set_lost_on_the_way_leaves_no_figure(stage: FakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_: TextSet) -> Iterator[str]:
        yield POEM
        raise SourceError("the data set stopped in the middle")

    monkeypatch.setattr(overlap, "read_texts", read)
    held_out, lost = overlap.check(run_of("versos"), stage)["sets"]
    assert lost == {"name": "versos", "not_checked": "the data set stopped in the middle"}
    assert held_out["found"] == 1


def test_no_share_where_nothing_could_be_checked(stage: FakeStage, texts: dict) -> None:
    texts["versos"] = ["curto", ""]
    row = overlap.check(run_of("versos"), stage)["sets"][1]
    assert (row["items"], row["checked"], row["found"]) == (2, 0, 0)
    assert row["share"] is row["mean_ngram_share"] is row["training_documents"] is None


def test_a_killed_scan_goes_on(stage: FakeStage, texts: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = overlap.check(run_of("versos"), stage)
    (stage.folder / "reports" / "overlap.json").unlink()
    with monkeypatch.context() as context:
        scanned = count_scans(context, stop_at=2)
        with pytest.raises(KeyboardInterrupt):
            overlap.check(run_of("versos"), stage)
    assert scanned == ["train-00000.parquet", "train-00001.parquet"]
    # what the sets hold is not asked again
    texts.clear()
    scanned = count_scans(monkeypatch)
    assert overlap.check(run_of("versos"), stage) == expected
    assert scanned == ["train-00002.parquet"]


def test_a_killed_scan_of_another_corpus_is_not_gone_on_with(
    stage: FakeStage, texts: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        count_scans(context, stop_at=2)
        with pytest.raises(KeyboardInterrupt):
            overlap.check(run_of("versos"), stage)
    stage.fingerprint = "f2"
    scanned = count_scans(monkeypatch)
    overlap.check(run_of("versos"), stage)
    assert len(scanned) == 3


def test_the_held_out_side_is_sampled_evenly(tmp_path: Path, texts: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "HELD_OUT_ITEMS", 10)
    test = [[f"texto de número {number} com palavras {number * 7}" for number in range(start, start + 9)] for start in
            (0, 9, 18)]  # fmt: skip
    # every third document is taken, the first one too: only 0, 3, 6, ... can be found
    stage = FakeStage(tmp_path, [[test[0][0], test[0][1], test[2][6]]], test)
    row = overlap.check(run_of(), stage)["sets"][0]
    assert (row["items"], row["checked"], row["found"]) == (9, 9, 2)


def test_a_damaged_file_of_the_corpus_is_named(stage: FakeStage, texts: dict) -> None:
    data = stage.paths[1].read_bytes()
    # the last bytes are the footer, its length and a mark
    pages = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for damaged in (data[: len(data) // 2], data[:4] + bytes(pages - 4) + data[pages:], b""):
        stage.paths[1].write_bytes(damaged)
        with pytest.raises(DamagedFile, match="train-00001.parquet does not read"):
            overlap.check(run_of("versos"), stage)
    assert not (stage.folder / "reports" / "overlap.json").exists()
