"""Stage 02: two forms of one tokenizer, nothing skipped, and the corpus as 16-bit tokens."""

from __future__ import annotations

import json
import random
import shutil
from itertools import islice

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.tiny import sentence
from ttl_utils import tokenizer as module
from ttl_utils.corpus import documents
from ttl_utils.errors import TTLError
from ttl_utils.files import sha256
from ttl_utils.cleaning import clean
from ttl_utils.tokenizer import (
    BOS,
    EOS,
    PAD,
    UNK,
    count_efficiency,
    load_tokenizer,
    prepare_tokenizer,
    sample_texts,
    train_sentencepiece,
    training_lines,
    write_llama_folder,
)

pytestmark = pytest.mark.usefixtures("no_energy")


@pytest.fixture(scope="module")
def done(tiny_done):
    return tiny_done.stage("02_tokenizer")


@pytest.fixture(scope="module")
def llama(done):
    return load_tokenizer(done.folder)


@pytest.fixture(scope="module")
def reference(done):
    return spm.SentencePieceProcessor(model_file=str(done.folder / "tokenizer.model"))


def texts_of(run, side: str) -> list[str]:
    return [row["text"] for row in documents(run.stage("01_data"), "corpus", side)]


# the folder


def test_the_folder_opens_as_a_llama_tokenizer(done, llama, reference):
    opened = AutoTokenizer.from_pretrained(done.folder)
    assert len(opened) == reference.vocab_size() == done.metrics()["vocab_size"] == 512
    assert opened.get_vocab() == {reference.id_to_piece(n): n for n in range(512)}
    ids = (opened.unk_token_id, opened.bos_token_id, opened.eos_token_id, opened.pad_token_id)
    assert ids == (UNK, BOS, EOS, PAD)
    assert opened.convert_ids_to_tokens([UNK, BOS, EOS, PAD]) == ["<unk>", "<s>", "</s>", "<pad>"]
    assert opened.padding_side == "right" and opened.model_max_length == 64
    text = "O mercado subiu."
    assert opened(text)["input_ids"] == [BOS, *reference.encode(text)]
    padded = opened([text, "O"], padding=True)
    assert padded["input_ids"][1][-1] == PAD and padded["attention_mask"][1][-1] == 0
    assert {path.name for path in done.files("tokenizer")} == set(module.TOKENIZER_FILES)


def test_every_byte_has_a_token(reference):
    assert sum(reference.is_byte(n) for n in range(512)) == 256
    assert not any(reference.id_to_piece(n) == "<unk>" for n in range(1, 512))


# SentencePiece writes a space as this mark, and reads the mark as a space
MARK = "\u2581"
WRITTEN = st.one_of(
    st.text(max_size=60),
    st.text("aãçéo AB12,.!\n🚀👩‍👩‍👧日é\u0303—“”", max_size=60),
    st.lists(st.sampled_from(["O mercado", "subiu", "\n\n", "13,5%", "🚀", "<s>", "</s>", "<unk>", "<0x0A>"])).map(
        " ".join
    ),
).map(lambda text: clean(text.replace(MARK, "")))


@given(WRITTEN)
@settings(max_examples=300, deadline=None)
def test_what_is_decoded_is_what_was_written(llama, text):
    ids = llama(text, split_special_tokens=True)["input_ids"]
    assert ids[0] == BOS
    assert llama.decode(ids[1:]) == text
    assert UNK not in ids


@given(WRITTEN)
@settings(max_examples=300, deadline=None)
def test_both_forms_agree(llama, reference, text):
    ids = llama(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids == reference.encode(text)
    # a control token in a text is letters, never control
    assert not {UNK, BOS, EOS, PAD} & set(ids)


def test_spaces_within_a_text_are_kept(llama, reference):
    """Prompts of a benchmark are not cleaned as the corpus is."""
    text = "um:\n    dois  três\n\n\n   quatro "
    ids = llama(text, add_special_tokens=False)["input_ids"]
    assert ids == reference.encode(text) and llama.decode(ids) == text


def test_a_tokenizer_that_differs_is_caught(done, reference, tmp_path, tiny_done):
    texts = ["um </s> escrito <s>, não um sinal", *texts_of(tiny_done, "test")[:50]]
    encoded = reference.encode(texts)
    module._check_parity(load_tokenizer(done.folder), texts, encoded)
    folder = tmp_path / "other"
    folder.mkdir()
    for path in done.files("tokenizer"):
        shutil.copy(path, folder)
    form = json.loads((folder / "tokenizer.json").read_text())
    form["model"]["merges"] = form["model"]["merges"][:-40]
    (folder / "tokenizer.json").write_text(json.dumps(form))
    with pytest.raises(TTLError, match="disagree at token [0-9]+ of "):
        module._check_parity(load_tokenizer(folder), texts, encoded)
    # an encoding that only ends early
    with pytest.raises(TTLError, match="disagree"):
        module._check_parity(load_tokenizer(done.folder), texts[:1], [encoded[0][:-1]])


def test_the_stage_checks_every_document_or_as_many_as_asked(done, tiny_prepared, monkeypatch):
    metrics = done.metrics()
    assert metrics["parity"] == {"documents": metrics["train_documents"] + metrics["test_documents"], "differences": 0}

    def tampered(model, folder, context):
        form = write_llama_folder(model, folder, context)
        form.add_tokens(["mercado"])
        return form

    monkeypatch.setattr(module, "write_llama_folder", tampered)
    run = tiny_prepared(tokenizer={"append_eos": False}, run="tampered")
    shutil.rmtree(run.folder / "02_tokenizer")
    with pytest.raises(TTLError, match="disagree"):
        prepare_tokenizer(run)
    assert not run.stage("02_tokenizer").finished


# training


@given(st.lists(st.text("aé日🚀 \n", max_size=120), max_size=5), st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_long_lines_are_cut_and_not_lost(texts, max_bytes):
    lines = list(training_lines(texts, max_bytes))
    longest = max(max_bytes, 4)
    assert all(line and "\n" not in line and len(line.encode()) <= longest for line in lines)
    # only spaces at a cut are dropped
    assert "".join(lines).replace(" ", "") == "".join(texts).replace("\n", "").replace(" ", "")


def test_lines_are_cut_at_a_space_where_there_is_one():
    assert list(training_lines(["um dois três"], 400)) == ["um dois três"]
    assert list(training_lines(["um dois três quatro"], 18)) == ["um", "dois três quatro"]
    assert list(training_lines(["x" * 10], 8)) == ["xx", "x" * 8]


def test_all_of_the_corpus_is_read_for_training(done, tiny_done):
    read = done.metrics()["read_for_training"]
    texts = texts_of(tiny_done, "train")
    assert read["documents"] == len(texts)
    assert read["characters"] == sum(len(text) - text.count("\n") for text in texts)


def test_sentencepiece_reads_a_line_up_to_the_limit(tiny_run):
    """Longer ones it would skip without a word: what only a long line holds must reach the vocabulary."""
    values = tiny_run().params.tokenizer.model_copy(update={"max_sentence_length": 2000, "vocab_size": 280})
    rng = random.Random(1)
    text = " ".join(["abacaxi"] * 2000)
    rest = [sentence(rng)[:3] for _ in range(5)]

    def pieces(lines) -> list[str]:
        model = train_sentencepiece(lines, values)
        return spm.SentencePieceProcessor(model_proto=model).encode("abacaxi", out_type=str)

    assert pieces([*training_lines([text], 2000), *rest]) == [f"{MARK}abacaxi"]
    # whole, the line is not read at all: its letters are unknown
    assert "<0x62>" in pieces([text, *rest])


def sentences(number: int) -> list[str]:
    rng = random.Random(0)
    return [sentence(rng) for _ in range(number)]


@pytest.mark.parametrize(
    ("size", "lines", "wanted"),
    [
        (60_000, 200, r"60000: .*Vocabulary size too high .*Give a smaller vocabulary, or more text"),
        (300, 200, r"300: .*smaller than required_chars.*Give a larger vocabulary, or a lower character_coverage"),
        (512, 0, r"512: .*more text"),
    ],
)
def test_a_vocabulary_that_does_not_fit_the_text_is_named(tiny_run, size, lines, wanted):
    values = tiny_run().params.tokenizer.model_copy(update={"vocab_size": size})
    with pytest.raises(TTLError, match=rf"tokenizer\.vocab_size {wanted}") as caught:
        train_sentencepiece(sentences(lines), values)
    assert "trainer_interface.cc" not in str(caught.value) or not lines


def test_sampled_texts_are_spread_and_the_same_each_time(tiny_done):
    corpus = tiny_done.stage("01_data")
    texts = texts_of(tiny_done, "train")
    assert list(sample_texts(corpus, 42, len(texts), len(texts))) == texts
    some = list(sample_texts(corpus, 42, 300, len(texts)))
    assert some == list(sample_texts(corpus, 42, 300, len(texts)))
    assert some != list(sample_texts(corpus, 43, 300, len(texts)))
    assert abs(len(some) - 300) < 6 * (300 * (1 - 300 / len(texts))) ** 0.5
    # as many from the first half as from the second
    places = [texts.index(text) for text in some]
    assert places == sorted(places) and 0.35 < np.mean(np.array(places) < len(texts) / 2) < 0.65


# efficiency


def test_efficiency_counts_just_the_words_asked_for(reference):
    texts = ["O mercado subiu muito", "hoje  de\nnovo", "nunca lido"]
    eff = count_efficiency(reference, texts, 6)
    pieces = len(reference.encode("O mercado subiu muito")) + len(reference.encode("hoje de"))
    words = ["O", "mercado", "subiu", "muito", "hoje", "de"]
    whole = sum(len(reference.encode(word)) == 1 for word in words)
    assert eff == {"words": 6, "tokens": pieces, "tokens_per_word": pieces / 6, "whole_word_share": whole / 6}
    assert 0 < whole < 6
    assert count_efficiency(reference, texts, 100)["words"] == 9
    assert count_efficiency(reference, [], 6) == {
        "words": 0,
        "tokens": 0,
        "tokens_per_word": None,
        "whole_word_share": None,
    }


def test_the_metrics_are_of_the_written_text(done, tiny_done, reference):
    metrics = done.metrics()
    assert metrics["efficiency"]["words"] == 200
    texts = {side: texts_of(tiny_done, side) for side in ("train", "test")}
    assert metrics["efficiency"] == count_efficiency(reference, texts["test"], 200)
    encoded = {side: reference.encode(texts[side]) for side in texts}
    words = sum(len(text.split()) for side in texts for text in texts[side])
    pieces = [index for side in texts for ids in encoded[side] for index in ids]
    assert metrics["tokens_per_word"] == pytest.approx(len(pieces) / words)
    for side in texts:
        assert metrics[f"{side}_bytes"] == sum(len(text.encode()) for text in texts[side])
        assert metrics[f"{side}_tokens"] == sum(len(ids) + 2 for ids in encoded[side])
    tokens = metrics["train_tokens"] + metrics["test_tokens"]
    fallen = sum(reference.is_byte(n) and reference.id_to_piece(n) != "<0x0A>" for n in pieces)
    assert fallen > 0 and metrics["byte_fallback_share"] == fallen / tokens
    assert 2 < metrics["bytes_per_stored_token"] < 2.2


# packed tokens


def packed(stage, side: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, starts) by file."""
    paths = [path for path in stage.files("tokens") if path.name.startswith(f"{side}-") and path.suffix == ".bin"]
    return [(np.fromfile(path, dtype="<u2"), np.load(path.with_suffix(".starts.npy"))) for path in paths]


def split(stage, side: str) -> list[list[int]]:
    return [part.tolist() for ids, starts in packed(stage, side) for part in np.split(ids, starts[1:])]


@pytest.mark.parametrize("side", ["train", "test"])
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
    # files end soon after their size, at a document's end
    assert all(20_000 <= len(ids) < 21_000 for ids, _ in packed(done, side)[:-1])
    assert len(packed(done, side)) == (5 if side == "train" else 1)


def test_no_packed_document_is_on_both_sides(done):
    sides = [{tuple(ids) for ids in split(done, side)} for side in ("train", "test")]
    assert all(sides) and not sides[0] & sides[1]


def test_without_the_end_token(tiny_done, tiny_prepared, reference):
    run = tiny_prepared(tokenizer={"append_eos": False, "parity_documents": 1}, run="no-eos")
    shutil.rmtree(run.folder / "02_tokenizer")
    stage = prepare_tokenizer(run)
    assert split(stage, "test") == [[BOS, *ids] for ids in reference.encode(texts_of(tiny_done, "test"))]
    # a batch of each side, since one document was asked for
    assert stage.metrics()["parity"]["documents"] == 512 + stage.metrics()["test_documents"]


def test_the_same_bytes_again_after_an_interruption(done, tiny_prepared, monkeypatch):
    run = tiny_prepared(run="again")
    shutil.rmtree(run.folder / "02_tokenizer")
    whole = module._batches

    def torn(texts, size):
        yield from islice(whole(texts, size), 1)
        raise RuntimeError("cut")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_batches", torn)
        with pytest.raises(RuntimeError, match="cut"):
            prepare_tokenizer(run)
    stage = run.stage("02_tokenizer")
    assert not stage.finished and (stage.folder / "tokens").is_dir()
    # what a killed process left behind, and a second pass would not overwrite
    (stage.folder / "tokens" / "train-00009.bin").write_bytes(b"torn")
    (stage.folder / "tokenizer.json").write_text("{")
    again = prepare_tokenizer(run)
    for group in ("tokenizer", "tokens"):
        hashes = [{path.name: sha256(path) for path in stage.files(group)} for stage in (again, done)]
        assert hashes[0] == hashes[1]
    names = {path.name for path in (again.folder / "tokens").iterdir()}
    assert names == {path.name for path in again.files("tokens")}


def test_a_damaged_corpus_is_refused(tiny_prepared):
    run = tiny_prepared(run="damaged")
    shutil.rmtree(run.folder / "02_tokenizer")
    path = run.stage("01_data").files("corpus")[0]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(TTLError, match=f"{path.name} is damaged"):
        prepare_tokenizer(run)
