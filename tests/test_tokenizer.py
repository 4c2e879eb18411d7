"""Stage 02: two forms of one tokenizer, nothing skipped, and the corpus as 16-bit tokens."""

from __future__ import annotations

import json
import random
import re
import shutil

import numpy as np
import pytest
import sentencepiece as spm
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.tiny import sentence
from ttl_utils import hub, tokenizer_import
from ttl_utils import tokenizer as module
from ttl_utils.cleaning import clean
from ttl_utils.corpus import documents
from ttl_utils.encoding import Codec
from ttl_utils.errors import TTLError
from ttl_utils.files import sha256
from ttl_utils.packing import check_parity, first_difference
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
def codec(done, llama):
    return Codec(llama, (done.folder / "tokenizer.model").read_bytes())


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


def test_a_tokenizer_that_differs_is_caught(done, tmp_path, tiny_done):
    texts = ["um </s> escrito <s>, não um sinal", *texts_of(tiny_done, "test")[:50]]
    model = (done.folder / "tokenizer.model").read_bytes()
    check_parity(Codec(load_tokenizer(done.folder), model), texts)
    folder = tmp_path / "other"
    folder.mkdir()
    for path in done.files("tokenizer"):
        shutil.copy(path, folder)
    form = json.loads((folder / "tokenizer.json").read_text())
    form["model"]["merges"] = form["model"]["merges"][:-40]
    (folder / "tokenizer.json").write_text(json.dumps(form))
    with pytest.raises(TTLError, match="disagree at token [0-9]+ of "):
        check_parity(Codec(load_tokenizer(folder), model), texts)
    # the last text alone differs
    alike = [text for text in texts if not first_difference(Codec(load_tokenizer(folder), model), [text])]
    other = next(text for text in texts if text not in alike)
    with pytest.raises(TTLError, match=re.escape(other[:80])):
        check_parity(Codec(load_tokenizer(folder), model), [*alike, other])


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
    assert list(sample_texts(corpus, 42, 1.0)) == texts
    some = list(sample_texts(corpus, 42, 300 / len(texts)))
    assert some == list(sample_texts(corpus, 42, 300 / len(texts)))
    assert some != list(sample_texts(corpus, 43, 300 / len(texts)))
    assert abs(len(some) - 300) < 6 * (300 * (1 - 300 / len(texts))) ** 0.5
    # as many from the first half as from the second
    places = [texts.index(text) for text in some]
    assert places == sorted(places) and 0.35 < np.mean(np.array(places) < len(texts) / 2) < 0.65


# efficiency


def test_efficiency_counts_just_the_words_asked_for(reference, codec):
    texts = ["O mercado subiu muito", "hoje  de\nnovo", "nunca lido"]
    eff = count_efficiency(codec, texts, 6)
    pieces = len(reference.encode("O mercado subiu muito")) + len(reference.encode("hoje de"))
    assert eff == {"words": 6, "tokens": pieces, "tokens_per_word": pieces / 6}
    assert count_efficiency(codec, texts, 100)["words"] == 9
    assert count_efficiency(codec, [], 6) == {
        "words": 0,
        "tokens": 0,
        "tokens_per_word": None,
    }


def test_the_metrics_are_of_the_written_text(done, tiny_done, reference, codec):
    metrics = done.metrics()
    assert metrics["efficiency"]["words"] == 200
    texts = {side: texts_of(tiny_done, side) for side in ("train", "test")}
    assert metrics["efficiency"] == count_efficiency(codec, texts["test"], 200)
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
    assert metrics["unknown_share"] == 0 and metrics["imported"] is None
    assert 2 < metrics["bytes_per_stored_token"] < 2.2


# importing


def copied(done, folder, **config):
    """The tiny tokenizer as somebody else's folder."""
    folder.mkdir()
    for path in done.files("tokenizer"):
        shutil.copy(path, folder)
    if config:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def imported(tiny_prepared, folder, name="imported", **settings):
    run = tiny_prepared(tokenizer={"source": str(folder), **settings}, run=name)
    shutil.rmtree(run.folder / "02_tokenizer")
    return prepare_tokenizer(run)


def hashes(stage, group):
    return {path.name: sha256(path) for path in stage.files(group)}


def test_an_imported_tokenizer_gives_the_tokens_of_its_own_stage(done, tiny_prepared, tmp_path, capsys):
    folder = copied(done, tmp_path / "theirs")
    stage = imported(tiny_prepared, folder, parity_documents=40)
    assert hashes(stage, "tokens") == hashes(done, "tokens")
    assert load_tokenizer(stage.folder).get_vocab() == load_tokenizer(folder).get_vocab()
    metrics, trained = stage.metrics(), done.metrics()
    record = metrics["imported"]
    assert record["name"] == str(folder) and record["commit"] is None
    assert record["sha256"] == hashes(done, "tokenizer")
    assert (record["encoder"], record["parity_documents"]) == ("SentencePiece", 40)
    assert metrics["read_for_training"] is None
    for key in ("efficiency", "tokens_per_word", "test_bytes", "train_documents", "byte_fallback_share"):
        assert metrics[key] == trained[key]
    assert (stage.folder / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    # where all documents are to be compared, the form that users load encodes
    again = imported(tiny_prepared, folder, name="compared")
    assert again.metrics()["imported"]["encoder"] == "Hugging Face"
    assert hashes(again, "tokens") == hashes(done, "tokens")


@pytest.mark.parametrize("change", ["merges", "no model", "another format"])
def test_the_form_that_users_load_encodes_where_the_other_differs(
    done, tiny_prepared, tmp_path, change, capsys, monkeypatch
):
    folder = copied(done, tmp_path / "theirs")
    model = folder / "tokenizer.model"
    if change == "merges":
        form = json.loads((folder / "tokenizer.json").read_text())
        # none that is found in the first text: that one agrees
        first = MARK + texts_of(done.run, "train")[0].replace(" ", MARK)
        form["model"]["merges"] = [pair for pair in form["model"]["merges"] if "".join(pair) in first]
        (folder / "tokenizer.json").write_text(json.dumps(form))
        monkeypatch.setattr(tokenizer_import, "PLAIN_CHARACTERS", 1)
    elif change == "no model":
        model.unlink()
    else:
        model.write_text("not SentencePiece")
    stage = imported(tiny_prepared, folder, parity_documents=200)
    assert stage.metrics()["imported"]["encoder"] == "Hugging Face"
    assert ("its two forms differ at token" in capsys.readouterr().out) == (change == "merges")
    assert (hashes(stage, "tokens") == hashes(done, "tokens")) == (change != "merges")
    opened = load_tokenizer(stage.folder)
    ids = np.fromfile(stage.files("tokens")[0], dtype="<u2")
    text = next(iter(texts_of(stage.run, "test")))
    expected = opened(text, split_special_tokens=True)["input_ids"]
    assert ids[: len(expected)].tolist() == expected


def byte_level(**special):
    """A tokenizer without SentencePiece: bytes, as GPT-2's."""
    form = tokenizers.Tokenizer(tokenizers.models.BPE())
    form.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    form.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    form.train_from_iterator(sentences(80), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=form, **special)


def test_any_fast_tokenizer_begins_with_its_token_and_can_pad(tiny_prepared, tmp_path, capsys):
    theirs = byte_level(bos_token="<|end|>", eos_token="<|end|>")
    theirs.save_pretrained(tmp_path / "bytes")
    stage = imported(tiny_prepared, tmp_path / "bytes", vocab_size=len(theirs))
    opened = load_tokenizer(stage.folder)
    assert len(opened) == len(theirs) and opened.pad_token == "<|end|>"
    assert "no token to pad with, so <|end|> is" in capsys.readouterr().out
    plain = theirs("O mercado", add_special_tokens=False)["input_ids"]
    assert opened("O mercado")["input_ids"] == [opened.bos_token_id, *plain]
    assert {path.name for path in stage.files("tokenizer")} == {"tokenizer.json", "tokenizer_config.json"}
    metrics = stage.metrics()
    assert metrics["vocab_size"] == len(theirs) and metrics["unknown_share"] == 0
    # one of each document's two control tokens is a text's; bytes of a text are those of the corpus
    assert metrics["test_bytes"] == sum(len(text.encode()) for text in texts_of(stage.run, "test"))


def test_characters_without_a_piece_are_counted_as_unknown(done, tiny_prepared, tmp_path):
    """As the published tokenizer: byte fallback switched on, and no piece for a byte."""
    folder = copied(done, tmp_path / "theirs")
    (folder / "tokenizer.model").unlink()
    form = json.loads((folder / "tokenizer.json").read_text())
    names = {name: f"unused{index}" for name, index in form["model"]["vocab"].items() if re.match("<0x..>", name)}
    form["model"]["vocab"] = {names.get(name, name): index for name, index in form["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(form))
    # as it stands, transformers leaves such a character out
    assert load_tokenizer(folder)("a日b", add_special_tokens=False)["input_ids"] == [
        *load_tokenizer(folder).convert_tokens_to_ids(["▁a", "b"])
    ]
    stage = imported(tiny_prepared, folder)
    opened = load_tokenizer(stage.folder)
    assert UNK in opened("a日b")["input_ids"] and opened.pad_token == "<pad>" and len(opened) == 512
    metrics, trained = stage.metrics(), done.metrics()
    assert metrics["byte_fallback_share"] == 0 < trained["byte_fallback_share"]
    ids = np.concatenate([np.fromfile(path, dtype="<u2") for path in stage.files("tokens") if path.suffix == ".bin"])
    assert metrics["unknown_share"] == (ids == UNK).sum() / len(ids) > 0


def test_what_cannot_be_used_is_refused_by_name(done, tiny_prepared, tmp_path, monkeypatch):
    folder = copied(done, tmp_path / "theirs")
    with pytest.raises(TTLError, match=r"has 512 pieces, and tokenizer.vocab_size is 600: set .* to 512"):
        imported(tiny_prepared, folder, name="a", vocab_size=600)
    with pytest.raises(TTLError, match="has no bos_token and no eos_token, which documents begin and end with"):
        byte_level().save_pretrained(tmp_path / "none")
        imported(tiny_prepared, tmp_path / "none", name="b", vocab_size=340)
    with pytest.raises(TTLError, match="has no eos_token,"):
        byte_level(bos_token="<|end|>").save_pretrained(tmp_path / "half")
        imported(tiny_prepared, tmp_path / "half", name="c", vocab_size=340)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TTLError, match="does not open as a tokenizer"):
        imported(tiny_prepared, tmp_path / "empty", name="d")
    with pytest.raises(TTLError, match="no such folder"):
        imported(tiny_prepared, tmp_path / "nowhere", name="e")
    monkeypatch.setattr(type(load_tokenizer(folder)), "__len__", lambda self: 70_000)
    with pytest.raises(TTLError, match="has 70,000 pieces; tokens are stored in 16 bits"):
        imported(tiny_prepared, folder, name="f")


def test_a_tokenizer_of_the_hub_is_known_by_its_commit(done, tiny_prepared, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--a--b" / "snapshots"
    snapshot.mkdir(parents=True)
    copied(done, snapshot / "0f1e")
    asked = []

    def download(name, **options):
        asked.append((name, options["revision"]))
        return str(snapshot / "0f1e")

    monkeypatch.setattr(hub, "model_folder", lambda name, revision: name)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    stage = imported(tiny_prepared, "a/b", revision="v1")
    assert asked == [("a/b", "v1")] and stage.metrics()["imported"]["commit"] == "0f1e"


def test_an_import_that_was_stopped_does_not_ask_again(done, tiny_prepared, tmp_path, monkeypatch):
    folder = copied(done, tmp_path / "theirs")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "pack_texts", stopped)
        imported(tiny_prepared, folder, parity_documents=40)
    run = tiny_prepared(tokenizer={"source": str(folder), "parity_documents": 40}, run="imported")
    shutil.rmtree(folder)
    stage = prepare_tokenizer(run)
    assert hashes(stage, "tokens") == hashes(done, "tokens")


def stopped(*_, **__):
    raise KeyboardInterrupt
