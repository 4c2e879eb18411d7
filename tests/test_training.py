"""The loop: schedule, accumulation, loss, decay; kills and interrupts that change nothing; divergence."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttl_utils import carbon, checkpoints
from ttl_utils import session as se
from ttl_utils import training as tr
from ttl_utils.devices import Peak
from ttl_utils.errors import DamagedFile, ParameterError, TTLError
from ttl_utils.loss import IGNORED, Learner, summed_loss
from ttl_utils.model import Hardware, new_model
from ttl_utils.params import load_params
from ttl_utils.pretraining import pretrain
from ttl_utils.records import Records, read_records
from ttl_utils.session import Loop
from ttl_utils.step import Step, learning_rate, make_optimizer
from ttl_utils.tokenizer import load_tokenizer

# two threads that wait for each other cost more than such small matrices
torch.set_num_threads(1)
CPU = Hardware("cpu", "fp32", "sdpa")
NANO = load_params({})
CONTEXT = 12


def setting(**changes):
    return NANO.pretraining.model_copy(update={"learning_rate": 0.01, "warmup_steps": 2, **changes})


@pytest.fixture(scope="module")
def tokenizer(tiny_done):
    return load_tokenizer(tiny_done.folder / "02_tokenizer")


@pytest.fixture
def make_model(tokenizer):
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "max_position_embeddings": CONTEXT}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    return lambda: new_model(NANO.model.model_copy(update=shape), tokenizer, seed=0, attention="sdpa")


def batch_of(step, rows=4):
    """Random rows of which a random part is learned: a few labels in one row, nearly all in another."""
    random_ids = torch.Generator().manual_seed(step)
    ids = torch.randint(4, 500, (rows, CONTEXT), generator=random_ids)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 1 + (3 * row + step) % (CONTEXT - 1)] = IGNORED
    return {"input_ids": ids, "labels": labels}


def steps(size=4):
    def get_step(step, accelerator):
        batch = batch_of(step)
        parts = [{key: value[n : n + size] for key, value in batch.items()} for n in range(0, 4, size)]
        return Step(parts, int((batch["labels"][:, 1:] != IGNORED).sum()))

    return get_step


def loop(folder, max_steps=6, **changes):
    folder.mkdir(exist_ok=True)
    own = {field.name for field in dataclasses.fields(Loop)}
    given = {key: changes.pop(key) for key in list(changes) if key in own}
    asked = setting(**{"logging_steps": 1, "save_steps": 100, **changes})
    energy = SimpleNamespace(energy_kwh=0.25, sample=lambda write: 0.25)
    return Loop(
        **{"settings": asked, "hardware": CPU, "max_steps": max_steps, "folder": folder, "energy": energy} | given
    )


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# the schedule


def test_the_schedule_by_hand():
    cosine = setting(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(cosine, step, 104) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(cosine, 4 + 50, 104) == pytest.approx(0.5)
    assert learning_rate(cosine, 4 + 25, 104) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert 0 < learning_rate(cosine, 103, 104) < 3e-4
    assert learning_rate(cosine, 104, 104) == 0
    linear = setting(learning_rate=1.0, warmup_steps=0, lr_scheduler_type="linear")
    assert [learning_rate(linear, step, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    constant = setting(learning_rate=1.0, warmup_steps=1, lr_scheduler_type="constant")
    assert {learning_rate(constant, step, 4) for step in range(4)} == {1.0}
    # cut short below the warm-up
    assert learning_rate(setting(learning_rate=1.0, warmup_steps=10), 2, 3) == pytest.approx(0.3)


@settings(max_examples=200)
@given(st.data(), st.sampled_from(["cosine", "linear", "constant"]), st.floats(1e-6, 1), st.integers(0, 50))
def test_the_rate_stays_between_zero_and_the_peak(data, kind, peak, warmup):
    max_steps = data.draw(st.integers(1, 200))
    asked = setting(learning_rate=peak, lr_scheduler_type=kind, warmup_steps=warmup)
    rates = [learning_rate(asked, step, max_steps) for step in range(max_steps)]
    assert all(0 < rate <= peak for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


# one step


def test_the_loss_is_that_of_transformers(make_model):
    model, ids = make_model(), batch_of(0)["input_ids"]
    ours = summed_loss(model, {"input_ids": ids, "labels": ids}) / (len(ids) * (CONTEXT - 1))
    assert ours.item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-6)


def test_ignored_labels_are_not_in_the_loss(make_model):
    model, batch = make_model(), batch_of(3)
    log = model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    expected = -sum(
        log[row, place - 1, batch["labels"][row, place]]
        for row in range(4)
        for place in range(1, CONTEXT)
        if batch["labels"][row, place] != IGNORED
    )
    assert summed_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_accumulated_parts_are_the_whole_batch(make_model, tokenizer, tmp_path):
    whole, first = make_model(), make_model()
    rows = tr.train(whole, tokenizer, steps(), loop(tmp_path / "whole"))
    for size in (1, 3):
        parts = make_model()
        found = tr.train(parts, tokenizer, steps(size), loop(tmp_path / str(size)))
        assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in rows], abs=2e-6)
        for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    # the first step's loss: the mean over all learned tokens, which here is not the mean of the rows' means
    batch = batch_of(0)
    nats = [summed_loss(first, {key: value[n : n + 1] for key, value in batch.items()}).item() for n in range(4)]
    counts = [(batch["labels"][n, 1:] != IGNORED).sum().item() for n in range(4)]
    assert len(set(counts)) > 1
    assert rows[0]["loss"] == pytest.approx(sum(nats) / sum(counts), abs=2e-6)
    assert abs(rows[0]["loss"] - sum(n / c for n, c in zip(nats, counts, strict=True)) / 4) > 1e-4


def test_norms_are_decayed_when_asked(make_model):
    model = make_model()
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    for decay_norms, expected in ((False, set()), (True, norms)):
        optimizer = make_optimizer(model, setting(decay_norms=decay_norms, weight_decay=0.1))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        grouped = [(names[id(p)], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(name for name, _ in grouped) == sorted(names.values())
        assert {name for name, decay in grouped if decay == 0} == norms - expected
        assert {decay for _, decay in grouped} <= {0.0, 0.1}


def test_decay_shrinks_weights_by_rate_times_decay(make_model):
    model = make_model()
    optimizer = make_optimizer(model, setting(learning_rate=0.1, weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if "norm" in name else 0.95
        torch.testing.assert_close(parameter, before[name] * factor)


def test_clipping_is_on_the_whole_steps_gradient(make_model, tokenizer, tmp_path):
    # plain AdamW hardly sees the gradient's size; epsilon as large as this makes it see
    large = {"adam_epsilon": 1.0, "max_steps": 1, "warmup_steps": 0, "weight_decay": 0.0}
    moved = {}
    for clip in (None, 1e-3):
        model, start = make_model(), make_model()
        tr.train(model, tokenizer, steps(2), loop(tmp_path / f"{clip}", max_grad_norm=clip, **large))
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        moved[clip] = math.sqrt(sum((a - b).square().sum().item() for a, b in pairs))
    # |update| is about rate x gradient when epsilon rules
    assert moved[1e-3] == pytest.approx(0.01 * 1e-3, rel=0.01)
    assert moved[None] > 100 * moved[1e-3]


# records and their figures


def test_records_hold_what_they_say(make_model, tokenizer, tmp_path):
    drawn = []
    asked = loop(
        tmp_path / "run",
        max_steps=5,
        logging_steps=2,
        eval_steps=2,
        evaluate=lambda model, step: {"validation_loss": float(step), "training": model.training},
        energy_before=1.0,
        on_record=lambda rows: drawn.append(len(rows)),
    )
    model = make_model()
    single = tr.train(make_model(), tokenizer, steps(), loop(tmp_path / "single", max_steps=5))
    rows = tr.train(model, tokenizer, steps(), asked)
    assert rows == read_records(tmp_path / "run" / "metrics.jsonl")
    losses = [row["loss"] for row in single]
    logged = {row["step"]: row for row in rows if "loss" in row}
    assert logged.keys() == {2, 4, 5}
    assert logged[2]["loss"] == pytest.approx(sum(losses[:2]) / 2, abs=2e-6)
    assert logged[4]["loss"] == pytest.approx(sum(losses[2:4]) / 2, abs=2e-6)
    assert logged[5]["loss"] == pytest.approx(losses[4], abs=2e-6)
    assert [row["tokens"] for row in logged.values()] == [2 * 48, 4 * 48, 5 * 48]
    assert logged[4]["learning_rate"] == learning_rate(asked.settings, 3, 5)
    assert {row["energy_kwh"] for row in rows} == {1.25}
    assert all(row["tokens_per_second"] > 0 for row in logged.values())
    evaluated = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 2, 4, 5]
    assert not any(row["training"] for row in evaluated)
    assert model.training
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-0000005" / "state.json").read_text())
    assert (state["tokens"], state["energy_kwh"], state["device"], state["precision"]) == (240, 1.25, "cpu", "fp32")
    assert drawn


def test_speed_leaves_out_evaluation_and_checkpoints(make_model, tokenizer, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(tr.time, "monotonic", lambda: clock[0])

    def get_step(step, accelerator):
        clock[0] += 2.0
        return steps()(step, accelerator)

    def evaluate(model, step):
        clock[0] += 1000.0
        return {"validation_loss": 0.0}

    asked = loop(tmp_path / "run", max_steps=6, logging_steps=2, eval_steps=3, save_steps=1, evaluate=evaluate)
    rows = tr.train(make_model(), tokenizer, get_step, asked)
    assert [row["tokens_per_second"] for row in rows if "loss" in row] == [24.0, 24.0, 24.0]


def test_records_after_the_checkpoint_are_dropped_and_a_torn_line_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = [{"step": 0, "validation_loss": 9.0}, {"step": 2, "loss": 3.0}, {"step": 4, "loss": 2.0}]
    text = "".join(json.dumps(row) + "\n" for row in whole)
    path.write_text(text + '{"step": 5, "lo')
    assert read_records(path) == whole
    records = Records(path, 2, None)
    assert records.rows == read_records(path) == whole[:2]
    records.add({"step": 3, "loss": 2.5})
    assert read_records(path) == [*whole[:2], {"step": 3, "loss": 2.5}]
    path.write_bytes(path.read_bytes() + b"\0\0\0\n" + b'{"step": 4}\n')
    with pytest.raises(DamagedFile, match="metrics.jsonl, line 4: not a record"):
        read_records(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
    path.write_text(text)
    # another process of a distributed run reads, and leaves the file to the first
    assert Records(path, 2, None, main=False).rows == whole[:2]
    assert path.read_text() == text
    # from the beginning: the evaluation before the first step is made again
    assert Records(path, 0, None).rows == read_records(path) == []


# interrupts


def interrupting(size, at, number=signal.SIGTERM):
    def get_step(step, accelerator):
        if step == at:
            os.kill(os.getpid(), number)
        return steps(size)(step, accelerator)

    return get_step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_an_interrupt_ends_at_a_whole_step_that_is_saved(make_model, tokenizer, tmp_path, number):
    undisturbed, cut, whole = make_model(), make_model(), make_model()
    before = signal.getsignal(number)
    every = tr.train(undisturbed, tokenizer, steps(), loop(tmp_path / "all", max_steps=9))
    # logged after 4, interrupted in 6: the resumed run logs at 9, with other intervals
    with pytest.raises(TTLError, match=r"it was interrupted \(SIG\w+\); step 6 is saved"):
        tr.train(cut, tokenizer, interrupting(4, 5, number), loop(tmp_path / "run", max_steps=9, logging_steps=4))
    assert signal.getsignal(number) == before
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000006"]
    again = loop(tmp_path / "run", max_steps=9, logging_steps=3, save_steps=2)
    rows = tr.train(whole, tokenizer, steps(), again)
    assert same(whole, undisturbed)
    assert [row["step"] for row in rows] == [4, 9]
    losses = [row["loss"] for row in every]
    # the mean over all steps since the last record, those before the interrupt too
    assert rows[1]["loss"] == pytest.approx(sum(losses[4:]) / 5, abs=2e-6)
    assert rows[1]["tokens"] == every[-1]["tokens"]


def test_an_interrupt_in_the_last_step_is_no_interrupt(make_model, tokenizer, tmp_path):
    rows = tr.train(make_model(), tokenizer, interrupting(4, 2), loop(tmp_path / "run", max_steps=3))
    assert rows[-1]["step"] == 3


def test_off_the_main_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with tr.clean_stop() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, "")]


def test_a_finished_run_is_not_trained_further(make_model, tokenizer, tmp_path):
    first, second = make_model(), make_model()
    rows = tr.train(first, tokenizer, steps(), loop(tmp_path / "run", max_steps=2))
    assert tr.train(second, tokenizer, None, loop(tmp_path / "run", max_steps=2)) == rows
    assert same(first, second)


def test_another_precision_goes_on_and_says_so(make_model, tokenizer, tmp_path, capsys):
    with pytest.raises(TTLError, match="interrupted"):
        tr.train(make_model(), tokenizer, interrupting(4, 1), loop(tmp_path / "run"))
    bf16 = Hardware("cpu", "bf16", "sdpa")
    rows = tr.train(make_model(), tokenizer, steps(), loop(tmp_path / "run", hardware=bf16))
    assert rows[-1]["step"] == 6
    said = capsys.readouterr().out
    assert "going on from step-0000002 (96 tokens seen)" in said
    assert "precision was fp32 and is bf16 now" in said


def test_other_processes_than_the_first_write_nothing(make_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(se.Accelerator, "is_main_process", property(lambda self: False))
    asked = loop(tmp_path / "run", eval_steps=2, save_steps=2, evaluate=lambda *_: pytest.fail("evaluated"))
    assert tr.train(make_model(), tokenizer, steps(), asked) == []
    assert list((tmp_path / "run").iterdir()) == []


def test_processes_that_do_not_start_are_missed(monkeypatch):
    se.make_accelerator(CPU)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TTLError, match="2 processes were asked for and Accelerate runs 1"):
        se.make_accelerator(CPU)


# trackers, hours, data that does not come


@pytest.fixture
def tracker(monkeypatch):
    """A tracker by the name of `ours`, as someone may register one with Accelerate; `seen` is what it was told."""
    from accelerate import tracking

    class Ours(tracking.GeneralTracker):
        name, requires_logging_directory, seen = "ours", False, []

        def __init__(self, run_name, **_):
            super().__init__()

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            self.seen.append(values)

        def log(self, values, step=None, **_):
            self.seen.append((step, values))

        def finish(self):
            self.seen.append("finished")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "ours", Ours)
    return Ours


def test_trackers_get_every_record_and_an_end(make_model, tokenizer, tmp_path, tracker):
    asked = loop(
        tmp_path / "run", max_steps=3, log_with=["ours"], config={"pretraining.max_steps": 3, "data.sources": []}
    )
    rows = tr.train(make_model(), tokenizer, steps(), asked)
    config, *logged, end = tracker.seen
    assert (config, end) == ({"pretraining.max_steps": 3}, "finished")
    numbers = [(row["step"], {key: row[key] for key in row if row[key] is not None}) for row in rows]
    assert logged == numbers
    assert len(rows) == 3


@pytest.mark.parametrize(("name", "why"), [("wandbb", "is no tracker of Accelerate's"), ("aim", "is not installed")])
def test_a_tracker_that_is_not_there_is_an_error(make_model, tokenizer, tmp_path, name, why):
    with pytest.raises(ParameterError, match=f"'{name}' {why}"):
        tr.train(make_model(), tokenizer, steps(), loop(tmp_path / "run", log_with=[name]))


def test_max_hours_end_at_a_whole_step_that_is_saved(make_model, tokenizer, tmp_path, monkeypatch):
    clock, whole, cut = [0.0], make_model(), make_model()
    tr.train(whole, tokenizer, steps(), loop(tmp_path / "all", max_steps=6))
    monkeypatch.setattr(tr.time, "monotonic", lambda: clock[0])

    def get_step(step, accelerator):
        clock[0] += 600.0
        return steps()(step, accelerator)

    with pytest.raises(TTLError, match=r"max_hours \(0.5\) are over; step 4 is saved"):
        tr.train(cut, tokenizer, get_step, loop(tmp_path / "run", max_steps=6, max_hours=0.5))
    # the next session has its hours anew
    rows = tr.train(cut, tokenizer, get_step, loop(tmp_path / "run", max_steps=6, max_hours=0.5))
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert same(whole, cut)


def test_data_that_does_not_come_is_a_record_while_the_run_waits(make_model, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(se, "STALLED_S", 0.2)
    path, seen = tmp_path / "run" / "metrics.jsonl", []

    def get_step(step, accelerator):
        if step == 3:
            end = time.monotonic() + 10
            while not any("stalled_s" in row for row in seen) and time.monotonic() < end:
                time.sleep(0.01)
                seen[:] = read_records(path)
        return steps()(step, accelerator)

    rows = tr.train(make_model(), tokenizer, get_step, loop(tmp_path / "run"))
    stalled = [row for row in rows if "stalled_s" in row]
    assert [(row["step"], row["tokens"]) for row in stalled] == [(3, 3 * 48)]
    assert stalled[0]["stalled_s"] >= 0.2
    assert stalled[0] in seen
    waited = next(row for row in rows if row["step"] == 4 and "loss" in row)
    assert waited["data_share"] > 0.5
    assert "stall" in capsys.readouterr().out
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 7))


def test_the_share_of_peak_is_by_the_convention(make_model, tokenizer, tmp_path):
    known = loop(tmp_path / "one", flops_per_token=1e6, peak=Peak(2e9, "a test"))
    for row in tr.train(make_model(), tokenizer, steps(), known):
        assert row["share_of_peak"] == pytest.approx(row["tokens_per_second"] * 1e6 / 2e9, abs=1e-4)
    rows = tr.train(make_model(), tokenizer, steps(), loop(tmp_path / "two", flops_per_token=1e6))
    assert {row["share_of_peak"] for row in rows} == {None}
    assert all(0 <= row["data_share"] < 1 and row["loss_std"] == 0 for row in rows)


# divergence


def finite(folder):
    from safetensors.torch import load_file

    return all(value.isfinite().all() for path in folder.rglob("*.safetensors") for value in load_file(path).values())


@pytest.mark.parametrize("cause", ["loss", "gradient", "rate"])
def test_divergence_stops_the_run_and_poisons_no_checkpoint(make_model, tokenizer, tmp_path, monkeypatch, cause):
    model, changes = make_model(), {"logging_steps": 4, "save_steps": 2, "max_steps": 12}

    def get_step(step, accelerator):
        if step == 5 and cause == "gradient":
            # the loss is a number, the weights after the step are not: nothing but the weights tells
            model.get_input_embeddings().weight.register_hook(lambda gradient: gradient * math.nan)
        if step == 5 and cause == "loss":
            original = Learner.forward
            monkeypatch.setattr(Learner, "forward", lambda *inputs, **batch: original(*inputs, **batch) * math.nan)
        return steps()(step, accelerator)

    if cause == "rate":
        changes |= {"learning_rate": 1e30, "save_steps": 1, "lr_scheduler_type": "constant"}
    folder = tmp_path / "run"
    with pytest.raises(TTLError, match="training has diverged") as caught:
        tr.train(model, tokenizer, get_step, loop(folder, **changes))
    assert "Lower the learning rate" in str(caught.value)
    kept = checkpoints.list_checkpoints(folder / "checkpoints")
    if cause != "rate":
        assert [path.name for path in kept] == ["step-0000002", "step-0000004"]
        assert "step-0000004" in str(caught.value)
    assert finite(folder / "checkpoints")
    for path in kept:
        checkpoints.check(path)
    assert not any("nan" in line.lower() for line in (folder / "metrics.jsonl").read_text().splitlines())


# pretraining


def records_of(run):
    return read_records(run.folder / "03_pretraining" / "metrics.jsonl")


def test_pretraining_leaves_what_the_contract_says(tiny_prepared, no_energy, capsys):
    run = tiny_prepared(pretraining={"logging_steps": 5})
    shown = []
    stage = pretrain(run, on_record=lambda rows: shown.append(rows[-1]["step"]))
    metrics = stage.metrics()
    rows = records_of(run)
    assert (metrics["steps"], metrics["tokens"]) == (12, 12 * 256)
    assert metrics["train_loss"] == [row["loss"] for row in rows if "loss" in row][-1]
    assert metrics["validation_loss"] == rows[-1]["validation_loss"] < metrics["initial_validation_loss"]
    assert metrics["initial_validation_loss"] == pytest.approx(metrics["uniform_loss"], rel=0.02)
    assert metrics["validation_perplexity"] == pytest.approx(math.exp(metrics["validation_loss"]), rel=1e-3)
    assert metrics["epochs"] == pytest.approx(metrics["tokens"] / metrics["unique_tokens"])
    samples = read_records(stage.folder / "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in samples] == [
        (step, prompt) for step in (0, 4, 8, 12) for prompt in run.params.pretraining.prompts
    ]
    assert all(row["text"].startswith(row["prompt"]) for row in samples)
    assert shown[-1] == 12
    # a second call reuses it
    capsys.readouterr()
    assert pretrain(run).metrics() == metrics
    assert "reused" in capsys.readouterr().out


def test_energy_is_that_of_all_sessions(tiny_prepared, monkeypatch):
    session = carbon.EnergySession()
    session.energy_kwh, session.emissions_kg, session.duration_s = 0.5, 0.2, 30.0
    monkeypatch.setattr(carbon, "track", lambda *_, **__: contextlib.nullcontext(session))
    asked, spent = [], [(1.0, 0.4, 60.0), (1.75, 0.7, 95.0)]
    monkeypatch.setattr(
        "ttl_utils.pretraining.stage_energy", lambda *place: asked.append(place) or spent[len(asked) - 1]
    )
    run = tiny_prepared(pretraining={"max_steps": 2})
    stage = pretrain(run)
    metrics = stage.metrics()
    assert (metrics["energy_kwh"], metrics["emissions_kg"], metrics["duration_s"]) == spent[1]
    assert {row["energy_kwh"] for row in records_of(run)} == {1.5}
    state = json.loads((stage.folder / "checkpoints" / "step-0000002" / "state.json").read_text())
    assert state["energy_kwh"] == 1.5
    # of the sessions before, for the curve; and of all at the end, other machines too
    assert [place[:2] for place in asked] == [(run.folder / "energy.jsonl", "03_pretraining")] * 2


def test_data_order_is_that_of_the_seed_and_the_step(tiny_prepared):
    from ttl_utils.pretraining import block_steps, token_blocks

    run = tiny_prepared()
    blocks = token_blocks(run, "train")
    alone = block_steps(blocks, run)
    one, shared = SimpleNamespace(process_index=0, num_processes=1), []
    for rank in range(2):
        shared.append(alone(3, SimpleNamespace(process_index=rank, num_processes=2)))
    step = alone(3, one)
    again = block_steps(blocks, run)(3, one)
    rows = torch.cat([batch["input_ids"] for batch in step.micro_batches])
    assert all(
        torch.equal(a["input_ids"], b["input_ids"])
        for a, b in zip(step.micro_batches, again.micro_batches, strict=True)
    )
    # the processes share the step's rows, and each divides by the targets of all
    divided = torch.cat([batch["input_ids"] for part in shared for batch in part.micro_batches])
    assert sorted(rows.tolist()) == sorted(divided.tolist())
    assert step.targets == shared[0].targets == 4 * 63
    assert not torch.equal(rows, torch.cat([b["input_ids"] for b in alone(4, one).micro_batches]))
