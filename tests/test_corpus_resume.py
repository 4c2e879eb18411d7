"""Stage 01 killed anywhere goes on where it was and gives the same bytes, with any number of processes."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import test_toxicity as toxic
from tests.test_corpus import hashes
from tests.tiny import words
from ttl_utils import corpus, judge
from ttl_utils.corpus import documents, prepare_corpus
from ttl_utils.errors import ParameterError, SourceError, TTLError
from ttl_utils.files import read_json
from ttl_utils.judge import SIDES
from ttl_utils.toxicity import Scorer

pytestmark = pytest.mark.usefixtures("no_energy")

WORDS = words("a casa o rio que na de pedra com uma torre e um porto em frente ao mar do sul da ilha para os barcos")


def text(number: int) -> str:
    """A document of its own; every 10th has another's text, every 7th is too short."""
    if number % 7 == 6:
        return "curto"
    number -= number % 10 == 9
    places = [(number * step) % len(WORDS) for step in range(3, 40)]
    return f"O número {number * 7919} fica longe. " + " ".join(WORDS[place] + "s" * (place % 3) for place in places)


def write_files(folder: Path) -> None:
    """The same kind of text as JSON lines, compressed lines and Parquet."""
    folder.mkdir(parents=True)
    lines = [json.dumps({"text": text(n), "where": "wiki" if n % 3 else "instruct"}) for n in range(300)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with gzip.open(folder / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps({"text": text(n + 300), "where": None}) for n in range(300)) + "\nnot json\n")
    rows = [{"text": text(n + 600), "where": "wiki"} for n in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "c.parquet", row_group_size=64)


def sources(folder: Path) -> list[dict]:
    files = [str(folder / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    common = {"use": "corpus", "kind": "plain", "filter": "all", "licence": "CC BY 4.0", "columns": ["text"]}
    origins = [{"pattern": "instruct", "kind": "instruction", "filter": "all", "licence": "CC BY-NC 4.0"}]
    return [
        {"name": "mixed", **common, "files": files[:2], "origin_column": "where", "origins": origins},
        {"name": "table", **common, "files": files[2:]},
    ]


@pytest.fixture
def make(tiny_run, tmp_path, monkeypatch):
    """A run over files in small parts, so that there are many places to be stopped at."""
    monkeypatch.setattr(corpus, "PART_CHARACTERS", 20_000)
    monkeypatch.setattr(corpus, "BATCH_CHARACTERS", 4_000)
    write_files(tmp_path / "texts")
    return lambda run="whole", **data: tiny_run(**overrides(tmp_path / "texts", run, **data))


def overrides(folder: Path, run: str, **data) -> dict:
    rules = {"all": {"min_words": 5, "near_duplicates": True}}
    data = {"sources": sources(folder), "filters": rules, "workers": 1, **data}
    return {"run": run, "data": data, "evaluation": {"downstream": []}}


def counted(stage) -> list[dict]:
    return stage.metrics()["sources"]


def test_everything_adds_up_by_part_too(make):
    stage = prepare_corpus(make())
    mixed, table = counted(stage)
    assert mixed["documents_in"] == 601 and table["documents_in"] == 300
    assert mixed["rejected"]["not JSON"] == 1
    for report, numbers in ((mixed, range(600)), (table, range(600, 900))):
        assert report["documents_in"] == report["documents_kept"] + sum(report["rejected"].values())
        assert report["rejected"]["too few words"] == sum(n % 7 == 6 for n in numbers)
        assert report["rejected"]["exact duplicate"] > 20
    plain, instruct = mixed["parts"]
    assert (instruct["documents_in"], instruct["kind"]) == (100, "instruction")
    for name in ("documents_in", "characters_in", "documents_kept", "characters_kept", "train_documents"):
        assert plain[name] + instruct[name] == mixed[name]
    assert {row["licence"]: row["model_use"] for row in stage.metrics()["licences"]} == {
        "CC BY 4.0": "free",
        "CC BY-NC 4.0": "non-commercial",
    }
    sheet = (stage.folder / "data_sheet.md").read_text(encoding="utf-8")
    assert f"{mixed['documents_kept']:,}" in sheet and "CC BY-NC 4.0" in sheet
    assert not (stage.folder / "work").exists()


def test_processes_and_parts_change_no_byte(make, monkeypatch):
    whole = hashes(prepare_corpus(make()))
    assert hashes(prepare_corpus(make("two", workers=2))) == whole
    monkeypatch.setattr(corpus, "PART_CHARACTERS", 2**26)
    assert hashes(prepare_corpus(make("one-part"))) == whole


@pytest.mark.parametrize("documents", [1, 150, 399, 640, 890])
def test_stopped_while_it_reads_it_goes_on(make, monkeypatch, capsys, documents):
    whole = prepare_corpus(make())
    plain, seen = judge.Judge.judge, []

    def stop(self, name, rows):
        seen.append(len(rows))
        if sum(seen) > documents:
            raise KeyboardInterrupt
        return plain(self, name, rows)

    with monkeypatch.context() as patch:
        patch.setattr(judge.Judge, "judge", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(make("stopped"))
    judged = []
    with monkeypatch.context() as patch:
        patch.setattr(judge.Judge, "judge", lambda *given: judged.append(len(given[2])) or plain(*given))
        again = prepare_corpus(make("stopped"))
    assert hashes(again) == hashes(whole) and counted(again) == counted(whole)
    if documents > 200:
        assert sum(judged) < 901, "what was read before is not read again"
    # at 640 the first source was whole, and of the second nothing was kept yet
    assert ("documents were read before, going on" in capsys.readouterr().out) == (documents in (150, 399, 890))


@pytest.mark.parametrize("step", ["_mark", "_write", "_mark_held_out"])
def test_stopped_later_it_reads_nothing_again(make, monkeypatch, step):
    whole = prepare_corpus(make())
    with monkeypatch.context() as patch:
        patch.setattr(corpus, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(make("stopped"))
    with monkeypatch.context() as patch:
        patch.setattr(corpus.sources, "open_source", lambda *_: pytest.fail("it was read again"))
        again = prepare_corpus(make("stopped"))
    assert hashes(again) == hashes(whole) and counted(again) == counted(whole)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_with_its_workers_it_goes_on(make, tiny, tmp_path):
    """SIGKILL, no chance to tidy up; the workers end with it."""
    whole = prepare_corpus(make())
    parameters = {"file": tiny.file, **overrides(tmp_path / "texts", "killed", workers=2)}
    script = tmp_path / "made.py"
    script.write_text(
        "import json, sys\n"
        "from ttl_utils import corpus\n"
        "from ttl_utils.params import load_params\n"
        "from ttl_utils.run import Run\n"
        "corpus.PART_CHARACTERS, corpus.BATCH_CHARACTERS = 20_000, 4_000\n"
        "if __name__ == '__main__':\n"
        "    corpus.prepare_corpus(Run(load_params(json.loads(sys.argv[1]))))\n"
    )
    command = [sys.executable, str(script), json.dumps(parameters)]
    work = Path(os.environ["TTL_OUTPUTS"]) / "killed" / "01_data" / "work"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(work.rglob("*.json"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert process.wait() == -signal.SIGKILL and len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=20)[1], "the workers end with it"
    stage = make("killed", workers=2).stage("01_data")
    assert not stage.finished and len(list(work.rglob("*.json"))) >= 3
    assert hashes(prepare_corpus(make("killed", workers=2))) == hashes(whole)


def test_a_damaged_source_keeps_what_was_done(make, tmp_path):
    """A cut file is named with its place; once it is whole again, reading goes on from the parts before."""
    whole = prepare_corpus(make())
    path = tmp_path / "texts" / "c.parquet"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(SourceError, match="c.parquet"):
        prepare_corpus(make("cut"))
    parts = make("cut").stage("01_data").folder / "work" / "00-mixed"
    before = {part.name: part.stat().st_mtime_ns for part in parts.glob("*.json")}
    assert before and read_json(max(parts.glob("*.json")))["ended"]
    path.write_bytes(good)
    assert hashes(prepare_corpus(make("cut"))) == hashes(whole)


@pytest.mark.parametrize("damage", ["deleted", "cut", "no record"])
def test_a_part_that_is_damaged_is_made_again_with_all_after_it(make, monkeypatch, damage):
    whole = prepare_corpus(make())
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_mark", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(make("damaged"))
    folder = make("damaged").stage("01_data").folder / "work" / "00-mixed"
    assert len(list(folder.glob("part-*.json"))) > 3
    if damage == "cut":
        path = folder / "part-00001.parquet"
        path.write_bytes(path.read_bytes()[:-9])
    else:
        for path in folder.glob("part-00001.json" if damage == "no record" else "part-00001.*"):
            path.unlink()
    again = prepare_corpus(make("damaged"))
    assert hashes(again) == hashes(whole) and counted(again) == counted(whole)


def test_many_short_documents_are_many_parts(make, monkeypatch):
    whole = hashes(prepare_corpus(make()))
    monkeypatch.setattr(corpus, "PART_CHARACTERS", 2**26)
    monkeypatch.setattr(corpus, "PART_DOCUMENTS", 50)
    written = []
    plain = corpus._write_part
    monkeypatch.setattr(corpus, "_write_part", lambda *given: written.append(given[0]) or plain(*given))
    assert hashes(prepare_corpus(make("parts"))) == whole and len(written) > 10


def test_a_corpus_of_which_nothing_is_kept_is_an_error(make):
    with pytest.raises(TTLError, match="no document of the corpus was kept .*too few words: "):
        prepare_corpus(make("none", filters={"all": {"min_words": 900}}))
    assert not make("none", filters={"all": {"min_words": 900}}).stage("01_data").finished


def test_a_folder_that_cannot_be_written_is_named(make, monkeypatch, tmp_path):
    (tmp_path / "afile").write_text("x")
    monkeypatch.setenv("TTL_OUTPUTS", str(tmp_path / "afile"))
    with pytest.raises(TTLError, match="cannot write in .*afile.*TTL_OUTPUTS"):
        prepare_corpus(make("nowhere"))


def test_a_worker_that_is_killed_is_one_message(make, monkeypatch):
    monkeypatch.setattr(corpus, "judge_in_worker", _die)
    with pytest.raises(TTLError, match="worker process was ended from outside.*data.workers"):
        prepare_corpus(make("dies", workers=2))


def _die(name: str, rows: list[dict]) -> None:
    os._exit(1)


def test_permissive_only_keeps_free_licences_and_counts_the_rest(make):
    mixed, table = counted(prepare_corpus(make("free", permissive_only=True)))
    # the part under CC BY-NC is gone, with its reason; what is read is the same
    assert mixed["rejected"]["licence"] == 100 and "licence" not in table["rejected"]
    assert mixed["licence_characters_in"]["CC BY-NC 4.0"] > 0
    assert mixed["parts"][1]["documents_kept"] == 0


def test_a_full_disk_is_named_and_nothing_is_half_written(make, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "part-00000.parquet")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(TTLError, match="the disk is full while writing part-00000.parquet"):
            prepare_corpus(make("full"))
    assert not list(make("full").stage("01_data").folder.rglob("part-*.json"))
    assert prepare_corpus(make("full")).finished


def test_toxic_documents_are_rejected_by_the_filters_that_ask(make, tmp_path, monkeypatch):
    """By source and part, with what other thresholds would reject; scores that were saved are not asked for again."""
    model = toxic.save(toxic.build(), tmp_path / "model")
    rows = [{"text": f"o rio {'insulto ' * 8}. {text(n)}" if n % 5 == 0 else f"o rio . {text(n)}"} for n in range(90)]
    rows = [
        row | {"where": "instruct" if n < 30 else "wiki"} for n, row in enumerate(rows) if "curto" not in row["text"]
    ]
    path = tmp_path / "toxic.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    source = sources(tmp_path / "texts")[0] | {"files": [str(path)]}
    # the part `instruct` keeps its filter, which does not ask
    given = {
        "sources": [source | {"filter": "web"}],
        "filters": {"all": {}, "web": {"toxicity": True}},
        "toxicity": {"model": str(model), "threshold": 0.0, "max_length": toxic.LENGTH, "batch_size": 4},
    }
    asked = []
    plain = Scorer.scores
    monkeypatch.setattr(Scorer, "scores", lambda self, texts: asked.append(len(texts)) or plain(self, texts))
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(make("toxic", **given))
    once = list(asked)
    stage = prepare_corpus(make("toxic", **given))
    assert asked == once and sum(once) == stage.metrics()["toxicity"]["scored"]
    (report,) = counted(stage)
    plain_part, instruct = report["parts"]
    bad = {row["text"] for row in rows if row["where"] == "wiki" and "insulto" in row["text"]}
    assert plain_part["rejected"]["toxic"] == len(bad) > 5 and "toxic" not in instruct["rejected"]
    kept = {row["text"] for side in SIDES for row in documents(stage, "corpus", side)}
    assert not bad & kept and any("insulto" in document for document in kept)
    chosen = [row for row in stage.metrics()["toxicity"]["sensitivity"] if row["threshold"] == 0.0]
    assert [(row["source"], row["rejected"]) for row in chosen] == [("mixed", len(bad))]


def test_a_classifier_that_cannot_be_had_is_said_and_one_that_cannot_work_stops_first(make, tmp_path, monkeypatch):
    settings = {"model": "some/model", "threshold": 0.0, "max_length": 8, "batch_size": 4}
    given = {"filters": {"all": {"min_words": 5, "near_duplicates": True, "toxicity": True}}, "toxicity": settings}
    stage = prepare_corpus(make("skipped", **given))
    said = stage.metrics()["toxicity"]
    assert not said["ran"] and "some/model" in said["why"]
    assert said["why"] in (stage.folder / "data_sheet.md").read_text(encoding="utf-8")
    model = toxic.save(toxic.build(), tmp_path / "model")
    monkeypatch.setattr(corpus.sources, "open_source", lambda *_: pytest.fail("it began to read"))
    with pytest.raises(ParameterError, match="max_length"):
        prepare_corpus(make("long", **given | {"toxicity": settings | {"model": str(model), "max_length": 999}}))
