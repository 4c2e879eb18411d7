"""Tokenizers beside ours: equal vocabulary, counts that add up, intervals, and a comparison that goes on."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import sentencepiece as spm
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as pb
from transformers import PreTrainedTokenizerFast

from tests.tiny import ADJECTIVES, NOUNS, sentence
from ttl_utils import encoders, figures_corpus
from ttl_utils import tokenizer_comparison as module
from ttl_utils.corpus import documents
from ttl_utils.encoders import alphabet, from_sentencepiece, from_transformers, train_wordpiece
from ttl_utils.errors import SourceError, TTLError
from ttl_utils.progress import Progress
from ttl_utils.resampling import ratio, resample
from ttl_utils.tokenizer import train_sentencepiece

VOCABULARY = 500


def recipe(**changes):
    """What training reads of the parameters."""
    values = {
        "vocab_size": VOCABULARY,
        "character_coverage": 0.9995,
        "max_sentence_length": 16384,
        "split_digits": True,
    }
    return SimpleNamespace(**(values | changes))


def invented(rng: random.Random) -> str:
    """A word of three syllables, so that there are more pieces to learn than the tiny corpus has."""
    return "".join(rng.choice("bcdfglmnprstv") + rng.choice("aeiouãéô") for _ in range(3))


@pytest.fixture(scope="module")
def lines() -> list[str]:
    rng = random.Random(1)
    return [f"{sentence(rng)} {invented(rng)} {rng.randint(0, 999)}" for _ in range(600)]


@pytest.fixture(scope="module")
def wordpiece(lines) -> encoders.Encoder:
    made = train_wordpiece(lines, recipe(), Counter("".join(lines)))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(made.decode()), unk_token="[UNK]")
    return from_transformers("wordpiece", "trained", fast)


@pytest.fixture(scope="module")
def models(lines) -> dict[str, bytes]:
    return {kind: train_sentencepiece(lines, recipe(), kind) for kind in ("bpe", "unigram")}


@pytest.fixture(scope="module")
def trained(models, wordpiece) -> list[encoders.Encoder]:
    processors = {kind: spm.SentencePieceProcessor(model_proto=model) for kind, model in models.items()}
    return [*(from_sentencepiece(kind, "trained", found) for kind, found in processors.items()), wordpiece]


# equal vocabulary


def test_the_three_have_the_same_vocabulary_everything_counted(trained):
    for encoder in trained:
        found = encoder.composition()
        assert found["vocab_size"] == VOCABULARY
        assert found["special"] + found["bytes"] + found["single"] + found["learned"] == VOCABULARY
        assert found["bytes"] == (0 if encoder.name == "wordpiece" else 256)
        ids = {index for text in encoder.encode(["O mercado subiu 12% 🎉\nem São Paulo"]) for index in text}
        assert max(ids) < VOCABULARY


def test_unigram_differs_from_bpe_in_nothing_but_the_algorithm(models):
    def spec(kind: str):
        found = pb.ModelProto.FromString(models[kind]).trainer_spec
        found.ClearField("model_type")
        return found

    assert spec("bpe") == spec("unigram")
    assert models["bpe"] != models["unigram"]


@given(
    st.dictionaries(st.sampled_from("abcdeçãé 🎉"), st.integers(1, 1000), min_size=1),
    st.floats(0, 1, exclude_min=True),
)
def test_the_alphabet_is_the_fewest_characters_that_cover(counts, coverage):
    counts = Counter(counts)
    kept = alphabet(counts, coverage)
    covered = sum(counts[character] for character in kept)
    assert covered >= coverage * counts.total() * (1 - 1e-12)
    assert covered - min(counts[character] for character in kept) < coverage * counts.total()
    assert min(counts[c] for c in kept) >= max((counts[c] for c in counts.keys() - kept), default=0)


def test_wordpiece_keeps_case_and_accents_and_splits_as_bert_does(wordpiece):
    pieces = {index: piece for piece, index in wordpiece.pieces.items()}

    def spelt(text: str) -> list[str]:
        return [pieces[index] for index in wordpiece.encode([text])[0]]

    assert spelt("São são") != spelt("são são") and spelt("são") != spelt("sao")
    assert spelt("rápido,rápido") == [*spelt("rápido"), ",", *spelt("rápido")]
    # digit by digit, as split_digits asks of the others
    assert spelt("909") == ["9", "0", "9"]
    assert spelt("日本") == ["[UNK]"] and spelt("rápido🎉") == ["[UNK]"]
    # names of special and of inner pieces are plain text in a text
    assert len(spelt("[UNK]")) == len(spelt("##a")) == 3


def test_wordpiece_learns_no_rare_character(lines):
    text = [*lines, "um caf🎉é raro"]
    coverage = 1 - 2 / sum(map(len, text))
    made = json.loads(train_wordpiece(text, recipe(character_coverage=coverage), Counter("".join(text))))
    assert not any("🎉" in piece for piece in made["model"]["vocab"])
    assert len(made["model"]["vocab"]) == VOCABULARY


@pytest.mark.parametrize("size", [30, 40_000])
def test_wordpiece_that_cannot_reach_the_vocabulary_says_so(lines, size):
    with pytest.raises(TTLError, match=f"vocab_size {size}: WordPiece finds .* (smaller|larger) vocabulary"):
        train_wordpiece(lines, recipe(vocab_size=size), Counter("".join(lines)))


SCRIPT = """
import sys, hashlib, json
from collections import Counter
from types import SimpleNamespace
from ttl_utils.encoders import train_wordpiece
lines = json.load(sys.stdin)
settings = SimpleNamespace(vocab_size=500, character_coverage=0.9995, split_digits=True)
print(hashlib.sha256(train_wordpiece(lines, settings, Counter("".join(lines)))).hexdigest())
"""


def test_wordpiece_is_the_same_in_every_process(lines):
    found = set()
    for seed in ("1", "2", "3"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], input=json.dumps(lines), env=environment, capture_output=True, text=True
        )
        assert not done.returncode, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


# counts


WORDS = st.sampled_from([*NOUNS, *ADJECTIVES, "São", "12", "9,5%", "🎉", "café🎉", "日本", "<s>", "[UNK]", "a"])
TEXTS = st.lists(st.lists(st.tuples(WORDS, st.sampled_from(" \n")), max_size=12), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(TEXTS)
def test_counts_are_those_of_one_text_after_another(trained, parts):
    texts = ["".join(word + space for word, space in text).strip() for text in parts]
    for encoder in trained:
        counts = encoder.count(texts)
        assert counts.shape == (len(texts), 5)
        names = {index: piece for piece, index in encoder.pieces.items()}
        for text, row in zip(texts, counts.tolist(), strict=True):
            pieces = [names[index] for index in encoder.encode([text])[0]]
            tokens, byte, unknown, breaks, whole = row
            assert tokens == len(pieces)
            assert breaks == pieces.count("<0x0A>") == (0 if encoder.name == "wordpiece" else text.count("\n"))
            assert byte == sum(piece.startswith("<0x") for piece in pieces) - breaks
            assert unknown == pieces.count("[UNK]") + pieces.count("<unk>")
            assert byte + unknown + breaks <= tokens and whole <= len(text.split())
        # whatever the texts are counted with, a text's counts are its own
        assert counts.tolist() == [encoder.count([text])[0].tolist() for text in texts]


def test_rare_characters_are_bytes_in_one_and_unknown_in_the_other(trained):
    counts = {encoder.name: encoder.count(["o mercado 🎉"])[0].tolist() for encoder in trained}
    assert [counts[name][1:3] for name in ("bpe", "unigram", "wordpiece")] == [[4, 0], [4, 0], [0, 1]]


def test_a_word_is_whole_when_it_is_one_known_piece_in_running_text(trained):
    for encoder in trained:
        assert encoder.whole({"o", "oxô", "🎉", "日"}) == {"o"}
        assert encoder.whole(set()) == set()


def test_a_word_is_whole_in_a_byte_level_tokenizer_too():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["o mercado sobe\no mercado cai"] * 50, trainer)
    encoder = from_transformers("byte-level", "loaded", PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    # the piece is " mercado": the word at a text's beginning is another one
    assert encoder.whole({"mercado"}) == {"mercado"}
    tokens, byte, unknown, breaks, whole = encoder.count(["mercado\no mercado"])[0].tolist()
    assert (byte, unknown, breaks, whole) == (0, 0, 1, 2) and tokens > 4
    assert not encoder.byte_ids


def test_first_words_are_counted_as_stage_02_counts_them():
    texts = ["um dois\ntrês", "", "quatro  cinco seis", "sete"]
    assert module.first_words(texts, 5) == ["um dois três", "", "quatro cinco"]
    assert module.first_words(texts, 99) == ["um dois três", "", "quatro cinco seis", "sete"]


# intervals

COUNTS = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 100)), min_size=2, max_size=40).map(np.array)


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.integers(0, 2**32))
def test_the_interval_holds_the_ratio_and_is_seeded(counts, seed):
    drawn = resample(counts, seed)
    found = ratio("r", counts, drawn, 0, 1)
    assert found["r"] == counts[:, 0].sum() / counts[:, 1].sum()
    assert found["r_low"] <= found["r"] * (1 + 1e-9) and found["r"] <= found["r_high"] * (1 + 1e-9)
    each = counts[:, 0] / counts[:, 1]
    assert each.min() * (1 - 1e-9) <= found["r_low"] and found["r_high"] <= each.max() * (1 + 1e-9)
    assert np.array_equal(drawn, resample(counts, seed))
    assert not np.array_equal(drawn, resample(counts, seed + 1)) or (counts == counts[0]).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_narrows_with_the_root_of_the_documents(seed):
    rng = np.random.default_rng(seed)
    widths = []
    for size in (100, 1600):
        words = rng.integers(20, 200, size)
        counts = np.stack([(words * rng.uniform(1.2, 2.0, size)).astype(int), words], axis=1)
        found = ratio("r", counts, resample(counts, seed), 0, 1)
        widths.append(found["r_high"] - found["r_low"])
    assert 3 < widths[0] / widths[1] < 5.3


def test_the_interval_holds_the_true_ratio_as_often_as_it_says():
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(1000 + seed)
        words = rng.integers(20, 200, 80)
        # a token a word, and a second one for half of the words of some documents: 1.5 on the whole
        counts = np.stack([words + rng.binomial(words, rng.beta(2, 2, 80)), words], axis=1)
        found = ratio("r", counts, resample(counts, seed), 0, 1)
        held += found["r_low"] <= 1.5 <= found["r_high"]
    assert 180 <= held <= 198


def test_the_same_ratio_in_every_document_has_no_width_and_one_document_no_interval():
    counts = np.array([[30, 20], [60, 40], [3, 2]])
    assert ratio("r", counts, resample(counts, 0), 0, 1) == {"r": 1.5, "r_low": 1.5, "r_high": 1.5}
    assert ratio("r", counts[:1], resample(counts[:1], 0), 0, 1) == {"r": 1.5, "r_low": None, "r_high": None}


def test_many_documents_are_drawn_in_parts_with_the_same_result():
    counts = np.random.default_rng(0).integers(1, 9, (50_000, 2))
    whole = np.random.default_rng(5).multinomial(50_000, np.full(50_000, 1 / 50_000), 100) @ counts
    assert np.array_equal(resample(counts, 5, 100), whole)


# domains


def corpus_of(monkeypatch, rows: list[tuple[str, str | None]]) -> None:
    found = [{"source": source, "origin": origin, "text": str(n)} for n, (source, origin) in enumerate(rows)]
    monkeypatch.setattr(module, "documents", lambda *_: iter(found))


def test_a_domain_is_an_origin_where_the_source_is_mixed(monkeypatch):
    mixed = [("hub", "source: wiki")] * 3 + [("hub", "instruct")] + [("news", None)] * 2
    corpus_of(monkeypatch, mixed)
    assert Counter(domain for domain, _ in module.held_out(None, 9)) == {"wiki": 3, "instruct": 1, "news": 2}
    # addresses, one a document
    corpus_of(monkeypatch, [("web", f"https://exemplo.com/{number}") for number in range(50)])
    assert {domain for domain, _ in module.held_out(None, 99)} == {"web"}


@given(st.lists(st.sampled_from("ab"), max_size=60), st.integers(1, 40))
def test_each_domain_gives_the_documents_asked_for_spread_over_it(names, most):
    with pytest.MonkeyPatch.context() as patch:
        corpus_of(patch, [(name, None) for name in names])
        taken = list(module.held_out(None, most))
    for name in set(names):
        places = [place for place, source in enumerate(names) if source == name]
        mine = [int(text) for domain, text in taken if domain == name]
        assert len(mine) == min(most, len(places)) and set(mine) <= set(places)
        gaps = np.diff([places.index(place) for place in mine])
        assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_what_is_measured_adds_up_over_batches_and_domains(trained, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 7)
    rng = random.Random(3)
    texts = [(rng.choice("xyz"), sentence(rng)) for _ in range(40)] + [("x", " \n ")]
    found = module.measure(trained, iter(texts), Progress("", None))
    assert sum(map(len, found.values())) == 40
    total = sum(counts.sum(axis=0) for counts in found.values()).tolist()
    plain = [text for _, text in texts[:40]]
    assert total[:2] == [sum(len(t.split()) for t in plain), sum(len(t.encode()) for t in plain)]
    assert total[2:] == [value for encoder in trained for value in encoder.count(plain).sum(axis=0).tolist()]
    rows = module.domain_rows("x", trained, found["x"], seed=0)
    assert rows[0]["against_ours"] == rows[0]["against_ours_low"] == rows[0]["against_ours_high"] == 1
    for row in rows:
        assert row["documents"] == len(found["x"]) and row["tokens_per_word"] == row["tokens"] / row["words"]
        assert row["bytes_per_token"] * row["tokens_per_word"] == pytest.approx(row["bytes"] / row["words"])
        assert (row["byte_fallback_share"] is None) == (row["tokenizer"] == "wordpiece")


# the whole comparison


@pytest.fixture
def prepared(tiny_prepared, no_energy):
    """A run with stages 01 and 02, whose comparison leaves out what the tiny corpus is too small for."""

    def make(**changes):
        values = {"algorithms": ["bpe", "unigram", "wordpiece"], "samples": 100_000, "documents": 100_000}
        return tiny_prepared(tokenizer={"comparison": values | {"tokenizers": [], "texts": []} | changes})

    return make


def report_of(run) -> Path:
    return run.stage("02_tokenizer").folder / "reports" / "comparison.json"


def test_a_comparison_adds_up_and_agrees_with_stage_02(prepared):
    run = prepared()
    result = module.compare(run)
    metrics = run.stage("02_tokenizer").metrics()
    assert [(row["algorithm"], row["note"]) for row in result["algorithms"]] == [
        ("bpe", ""),
        ("unigram", ""),
        ("wordpiece", ""),
    ]
    table = module.domain_table(result)
    by_tokenizer = table.groupby("tokenizer")[["documents", "words", "bytes", "tokens"]].sum()
    texts = [row["text"] for row in documents(run.stage("01_data"), "corpus", "test")]
    assert set(by_tokenizer.documents) == {len(texts)} and set(by_tokenizer.bytes) == {metrics["test_bytes"]}
    assert set(by_tokenizer.words) == {sum(len(text.split()) for text in texts)}
    # every sample was learned from, so BPE is ours again
    ours, bpe = by_tokenizer.tokens["ours (tiny)"], by_tokenizer.tokens["bpe"]
    # less <s> and </s> of each document
    assert ours == bpe == metrics["test_tokens"] - 2 * len(texts)
    first = module.efficiency_table(result).iloc[0]
    for name in ("words", "tokens", "tokens_per_word"):
        assert first[name] == metrics["efficiency"][name]


def test_a_second_call_reads_the_report_and_a_changed_parameter_does_not(prepared, monkeypatch):
    run = prepared(algorithms=["wordpiece"])
    result = module.compare(run)
    content = report_of(run).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module, "measure", lambda *_: pytest.fail("measured again"))
        assert module.compare(run) == result == json.loads(content)
    fewer = module.compare(prepared(algorithms=["wordpiece"], documents=3))
    assert {row["documents"] for row in fewer["domains"]} == {3}
    # and back again: the same bytes
    module.compare(run)
    assert report_of(run).read_bytes() == content


def test_a_killed_comparison_goes_on_with_what_is_trained(prepared, monkeypatch):
    run = prepared(algorithms=["bpe", "wordpiece"])

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_wordpiece", killed)
        with pytest.raises(KeyboardInterrupt):
            module.compare(run)
    assert not report_of(run).exists()
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_sentencepiece", lambda *_: pytest.fail("trained again"))
        went_on = module.compare(run)
    folder = run.stage("02_tokenizer").folder / "comparison"
    assert sorted(path.name.split("-")[0] for path in folder.iterdir()) == ["bpe", "wordpiece"]
    again = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in (*folder.iterdir(), report_of(run)):
        path.unlink()
    assert module.compare(run) == went_on
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == again


def test_an_algorithm_that_cannot_be_trained_is_a_row_with_the_reason(prepared, monkeypatch):
    def too_small(*_):
        raise TTLError("vocab_size 512: give a smaller vocabulary")

    monkeypatch.setattr(module, "train_sentencepiece", too_small)
    table = module.domain_table(module.compare(prepared()))
    assert set(table[table.role == "trained"].tokenizer) == {"wordpiece"}
    assert table[table.note != ""].tokenizer.tolist() == ["bpe", "unigram"]


def test_what_cannot_be_reached_is_a_row_with_the_reason_until_it_can_be(prepared, monkeypatch, tmp_path):
    folder, file = tmp_path / "outro", tmp_path / "espanhol.txt"
    names = ["nicholasKluge/TeenyTinyLlama-160m", str(folder)]
    texts = [{"name": "espanhol", "files": [str(file)]}]
    run = prepared(algorithms=[], tokenizers=names, texts=texts)

    def unreachable(name, revision):
        if Path(name).is_dir():
            return name
        raise SourceError(f"{name}: not to be had")

    def read_texts(item):
        if not file.exists():
            raise SourceError("no such file")
        yield from file.read_text().split("\n\n")

    monkeypatch.setattr(encoders.hub, "model_folder", unreachable)
    monkeypatch.setattr(module.sources, "read_texts", read_texts)
    result = module.compare(run)
    table = module.efficiency_table(result).set_index("tokenizer")
    assert table.text[names[0]] == module.PUBLISHED and table.tokens[names[0]] == 9937
    assert table.text[names[1]] == module.NEITHER and "not to be had" in table.note[names[1]]
    assert set(table.text[["Sabiá-7B", "BERTimbau"]]) == {module.PUBLISHED} and "TTL" not in table.index
    rows = module.domain_table(result)
    assert rows[rows.note != ""][["domain", "tokenizer"]].values.tolist() == [
        ["", names[0]],
        ["", names[1]],
        ["espanhol", ""],
    ]
    with monkeypatch.context() as patch:
        patch.setattr(module, "measure", lambda *_: pytest.fail("measured again, though nothing answers"))
        assert module.compare(run) == result
    # a folder that is there, but no tokenizer; and the texts
    folder.mkdir()
    file.write_text("El mercado subió mucho.\n\nLa empresa vende café.\n\n   ")
    result = module.compare(run)
    assert "does not load" in result["missing"][names[1]] and list(result["missing"]) == names
    found = [row for row in result["domains"] if row["domain"] == "espanhol"]
    assert [(row["documents"], row["words"]) for row in found] == [(2, 8)]
    # and the tokenizer: ours under another name
    stage = run.stage("02_tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((stage.folder / name).read_bytes())
    result = module.compare(run)
    table = module.efficiency_table(result).set_index("tokenizer")
    assert table.text[names[1]] == module.MEASURED and table.tokens[names[1]] == table.tokens["ours (tiny)"]
    loaded = [row for row in result["domains"] if row["role"] == "loaded"]
    assert loaded and all(row["against_ours"] == 1 for row in loaded)


def test_texts_under_the_name_of_a_domain_are_not_mixed_with_it(prepared, monkeypatch):
    texts = [{"name": "porttinari", "files": ["x.txt"]}, {"name": "vazio", "files": ["y.txt"]}]
    monkeypatch.setattr(
        module.sources, "read_texts", lambda item: iter(["um texto"] if item.name != "vazio" else [" "])
    )
    result = module.compare(prepared(algorithms=[], texts=texts))
    assert "another domain has this name" in result["missing"]["porttinari"]
    assert "no text with a word" in result["missing"]["vazio"]
    assert all(row["documents"] > 1 for row in result["domains"] if row["domain"] == "porttinari")


def test_every_name_of_table_1_is_published():
    published = module.paper.table("table1_tokenizers")
    assert set(module.TABLE_1.values()) == set(published.tokenizer)


# figures


def domain_rows_of(names: list[str]) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for name in names:
        for tokenizer, role in (("ours (x)", "ours"), ("bpe", "trained"), ("eles", "loaded")):
            value = float(rng.uniform(1.2, 2.4))
            low, high = (None, None) if name == "um" else (value - 0.1, value + 0.1)
            row = {"domain": name, "tokenizer": tokenizer, "role": role, "documents": 9, "tokens_per_word": value}
            rows.append(row | {"tokens_per_word_low": low, "tokens_per_word_high": high})
    return rows


EFFICIENCY = [
    {"tokenizer": "ours (x)", "vocab_size": 512, "words": 200, "tokens_per_word": 1.9, "text": module.MEASURED},
    {"tokenizer": "a/b", "vocab_size": 9000, "words": 200, "tokens_per_word": 1.4, "text": module.MEASURED},
    {"tokenizer": "TTL", "vocab_size": 32000, "words": 7400, "tokens_per_word": 1.34, "text": module.PUBLISHED},
    {"tokenizer": "x/y", "text": module.NEITHER},
]
REPORTS = [
    {"source": "um", "use": "corpus", "rejected": {"too few words": 3}, "train_documents": 6, "test_documents": 1},
    {"source": "dois", "use": "corpus", "rejected": {"toxic": 2}, "train_documents": 0, "test_documents": 0},
    {"source": "três", "use": "chat", "rejected": {}, "train_documents": 1, "test_documents": 0},
]
LENGTHS = [
    {"kind": "plain", "words_from": 0, "words_to": 1, "documents": 2},
    {"kind": "plain", "words_from": 10, "words_to": 18, "documents": 5},
    {"kind": "instruction", "words_from": 1_000_000, "words_to": None, "documents": 1},
]
FIGURES = {
    "02_efficiency": (figures_corpus.efficiency, EFFICIENCY),
    "02_domains": (figures_corpus.domains, domain_rows_of(["um", "dois"])),
    "01_flow": (figures_corpus.flow, figures_corpus.flow_table(REPORTS)),
    "01_lengths": (figures_corpus.lengths, LENGTHS),
    "01_toxicity": (figures_corpus.toxicity, [{"source": "um", "threshold": t, "share": 0.1 * t} for t in range(4)]),
}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("chosen", [None, 2.0])
def test_a_figure_is_saved_with_its_data(tmp_path, name, chosen):
    toxicity = chosen and SimpleNamespace(threshold=chosen)
    run = SimpleNamespace(figures=tmp_path, params=SimpleNamespace(data=SimpleNamespace(toxicity=toxicity)))
    draw, rows = FIGURES[name]
    table = pd.DataFrame(rows)
    draw(run, table)
    kinds = ("csv", "pdf", "png", "svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.{kind}" for kind in kinds]
    written = pd.read_csv(tmp_path / f"{name}.csv")
    # the marked threshold is data of the figure too
    marked = ["chosen"] if name == "01_toxicity" else []
    assert written.columns.tolist() == [*table.columns, *marked] and len(written) == len(table)
    assert all((written[column] == chosen).all() if chosen else written[column].isna().all() for column in marked)


def test_the_curve_of_near_duplicates_is_saved(tmp_path):
    table = pd.DataFrame({"similarity": [0, 0.5, 1], "probability": [0, 0.4, 1], "found": [0, 0.5, 1]})
    figures_corpus.minhash_curve(SimpleNamespace(figures=tmp_path), table, 0.6)
    wanted = table.astype({"similarity": float}).assign(half_found_at=0.6)
    assert pd.read_csv(tmp_path / "01_minhash.csv").equals(wanted)


def test_the_way_of_documents_adds_up_to_what_was_read():
    table = figures_corpus.flow_table(REPORTS)
    assert table.groupby("source").documents.sum().to_dict() == {"um": 10, "dois": 2}


def test_the_bars_of_a_source_fill_the_line(tmp_path):
    reasons = ["too few words", "language", "empty", "too long", "too many words", "licence"]
    rules = [{"source": "um", "step": reason, "documents": n + 1} for n, reason in enumerate(reasons)]
    # told in too many ways to have a bar of its own, however common
    rules.append({"source": "um", "step": "row 7: no text", "documents": 9})
    table = pd.DataFrame([*rules, {"source": "um", "step": "training", "documents": 5}])
    figure = figures_corpus.flow(SimpleNamespace(figures=tmp_path), table)
    bars = [patch for patch in figure.axes[0].patches]
    assert sum(bar.get_width() for bar in bars) == pytest.approx(1)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    # the four commonest rules, the rest together, and what is kept
    assert names == ["licence", "too many words", "too long", "empty", "other reasons", "training"]
