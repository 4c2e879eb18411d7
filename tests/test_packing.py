"""Texts and published tokens as packed tokens: the same ids on every way, and the same bytes after every stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from ttl_utils import blocks, packing, pretraining, tokenizer_import
from ttl_utils import tokenizer as module
from ttl_utils.blocks import TokenBlocks, TokenWriter
from ttl_utils.corpus import documents
from ttl_utils.encoding import Codec, Words
from ttl_utils.errors import SourceError, TTLError
from ttl_utils.files import read_json, sha256
from ttl_utils.packing import batches, framed, token_bytes
from ttl_utils.tokenizer import BOS, EOS, load_tokenizer, prepare_tokenizer

pytestmark = pytest.mark.usefixtures("no_energy")
SIDES = ("train", "test")


@pytest.fixture(scope="module")
def done(tiny_done):
    return tiny_done.stage("02_tokenizer")


@pytest.fixture(scope="module")
def model(done):
    return (done.folder / "tokenizer.model").read_bytes()


@pytest.fixture(scope="module")
def reference(model):
    return spm.SentencePieceProcessor(model_proto=model)


def texts_of(run, side: str) -> list[str]:
    return [row["text"] for row in documents(run.stage("01_data"), "corpus", side)]


def packed(stage, side: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, starts) by file."""
    paths = [path for path in stage.files("tokens") if path.name.startswith(f"{side}-") and path.suffix == ".bin"]
    return [(np.fromfile(path, dtype="<u2"), np.load(path.with_suffix(".starts.npy"))) for path in paths]


def split(stage, side: str) -> list[list[int]]:
    return [part.tolist() for ids, starts in packed(stage, side) for part in np.split(ids, starts[1:])]


def all_ids(stage, side: str) -> np.ndarray:
    return np.concatenate([ids for ids, _ in packed(stage, side)])


def all_starts(stage, side: str) -> list[int]:
    found, before = [], 0
    for ids, starts in packed(stage, side):
        found += (starts + before).tolist()
        before += len(ids)
    return found


def hashes(stage) -> dict[str, str]:
    return {path.name: sha256(path) for group in ("tokenizer", "tokens") for path in stage.files(group)}


# words


ANY = st.lists(
    st.sampled_from(
        ["O mercado", "subiu", " ", "  ", "\n\n", "13,5%", "🚀", "<s>", "\u2581", "日", "café,", "e\u0301", "\u00a0"]
    ),
    max_size=12,
).map("".join) | st.text(max_size=40)


@given(st.lists(ANY, max_size=6), st.integers(1, 5))
@settings(max_examples=300, deadline=None)
def test_texts_put_together_from_words_are_those_of_sentencepiece(model, reference, texts, together):
    words = Words(model)
    assert words.apart
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ttl_utils.encoding.TOGETHER", together)
        ids, lengths = words.encode(texts)
    assert ids.dtype == np.dtype("<u2")
    parts = np.split(ids, np.cumsum(lengths)[:-1]) if texts else []
    assert [part.tolist() for part in parts] == reference.encode(texts)


@pytest.mark.parametrize(
    "options",
    [
        {"split_by_whitespace": False},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"model_type": "unigram"},
        {"treat_whitespace_as_suffix": True},
        {"allow_whitespace_only_pieces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    ],
)
def test_models_of_other_kinds_encode_as_sentencepiece_does(tiny_done, tmp_path, options):
    texts = texts_of(tiny_done, "test")
    lines = [line.replace(", ", ",  ") for text in texts for line in text.split("\n")]
    kept = {"remove_extra_whitespaces": False, "normalization_rule_name": "identity", "model_type": "bpe", **options}
    prefix = str(tmp_path / "m")
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=prefix, vocab_size=400, byte_fallback=True, minloglevel=2, **kept,
        hard_vocab_limit=False, character_coverage=0.98,
    )  # fmt: skip
    model = (tmp_path / "m.model").read_bytes()
    texts += ["", " ", "a  b", " a", "a ", "São  Paulo\n\n do Sul", "o\u00a0mercado \u200b da\u3000cidade … \u00b2"]
    words = Words(model)
    ids, lengths = words.encode(texts)
    whole = spm.SentencePieceProcessor(model_proto=model).encode(texts)
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == whole
    # without the empty text, by words where that is right
    ids, lengths = words.encode(texts := [text for text in texts if text])
    whole = spm.SentencePieceProcessor(model_proto=model).encode(texts)
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == whole


@given(st.lists(st.text(max_size=9), max_size=20), st.integers(1, 20))
def test_batches_are_bounded_and_whole(texts, characters):
    cut = list(batches(texts, characters))
    assert [text for batch in cut for text in batch] == texts
    assert all(batch and (len(batch) == 1 or sum(map(len, batch)) <= characters) for batch in cut)
    # none could have held the next text
    assert all(sum(map(len, one)) + len(other[0]) > characters for one, other in zip(cut, cut[1:], strict=False))


@given(st.lists(st.lists(st.integers(3, 65_535), max_size=5), min_size=1, max_size=6), st.sampled_from([None, EOS]))
def test_documents_stand_within_their_control_tokens(parts, eos):
    lengths = np.array([len(part) for part in parts])
    ids, starts = framed(np.array([n for part in parts for n in part], dtype="<u2"), lengths, BOS, eos)
    tail = [] if eos is None else [eos]
    assert [part.tolist() for part in np.split(ids, starts[1:])] == [[BOS, *part, *tail] for part in parts]
    assert starts[0] == 0 and ids.dtype == np.dtype("<u2")


# the corpus


@pytest.mark.parametrize("side", SIDES)
def test_packed_documents_are_the_corpus(done, tiny_done, reference, side):
    texts = texts_of(tiny_done, side)
    assert split(done, side) == [[BOS, *ids, EOS] for ids in reference.encode(texts)]
    metrics = done.metrics()
    assert metrics[f"{side}_documents"] == len(texts)
    size = sum(path.stat().st_size for path in done.files("tokens") if path.match(f"{side}-*.bin"))
    # 16 bits a token
    assert size == 2 * metrics[f"{side}_tokens"]
    for ids, starts in packed(done, side):
        assert (ids[starts] == BOS).all() and (ids == BOS).sum() == len(starts)
        assert ids.max() < metrics["vocab_size"]
    # files end with the batch that fills them
    assert all(20_000 <= len(ids) < 40_000 for ids, _ in packed(done, side)[:-1])
    assert len(packed(done, side)) == (4 if side == "train" else 1)


def test_no_packed_document_is_on_both_sides(done):
    sides = [{tuple(ids) for ids in split(done, side)} for side in SIDES]
    assert all(sides) and not sides[0] & sides[1]


def again(tiny_prepared, name="again", **changes):
    run = tiny_prepared(run=name, tokenizer=changes)
    shutil.rmtree(run.folder / "02_tokenizer")
    return run


def test_without_the_end_token(tiny_done, tiny_prepared, reference):
    stage = prepare_tokenizer(again(tiny_prepared, append_eos=False, parity_documents=3))
    assert split(stage, "test") == [[BOS, *ids] for ids in reference.encode(texts_of(tiny_done, "test"))]
    # as many of each side as were asked for
    assert stage.metrics()["parity"]["documents"] == 6


@pytest.mark.parametrize("batch", [300, 5_000])
def test_a_document_larger_than_a_batch_and_batches_of_any_size_give_the_same_ids(
    done, tiny_prepared, monkeypatch, batch
):
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", batch)
    stage = prepare_tokenizer(again(tiny_prepared))
    for side in SIDES:
        assert split(stage, side) == split(done, side)
    known = {"bytes_per_stored_token"}
    assert {k: v for k, v in stage.metrics().items() if k not in known} == {
        k: v for k, v in done.metrics().items() if k not in known
    }


# stopped, and run again


class Stop(BaseException):
    """As a kill: nothing that expects errors handles it."""


def after(number: int, function):
    """The function, which at its call of this number is stopped before it does anything."""
    calls = []

    def call(*arguments, **options):
        calls.append(1)
        if len(calls) > number:
            raise Stop
        return function(*arguments, **options)

    return call


# where it is stopped: at which call of what, and how many files are whole then
POINTS = {
    "in training": (module, "train_sentencepiece", 0, 0),
    "after training": (module, "write_json", 0, 0),
    "at the folder": (module, "write_llama_folder", 0, 0),
    "in the first batch": (Codec, "encode", 0, 0),
    "in a later batch": (Codec, "encode", 9, 1),
    "before the starts": (np, "save", 1, 1),
    "before a file's record": (blocks, "write_json", 2, 2),
    "between the sides": (packing, "TokenWriter", 1, 4),
    "in the other side": (blocks, "write_json", 4, 4),
    "at the end": (module, "count_efficiency", 0, 5),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_stage_that_was_stopped_goes_on_to_the_same_bytes(done, tiny_prepared, monkeypatch, capsys, point):
    run = again(tiny_prepared)
    place, name, number, files = POINTS[point]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, after(number, getattr(place, name)))
        with pytest.raises(Stop):
            prepare_tokenizer(run)
    stage = run.stage("02_tokenizer")
    assert not stage.finished
    whole = {path: path.stat().st_mtime_ns for path in (stage.folder / "tokens").glob("*.json")}
    trained = point not in ("in training", "after training")
    # what a killed process left behind, and a second pass would not overwrite
    (stage.folder / "tokens").mkdir(exist_ok=True)
    (stage.folder / "tokens" / "train-00009.bin").write_bytes(b"torn")
    calls = []
    monkeypatch.setattr(module, "train_sentencepiece", _counted(calls, "training", module.train_sentencepiece))
    monkeypatch.setattr(packing, "framed", _counted(calls, "batch", packing.framed))
    capsys.readouterr()
    prepare_tokenizer(run)
    assert hashes(stage) == hashes(done)
    assert stage.metrics() == done.metrics()
    assert calls.count("training") == (not trained)
    assert ("was trained before" in capsys.readouterr().out) == trained
    # whole files were not made again
    assert all(path.stat().st_mtime_ns == time for path, time in whole.items())
    assert len(whole) == files
    assert {path.stem.partition(".")[0] for path in (stage.folder / "tokens").iterdir()} == {
        path.stem.partition(".")[0] for path in stage.files("tokens")
    }


def _counted(calls, name, function):
    def call(*arguments):
        calls.append(name)
        return function(*arguments)

    return call


def test_a_whole_file_that_was_cut_afterwards_is_made_again(done, tiny_prepared, monkeypatch):
    run = again(tiny_prepared)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(module, "count_efficiency", after(0, None))
        prepare_tokenizer(run)
    tokens = run.stage("02_tokenizer").folder / "tokens"
    starts = tokens / "train-00001.starts.npy"
    starts.write_bytes(starts.read_bytes()[:-8])
    assert hashes(prepare_tokenizer(run)) == hashes(done)


KILLED = """
import contextlib, os, signal, sys
from ttl_utils import blocks, carbon
from ttl_utils.params import load_params
from ttl_utils.run import Run
from ttl_utils.tokenizer import prepare_tokenizer

carbon.track = lambda *_, **__: contextlib.nullcontext(carbon.EnergySession())
replace, calls = os.replace, []
def kill(one, other):
    calls.append(str(other))
    if sum(name.endswith(".json") and "tokens" in name for name in calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(one, other)
os.replace = kill
prepare_tokenizer(Run(load_params({"file": sys.argv[1], "run": "again"})))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_process_is_gone_on_from(done, tiny, tiny_prepared):
    run = again(tiny_prepared)
    killed = subprocess.run([sys.executable, "-c", KILLED, tiny.file], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    stage = run.stage("02_tokenizer")
    # the third file is there, and its record is not
    names = {path.name for path in (stage.folder / "tokens").iterdir()}
    assert {"train-00001.json", "train-00002.bin"} <= names and "train-00002.json" not in names
    prepare_tokenizer(run)
    assert hashes(stage) == hashes(done) and stage.metrics() == done.metrics()


def test_progress_goes_on_from_where_it_was(tiny_prepared, monkeypatch):
    run = again(tiny_prepared)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(packing, "framed", after(5, packing.framed))
        prepare_tokenizer(run)
    done = read_json(run.stage("02_tokenizer").folder / "tokens" / "train-00000.json")["totals"]["documents"]
    begun = []

    class Seen(packing.Progress):
        def __enter__(self):
            begun.append((self.label, self.done, self.first, self.total))
            return super().__enter__()

    monkeypatch.setattr(packing, "Progress", Seen)
    total = prepare_tokenizer(run).metrics()["train_documents"]
    assert begun[0] == ("train documents to tokens", done, done, total) and 0 < done < total


@given(st.lists(st.lists(st.integers(0, 65_535), max_size=9), max_size=12), st.integers(1, 20), st.data())
@settings(max_examples=100, deadline=None)
def test_a_writer_that_resumes_writes_the_same_bytes(tmp_path_factory, rows, shard_tokens, data):
    def write(folder, stop=None):
        writer = TokenWriter(folder, "train", shard_tokens)
        writer.resume()
        for number, ids in enumerate(rows[writer.totals["documents"] :], start=writer.totals["documents"]):
            if number == stop:
                # what was written so far reaches the disk, as much as there is
                if writer.file:
                    writer.file.flush()
                return writer
            writer.add(ids, counts={"sum": sum(ids)}, state=number)
        writer.close()
        return writer

    alone, stopped = (tmp_path_factory.mktemp(name) for name in ("alone", "stopped"))
    once = write(alone)
    for stop in data.draw(st.lists(st.integers(0, len(rows)), max_size=3)):
        write(stopped, stop)
    writer = write(stopped)
    assert writer.totals == once.totals and writer.totals["sum"] == sum(map(sum, rows))
    assert writer.state == (len(rows) - 1 if rows else None)
    read = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (alone, stopped)]
    assert read[0] == read[1]


def test_a_damaged_corpus_is_refused(tiny_prepared):
    run = again(tiny_prepared, name="damaged")
    path = run.stage("01_data").files("corpus")[0]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(TTLError, match=f"{path.name} is damaged"):
        prepare_tokenizer(run)


def test_an_empty_corpus_is_named(tiny_prepared, monkeypatch):
    run = again(tiny_prepared)
    monkeypatch.setattr(module, "_count_documents", lambda corpus, side: 0)
    with pytest.raises(TTLError, match="01_data has no document to train on: give data.sources one with use: corpus"):
        prepare_tokenizer(run)


# published tokens


ROW = 47


@pytest.fixture
def published(done, tmp_path, monkeypatch):
    """`publish(rows, kind)`: the tiny tokens as a set of the hub, cut in rows; returns their tokenizer's folder."""
    folder = tmp_path / "mirror" / "somebody" / "tokens"
    monkeypatch.setenv("TTL_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setattr(packing, "BATCH_ROWS", 100)

    def publish(rows=None, kind=None):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        for side in SIDES:
            ids = all_ids(done, side)
            kept = [ids[n : n + ROW].tolist() for n in range(0, len(ids), ROW)] if rows is None else rows[side]
            # several files, and several row groups
            for number, part in enumerate((kept[:700], kept[700:])):
                table = pa.table({"input_ids": pa.array(part, kind or pa.list_(pa.int32())), "n": range(len(part))})
                path = folder / "data" / f"{side}-{number:05}-of-00002.parquet"
                pq.write_table(table, path, row_group_size=150)
        theirs = tmp_path / "theirs"
        if not theirs.exists():
            theirs.mkdir()
            for path in done.files("tokenizer"):
                shutil.copy(path, theirs)
        return theirs

    return publish


def tokens_run(tiny_prepared, source, name="tokens", **changes):
    tokens = {"dataset": "somebody/tokens", "train_split": "train", "test_split": "test", "column": "input_ids"}
    return again(tiny_prepared, name=name, source=str(source), tokens={**tokens, **changes})


def test_published_tokens_are_taken_as_they_are(done, tiny_prepared, published):
    run = tokens_run(tiny_prepared, published())
    stage = prepare_tokenizer(run)
    for side in SIDES:
        assert np.array_equal(all_ids(stage, side), all_ids(done, side))
        assert all_starts(stage, side) == all_starts(done, side)
    # a file may begin within a document here
    assert any(not len(starts) or starts[0] for _, starts in packed(stage, "train"))
    blocks = pretraining.token_blocks(run, "train")
    assert blocks.documents == done.metrics()["train_documents"]
    assert [blocks.document(n).tolist() for n in range(blocks.documents)] == split(done, "train")
    metrics, trained = stage.metrics(), done.metrics()
    for key in ("train_tokens", "test_tokens", "train_documents", "test_documents", "train_bytes", "test_bytes"):
        assert metrics[key] == trained[key], key
    assert metrics["byte_fallback_share"] == trained["byte_fallback_share"]
    assert metrics["tokens_per_word"] is None and metrics["efficiency"] == trained["efficiency"]
    assert set(metrics["published_tokens"]) == {"train", "test"}


def test_published_tokens_need_no_text(done, tiny_prepared, published, monkeypatch, make_empty):
    run = tokens_run(tiny_prepared, published())
    make_empty()
    stage = prepare_tokenizer(run)
    metrics = stage.metrics()
    assert np.array_equal(all_ids(stage, "test"), all_ids(done, "test"))
    assert metrics["efficiency"]["tokens_per_word"] is None and metrics["test_bytes"] == done.metrics()["test_bytes"]


@pytest.fixture
def make_empty(monkeypatch):
    def make():
        for place in (module, tokenizer_import):
            monkeypatch.setattr(place, "documents", lambda *_, **__: iter(()))
        monkeypatch.setattr(module, "_count_documents", lambda corpus, side: 0)

    return make


def test_rows_that_are_documents_and_rows_of_no_document(done, tiny_prepared, published):
    documents = {side: split(done, side) for side in SIDES}
    # the test side begins within a document
    documents["test"][0] = documents["test"][0][3:]
    stage = prepare_tokenizer(tokens_run(tiny_prepared, published(documents)))
    assert [part for part in split(stage, "train")] == documents["train"]
    assert split(stage, "test") == documents["test"] and all_starts(stage, "test")[0] == 0


@pytest.mark.parametrize("number", [0, 1, 3, 4])
def test_published_tokens_go_on_after_a_stop(done, tiny_prepared, published, monkeypatch, number):
    source = published()
    whole = prepare_tokenizer(tokens_run(tiny_prepared, source, name="whole"))
    run = tokens_run(tiny_prepared, source)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(blocks, "write_json", after(number, blocks.write_json))
        prepare_tokenizer(run)
    calls = []
    monkeypatch.setattr(packing, "_row_ids", _counted(calls, "row", packing._row_ids))
    stage = prepare_tokenizer(run)
    assert hashes(stage) == hashes(whole) and stage.metrics() == whole.metrics()
    rows = sum(-(-len(all_ids(done, side)) // ROW) for side in SIDES)
    # rows of whole files are not read again
    assert len(calls) == rows if not number else len(calls) < rows


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ([5, 512], None, r"row 820: id 512 is not of this tokenizer, which has 512 pieces"),
        ([-1], None, r"row 820: id -1 is not of this tokenizer"),
        (None, None, r"row 820: 'None' is not a list of token ids; set tokenizer.tokens.column"),
        ([3, None], None, r"row 820: '\[3, None\]' is not a list of token ids"),
    ],
)
def test_a_row_that_holds_no_ids_is_named(done, tiny_prepared, published, row, kind, message):
    ids = {side: all_ids(done, side) for side in SIDES}
    rows = {side: [ids[side][n : n + ROW].tolist() for n in range(0, len(ids[side]), ROW)] for side in SIDES}
    rows["train"][820] = row
    run = tokens_run(tiny_prepared, published(rows, kind))
    with pytest.raises(TTLError, match=rf"'somebody/tokens', train, {message}"):
        prepare_tokenizer(run)


def test_columns_of_another_kind_or_name_are_named(done, tiny_prepared, published):
    source = published({side: [[1.5, 2.5]] * 800 for side in SIDES}, pa.list_(pa.float64()))
    with pytest.raises(TTLError, match=r"train, row 0: '\[1.5, 2.5\]' is not a list of token ids"):
        prepare_tokenizer(tokens_run(tiny_prepared, source))
    with pytest.raises(TTLError, match=r"train, row 0: '0' is not a list of token ids"):
        prepare_tokenizer(tokens_run(tiny_prepared, source, name="n", column="n"))
    with pytest.raises(SourceError, match=r"has no column 'ids'; it has input_ids, n: set tokenizer.tokens.column"):
        prepare_tokenizer(tokens_run(tiny_prepared, source, name="ids", column="ids"))


WRITTEN = st.text("aãçéo AB12,.!\n🚀日é—“", min_size=1, max_size=40).map(str.strip).filter(bool)


@given(WRITTEN)
@settings(max_examples=150, deadline=None)
def test_bytes_of_a_text_are_known_from_its_ids(done, text):
    tokenizer = load_tokenizer(done.folder)
    inner, first = token_bytes(tokenizer)
    ids = np.array(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    assert first[ids[0]] + inner[ids[1:]].sum() == len(text.encode())
    assert not inner[[0, BOS, EOS]].any() and not first[[0, BOS, EOS]].any()


def test_files_of_a_side_tell_what_they_hold(done):
    records = [read_json(path) for path in sorted((done.folder / "tokens").glob("train-*.json"))]
    totals = [record["totals"] for record in records]
    assert totals[-1]["documents"] == done.metrics()["train_documents"]
    assert [one["tokens"] < other["tokens"] for one, other in zip(totals, totals[1:], strict=False)]
    assert json.dumps(records)


def test_blocks_over_packed_files_are_those_of_the_stage(done):
    blocks = TokenBlocks(done.files("tokens"), 64)
    assert blocks.tokens == done.metrics()["train_tokens"] + done.metrics()["test_tokens"]
