"""Fine-tuning beside transformers' Trainer, where the answer is read, batches, and scores beside scikit-learn."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_encoder import write_encoder
from ttl_utils import classifier as cl
from ttl_utils.checkpoints import save_pretrained
from ttl_utils.errors import SourceError, TTLError
from ttl_utils.examples import Rows
from ttl_utils.model import Hardware, new_model
from ttl_utils.origins import find_baseline, find_origin
from ttl_utils.tokenizer import load_tokenizer

# two threads that wait for each other cost more than such small matrices
torch.set_num_threads(1)
CPU = Hardware("cpu", "fp32", "sdpa")


@pytest.fixture(scope="module")
def decoder(tiny_done, tmp_path_factory):
    tokenizer = load_tokenizer(tiny_done.folder / "02_tokenizer")
    folder = tmp_path_factory.mktemp("base") / "model"
    shape = {"hidden_size": 16, "intermediate_size": 32, "initializer_range": 0.3}
    model = new_model(tiny_done.params.model.model_copy(update=shape), tokenizer, seed=0, attention="sdpa")
    save_pretrained(model, tokenizer, folder)
    return find_origin("tiny", folder, tokenizer)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    write_encoder(folder)
    return find_baseline(str(folder))


def random_rows(count, origin, seed=0, lengths=(2, 30)):
    """Random ids, and classes that hang on the first of them."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(5, origin.vocab_size, rng.integers(*lengths)) for _ in range(count)]
    types = [np.arange(len(row)) * 2 // len(row) for row in ids] if origin.encoder else None
    return Rows(ids, types, np.array([int(row[0]) % 2 for row in ids]), 0)


# scores


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_scores_are_scikit_learns(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    predicted, labels = np.array(pairs).T
    found = cl.scores(predicted, labels)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["macro_f1"] == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))


def test_the_constant_answer_is_the_training_sets_most_frequent():
    train, test = np.array([1, 1, 0, 2, 1]), np.array([0, 0, 1, 0])
    # always 1: one of four is right; its F1 is 2 / (4 + 1), that of 0 is 0
    assert cl.constant_answer(train, test) == {"accuracy": 0.25, "macro_f1": pytest.approx(0.2)}


# batches


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=200), st.integers(1, 7), st.integers(0, 5))
def test_batches_hold_every_row_once(lengths, size, seed):
    found = cl.batches(np.array(lengths), size, np.random.default_rng(seed))
    assert sorted(np.concatenate(found).tolist()) == list(range(len(lengths)))
    assert len(found) == -(-len(lengths) // size)
    assert max(map(len, found)) <= size


def test_batches_hold_like_lengths_in_a_shuffled_order():
    lengths = np.random.default_rng(0).integers(1, 100, 4000)

    def made(seed):
        return cl.batches(lengths, 16, np.random.default_rng(seed))

    def padding(batches):
        return 1 - lengths.sum() / sum(lengths[rows].max() * len(rows) for rows in batches)

    assert padding(made(0)) < 0.05 < 0.4 < padding(np.split(np.arange(4000), 250))
    assert all(np.array_equal(one, two) for one, two in zip(made(0), made(0), strict=True))
    assert not np.array_equal(made(0)[0], made(1)[0])
    # long and short batches come by turns, not one after the other by length
    means = [lengths[rows].mean() for rows in made(0)[:32]]
    assert abs(np.corrcoef(means, range(32))[0, 1]) < 0.5


# where the answer is read


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_padding_changes_no_answer(kind, request):
    origin = request.getfixturevalue(kind)
    torch.manual_seed(0)
    model, rows = cl.open_classifier(origin, ["a", "b", "c"]).eval(), random_rows(9, origin)
    alone = [cl._logits(model, cl.padded(rows, np.array([n]), origin, "cpu"), origin) for n in range(9)]
    inputs = cl.padded(rows, np.arange(9), origin, "cpu")
    assert inputs["input_ids"].shape == (9, rows.lengths.max())
    with torch.no_grad():
        torch.testing.assert_close(cl._logits(model, inputs, origin), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_the_answer_is_read_at_the_last_real_token(decoder):
    torch.manual_seed(0)
    model, rows = cl.open_classifier(decoder, ["a", "b"]).eval(), random_rows(6, decoder)
    # a text that ends with </s>, as formats do, and one of the beginning alone
    rows.ids[0][-1], rows.ids[1] = decoder.tokenizer.eos_token_id, np.array([decoder.tokenizer.bos_token_id])
    with torch.no_grad():
        found = cl._logits(model, cl.padded(rows, np.arange(6), decoder, "cpu"), decoder)
        for row, logits in zip(rows.ids, found, strict=True):
            hidden = model.model(input_ids=torch.from_numpy(row)[None], use_cache=False).last_hidden_state
            torch.testing.assert_close(logits, model.score(hidden[0, -1]), rtol=1e-4, atol=1e-5)


def test_a_tokenizer_without_padding_gets_one_of_the_models_own(decoder):
    tokenizer = copy.deepcopy(decoder.tokenizer)
    tokenizer.pad_token = None
    origin = find_origin("tiny", decoder.folder, tokenizer)
    assert origin.tokenizer.pad_token_id == tokenizer.unk_token_id
    # the caller's is as it was
    assert tokenizer.pad_token_id is None
    torch.manual_seed(0)
    model, rows = cl.open_classifier(origin, ["a", "b"]).eval(), random_rows(5, origin)
    logits = cl.predict(model, rows, origin, CPU)
    for n in range(5):
        one = model(input_ids=torch.from_numpy(rows.ids[n])[None]).logits
        torch.testing.assert_close(logits[n], one[0], rtol=1e-4, atol=1e-5)


def test_answers_come_back_in_the_rows_order(decoder, monkeypatch):
    torch.manual_seed(0)
    model, rows = cl.open_classifier(decoder, ["a", "b"]), random_rows(40, decoder)
    whole = cl.predict(model, rows, decoder, CPU)
    monkeypatch.setattr(cl, "SCORED_TOKENS", 64)
    torch.testing.assert_close(cl.predict(model, rows, decoder, CPU), whole, rtol=1e-4, atol=1e-5)
    alone = model(input_ids=torch.from_numpy(rows.ids[7])[None]).logits[0]
    torch.testing.assert_close(whole[7], alone, rtol=1e-4, atol=1e-5)
    assert not model.training


# training


def asked(tiny_run, **changes):
    changes = {"epochs": 3, "batch_size": 8, "learning_rate": 0.02, "weight_decay": 0.3} | changes
    return tiny_run(evaluation={f"downstream_{name}": value for name, value in changes.items()}).params.evaluation


def trained(origin, rows, settings, **more):
    """The result, and the model as it stood after the last epoch that was the best so far."""
    kept = []
    more = {"advance": lambda note: False} | more
    result = cl.fine_tune(origin, ["a", "b"], rows, 1, settings, CPU, keep=kept.append, **more)
    return result, kept[-1]


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_it_trains_as_the_cards_trainer(kind, request, tiny_run, tmp_path, monkeypatch):
    """The cards' code, on the same batches: schedule, decay groups, clipping, eps."""
    from torch.utils.data import SequentialSampler
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    origin = request.getfixturevalue(kind)
    rows, wanted = random_rows(28, origin, lengths=(4, 12)), asked(tiny_run)
    in_order = [np.arange(start, min(start + 8, 28)) for start in range(0, 28, 8)]
    monkeypatch.setattr(cl, "batches", lambda *_: in_order)
    # the last epoch's weights, whatever its accuracy
    accuracies = iter(range(9))
    monkeypatch.setattr(cl, "scores", lambda *_: {"accuracy": next(accuracies), "macro_f1": 0})
    result, model = trained(origin, {"train": rows, "test": rows}, wanted)

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    torch.manual_seed(1)
    theirs = cl.open_classifier(origin, ["a", "b"])
    data = [
        {"input_ids": ids.tolist(), "label": int(label)}
        | ({"token_type_ids": rows.types[n].tolist()} if rows.types else {})
        for n, (ids, label) in enumerate(zip(rows.ids, rows.labels, strict=True))
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=wanted.downstream_learning_rate,
        weight_decay=wanted.downstream_weight_decay,
        per_device_train_batch_size=8,
        num_train_epochs=3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    tokenizer = copy.deepcopy(origin.tokenizer)
    tokenizer.padding_side = "right"
    InOrder(model=theirs, args=arguments, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer)).train()
    for (name, ours), weights in zip(model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, weights, rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert result["padding_share"] == pytest.approx(
        1 - rows.lengths.sum() / sum(rows.lengths[part].max() * len(part) for part in in_order)
    )


def test_a_set_that_can_be_learned_is_learned_and_again_bit_for_bit(decoder, tiny_run):
    rows = {"train": random_rows(160, decoder, 1, (2, 6)), "test": random_rows(60, decoder, 2, (2, 6))}
    for one in rows.values():
        for ids, label in zip(one.ids, one.labels, strict=True):
            ids[-1] = 5 + label
    wanted = asked(tiny_run, learning_rate=0.01, weight_decay=0.01)
    notes = []
    result, model = trained(decoder, rows, wanted, advance=notes.append)
    assert result["best_epoch"]["accuracy"] > 0.9
    assert [epoch["epoch"] for epoch in result["epochs"]] == [1, 2, 3]
    assert result["last_epoch"] == result["epochs"][-1]
    assert notes == [f"epoch {epoch}" for epoch in (1, 2, 3) for _ in range(20)]
    # another state of torch's random numbers changes nothing
    torch.manual_seed(99)
    again, same = trained(decoder, rows, wanted)
    assert again | {"duration_s": 0} == result | {"duration_s": 0}
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), same.parameters(), strict=True))
    other = cl.fine_tune(decoder, ["a", "b"], rows, 2, wanted, CPU, lambda note: False)
    assert other["epochs"] != result["epochs"]


def test_what_is_dropped_is_dropped_in_training_alone(encoder, tiny_run, monkeypatch):
    modes, real = [], cl._logits
    monkeypatch.setattr(cl, "_logits", lambda model, *more: modes.append(model.training) or real(model, *more))
    rows = random_rows(16, encoder)
    trained(encoder, {"train": rows, "test": rows}, asked(tiny_run, epochs=2))
    assert modes == [True, True, False] * 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_matrices_in_16_bits_and_weights_in_32(decoder, tiny_run, precision):
    rows, found = random_rows(24, decoder), []
    hardware = Hardware("cpu", precision, "sdpa")
    wanted = asked(tiny_run, epochs=1)
    result = cl.fine_tune(
        decoder, ["a", "b"], {"train": rows, "test": rows}, 1, wanted, hardware, lambda note: False, found.append
    )
    assert {weights.dtype for weights in found[0].parameters()} == {torch.float32}
    exact = cl.fine_tune(decoder, ["a", "b"], {"train": rows, "test": rows}, 1, wanted, CPU, lambda note: False)
    assert result["precision"] == precision
    assert result["last_epoch"]["train_loss"] == pytest.approx(exact["last_epoch"]["train_loss"], rel=0.05)
    assert result["last_epoch"]["train_loss"] != exact["last_epoch"]["train_loss"]


def test_the_best_epoch_is_kept_and_the_last_stands_beside_it(decoder, tiny_run, monkeypatch):
    answers = iter([[0, 1, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
    monkeypatch.setattr(cl, "predict", lambda *_: torch.eye(2)[next(answers)])
    rows = random_rows(4, decoder)
    rows = replace(rows, labels=np.zeros(4, np.int64))
    kept = []
    result = cl.fine_tune(
        decoder, ["a", "b"], {"train": rows, "test": rows}, 0, asked(tiny_run, epochs=4), CPU, bool, kept.append
    )
    assert [epoch["accuracy"] for epoch in result["epochs"]] == [0.25, 0.75, 0.0, 0.75]
    # the first of equals; the paper's tables give the best
    assert (result["best_epoch"]["epoch"], result["last_epoch"]["epoch"], len(kept)) == (2, 4, 2)


def test_a_loss_that_is_no_number_stops_it(decoder, tiny_run):
    rows = random_rows(24, decoder)
    with pytest.raises(TTLError, match=r"tiny: the loss is no number .*downstream_learning_rate \(it is 1e\+30\)"):
        trained(decoder, {"train": rows, "test": rows}, asked(tiny_run, learning_rate=1e30))


def test_a_look_at_the_line_is_enough_to_see_it(decoder, tiny_run):
    rows, steps = random_rows(80, decoder), []

    def shown(note):
        steps.append(note)
        return len(steps) == 6

    # an epoch has ten
    with pytest.raises(TTLError, match="by step 6 of"):
        trained(decoder, {"train": rows, "test": rows}, asked(tiny_run, learning_rate=1e30), advance=shown)


# models that are not what they should be


def test_weights_that_are_missing_are_said(decoder, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in decoder.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks weights, such as model.layers.1.mlp.up_proj.weight"):
        cl.open_classifier(replace(decoder, folder=tmp_path), ["a", "b"])


def test_a_damaged_file_is_said(decoder, tmp_path):
    for path in decoder.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match="model 'tiny' does not open as a classifier"):
        cl.open_classifier(replace(decoder, folder=tmp_path), ["a", "b"])
