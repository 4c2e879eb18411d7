"""Failure signatures: none on healthy curves, one an episode on sick ones; what explains a stop is saved whole."""

from __future__ import annotations

import csv
import json
import math
import pickle
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from ttl_utils import files, health
from ttl_utils.explain import explain_not_finite
from ttl_utils.health import Finding, Health, findings

# two threads that wait for each other cost more than such small matrices
torch.set_num_threads(1)
VOCAB, PER_STEP = 4096, 2048
GUESSING = math.log(VOCAB)
REFERENCE = Path(__file__).parents[1] / "outputs" / "reference" / "nano" / "figures" / "03_loss.csv"


def log(step, loss, **values):
    speed = {"tokens_per_second": 8000.0, "data_share": 0.003}
    return {"step": step, "tokens": step * PER_STEP, "loss": loss, **speed} | values


def evaluation(step, loss):
    return {"step": step, "tokens": step * PER_STEP, "validation_loss": loss, "perplexity": math.exp(loss)}


def records_of(losses, every=1, spread=True):
    """Records of a run with these losses, one a step."""
    rows = []
    for end in range(every, len(losses) + 1, every):
        part = losses[end - every : end]
        std = {"loss_std": statistics.pstdev(part)} if spread else {}
        rows.append(log(end, statistics.fmean(part), **std))
    return rows


def power_law(steps, seed, uniform=GUESSING, floor=2.0, exponent=0.3, onset=30.0, noise=0.4):
    """Losses from that of guessing down; batches differ from one another once the model has learned something."""
    rng = random.Random(seed)
    curve = [floor + (uniform + 0.1 - floor) * (1 + step / onset) ** -exponent for step in range(steps)]
    return [loss + rng.gauss(0, noise) * min(1, 0.2 + 1.2 * (uniform - loss) / (uniform - floor)) for loss in curve]


def healthy(records=100, every=10, seed=0, **shape):
    return records_of(power_law(records * every, seed, **shape), every)


def kinds(found):
    return [finding.kind for finding in found]


def published(name, size):
    with (Path(health.__file__).parent / "published" / name).open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["size"] == size]


# healthy curves


def test_the_reference_run_is_healthy():
    with REFERENCE.open(encoding="utf-8") as file:
        saved = list(csv.DictReader(file))
    assert {row.pop("run") for row in saved} == {"nano"}
    rows = [{key: float(value) if value else None for key, value in row.items()} for row in saved]
    assert len(rows) > 50
    assert findings(rows, vocab_size=VOCAB, warmup_steps=50) == findings(rows) == []


@pytest.mark.parametrize(("size", "warmup_steps"), [("160m", 5000), ("460m", 10000)])
def test_the_published_curves_are_healthy(size, warmup_steps):
    curve = [(int(row["step"]), float(row["loss"])) for row in published("train_loss_smoothed.csv", size)]
    rows = [{"step": step, "tokens": 8192 * step, "loss": loss} for step, loss in curve]
    rows += [
        {"step": int(row["step"]), "tokens": int(row["tokens"]), "validation_loss": float(row["loss"])}
        for row in published("evaluation_log.csv", size)
    ]
    rows.sort(key=lambda row: row["step"])
    assert findings(rows, vocab_size=32000, warmup_steps=warmup_steps) == []
    # as a run would log it: every 100 steps, with the noise of single steps
    rng, noisy = random.Random(0), []
    for (step, loss), (after, loss_after) in zip(curve, curve[1:], strict=False):
        for at in range(-(-step // 400) * 400, after, 400):
            mean = loss + (loss_after - loss) * (at - step) / (after - step)
            noisy.append(log(at, mean + rng.gauss(0, 0.03), loss_std=abs(rng.gauss(0.3, 0.02))))
    assert len(noisy) > 1000
    assert findings(noisy, vocab_size=32000, warmup_steps=warmup_steps) == []


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    every=st.sampled_from([1, 2, 5, 10, 100]),
    records=st.sampled_from([30, 120, 400]),
    vocab_size=st.sampled_from([512, VOCAB, 32000]),
    warmup=st.sampled_from([0, 50, 500]),
    floor=st.floats(0.15, 0.35),
    exponent=st.floats(0.2, 0.35),
    noise=st.floats(0.01, 0.5),
    known=st.booleans(),
)
def test_noisy_power_laws_are_healthy(seed, every, records, vocab_size, warmup, floor, exponent, noise, known):
    uniform, steps, rng = math.log(vocab_size), every * records, random.Random(seed)
    shape = {"floor": floor * uniform, "exponent": exponent, "onset": 20 + warmup / 3, "noise": noise}
    losses = power_law(steps, seed, uniform, **shape)
    rows = records_of(losses, every, spread=known)
    for row in rows:
        row["tokens_per_second"] *= rng.lognormvariate(0, 0.12)
        row["data_share"] = rng.uniform(0, 0.02)
    # compiled in the first step, as after each resume
    rows[0]["tokens_per_second"] /= 20
    rows[len(rows) // 2]["tokens_per_second"] /= 20
    quiet = power_law(steps + 1, seed, uniform, **shape | {"noise": 0.01})
    every_eval = max(every, steps // 5)
    rows += [evaluation(step, quiet[step] + 0.05) for step in range(0, steps + 1, every_eval)]
    rows.sort(key=lambda row: row["step"])
    assert findings(rows, vocab_size=vocab_size if known else None, warmup_steps=warmup) == []


@pytest.mark.parametrize("intervals", [(100, 1, 10), (1, 100, 10), (10, 7, 1)])
def test_a_changed_logging_interval_is_no_finding(intervals):
    for seed in range(3):
        losses, rows, step = power_law(15_001, seed), [], 0
        for every in intervals:
            part = losses[step : step + min(5000, 200 * every)]
            rows += [log(step + row["step"], row["loss"]) for row in records_of(part, every)]
            step = rows[-1]["step"]
        # the last interval is a short one
        rows.append(log(step + 1, losses[step] + 0.4))
        assert findings(rows, vocab_size=VOCAB, warmup_steps=50) == []


def test_batches_that_begin_to_differ_are_no_finding():
    rng = random.Random(0)
    # near the loss of guessing all batches are alike
    losses = [8 - n / 60 + rng.gauss(0, 0.05 if n < 60 else 0.4) for n in range(300)]
    assert findings(records_of(losses), VOCAB, warmup_steps=50) == []


def test_missing_and_null_keys_are_not_judged():
    rows = [{"step": row["step"], "tokens": row["tokens"], "loss": row["loss"]} for row in healthy()]
    empty = dict.fromkeys(("loss_std", "tokens_per_second", "share_of_peak", "data_share", "validation_loss"))
    assert findings([row | empty for row in rows]) == findings(rows) == []
    assert findings([]) == findings([{"step": 0, "tokens": 0}]) == []


# not finite, stalled


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_found_once(bad):
    rows = healthy()
    after = rows[-1]["step"]
    for name in ("loss", "validation_loss"):
        sick = [{"step": after + n, "tokens": (after + n) * PER_STEP, name: bad} for n in (10, 20)]
        found = findings(rows + sick)
        assert found == [Finding("not_finite", after + 10, (after + 10) * PER_STEP, f"{name} {bad}")]
    stop = {"step": after + 10, "tokens": 7, "not_finite": "weights", "energy_kwh": 0.1}
    assert [str(finding) for finding in findings([*rows, stop])] == [f"step {after + 10:,}: not finite: weights"]
    # what came before it is not forgotten, and a second episode is found again
    again = [log(after + 20, 3.0), log(after + 30, bad)]
    assert kinds(findings([*rows, stop, *again])) == ["not_finite", "not_finite"]


def test_a_stalled_data_source_is_found_once_a_stall():
    rows = healthy()
    stalls = [{"step": 1000, "tokens": 5, "stalled_s": seconds} for seconds in (61.2, 121.3)]
    found = findings([*rows, *stalls])
    assert [str(finding) for finding in found] == ["step 1,000: stalled: no data for 61 s"]
    assert kinds(findings([*rows, *stalls, log(1010, rows[-1]["loss"]), stalls[0]])) == ["stalled", "stalled"]


# divergence


def test_divergence_is_one_line_with_step_and_figures():
    rows = [log(step, 4.0 + 100 / step) for step in range(100, 1000, 10)]
    rows += [log(step, 9.81) for step in range(1000, 3000, 10)]
    spike, divergence = findings(rows, vocab_size=32000, warmup_steps=50)
    assert str(spike).startswith("step 1,000: loss spike: loss 9.81, usually 4.1")
    assert str(divergence) == "step 1,020: divergence: loss 9.81, was 4.10 at step 990"


def test_divergence_is_found_again_after_it_recovered():
    good, bad = [3.0] * 60, [6.0] * 60
    rows = [log(10 * n, loss) for n, loss in enumerate(good + bad + good + bad, start=1)]
    assert kinds(findings(rows)).count("divergence") == 2
    # up and down about the threshold is one episode
    rows = [log(10 * n, 3.0 if n < 60 else 3.45 + 0.15 * (n // 6 % 2)) for n in range(1, 120)]
    assert kinds(findings(rows)) == ["loss_spike", "divergence"]


@pytest.mark.parametrize("every", [1, 10, 100])
@pytest.mark.parametrize("seed", range(3))
def test_a_jump_in_a_noisy_curve_is_found_within_five_records(seed, every):
    rows = healthy(every=every, seed=seed)
    after, level = rows[-1]["step"], rows[-1]["loss"] + 4
    assert findings(rows, VOCAB) == []
    found = findings(rows + [log(after + n * every, level) for n in range(1, 6)], VOCAB)
    assert "divergence" in kinds(found)


def test_a_slow_rise_is_found():
    rng = random.Random(0)
    rows = [log(100 * n, 3 + max(0, n - 200) * 0.003 + rng.gauss(0, 0.03)) for n in range(1, 400)]
    found = findings(rows)
    assert kinds(found) == ["divergence"]
    assert 200 < found[0].step / 100 < 330


def test_above_the_loss_of_guessing_after_the_warm_up():
    rows = [log(step, 8.5) for step in range(10, 400, 10)]
    assert findings(rows) == []
    (found,) = findings(rows, VOCAB, warmup_steps=150)
    assert str(found) == "step 170: divergence: loss 8.50, above the 8.32 of guessing"
    # it wanders about the threshold: still one
    rows += [log(step, 8.3 + 0.1 * (step // 50 % 2)) for step in range(400, 1500, 10)]
    assert kinds(findings(rows, VOCAB, 150)).count("divergence") == 1


def test_a_first_evaluation_is_where_high_records_come_from():
    rows = [evaluation(0, 8.35), *(log(step, 12.0) for step in range(10, 60, 10))]
    assert "step 50: divergence: loss 12.00, was 8.35 at step 0" in map(str, findings(rows, VOCAB, warmup_steps=50))


def tiny_training(rate, seed=0, steps=60, vocab=64, warmup=10):
    """Losses of a real, tiny Llama on text in which each token has one likely follower."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=32, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    follower, losses = torch.randperm(vocab), []
    for step in range(steps):
        ids = [torch.randint(vocab, (8,))]
        for _ in range(23):
            ids.append(torch.where(torch.rand(8) < 0.8, follower[ids[-1]], torch.randint(vocab, (8,))))
        batch = torch.stack(ids, dim=1)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / warmup)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("seed", range(2))
def test_a_rate_a_hundred_times_too_high_has_a_signature_and_the_right_one_none(seed):
    learned, diverged = tiny_training(0.01, seed), tiny_training(1.0, seed)
    assert learned[-1] < 2 < diverged[-1]
    for every in (1, 5, 10):
        assert findings(records_of(learned, every), 64, warmup_steps=10) == []
        # it goes up to a plateau near the loss of guessing, not to NaN
        assert "divergence" in kinds(findings(records_of(diverged, every), 64, warmup_steps=10))


def test_standing_still_near_the_loss_of_guessing_is_found_and_low_is_not():
    rng = random.Random(0)
    stuck = [log(10 * n, 6.3 + 2 * math.exp(-n / 2) + rng.gauss(0, 0.1)) for n in range(1, 61)]
    found = findings(stuck, VOCAB, warmup_steps=50)
    assert kinds(found) == ["loss_plateau"]
    assert found[0].step == 300
    assert "6.3" in found[0].evidence
    assert findings([row | {"loss": row["loss"] - 3.0} for row in stuck], VOCAB, warmup_steps=50) == []
    # a warm-up may take its time
    assert findings(stuck, VOCAB, warmup_steps=600) == []


def test_back_above_guessing_in_the_warm_up_is_a_divergence_and_a_slow_start_is_none():
    uniform = math.log(VOCAB)
    rows = [log(10 * n, uniform + change) for n, change in enumerate((-0.7, 0.2, -1.3, -1.5, -1.6), start=1)]
    assert [(found.kind, found.step) for found in findings(rows, VOCAB, warmup_steps=50)] == [("divergence", 20)]
    slow = [log(10 * n, uniform + change) for n, change in enumerate((0.02, -0.1, -0.3, -0.2, -0.6), start=1)]
    assert findings(slow, VOCAB, warmup_steps=50) == []
    # single steps wander more than that
    noisy = [log(n, uniform + change) for n, change in enumerate((-0.6, 0.2, -0.5, 0.1, -0.6), start=1)]
    assert findings(noisy, VOCAB, warmup_steps=50) == []


# variance


@pytest.mark.parametrize("every", [1, 10, 100])
def test_a_spike_is_found_and_another_one_too(every):
    rows = healthy(every=every)
    for place in (60, 80):
        rows[place]["loss"] += 4.0
    found = findings(rows, VOCAB)
    assert [(finding.kind, finding.step) for finding in found] == [("loss_spike", every * n) for n in (61, 81)]


def test_a_spike_within_an_interval_is_found_by_its_spread():
    losses = power_law(10_000, seed=1)
    losses[7_042] += 20
    (found,) = findings(records_of(losses, every=100), VOCAB)
    assert (found.kind, found.step) == ("loss_spike", 7100)
    assert "the loss of 100 steps spreads by 2.0" in found.evidence
    # a nat in one of a hundred steps is the noise of batches
    losses[7_042] -= 19
    assert findings(records_of(losses, every=100), VOCAB) == []


def test_a_first_interval_far_above_guessing_is_found():
    # a real run at a hundred times its rate: the mean hides it
    first = [8.34, 8.08, 7.34, 6.84, 7.02, 7.26, 7.01, 7.76, 8.1, 12.47]
    (found,) = findings(records_of(first, every=10), VOCAB, warmup_steps=50)
    assert str(found).startswith("step 10: loss spike: loss 8.02, spread 1.5")
    (found,) = findings(records_of(first, every=1), VOCAB, warmup_steps=50)
    assert str(found) == "step 10: loss spike: loss 12.47, spread 0.00: far above the 8.32 of guessing"
    falls = [8.45] * 8 + [6.0, 4.0]
    assert findings(records_of(falls, every=10), VOCAB) == []


@pytest.mark.parametrize("every", [1, 20])
def test_a_growing_spread_is_found_once(every):
    def rows(growth):
        rng = random.Random(0)
        noise = [0.1 if step < 200 * every else 0.1 * growth for step in range(400 * every)]
        return records_of([3 + rng.gauss(0, deviation) for deviation in noise], every)

    found = [finding for finding in findings(rows(6), VOCAB) if finding.kind == "loss_spread"]
    assert len(found) == 1
    assert 200 * every < found[0].step < 260 * every
    assert findings(rows(1.5), VOCAB) == []


# perplexity


def test_a_plateau_is_a_note_that_takes_tokens_and_evaluations():
    falling = [evaluation(100 * n, 4 - math.log(n)) for n in range(1, 5)]
    flat = [evaluation(step, falling[-1]["validation_loss"] + 0.004 * (-1) ** step) for step in range(410, 800, 10)]
    (found,) = findings(falling + flat, warmup_steps=100)
    # the tokens of step 400, half as many again
    assert str(found) == "step 600: perplexity plateau: perplexity 13.70, was 13.65 at step 400"
    # two evaluations are too few, however far apart
    assert findings([*falling, *flat[-2:]]) == []
    assert kinds(findings([*falling, *flat[-3:]])) == ["perplexity_plateau"]
    # slow is not flat
    assert findings([evaluation(100 * n, 4 - 0.012 * n) for n in range(2, 20)]) == []
    # found again after it recovered
    lower = [evaluation(step, 2.0) for step in range(800, 1300, 100)]
    assert kinds(findings(falling + flat + lower)) == ["perplexity_plateau"] * 2


def test_no_plateau_within_the_warm_up():
    rows = [evaluation(step, 10.3) for step in range(0, 1000, 100)]
    assert findings(rows, warmup_steps=1000) == []
    assert kinds(findings(rows, warmup_steps=100)) == ["perplexity_plateau"]


def overfitting(training):
    rows = []
    for n in range(1, 31):
        rows += [log(100 * n - 50, training(n)), evaluation(100 * n, 3.5 + 0.002 * (n - 10) ** 2)]
    return rows


def test_overfitting_is_named_where_training_loss_falls_while_perplexity_rises():
    plateau, found = findings(overfitting(lambda n: 4 - n / 20), VOCAB)
    assert (plateau.kind, found.kind) == ("perplexity_plateau", "perplexity_rise")
    assert found.step == 1700
    expected = "perplexity 36.53, was 33.12 at step 1,000; training loss 3.25, was 3.60: overfitting"
    assert found.evidence == expected
    # the loss rises too: something else
    found = findings(overfitting(lambda n: 3.5 + 0.002 * (n - 10) ** 2), VOCAB)
    assert "perplexity_rise" in kinds(found)
    assert not [finding for finding in found if "overfitting" in finding.evidence]


def test_a_wandering_perplexity_is_no_rise():
    losses = [4.0, 3.6, 3.4, 3.46, 3.3, 3.37, 3.2]
    assert findings([evaluation(100 * n, loss) for n, loss in enumerate(losses)]) == []
    assert kinds(findings([evaluation(100 * n, loss) for n, loss in enumerate([*losses, 3.31])])) == ["perplexity_rise"]
    # while it is worse, that it does not get better is no news
    assert kinds(findings([evaluation(100 * n, min(n, 3) - 2.0) for n in range(1, 20)])) == ["perplexity_rise"]
    sick = [*losses, 3.4, 3.5, 3.0, 3.4]
    assert kinds(findings([evaluation(100 * n, loss) for n, loss in enumerate(sick)])) == ["perplexity_rise"] * 2


# utilisation


def slowed(rows, places, **values):
    return [row | (values if number in places else {}) for number, row in enumerate(rows)]


def test_low_utilisation_must_last_and_is_found_once():
    rows = healthy()
    slow = {"tokens_per_second": 3000.0, "share_of_peak": 0.043}
    (found,) = findings(slowed(rows, range(60, 100), **slow))
    assert str(found) == "step 630: low utilisation: 3,000 tokens/s (4.3% of peak), usually 8,000"
    assert findings(slowed(rows, range(60, 62), **slow)) == []
    assert findings(slowed(rows, range(60, 100), tokens_per_second=4100.0)) == []
    # up and down for single records is one episode, recovered and slow again is two
    assert kinds(findings(slowed(rows, {*range(60, 64), *range(65, 68)}, **slow))) == ["low_utilisation"]
    assert kinds(findings(slowed(rows, {*range(60, 64), *range(80, 84)}, **slow))) == ["low_utilisation"] * 2


def test_a_second_is_no_episode():
    rows = healthy(records=300, every=1, noise=0.1)
    # three steps at 3,000 tokens a second take two seconds, fifteen take ten
    assert findings(slowed(rows, range(100, 110), tokens_per_second=3000.0)) == []
    assert kinds(findings(slowed(rows, range(100, 120), tokens_per_second=3000.0))) == ["low_utilisation"]


def test_a_slower_machine_becomes_the_usual():
    rows = slowed(healthy(records=200), range(60, 200), tokens_per_second=3000.0)
    assert kinds(findings(slowed(rows, range(150, 200), tokens_per_second=1000.0))) == ["low_utilisation"] * 2


def test_a_data_source_that_holds_training_back_is_found_once():
    rows = healthy()
    (found,) = findings(slowed(rows, range(40, 100), data_share=0.35))
    assert str(found) == "step 440: slow data: 35% of the time waits for data"
    assert findings(slowed(rows, range(40, 42), data_share=0.35)) == []
    assert findings(slowed(rows, range(100), data_share=0.15)) == []


# a fold with a small state


def sick_run():
    rows = slowed(healthy(records=200), range(60, 80), tokens_per_second=2000.0)
    rows[120]["loss"] += 5
    rows[140:] = [row | {"loss": 9.0} for row in rows[140:]]
    rows.insert(100, {"step": 1000, "tokens": 1000 * PER_STEP, "stalled_s": 70.0})
    return [*rows, {"step": 2001, "tokens": 2001 * PER_STEP, "not_finite": "loss"}]


@given(st.integers(0, 202))
@settings(max_examples=20, deadline=None)
def test_a_resumed_run_finds_the_same(cut):
    rows = sick_run()
    whole = findings(rows, VOCAB, 50)
    assert set(kinds(whole)) >= {"low_utilisation", "stalled", "loss_spike", "divergence", "not_finite"}
    resumed, before = Health(VOCAB, 50), []
    for row in rows[:cut]:
        before += resumed.see(row)
    assert before == findings(rows[:cut], VOCAB, 50)
    assert before + [finding for row in rows[cut:] for finding in resumed.see(row)] == whole


def test_records_are_not_changed_and_the_state_stays_small():
    rows = sick_run()
    copy = json.dumps(rows)
    findings(rows, VOCAB)
    assert json.dumps(rows) == copy

    def size(records):
        watch = Health(VOCAB)
        for row in records:
            watch.see(row)
            watch.see(evaluation(row["step"], row["loss"]))
        return len(pickle.dumps(watch.__dict__))

    long = healthy(records=2000, every=1)
    assert size(long) < 1.1 * size(long[:400])


def test_watching_needs_no_torch():
    code = "import sys, ttl_utils.health; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# what explains a stop


def strict(path):
    """JSON as the standard has it: no NaN, no infinity."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))


@pytest.fixture
def sick():
    """A model after a step, with NaN in a weight, infinities in a gradient and a moment."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    ids = torch.randint(10, (2, 5))
    model(ids).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
        model[1].weight[1, 1] = 2e38
        model[1].weight.grad[0] = math.inf
        optimizer.state[model[0].weight]["exp_avg_sq"][3] = -math.inf
    batch = {"input_ids": ids[:, :4], "labels": ids[:, :4]}
    return model, optimizer, batch


def explain(folder, sick, **changes):
    model, optimizer, batch = sick
    given = {"folder": folder, "step": 120, "losses": [4.0, 4.1, math.nan], "first_bad": 120, "model": model}
    given |= {"optimizer": optimizer, "batch": batch, "records": [log(n, 4.0) for n in range(1, 100)]}
    return explain_not_finite(**given | changes)


def test_what_explains_a_stop(tmp_path, sick):
    model, _, batch = sick
    records = [*(log(n, 4.0) for n in range(1, 100)), {"step": 120, "tokens": 9, "loss": math.nan, "deep": [math.inf]}]
    path = explain(tmp_path / "stage", sick, records=records)
    assert path == tmp_path / "stage" / "not_finite-step-0000120"
    assert sorted(item.name for item in path.iterdir()) == ["batch.safetensors", "report.json"]
    report = strict(path / "report.json")
    assert (report["step"], report["first_bad_step"], report["learning_rate"]) == (120, 120, 0.25)
    assert report["losses"] == {"118": 4.0, "119": 4.1, "120": "nan"}
    assert report["records"][0]["step"] == 51
    assert report["records"][-1] == {"step": 120, "tokens": 9, "loss": "nan", "deep": ["inf"]}
    tensors = report["tensors"]
    expected = {f"{name}{kind}" for name, _ in model.named_parameters() for kind in ("", "/gradient")}
    expected |= {f"{name}/{moment}" for name, _ in model.named_parameters() for moment in ("exp_avg", "exp_avg_sq")}
    assert tensors.keys() == expected
    assert {name for name, found in tensors.items() if not found["finite"]} == {
        "1.weight",
        "1.weight/gradient",
        "0.weight/exp_avg_sq",
    }
    assert tensors["1.weight"]["share_not_finite"] == pytest.approx(1 / 12)
    # the squares of what is left would overflow
    assert tensors["1.weight"]["largest"] == pytest.approx(2e38)
    assert tensors["1.weight"]["norm"] == pytest.approx(2e38)
    assert tensors["1.weight/gradient"]["share_not_finite"] == pytest.approx(1 / 3)
    assert tensors["0.weight"]["norm"] == pytest.approx(model[0].weight.norm().item())
    assert tensors["0.weight"]["largest"] == pytest.approx(model[0].weight.abs().max().item())
    saved = load_file(path / "batch.safetensors")
    assert saved.keys() == batch.keys()
    assert all(torch.equal(saved[key], value) for key, value in batch.items())


def test_one_bad_number_among_millions_is_seen(tmp_path):
    model = torch.nn.Linear(2**10, 2**10, bias=False, dtype=torch.bfloat16)
    torch.nn.init.zeros_(model.weight)
    with torch.no_grad():
        model.weight[5, 5] = math.nan
    sick = model, torch.optim.SGD(model.parameters(), lr=0.1), None
    path = explain(tmp_path, sick)
    assert [item.name for item in path.iterdir()] == ["report.json"]
    (found,) = strict(path / "report.json")["tensors"].values()
    assert found == {"finite": False, "norm": 0.0, "largest": 0.0, "share_not_finite": 2**-20}


def test_an_explanation_is_whole_or_not_there(tmp_path, sick, monkeypatch):
    checkpoint = tmp_path / "checkpoints" / "step-0000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"good")

    def full(path, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ttl_utils.explain.write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            explain(tmp_path, sick)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    # what a killed try left behind, and an earlier try of the same step
    (tmp_path / ".not_finite-step-0000120.partial").mkdir()
    files.write_text(tmp_path / ".not_finite-step-0000120.partial" / "left", "")
    path = explain(tmp_path, sick, losses=[1.0])
    assert not (path / "left").exists()
    path = explain(tmp_path, sick, losses=[2.0])
    assert strict(path / "report.json")["losses"] == {"120": 2.0}
    assert sorted(item.name for item in path.iterdir()) == ["batch.safetensors", "report.json"]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["checkpoints", "not_finite-step-0000120"]
    assert (checkpoint / "model.safetensors").read_bytes() == b"good"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_of_a_cuda_device_are_explained(tmp_path):
    model = torch.nn.Linear(4, 4).cuda()
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long, device="cuda")}
    path = explain(tmp_path, (model, torch.optim.AdamW(model.parameters()), batch))
    assert load_file(path / "batch.safetensors")["input_ids"].tolist() == [[1] * 4]
