"""Scores against scikit-learn, what a data set must have, padding, and a set that can be learned."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttl_utils import downstream as ds
from ttl_utils.checkpoints import save_pretrained
from ttl_utils.errors import TTLError
from ttl_utils.model import Hardware, new_model
from ttl_utils.schema import Downstream
from ttl_utils.tokenizer import load_tokenizer

# two threads that wait for each other cost more than such small matrices
torch.set_num_threads(1)
CPU = Hardware("cpu", "fp32", "sdpa")


def item(**changes):
    return Downstream(**{"name": "set", "source": "s", "text": "{text}", "label": "label", "max_length": 32, **changes})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_scores_are_scikit_learns(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    predicted, labels = np.array(pairs).T
    found = ds.scores(predicted, labels)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["macro_f1"] == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))


def test_the_constant_answer_is_the_training_sets_most_frequent():
    train, test = np.array([1, 1, 0, 2, 1]), np.array([0, 0, 1, 0])
    # always 1: one of four is right; its F1 is 2 / (4 + 1), that of 0 is 0
    assert ds.constant_answer(train, test) == {"accuracy": 0.25, "macro_f1": pytest.approx(0.2)}


# the data set


@pytest.fixture
def source(monkeypatch):
    """`source(train, test)`: rows of stage 01 in place of its files."""

    def give(train, test):
        rows = {"train": train, "test": test}
        monkeypatch.setattr(ds, "documents", lambda corpus, use, side: iter(rows[side]))

    return give


def row(text, label, source="s"):
    return {"text": text, "label": label, "source": source}


def test_the_sources_rows_in_the_format(source):
    source([row("a", 1), row("b", 0), row("c", 5, "another")], [row("d", 1)])
    found = ds.load_downstream(item(text="<s>{text}<s>{text}!"), None)
    assert found == {"train": [("<s>a<s>a!", 1), ("<s>b<s>b!", 0)], "test": [("<s>d<s>d!", 1)]}


def test_braces_in_a_text_are_text(source):
    source([row("{x} {", 1)], [row("{text}", 1)])
    assert ds.load_downstream(item(), None) == {"train": [("{x} {", 1)], "test": [("{text}", 1)]}


@pytest.mark.parametrize(
    ("changes", "train", "test", "message"),
    [
        ({}, [row("a", 0)], [row("b", 7)], "'set': label 7 of the test set is not in the training set"),
        ({}, [row("a", 0)], [row("b", 7), row("c", "x")], "label .* is not in the training set"),
        ({"text": "{premise}"}, [row("a", 0)], [row("b", 0)], "no column 'premise'; there are text, label"),
        ({"label": "class"}, [row("a", 0)], [row("b", 0)], "no column 'class'"),
        ({}, [], [row("b", 0)], "0 training and 1 test"),
        ({"source": "other"}, [row("a", 0)], [row("b", 0)], "0 training and 0 test"),
    ],
)
def test_what_is_wrong_with_a_set_is_said(source, changes, train, test, message):
    source(train, test)
    with pytest.raises(TTLError, match=message):
        ds.load_downstream(item(**changes), None)


HUB = {"source": None, "dataset": "someone/set", "train_split": "train", "test_split": "test"}


def test_a_set_of_the_hub_that_cannot_be_had_is_not_run(monkeypatch):
    monkeypatch.delenv("TTL_MIRROR", raising=False)
    found = ds.load_downstream(item(**HUB), None)
    assert found["status"] == "not run"
    assert "someone/set" in found["reason"]
    assert "cannot be reached" in found["reason"]


def test_a_set_of_the_hub_is_read_from_a_mirror(tmp_path, monkeypatch):
    folder = tmp_path / "someone" / "set"
    folder.mkdir(parents=True)
    (folder / "train.csv").write_text("text,label\nsim,1\nnão,0\n")
    (folder / "test.csv").write_text("text,label\ntalvez,1\n")
    monkeypatch.setenv("TTL_MIRROR", str(tmp_path))
    found = ds.load_downstream(item(**HUB), None)
    assert found == {"train": [("sim", 1), ("não", 0)], "test": [("talvez", 1)]}


# training


@pytest.fixture(scope="module")
def base(tiny_done, tmp_path_factory) -> Path:
    tokenizer = load_tokenizer(tiny_done.folder / "02_tokenizer")
    folder = tmp_path_factory.mktemp("base") / "model"
    save_pretrained(new_model(tiny_done.params.model, tokenizer, seed=0, attention="sdpa"), tokenizer, folder)
    return folder


def test_padding_changes_no_answer(base):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).eval()
    tokenizer = load_tokenizer(base)
    texts = ("O mercado", "A empresa produz muito café no sul.", "Olá", "água e gás na costa, com 30 metros")
    rows = [ds._ids(tokenizer, text, 32) for text in texts]
    assert len({len(ids) for ids in rows}) == len(rows)
    with torch.no_grad():
        together = model(**ds._padded(rows, tokenizer.pad_token_id, "cpu")).logits
        alone = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    predicted = ds._predict(model, rows, tokenizer.pad_token_id, CPU, torch.autocast("cpu", enabled=False))
    assert predicted.tolist() == alone.argmax(-1).tolist()


def test_a_format_brings_its_own_beginning(base):
    tokenizer = load_tokenizer(base)
    assert ds._ids(tokenizer, "<s>sim", 32) == ds._ids(tokenizer, "sim", 32)
    assert ds._ids(tokenizer, "sim", 32).count(tokenizer.bos_token_id) == 1
    pair = ds._ids(tokenizer, "<s>sim<s>não</s>", 32)
    assert pair.count(tokenizer.bos_token_id) == 2
    assert pair[-1] == tokenizer.eos_token_id
    assert len(ds._ids(tokenizer, "mercado " * 50, 32)) == 32


def words(label, count, seed):
    """The first word alone decides."""
    random = np.random.default_rng(seed)
    nouns = ["mercado", "empresa", "bacia", "rocha"]
    return [
        (f"{'confio' if label == 'sim' else 'duvido'} {' '.join(random.choice(nouns, random.integers(1, 5)))}", label)
        for _ in range(count)
    ]


def test_a_set_that_can_be_learned_is_learned(base, tiny_run, tmp_path):
    asked = {"downstream_epochs": 3, "downstream_learning_rate": 0.01, "downstream_batch_size": 8}
    run = tiny_run(evaluation=asked)
    data = {
        "train": words("sim", 40, 1) + words("não", 24, 2),
        "test": words("sim", 10, 3) + words("não", 30, 4),
    }
    found = ds.fine_tune(data, item(), base, tmp_path / "best", run, CPU)
    assert found["accuracy"] > 0.9
    assert found["macro_f1"] > 0.9
    assert found["constant_answer"]["accuracy"] == 0.25
    assert (found["train_examples"], found["test_examples"], found["labels"]) == (64, 40, ["não", "sim"])
    assert [epoch["epoch"] for epoch in found["epochs"]] == [1, 2, 3]
    assert found["last_epoch"] == found["epochs"][-1]
    best = max(found["epochs"], key=lambda epoch: epoch["accuracy"])
    assert (found["accuracy"], found["best_epoch"]) == (best["accuracy"], best["epoch"])
    again = ds.fine_tune(data, item(), base, tmp_path / "again", run, CPU)
    assert again | {"duration_s": 0} == found | {"duration_s": 0}

    # what was kept is the best epoch's model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "best")
    tokenizer = load_tokenizer(tmp_path / "best")
    rows = [ds._ids(tokenizer, text, 32) for text, _ in data["test"]]
    predicted = ds._predict(model, rows, tokenizer.pad_token_id, CPU, torch.autocast("cpu", enabled=False))
    answers = [model.config.id2label[index] for index in predicted.tolist()]
    assert np.mean([one == label for one, (_, label) in zip(answers, data["test"], strict=True)]) == found["accuracy"]


def test_the_best_epoch_is_kept_and_the_last_stands_beside_it(base, tiny_run, tmp_path, monkeypatch):
    answers = iter([[0, 1, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]])
    monkeypatch.setattr(ds, "_predict", lambda *_: np.array(next(answers)))
    saved = []
    monkeypatch.setattr(ds, "save_model_folder", lambda *_: saved.append(True))
    run = tiny_run(evaluation={"downstream_epochs": 3})
    data = {"train": words("sim", 2, 1) + words("não", 2, 2), "test": words("não", 4, 3)}
    found = ds.fine_tune(data, item(), base, tmp_path / "best", run, CPU)
    assert [epoch["accuracy"] for epoch in found["epochs"]] == [0.25, 0.75, 0.0]
    assert (found["best_epoch"], found["accuracy"], found["last_epoch"]["epoch"]) == (2, 0.75, 3)
    assert found["stderr"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert len(saved) == 2


def test_stage_01s_trust_set_is_read(tiny_done):
    data = ds.load_downstream(tiny_done.params.evaluation.downstream[0], tiny_done.need("01_data"))
    assert {label for _, label in data["train"]} == {label for _, label in data["test"]} == {0, 1}
    assert not {text for text, _ in data["train"]} & {text for text, _ in data["test"]}
