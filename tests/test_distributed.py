"""Several processes give what one gives; what was asked for runs, or it stops; kills change nothing."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from tests.driver import Driver
from ttl_utils import carbon, checkpoints, distributed
from ttl_utils.errors import TTLError
from ttl_utils.files import sha256
from ttl_utils.ledger import stage_energy, stage_totals
from ttl_utils.model import Hardware
from ttl_utils.params import bundled
from ttl_utils.records import read_records
from ttl_utils.session import Session
from ttl_utils.training import clean_stop

CPU = Hardware("cpu", "fp32", "sdpa")
STEPS = 24
PRETRAINING = {"max_steps": STEPS, "logging_steps": 1, "save_steps": 3, "eval_steps": 8, "eval_tokens": 256}


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory, request):
    """`start(run, ...)` a process that makes stage 03, `stage(run)` its folder; `alone` has been made in one go."""
    if not hasattr(os, "fork"):
        pytest.skip("these processes are forked")
    outputs = tmp_path_factory.mktemp("outputs")
    # it imports while the corpus is made
    driver = Driver(outputs, tiny.cache)
    shutil.copytree(
        request.getfixturevalue("tiny_done").folder, outputs / "base", ignore=shutil.ignore_patterns(".locks")
    )

    def start(run, processes=1, before="", pretraining=None, **environment):
        given = {"file": tiny.file, "run": run, "base": "base", "pretraining": PRETRAINING | (pretraining or {})}
        return driver.start(given, processes, before, **environment)

    def stage(run):
        return outputs / run / "03_pretraining"

    def records(run):
        return read_records(stage(run) / "metrics.jsonl")

    assert driver.until(start("alone")) == 0, driver.said()
    yield SimpleNamespace(start=start, until=driver.until, said=driver.said, stage=stage, records=records)
    driver.close()


def fsdp_environment():
    """What `accelerate launch` gives to each process that it starts by our configuration file."""
    file = str(bundled("params") / "accelerate" / "fsdp.yaml")
    given = launch_command_parser().parse_args(["--config_file", file, "--main_process_port", "0", "-m", "ttl_utils"])
    made = prepare_multi_gpu_env(_validate_launch_command(given)[0])
    return {name: value for name, value in made.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def weights(place, run):
    return load_file(place.stage(run) / "model" / "model.safetensors")


def newest(place, run):
    return checkpoints.step_of(checkpoints.newest_whole(place.stage(run) / "checkpoints"))


def assert_same_within_rounding(place, run):
    """Curve, evaluations, samples, weights and the final moments are those of the run alone."""
    pairs = list(zip(place.records(run), place.records("alone"), strict=True))
    for row, expected in pairs:
        assert (row["step"], row["tokens"]) == (expected["step"], expected["tokens"])
        for key in {"loss", "validation_loss"} & expected.keys():
            assert row[key] == pytest.approx(expected[key], abs=1e-4), (row, expected)
    assert {row["step"] for row, _ in pairs if "loss" in row} == set(range(1, STEPS + 1))
    made, expected = weights(place, run), weights(place, "alone")
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(made[name], value, rtol=1e-3, atol=1e-4)
    moments = [
        load_file(place.stage(name) / "checkpoints" / f"step-{STEPS:07}" / checkpoints.OPTIMIZER)
        for name in (run, "alone")
    ]
    assert moments[0].keys() == moments[1].keys()
    for name, value in moments[1].items():
        torch.testing.assert_close(moments[0][name], value, rtol=1e-2, atol=1e-6)


# several processes


def test_two_processes_stop_together_and_one_or_two_go_on_with_the_same_curve(place):
    def stop(processes, records):
        pid = place.start("changing", processes)
        assert place.until(pid, lambda: len(place.records("changing")) >= records) is None, place.said()
        os.kill(pid, signal.SIGTERM)
        # not 0: a launcher or a script that goes on would take the run for finished
        assert place.until(pid) == 3, place.said()
        return newest(place, "changing")

    first = stop(1, 3)
    # to the launcher, which passes it on: no process may stop a step before the other
    second = stop(2, first + 5)
    assert first < second < STEPS
    assert f"interrupted (SIGTERM); step {second} is saved" in place.said()
    assert place.until(place.start("changing")) == 0, place.said()
    assert_same_within_rounding(place, "changing")


def test_the_process_that_is_told_stops_the_others_too(place):
    pids = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        shared["MASTER_PORT"] = str(free.getsockname()[1])
    for rank in "10":
        pids.append(place.start("told", pretraining={"logging_steps": 4}, **shared, RANK=rank, LOCAL_RANK=rank))
    assert place.until(pids[0], lambda: len(place.records("told")) >= 2) is None, place.said()
    os.kill(pids[0], signal.SIGTERM)
    assert [place.until(pid) for pid in pids] == [3, 3], place.said()
    step = newest(place, "told")
    assert step % 4 == 0
    for why in ("it was interrupted (SIGTERM)", "another process was interrupted"):
        assert f"{why}; step {step} is saved" in place.said()


# without GPUs, FSDP 2 itself runs on a CPU; Accelerate asks for a GPU, and so do we
SHARDS = """
from accelerate import DistributedType
from accelerate.state import PartialState
from ttl_utils import distributed, session

distributed.check_launcher = lambda hardware: None
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
kept = session.prepare

def prepare(accelerator, *given):
    learner, *made = kept(accelerator, *given)
    print("shards:", *{type(weights).__name__ for weights in learner.parameters()}, flush=True)
    return learner, *made

session.prepare = prepare
"""


def test_shards_learn_the_same_and_their_checkpoints_are_whole(place):
    launcher = fsdp_environment()
    # two micro-batches a step on each process
    rows = {"per_device_train_batch_size": 1}
    pid = place.start("shards", 2, SHARDS, rows, **launcher)
    assert place.until(pid, lambda: len(place.records("shards")) >= 5) is None, place.said()
    os.kill(pid, signal.SIGTERM)
    assert place.until(pid) == 3, place.said()
    assert 0 < newest(place, "shards") < STEPS
    assert place.until(place.start("shards", 2, SHARDS, rows, **launcher)) == 0, place.said()
    assert set(re.findall("shards: .*", place.said())) == {"shards: DTensor"}
    assert_same_within_rounding(place, "shards")


# what was asked for runs, or it stops


@pytest.fixture
def launcher(monkeypatch):
    """`launcher(NAME="value")`: the environment that a launcher leaves, and nothing else of that kind."""
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "MASTER_"))]:
        monkeypatch.delenv(name)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return lambda **given: [monkeypatch.setenv(name, value) for name, value in given.items()]


def launched(*options):
    """The environment that `accelerate launch` would give to a process it starts itself."""
    given = launch_command_parser().parse_args([*options, "-m", "ttl_utils"])
    return prepare_simple_launcher_cmd_env(_validate_launch_command(given)[0])[1]


CUDA = Hardware("cuda", "bf16", "sdpa")


def test_one_process_of_accelerate_launch_is_fine(launcher):
    for options in ((), ("--cpu",), ("--cpu", "--num_processes", "1")):
        launcher(**launched(*options))
        assert distributed.make_accelerator(CPU).num_processes == 1


def test_accelerate_launch_with_processes_that_do_not_start(launcher, monkeypatch):
    arguments = ["pretrain", "nano", "--run", "two words"]
    monkeypatch.setattr(sys, "argv", ["ttl_utils/__main__.py", *arguments])
    for options in (("--cpu", "--num_processes", "2"), ("--num_processes", "2")):
        launcher(**launched(*options))
        with pytest.raises(TTLError, match="asked for several processes and started one") as caught:
            distributed.make_accelerator(CPU)
    line = shlex.split(str(caught.value).partition("start them with: torchrun ")[2].replace(" N ", " 2 "))
    given = get_args_parser().parse_args(line)
    assert (given.nproc_per_node, given.module, given.training_script) == ("2", True, "ttl_utils")
    assert given.training_script_args == arguments
    # torchrun says how many it started
    launcher(WORLD_SIZE="2")
    distributed.check_launcher(CPU)


def test_a_precision_that_the_parameters_do_not_give(launcher):
    launcher(**launched("--cpu", "--mixed_precision", "bf16"))
    with pytest.raises(TTLError, match="asks for mixed precision bf16, and the parameters give fp32"):
        distributed.make_accelerator(CPU)
    assert distributed.make_accelerator(Hardware("cpu", "bf16", "sdpa")).mixed_precision == "bf16"


def test_a_device_that_the_parameters_do_not_give(launcher):
    launcher(**launched("--cpu"))
    with pytest.raises(TTLError, match="the parameters put the model on cuda, and the launcher on cpu"):
        distributed.make_accelerator(Hardware("cuda", "fp32", "sdpa"))


@pytest.mark.parametrize(
    ("hardware", "given", "said"),
    [
        (CPU, {"WORLD_SIZE": "2"}, "FSDP needs several CUDA GPUs"),
        (CUDA, {}, "FSDP needs several CUDA GPUs"),
        (CUDA, {"WORLD_SIZE": "2", "FSDP_VERSION": "1"}, "in version 2 without offloading"),
        (CUDA, {"WORLD_SIZE": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "in version 2 without offloading"),
        (CUDA, {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED"),
    ],
)
def test_shards_of_another_kind_than_ours(launcher, hardware, given, said):
    launcher(**{"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **given})
    with pytest.raises(TTLError, match=said):
        distributed.make_accelerator(hardware)


def test_the_configuration_file_for_shards_is_one_that_runs(launcher):
    launcher(**fsdp_environment(), WORLD_SIZE="8")
    distributed.check_launcher(CUDA)


def test_shards_round_no_loss_and_no_sum_of_gradients(launcher, monkeypatch):
    launcher(**fsdp_environment())
    monkeypatch.setattr(distributed, "check_launcher", lambda hardware: None)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(AcceleratorState, "_reset_state", lambda **_: None)
    PartialState(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MULTI_GPU)
    accelerator = distributed.make_accelerator(Hardware("cpu", "bf16", "sdpa"))
    assert distributed.is_sharded(accelerator)
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (None, None, None)


def test_processes_that_see_other_things_do_not_begin(monkeypatch):
    two = SimpleNamespace(num_processes=2)
    others = [{"step": 6, "data": "a"}, {"step": 6, "data": "a"}, {"step": 0, "data": "a"}]
    monkeypatch.setattr(distributed, "gather_object", lambda mine: others)
    with pytest.raises(TTLError, match="process 2 has step 0 and process 0 has 6.*that every machine sees"):
        distributed.check_same(two, others[0])
    del others[2]
    distributed.check_same(two, others[0])


def test_slow_steps_are_not_all_waited_for_when_a_process_is_told_to_stop():
    asked = []

    def reduce(figures, how):
        asked.append(figures)
        # another process with the same times, which is not told to stop
        return figures * torch.tensor([1.0, 2.0]) if figures.ndim else figures

    accelerator = SimpleNamespace(num_processes=2, device="cpu", reduce=reduce)
    energy = SimpleNamespace(energy_kwh=0.25)
    session = SimpleNamespace(accelerator=accelerator, main=False, loop=SimpleNamespace(energy=energy), logged=4)
    Session._gather_figures(session, 8, 4 * 1.6)
    # 5 s, of steps of 1.6 s
    assert (session.logged, session.agree_every, session.elsewhere_kwh) == (8, 3, 0.25)
    answers = [Session.agree(session, "told", step, logged=step == 11) for step in range(9, 13)]
    assert answers == ["told", "", "told", "told"]
    assert len(asked) == 1 + 3
    # the first process's own energy is no other machine's
    session.main = True
    Session._gather_figures(session, 12, 0.001)
    assert session.elsewhere_kwh == 0
    assert session.agree_every > 1000


def test_no_process_ends_while_the_first_one_writes():
    # a launcher would see it end, and half a minute later kill the one that writes
    order = []
    accelerator = SimpleNamespace(wait_for_everyone=lambda: order.append("all"))
    with Session._clock_stopped(SimpleNamespace(interval_s=0.0, resumed_at=0.0, accelerator=accelerator)):
        order.append("write")
    assert order == ["all", "write", "all"]


def test_a_signal_that_comes_twice_is_one_unless_it_is_an_interrupt():
    with clean_stop() as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert stop() == "it was interrupted (SIGTERM)"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# one meter a machine


@pytest.mark.parametrize(("rank", "local_rank", "meters"), [("0", "0", 1), ("1", "1", 0), ("8", "0", 1)])
def test_each_machine_has_one_meter(tiny_prepared, monkeypatch, rank, local_rank, meters):
    started = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)

    class Tracker:
        _conf, _hardware = {}, []

        def __init__(self, **_):
            started.append(self)

        def start(self):
            pass

        def flush(self):
            return 1.0

        stop = flush

    monkeypatch.setattr(carbon.codecarbon, "OfflineEmissionsTracker", Tracker)
    stage = tiny_prepared().stage("03_pretraining")
    with stage.work():
        assert len(started) == meters
        # the first process of all holds the folder
        assert (stage.folder / "stage.json").exists() == (rank == "0")


def test_machines_spend_energy_each_and_the_time_once(tmp_path):
    ledger = tmp_path / "energy.jsonl"
    row = {"stage": "03_pretraining", "time": "2026-01-01T00:00:00+00:00", "emissions_kg": 0.5}
    row |= {key: "measured" for key in ("cpu_method", "gpu_method", "ram_method", "country_iso_code")}
    row |= {"cpu_kwh": 1.0, "gpu_kwh": 0.0, "ram_kwh": 0.0, "energy_kwh": 1.0}
    rows = [
        {**row, "session": "a", "rank": 0, "duration_s": 50.0},
        {**row, "session": "b", "rank": 8, "duration_s": 99.0},
        {**row, "session": "a", "rank": 0, "duration_s": 100.0},
        # one of before there were ranks
        {**row, "session": "c", "duration_s": 10.0},
    ]
    ledger.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert stage_energy(ledger, "03_pretraining") == (3.0, 1.5, 110.0)
    totals = stage_totals(ledger).iloc[0]
    assert (totals.energy_kwh, totals.duration_s) == (3.0, 110.0)
    assert totals.mean_watts == pytest.approx(3.0 * 3.6e6 / 110)


# kills


def without_times(row):
    return {key: row[key] for key in row if key not in ("tokens_per_second", "share_of_peak", "data_share")}


def kill_while_writing(place, run, pid):
    """Kill it with a checkpoint half written: stopped first, to be sure that it still is."""
    folder = place.stage(run) / "checkpoints"
    while True:
        assert place.until(pid, lambda: any(folder.glob(".step-*.partial"))) is None, place.said()
        os.kill(pid, signal.SIGSTOP)
        if half := list(folder.glob(".step-*.partial")):
            os.kill(pid, signal.SIGKILL)
            return half[0]
        os.kill(pid, signal.SIGCONT)


def test_five_kills_change_no_byte(place):
    choice = random.Random(seed := random.randrange(10**6))
    print(f"seed {seed}")
    # before the first checkpoint, and then with some progress between kills; the third while one is written
    at = choice.randint(1, 2)
    for number in range(5):
        pid = place.start("killed")
        assert place.until(pid, lambda at=at: len(place.records("killed")) >= at) is None, place.said()
        if number == 2:
            half = kill_while_writing(place, "killed", pid)
        else:
            time.sleep(choice.random() * 0.03)
            os.kill(pid, signal.SIGKILL)
        assert place.until(pid) == -signal.SIGKILL
        assert not (place.stage("killed") / "manifest.json").exists()
        if number == 2:
            assert half.is_dir()
        at = len(place.records("killed")) + choice.randint(1, 3)
    assert place.until(place.start("killed")) == 0, place.said()
    for name in ("model/model.safetensors", "samples.jsonl"):
        assert sha256(place.stage("killed") / name) == sha256(place.stage("alone") / name), name
    found, expected = (list(map(without_times, place.records(run))) for run in ("killed", "alone"))
    assert found == expected
    assert not list(place.stage("killed").rglob("*partial*"))
    # what would be gone on from is the same too
    last = f"checkpoints/step-{STEPS:07}/checkpoint.json"
    hashes = [json.loads((place.stage(run) / last).read_text()) for run in ("killed", "alone")]
    assert {key: value for key, value in hashes[0].items() if key != "state.json"}.items() <= hashes[1].items()
