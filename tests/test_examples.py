"""Sets as classifiers read them: control tokens of the format alone, classes, and what is wrong with a set."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_encoder import write_encoder
from ttl_utils import examples as ex
from ttl_utils.encoding import plain_ids
from ttl_utils.errors import SourceError, TTLError
from ttl_utils.schema import Downstream
from ttl_utils.tokenizer import load_tokenizer

PAIR = "<s>{premise}<s>{hypothesis}</s>"
HUB = {"source": None, "dataset": "someone/set", "train_split": "train", "test_split": "test"}
TEXTS = st.lists(
    st.sampled_from(
        ["<s>", "</s>", "<pad>", "<unk>", " ", "\n", "{", "}", "{premise}", "água", "O mercado", "3", "🚀"]
    ),
    max_size=6,
).map("".join)


def item(**changes):
    return Downstream(**{"name": "set", "source": "s", "text": "{text}", "label": "label", "max_length": 32, **changes})


def row(text, label, source="s"):
    return {"text": text, "label": label, "source": source}


def pair(premise, hypothesis, label):
    return {"premise": premise, "hypothesis": hypothesis, "label": label, "source": "s"}


@pytest.fixture(scope="module")
def tokenizer(tiny_done):
    return load_tokenizer(tiny_done.folder / "02_tokenizer")


@pytest.fixture
def source(monkeypatch):
    """`source(train, test)`: rows of stage 01 in place of its files."""

    def give(train, test):
        rows = {"train": train, "test": test}
        monkeypatch.setattr(ex, "documents", lambda corpus, use, side: iter(rows[side]))

    return give


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """`mirror(train, test, features)`: a set of the hub in a mirror, as Parquet."""
    import datasets

    def give(train, test, features=None):
        for split, rows in (("train", train), ("test", test)):
            path = tmp_path / "someone" / "set" / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows, features=features).to_parquet(path)
        monkeypatch.setenv("TTL_MIRROR", str(tmp_path))
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        return item(**HUB)

    return give


def test_the_sources_rows_in_the_formats_pieces(source):
    source([row("a", 1), row("b", 0), row("c", 5, "another")], [row("d", 1)])
    found = ex.load_examples(item(text="<s>{text}<s>{text}!"), None)
    assert found.pieces == ["<s>", "{text}", "<s>", "{text}!"]
    assert found.texts == {"train": [["a", "b"], ["a!", "b!"]], "test": [["d"], ["d!"]]}
    assert (found.labels["train"].tolist(), found.labels["test"].tolist(), found.names) == ([1, 0], [1], ["0", "1"])
    assert not found.from_mirror


@settings(max_examples=50, deadline=None)
@given(premise=TEXTS, hypothesis=TEXTS)
def test_only_the_formats_control_tokens_are_control_tokens(tokenizer, premise, hypothesis):
    rows = {"train": [pair(premise, hypothesis, 0), pair("a", "b", 1)], "test": [pair("a", "b", 1)]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ex, "documents", lambda corpus, use, side: iter(rows[side]))
        examples = ex.load_examples(item(text=PAIR), None)
    ids = ex.decoder_rows(examples, "train", tokenizer, 500).ids[0].tolist()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    one, two = plain_ids(tokenizer, [premise, hypothesis])
    assert ids == [bos, *one, bos, *two, eos]
    # letters cost several ids each; none of the control tokens is among them
    assert not {bos, eos, tokenizer.pad_token_id} & {*one, *two}


@pytest.mark.parametrize("text", ["{text}", "<s>{text}"])
def test_one_beginning_whoever_brings_it(source, tokenizer, text):
    source([row("O mercado", 1), row("não", 0)], [row("sim", 1)])
    rows = ex.decoder_rows(ex.load_examples(item(text=text), None), "train", tokenizer, 32)
    assert [ids.tolist() for ids in rows.ids] == [tokenizer(one)["input_ids"] for one in ("O mercado", "não")]
    assert rows.ids[0].tolist().count(tokenizer.bos_token_id) == 1


def test_what_is_longer_is_cut_and_counted(source, tokenizer):
    source([row("mercado " * 50, 1), row("não", 0), row("sim " * 60, 0)], [row("sim", 1)])
    rows = ex.decoder_rows(ex.load_examples(item(), None), "train", tokenizer, 16)
    assert (rows.lengths.max(), rows.cut) == (16, 2)
    assert rows.lengths[1] < 16


def test_many_rows_are_encoded_as_one_by_one(source, tokenizer, monkeypatch):
    texts = [f"O mercado {n}" for n in range(7)]
    source([row(text, n % 2) for n, text in enumerate(texts)], [row("sim", 1)])
    examples = ex.load_examples(item(), None)
    whole = ex.decoder_rows(examples, "train", tokenizer, 32)
    monkeypatch.setattr(ex, "_TOGETHER", 3)
    assert [ids.tolist() for ids in ex.decoder_rows(examples, "train", tokenizer, 32).ids] == [
        ids.tolist() for ids in whole.ids
    ]


def test_a_format_needs_the_models_control_tokens(source, tmp_path):
    from transformers import AutoTokenizer

    write_encoder(tmp_path / "bert")
    source([row("a", 1), row("b", 0)], [row("d", 1)])
    with pytest.raises(TTLError, match="'set': its format holds </s>, and the model's tokenizer has no such token"):
        ex.decoder_rows(
            ex.load_examples(item(text="{text}</s>"), None), "test", AutoTokenizer.from_pretrained(tmp_path / "bert"), 8
        )


# encoders


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("encoder") / "bert"
    write_encoder(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_an_encoder_reads_a_pair_with_its_own_control_tokens(source, bert):
    source([pair("o mercado", "[SEP] sim", 1), pair("não", "sim", 0)], [pair("sim", "sim", 1)])
    rows = ex.encoder_rows(ex.load_examples(item(text=PAIR), None), "train", bert, 32)
    cls, sep = bert.cls_token_id, bert.sep_token_id
    first, second = (plain_ids(bert, [text])[0] for text in ("o mercado", "[SEP] sim"))
    assert rows.ids[0].tolist() == [cls, *first, sep, *second, sep]
    # a control token that is written in a text is letters
    assert rows.ids[0].tolist().count(sep) == 2
    assert rows.types[0].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert rows.cut == 0


def test_an_encoder_reads_one_text_and_its_cuts_are_counted(source, bert):
    source([row("sim " * 40, 1), row("não", 0)], [row("sim", 1)])
    rows = ex.encoder_rows(ex.load_examples(item(text="<s>{text}</s>"), None), "train", bert, 12)
    assert (len(rows.ids[0]), rows.cut) == (12, 1)
    assert rows.ids[0][-1] == bert.sep_token_id
    assert bert.decode(rows.ids[1]) == "[CLS] não [SEP]"


def test_a_third_part_goes_with_the_second(source, bert):
    source([row("sim", 1), row("não", 0)], [row("sim", 1)])
    rows = ex.encoder_rows(ex.load_examples(item(text="{text}<s>a{text}<s>{text}"), None), "train", bert, 32)
    assert rows.ids[1].tolist() == bert("não", "anão não")["input_ids"]


# classes


def classes(*names):
    import datasets

    return datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})


def test_the_data_sets_own_names(mirror):
    asked = mirror(
        [{"text": "a", "label": 2}, {"text": "b", "label": 0}], [{"text": "c", "label": 2}], classes("A", "B", "C")
    )
    found = ex.load_examples(asked, None)
    assert (found.names, found.labels["train"].tolist(), found.from_mirror) == (["A", "C"], [1, 0], True)


def test_labels_without_names(source):
    for labels, names in (([10, 9, 2], ["2", "9", "10"]), ([True, False], ["False", "True"]), (["b", "a"], ["a", "b"])):
        source([row("a", label) for label in labels], [row("b", labels[0])])
        found = ex.load_examples(item(), None)
        assert found.names == names
        assert [found.names[n] for n in found.labels["train"]] == [str(label) for label in labels]


def test_the_fingerprint_is_that_of_texts_format_and_labels(source):
    def fingerprint(texts=("a", "b"), labels=(0, 1), test="c", **changes):
        source([row(*one) for one in zip(texts, labels, strict=True)], [row(test, 1)])
        return ex.load_examples(item(**changes), None).fingerprint

    same = fingerprint()
    assert same == fingerprint(name="other", max_length=9)
    others = [
        fingerprint(("a", "B")),
        fingerprint(labels=(1, 0)),
        fingerprint(test="d"),
        fingerprint(text="<s>{text}"),
        fingerprint(("ab", "")),
    ]
    assert len({same, *others}) == 6


# what is wrong with a set


@pytest.mark.parametrize(
    ("changes", "train", "test", "message"),
    [
        ({}, [row("a", 0), row("a", 1)], [row("b", 7)], "'set': label 7 of the test set is not in the training set"),
        ({}, [row("a", 0), row("a", 1)], [row("b", 7), row("c", "x")], "label .* is not in the training set"),
        ({"text": "{premise}"}, [row("a", 0)], [row("b", 0)], "no column 'premise'; there are text, label"),
        ({"label": "class"}, [row("a", 0)], [row("b", 0)], "no column 'class'"),
        ({}, [], [row("b", 0)], "0 training and 1 test"),
        ({"source": "other"}, [row("a", 0)], [row("b", 0)], "0 training and 0 test"),
        ({}, [row("a", 0), row("b", 0)], [row("b", 0)], "all training examples have the label 0"),
        ({}, [row("a", 0), row("b", 1.5)], [row("b", 0)], "label 1.5 of row 1 of the train side is no class"),
        ({}, [row("a", 0), row("b", 1)], [row("b", None)], "label None of row 0 of the test side is no class"),
        ({}, [row("a", 0), row(None, 1)], [row("b", 0)], "row 1 of the train side has nothing in column 'text'"),
        ({"text": "sim"}, [row("a", 0)], [row("b", 0)], "format 'sim' names no {column}"),
        ({"text": "{text"}, [row("a", 0)], [row("b", 0)], "format '{text' cannot be read"),
    ],
)
def test_what_is_wrong_with_a_set_is_said(source, changes, train, test, message):
    source(train, test)
    with pytest.raises(TTLError, match=message):
        ex.load_examples(item(**changes), None)


def test_a_split_without_labels_is_said(mirror):
    asked = mirror(
        [{"text": "a", "label": 1}, {"text": "b", "label": 0}], [{"text": "c", "label": -1}], classes("A", "B")
    )
    with pytest.raises(TTLError, match="label -1 of the test side is outside the set's classes, A, B"):
        ex.load_examples(asked, None)


def test_a_column_that_the_hubs_set_lacks_is_said(mirror):
    asked = mirror([{"text": "a", "label": 1}], [{"text": "c", "label": 1}])
    with pytest.raises(TTLError, match="no column 'comment'; there are text, label"):
        ex.load_examples(asked.model_copy(update={"text": "{comment}"}), None)


def test_a_set_that_cannot_be_had(monkeypatch, mirror):
    asked = mirror([{"text": "a", "label": 1}], [{"text": "c", "label": 1}])
    with pytest.raises(SourceError, match="split dev"):
        ex.load_examples(asked.model_copy(update={"test_split": "dev"}), None)
    monkeypatch.delenv("TTL_MIRROR")
    with pytest.raises(SourceError, match=r"someone/set.* cannot be reached"):
        ex.load_examples(asked, None)


def test_stage_01s_trust_set_is_read(tiny_done):
    data = ex.load_examples(tiny_done.params.evaluation.downstream[0], tiny_done.need("01_data"))
    assert data.names == ["0", "1"]
    assert not set(data.texts["train"][0]) & set(data.texts["test"][0])


def test_ids_beyond_the_model_are_said(source, tokenizer):
    source([row("a", 1), row("b", 0)], [row("d", 1)])
    with pytest.raises(SourceError, match="and the model has 100 rows"):
        ex.make_rows(ex.load_examples(item(), None), tokenizer, False, 32, 100)
