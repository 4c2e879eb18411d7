"""The configuration search: what is tried on which device, every end of a child, and what is proposed."""

from __future__ import annotations

import contextlib
import sys

import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch._inductor.exc import InvalidCxxCompiler

from ttl_utils import lean, loss, model, search, step, trial
from ttl_utils.devices import Peak
from ttl_utils.errors import ParameterError, TTLError
from ttl_utils.params import load_params
from ttl_utils.pipeline import overrides
from ttl_utils.search import BASELINE, CHOICES, MICRO, OWN, SETTING, TOGETHER, configurations

NANO = load_params({}).pretraining.model_copy(update={"tokens_per_step": 8 * 256, MICRO: 4})


@contextlib.contextmanager
def machine(name):
    """A machine with a T4, with an A100 (and flash-attn), or with neither."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: name != "cpu")
        patch.setattr(torch.cuda, "get_device_name", lambda: f"NVIDIA {name}")
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: name == "A100")
        patch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0) if name == "A100" else (7, 5))
        patch.setattr(model, "find_spec", lambda _: True if name == "A100" else None)
        yield "cpu" if name == "cpu" else "cuda"


def listed(name, rows=8, **changes):
    with machine(name) as device:
        found = configurations(NANO.model_copy(update=changes), device, rows)
    return {one.name: one for one in found}


def changed(one, base):
    return {key for key in CHOICES if one.values[key] != base.values[key]}


# what is tried


def test_on_a_cpu():
    found = listed("cpu")
    assert list(found)[0] == OWN
    assert {name for name, one in found.items() if not one.unsupported} == {
        OWN,
        f"{BASELINE} = attention: eager",
        "precision: bf16",
        f"{MICRO}: 2",
        f"{MICRO}: 8",
        "compile: true",
        "gradient_checkpointing: true",
        "optim: adamw_torch",
    }
    assert "CUDA" in found["precision: tf32"].unsupported
    assert "CUDA" in found[SETTING].unsupported


def test_on_a_t4():
    found = listed("T4")
    assert found[OWN].values | {"precision": "fp16", "attention": "sdpa"} == found[OWN].values
    for name in (SETTING, "precision: bf16", "precision: tf32", "attention: flash_attention_2"):
        assert "Ampere" in found[name].unsupported
    assert not found[BASELINE].unsupported
    assert found[BASELINE].values | {"precision": "fp32", "attention": "eager"} == found[BASELINE].values
    assert not found["precision: fp32"].unsupported


def test_on_an_a100():
    found = listed("A100")
    assert not any(one.unsupported for one in found.values())
    own = found[f"{OWN} = {SETTING}"]
    assert own.values | {"precision": "bf16", "attention": "flash_attention_2"} == own.values
    # FlashAttention has no 32 bits
    assert "precision: tf32, attention: sdpa" in found
    assert "precision: fp32, attention: sdpa" in found
    assert "precision: fp16" in found


def test_documents_that_are_kept_apart_rule_flash_attention_out():
    found = listed("A100", isolate_documents=True)
    assert found[OWN].values["attention"] == "sdpa"
    assert "isolate_documents" in found[f"{SETTING} = attention: flash_attention_2"].unsupported
    assert "isolate_documents" in listed("A100", isolate_documents=True, attention="flash_attention_2")[OWN].unsupported


def test_a_setting_of_another_machine_is_a_row_and_the_rest_goes_on():
    found = list(listed("cpu", precision="bf16", attention="flash_attention_2").values())
    assert "CUDA" in found[0].unsupported
    assert found[1].name == search.POSSIBLE
    assert found[1].values | {"precision": "fp32", "attention": "sdpa"} == found[1].values
    assert sum(not one.unsupported for one in found) == 8


keys = st.fixed_dictionaries(
    {
        "precision": st.sampled_from(["auto", "fp32", "tf32", "bf16", "fp16"]),
        "attention": st.sampled_from(["auto", "eager", "sdpa", "flash_attention_2"]),
        "compile": st.booleans(),
        "gradient_checkpointing": st.booleans(),
        "isolate_documents": st.booleans(),
        "optim": st.sampled_from(CHOICES["optim"]),
    }
)


@hypothesis_settings(max_examples=80, deadline=None)
@given(st.sampled_from(["cpu", "T4", "A100"]), keys, st.integers(1, 12), st.integers(1, 12))
def test_one_thing_at_a_time_at_constant_tokens_per_step(name, asked, micro, accumulation):
    found = list(listed(name, micro * accumulation, **asked, **{MICRO: micro}).values())
    base = next((one for one in found if not one.unsupported), found[0])
    assert found.index(base) == (1 if found[0].unsupported else 0)
    for number, one in enumerate(found):
        assert (micro * accumulation) % one.values[MICRO] == 0
        assert one.values not in [other.values for other in found[:number]]
        if not one.unsupported:
            with machine(name):
                assert model.choose_hardware(one.settings).precision == one.values["precision"]
        if SETTING not in one.name and BASELINE not in one.name and one not in found[:2]:
            assert len(changed(one, base)) == 1 or one.name.startswith(("precision: fp32, ", "precision: tf32, "))
    for name in (SETTING, BASELINE):
        assert sum(name in one.name for one in found) == 1


# how a child ends


def child(monkeypatch, code, limit_s=20.0):
    monkeypatch.setattr(search, "COMMAND", [sys.executable, "-I", "-S", "-c", code])
    return search._run_child({"steps": 1}, limit_s)


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ('print("noise"); print(\'{"status": "ok", "tokens_per_second": 5}\')', "ok", None),
        # the figures were printed before the end went wrong
        ('import os; print(\'{"status": "ok"}\', flush=True); os.kill(os.getpid(), 11)', "ok", None),
        ("import os; os.kill(os.getpid(), 9)", "out of memory", "killed"),
        ("import os; os.kill(os.getpid(), 11)", "failed", "-11"),
        ("import sys; sys.exit('terminate called after std::bad_alloc')", "out of memory", "bad_alloc"),
        ("print('nothing useful')", "failed", "it said nothing"),
        ('print(\'{"status": "o\')', "failed", "exit status 0"),
        ("print('[1]'); print(3)", "failed", "exit status 0"),
        ("import sys; sys.stdout.buffer.write(bytes(range(128, 256)))", "failed", "exit status 0"),
        ("pass", "failed", "it said nothing"),
        ("raise ValueError('of this')", "failed", "ValueError: of this"),
        ("import sys; sys.stdin.read(); print('x' * 9999, file=sys.stderr)", "failed", "xxx"),
    ],
)
def test_every_end_of_a_child_is_a_row(monkeypatch, code, status, reason):
    found = child(monkeypatch, code)
    assert found["status"] == status
    if reason:
        assert reason in found["reason"]
        assert "\n" not in found["reason"]
        assert len(found["reason"]) <= 200


def test_a_child_that_takes_too_long_is_stopped(monkeypatch):
    assert child(monkeypatch, "import time; time.sleep(60)", 0.3) == {
        "status": "timed out",
        "reason": "not done after 0 s",
    }


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "out of memory"),
        (MemoryError(), "out of memory"),
        (ImportError("FlashAttention2 has been toggled on, but it cannot be used"), "unsupported"),
        (ParameterError("precision 'bf16' needs an Ampere GPU"), "unsupported"),
        (InvalidCxxCompiler(), "unsupported"),
        (ValueError("two\nlines"), "failed"),
    ],
)
def test_every_error_in_a_child_is_a_row(monkeypatch, error, status):
    def broken(job):
        raise error

    monkeypatch.setattr(trial, "measure", broken)
    found = trial.answer({})
    assert found["status"] == status
    assert found["reason"]
    assert "\n" not in found["reason"]


# the search


@pytest.fixture
def simulated(monkeypatch, tiny_run):
    """`simulate(speed, **overrides)`: a search whose children answer `speed(settings)`: tokens/s, or a whole answer."""

    def simulate(speed, **pretraining):
        def answer(job, limit_s):
            asked.append(job["settings"])
            limits.append(limit_s)
            found = speed(job["settings"])
            if isinstance(found, dict):
                return found
            measured = {"tokens_per_second": float(found), "evaluation_tokens_per_second": 3.0 * found}
            return {"status": "ok", "reason": "", "peak_memory_gib": 1.0, **measured}

        asked, limits = [], []
        monkeypatch.setattr(search, "_run_child", answer)
        monkeypatch.setattr(search, "peak", lambda hardware: Peak(1e9, "made up"))
        return search.search(tiny_run(pretraining=pretraining), 1), asked, limits

    return simulate


NO_MEMORY = {"status": "out of memory", "reason": "too large"}


def test_ratios_share_of_peak_and_columns(simulated):
    table, asked, limits = simulated(lambda s: 100 if s["attention"] == "eager" else 250)
    assert len(asked) == (table.status == "ok").sum() == len(table) - (table.status == "unsupported").sum()
    assert (table[MICRO] * table.accumulation * 64 == 256).all()
    assert table.training_ratio[0] == table.evaluation_ratio[0] == 2.5
    assert table.share_of_peak[0] == pytest.approx(250 * tiny_flops() / 1e9, abs=1e-4)
    assert limits[0] == search.FIRST_LIMIT_S
    # the run takes 12 steps of 256 tokens: a twentieth of it, and twice the time of the first row (none)
    assert limits[1] == pytest.approx(12 * 256 / 250 / 20, abs=0.3)
    assert list(search.claims(table).verdict) == [f"not run ({SETTING}: unsupported)"] * 2


def tiny_flops():
    # 6N + 12 layers x hidden x context, of tests/tiny.py
    count = 2 * 512 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    return 6 * count + 12 * 2 * 32 * 64


def test_where_the_own_setting_does_not_fit_the_search_goes_on_from_a_smaller_micro_batch(simulated):
    def speed(settings):
        return NO_MEMORY if settings[MICRO] > 1 else 10

    table, _, _ = simulated(speed, per_device_train_batch_size=4)
    assert list(table.name[:3]) == [OWN, f"{MICRO}: 2", f"{MICRO}: 1"]
    assert list(table.status[:3]) == ["out of memory", "out of memory", "ok"]
    others = table[3:]
    assert (others[others.status != "unsupported"][MICRO] == 1).sum() == 5
    assert search.best(table)["name"] == f"{MICRO}: 1"
    assert f"--set pretraining.{MICRO}=1" in search.proposal(table)


def test_where_nothing_fits_there_is_a_table_all_the_same(simulated):
    table, asked, _ = simulated(lambda settings: NO_MEMORY)
    assert set(table.status) == {"out of memory", "unsupported"}
    assert len({str(sorted(settings.items())) for settings in asked}) == len(asked)
    assert search.proposal(table) == "No configuration ran."
    with pytest.raises(TTLError, match="too large"):
        search.best(table)


def test_what_gained_is_tried_together(simulated):
    def speed(settings):
        return 100 * (1.5 if settings["compile"] else 1) * (1.2 if settings["optim"] == "adamw_torch" else 1)

    table, _, _ = simulated(speed)
    assert table.name.iloc[-1] == TOGETHER
    assert table.tokens_per_second.iloc[-1] == pytest.approx(180)
    assert list(table.name).count(TOGETHER) == 1
    assert search.best(table)["name"] == TOGETHER


def test_one_gain_alone_is_not_tried_twice(simulated):
    table, asked, _ = simulated(lambda settings: 130 if settings["compile"] else 100)
    assert TOGETHER not in list(table.name)
    assert sum(settings["compile"] for settings in asked) == 1


def test_a_step_larger_than_the_free_memory_is_not_begun(simulated, monkeypatch):
    free = search.psutil.virtual_memory()
    monkeypatch.setattr(search.psutil, "virtual_memory", lambda: free._replace(available=1000))
    table, asked, _ = simulated(lambda settings: 1)
    assert asked == []
    assert table.reason[0].startswith("not run: needs about")
    assert table.status[0] == "out of memory"


def test_no_steps_are_refused(tiny_run):
    with pytest.raises(ParameterError, match="search_steps 0"):
        search.search(tiny_run(), 0)


# what is proposed


def made_table(rows):
    """Rows (tokens per second or None, compile, checkpointing), the file's own first."""
    return pd.DataFrame(
        {
            "name": f"row {number}",
            "status": "failed" if speed is None else "ok",
            "reason": "",
            **{key: None for key in CHOICES},
            "optim": number,
            "compile": compiled,
            "gradient_checkpointing": checkpointing,
            "tokens_per_second": speed,
        }
        for number, (speed, compiled, checkpointing) in enumerate(rows)
    )


row = st.tuples(st.none() | st.integers(90, 130).map(float), st.booleans(), st.booleans())


@given(st.lists(row, min_size=1, max_size=8))
def test_best_is_as_fast_as_any_and_the_simplest_of_those(rows):
    table = made_table(rows)
    ran = table[table.status == "ok"]
    if ran.empty:
        with pytest.raises(TTLError):
            search.best(table)
        return
    found = search.best(table)
    fastest = ran.tokens_per_second.max()
    assert found.tokens_per_second >= 0.97 * fastest
    for at, other in ran[ran.tokens_per_second >= 0.97 * fastest].iterrows():
        assert (found.compile, found.gradient_checkpointing) <= (other.compile, other.gradient_checkpointing)
        if (found.compile, found.gradient_checkpointing) == (other.compile, other.gradient_checkpointing):
            assert found.name == 0 or (at != 0 and found.tokens_per_second >= other.tokens_per_second)


def test_the_proposal_reads_as_what_it_proposes(simulated):
    table, _, _ = simulated(lambda s: 100 + 50 * s["compile"] + 60 * (s["precision"] == "bf16"))
    text = search.proposal(table)
    wanted = {"precision": "bf16", "compile": True}
    assert "210 tokens/s (the file's own: 100)" in text
    assert "changes the precision" in text
    line = next(line for line in text.splitlines() if line.startswith("--set"))
    assert overrides(line.removeprefix("--set ").split(" --set "))["pretraining"] == wanted
    assert yaml.safe_load(text[text.index("pretraining:\n") :])["pretraining"] == wanted


def test_nothing_is_proposed_for_less_than_the_noise(simulated):
    table, _, _ = simulated(lambda s: 100 + 2 * (s["optim"] == "adamw_torch"))
    assert search.best(table)["name"] == OWN
    assert "leave it as it is" in search.proposal(table)


# the real thing


def test_a_trial_runs_the_loops_own_code(tiny_run, monkeypatch):
    run, seen = tiny_run(), []

    def train_step(learner, optimizer, accelerator, data, max_grad_norm):
        seen.append((learner, data))
        return step.train_step_itself(learner, optimizer, accelerator, data, max_grad_norm)

    monkeypatch.setattr(step, "train_step_itself", step.train_step, raising=False)
    monkeypatch.setattr(step, "train_step", train_step)
    monkeypatch.setattr(lean, "make_lean", lambda made: setattr(made, "was_made_lean", True) or made)
    changes = {"isolate_documents": True, "gradient_checkpointing": True, MICRO: 1, "attention": "sdpa"}
    settings = run.params.pretraining.model_copy(update=changes)
    job = {"model": run.params.model.model_dump(), "settings": settings.model_dump(), "vocab_size": 99, "steps": 3}
    found = trial.measure(job)
    # one to warm up, one to tell how many it takes to rise above the noise
    assert len(seen) >= 2 + 3
    learner, data = seen[-1]
    assert isinstance(learner, loss.Learner)
    assert learner.model.was_made_lean
    assert any(getattr(module, "gradient_checkpointing", False) for module in learner.model.modules())
    assert len(data.micro_batches) == 4
    assert data.targets == 4 * 63
    assert data.micro_batches[0]["input_ids"].shape == (1, 64)
    assert data.micro_batches[0]["position_ids"].tolist() == [4 * list(range(16))]
    assert found.keys() == {"tokens_per_second", "evaluation_tokens_per_second", "peak_memory_gib"}


def test_speed_is_tokens_over_the_timed_steps_alone(tiny_run, monkeypatch):
    run = tiny_run()
    # warm-up, one call, those that count
    took, asked = iter([100.0, 1.0, 6.0, 100.0, 0.25, 1.8]), []
    monkeypatch.setattr(trial, "_seconds", lambda call, times: asked.append(times) or next(took))
    job = {"settings": run.params.pretraining.model_dump(), "model": run.params.model.model_dump()}
    found = trial.measure(job | {"vocab_size": 99, "steps": 3})
    assert asked == [1, 1, 3, 1, 1, 6]
    assert found["tokens_per_second"] == 3 * 256 / 6
    assert found["evaluation_tokens_per_second"] == round(6 * 256 / 1.8, 1)


def test_two_real_rows_at_a_tiny_size(tiny_run, monkeypatch, capsys):
    run = tiny_run()
    found = configurations(run.params.pretraining, "cpu", 4)
    kept = [one for one in found if one.name == OWN or SETTING in one.name or BASELINE in one.name]
    monkeypatch.setattr(search, "configurations", lambda *_: list(kept))
    monkeypatch.setattr(search, "_gains", lambda tried: {})
    table = search.search_command(run, 2)
    assert list(table.status) == ["ok", "unsupported", "ok"]
    ran = table[table.status == "ok"]
    assert (ran.tokens_per_second > 0).all()
    assert (ran.evaluation_tokens_per_second > 0).all()
    assert ran.peak_memory_gib.between(0.1, 3).all()
    assert ran.share_of_peak.between(0, 1).all()
    saved = pd.read_csv(run.figures / "03_search.csv")
    assert list(saved.name) == list(table.name)
    assert (run.figures / "03_search.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "not run (paper's setting: unsupported)" in printed
    # nothing was applied, nothing of the run was made
    assert not (run.folder / "03_pretraining").exists()
