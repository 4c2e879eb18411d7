"""The toxicity classifier on a tiny model whose score hangs on one word, and what is said where none can be had."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

from ttl_utils.errors import ParameterError, SourceError
from ttl_utils.schema import Toxicity
from ttl_utils.toxicity import STEPS, load, sensitivity

WORDS = ["o", "a", "mercado", "rio", "chuva", "ponte", "abre", "cedo", "todos", "os", "dias", "insulto", "."]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
BAD = VOCABULARY.index("insulto")
SIZE, LENGTH = 16, 24


def build(outputs: int = 1) -> BertForSequenceClassification:
    """Random, but for the path of one word to the score: it is low where the word stands, and else high."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=SIZE,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=LENGTH,
        num_labels=outputs,
    )
    model = BertForSequenceClassification(config)
    embeddings, layer = model.bert.embeddings, model.bert.encoder.layer[0]
    with torch.no_grad():
        # the last feature belongs to the word alone; the first position looks at all others evenly and takes it over
        embeddings.word_embeddings.weight[:, -1] = 0
        embeddings.position_embeddings.weight[:, -1] = 0
        embeddings.token_type_embeddings.weight[:, -1] = 0
        embeddings.word_embeddings.weight[BAD] = 0
        embeddings.word_embeddings.weight[BAD, -1] = 1
        layer.attention.self.query.weight.zero_()
        layer.attention.self.value.weight.copy_(torch.eye(SIZE))
        layer.attention.output.dense.weight.copy_(50 * torch.eye(SIZE))
        model.bert.pooler.dense.weight.copy_(torch.eye(SIZE))
        model.classifier.weight.zero_()
        model.classifier.weight[:, -1] = -8
        model.classifier.bias.fill_(4)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(build(), tmp_path_factory.mktemp("model"))


def save(model, path):
    model.save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(path / "vocab.txt"), do_lower_case=False).save_pretrained(path)
    return path


def settings(model, **changed) -> Toxicity:
    return Toxicity(**{"model": str(model), "threshold": 0.0, "max_length": LENGTH, "batch_size": 4} | changed)


def sentence(words: int, rng: random.Random) -> str:
    return " ".join(rng.choice([word for word in WORDS if word != "insulto"]) for _ in range(words))


CLEAN = "o mercado abre cedo todos os dias ."
TOXIC = "o mercado insulto abre cedo ."


def test_a_toxic_text_scores_below_the_threshold_and_a_clean_one_above(folder):
    scores = load(settings(folder)).scores([CLEAN, TOXIC, "a chuva .", "insulto"])
    assert scores.dtype == np.float32 and scores.shape == (4,)
    assert list(scores < 0) == [False, True, False, True]


def test_scores_come_in_the_order_of_the_texts_whatever_their_batch(folder):
    rng = random.Random(1)
    texts = [sentence(rng.randint(0, 20), rng) for _ in range(30)]
    texts[7:7], texts[20:20] = [TOXIC], [TOXIC + " " + CLEAN]
    alone = load(settings(folder, batch_size=1)).scores(texts)
    for size in (3, 4, 64):
        together = load(settings(folder, batch_size=size)).scores(texts)
        np.testing.assert_allclose(together, alone, atol=1e-5)
        # the same list, the same bytes
        assert together.tobytes() == load(settings(folder, batch_size=size)).scores(texts).tobytes()
    assert list(np.flatnonzero(alone < 0)) == [7, 20]


def test_only_the_first_tokens_are_read(folder):
    scorer = load(settings(folder, max_length=8))
    # [CLS] and [SEP] take two of the eight
    early, late = "o a o a o insulto o a", "o a o a o a insulto o"
    assert list(scorer.scores([early, late]) < 0) == [True, False]
    assert scorer.scores([late])[0] == scorer.scores(["o a o a o a"])[0]
    # a text without end costs no more than its beginning
    assert scorer.scores(["insulto " + "o a " * 500_000])[0] < 0


def test_no_text_has_no_score(folder):
    scorer = load(settings(folder))
    assert scorer.scores([]).shape == (0,)
    assert np.isfinite(scorer.scores(["", " ", "🚀"])).all()


def test_the_hardware_is_named(folder):
    device = load(settings(folder)).hardware
    assert device == ("cuda, float16" if torch.cuda.is_available() else device)
    assert device.endswith(("float16", "float32"))


def test_the_mirror_stands_in_for_the_hub(tmp_path, monkeypatch):
    save(build(), tmp_path / "owner" / "classifier")
    monkeypatch.setenv("TTL_MIRROR", str(tmp_path))
    assert load(settings("owner/classifier")).scores([TOXIC])[0] < 0


def test_what_cannot_be_had_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("TTL_MIRROR", raising=False)
    # the tests run without a hub
    with pytest.raises(SourceError, match="owner/classifier.*hub"):
        load(settings("owner/classifier"))
    with pytest.raises(SourceError, match="no such folder"):
        load(settings(tmp_path / "nothing"))
    with pytest.raises(SourceError, match="does not open"):
        load(settings(tmp_path))


def test_pickled_weights_are_refused(tmp_path):
    path = save(build(), tmp_path)
    torch.save(build().state_dict(), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="does not open"):
        load(settings(path))


def test_damaged_weights_are_named(tmp_path):
    path = save(build(), tmp_path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match="does not open"):
        load(settings(path))


def test_another_kind_of_model_is_refused(tmp_path):
    with pytest.raises(SourceError, match="has more outputs"):
        load(settings(save(build(outputs=2), tmp_path / "two")))
    # a model without a classifier would be given a random one
    path = save(build(), tmp_path / "base")
    BertModel(build().config).save_pretrained(path)
    with pytest.raises(SourceError, match=r"lacks classifier"):
        load(settings(path))


def test_a_longer_text_than_the_model_reads_is_refused(folder):
    with pytest.raises(ParameterError, match=f"toxicity.max_length 25: .* reads {LENGTH} at most"):
        load(settings(folder, max_length=LENGTH + 1))


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    path = save(build(), tmp_path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "own",
        "auto_map": {"AutoModelForSequenceClassification": "own.Model", "AutoConfig": "own.C"},
    }
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    with pytest.raises(SourceError):
        load(settings(path))
    assert not (tmp_path / "ran").exists()


def test_sensitivity_counts_what_each_threshold_would_reject():
    scores = np.array([-5, -1.5, 0, 0.5, 3, -0.25, 9], np.float32)
    sources = ["b", "b", "b", "b", "b", "a", "a"]
    table = sensitivity(scores, sources, 0.0)
    assert list(table.columns) == ["source", "documents", "threshold", "rejected", "share"]
    assert list(dict.fromkeys(table["source"])) == ["b", "a"]
    found = {(row.source, row.threshold): (row.documents, row.rejected, row.share) for row in table.itertuples()}
    assert found["b", -2.0] == (5, 1, 0.2)
    # a score on the threshold is kept
    assert found["b", 0.0] == (5, 2, 0.4) and found["b", 4.0] == (5, 5, 1.0)
    assert found["a", -1.0] == (2, 0, 0.0) and found["a", 0.0] == (2, 1, 0.5)
    assert len(found) == 2 * len(STEPS) and all((table["rejected"].diff() >= 0)[table["source"].eq("b")][1:])
    # the row of the chosen threshold is what is rejected
    chosen = sensitivity(scores, sources, 0.3)
    assert chosen.loc[chosen["threshold"] == 0.3, "rejected"].sum() == (scores < 0.3).sum()
    assert json.dumps(table.to_dict("records"))
    assert list(sensitivity(np.empty(0, np.float32), [], 0.0).columns) == list(table.columns)
