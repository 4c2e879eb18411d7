"""Sweeps: names, mistakes found before anything starts, failures that stop nothing, interrupts, a second call."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.tiny import Tiny
from ttl_utils import sweep as sweeps
from ttl_utils.comparison import compare
from ttl_utils.errors import MissingStage, ParameterError, TTLError
from ttl_utils.params import load_params
from ttl_utils.pipeline import overrides
from ttl_utils.run import Run

# a child in the place of `ttl pretrain`: what it was asked for goes to a file, and it does as that file's folder says
CHILD = """
import json, os, sys, time
name = sys.argv[sys.argv.index("--run") + 1]
folder = os.environ["TTL_OUTPUTS"]
print("begun", name, flush=True)
with open(os.path.join(folder, "asked.jsonl"), "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
what = json.load(open(os.path.join(folder, "what.json"))).get(name, "")
if what == "wait":
    try:
        print("waiting", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("\\nttl: saved a checkpoint", file=sys.stderr)
        open(os.path.join(folder, "saved"), "w").close()
        sys.exit(1)
if what == "kill":
    os.kill(os.getpid(), 9)
if what == "crash":
    raise ValueError("no such thing")
if what:
    print("\\nttl: " + what, file=sys.stderr)
    sys.exit(1)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sweeps start the stand-in; returns the file that says what becomes of a run (by its name)."""
    script, outputs = tmp_path / "child.py", tmp_path / "outputs"
    script.write_text(CHILD)
    outputs.mkdir(exist_ok=True)
    monkeypatch.setattr(sweeps, "PRETRAIN", (sys.executable, str(script), "pretrain"))
    (outputs / "what.json").write_text("{}")
    return outputs / "what.json"


def asked(what: Path) -> list[list[str]]:
    path = what.with_name("asked.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def rates(*values: float) -> list[dict]:
    return [{"pretraining": {"learning_rate": value}} for value in values]


# names

values = st.one_of(st.integers(), st.floats(allow_nan=False), st.text(max_size=8), st.booleans(), st.none())
items = st.lists(st.dictionaries(st.sampled_from("abcde"), st.dictionaries(st.text(max_size=9), values)), max_size=6)


def test_runs_are_named_for_what_is_changed() -> None:
    grid = [{"pretraining": {"learning_rate": rate, "seed": seed}} for rate in (1e-3, 3e-5) for seed in (1, 2)]
    assert sweeps._names("nano", grid) == [
        "nano-learning_rate=0.001-seed=1",
        "nano-learning_rate=0.001-seed=2",
        "nano-learning_rate=3e-05-seed=1",
        "nano-learning_rate=3e-05-seed=2",
    ]
    two = [{"seed": 1}, {"pretraining": {"seed": 1, "compile": True}}, {}]
    # a key of the same name in two places is named in full
    assert sweeps._names("x", two) == ["x-seed=1", "x-pretraining.seed=1-compile=true", "x"]
    odd = [{"pretraining": {"prompts": ["a/b", "../c"]}}, {"pretraining": {"copy_to": "/mnt/x"}}]
    assert sweeps._names("x", odd) == ["x-prompts=_a_b_.._c_", "x-copy_to=_mnt_x"]
    # a disk may not tell capitals apart
    one, other = sweeps._names("x", [{"pretraining": {"init_from": name}} for name in ("a", "A")])
    assert one.startswith("x-init_from=a-") and one.casefold() != other.casefold()


@settings(deadline=None)
@given(items)
def test_names_are_plain_folders_and_differ_where_the_items_do(items: list[dict]) -> None:
    names = sweeps._names("nano", items)
    for name in names:
        assert Path(name).name == name and name.startswith("nano") and 0 < len(name) <= 120
    for name, item in zip(names, items, strict=True):
        for other, there in zip(names, items, strict=True):
            if json.dumps(item, sort_keys=True) != json.dumps(there, sort_keys=True) and name == other:
                # empty sections change nothing
                assert dict(sweeps.leaves(item)) == dict(sweeps.leaves(there))


@settings(deadline=None)
@example("\x85")
@example(1e-05)
@given(values.filter(lambda value: value not in (float("inf"), -float("inf"))))
def test_what_an_item_says_arrives_as_it_was(value: object) -> None:
    item = sweeps.Item("n", {"pretraining": {"learning_rate": value}}, None)
    *_, flag, text = sweeps._arguments("nano", "nano", item)
    assert flag == "--set" and overrides([text]) == {"pretraining": {"learning_rate": value}}


# one after another


def test_every_item_is_a_process_of_its_own_on_one_base(child: Path, tiny_prepared, tiny: Tiny) -> None:
    tiny_prepared()
    outcomes = sweeps.sweep(tiny.file, rates(0.01, 1e-5))
    names = ["tiny-learning_rate=0.01", "tiny-learning_rate=1e-05"]
    assert [(outcome.run, outcome.state, outcome.message) for outcome in outcomes] == [
        (n, "finished", "") for n in names
    ]
    assert asked(child) == [
        ["pretrain", tiny.file, "--run", name, "--base", "tiny", "--set", f"pretraining.learning_rate={rate}"]
        for name, rate in zip(names, ("0.01", "1.0e-05"), strict=True)
    ]


def test_a_failure_is_a_line_and_stops_nothing(child: Path, tiny_prepared, tiny: Tiny, tmp_path: Path, capfd) -> None:
    tiny_prepared()
    names = [f"tiny-seed={seed}" for seed in range(4)]
    child.write_text(
        json.dumps({names[0]: "the loss is not finite:\nlower the rate", names[1]: "kill", names[2]: "crash"})
    )
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump([{"pretraining": {"seed": seed}} for seed in range(4)]))
    with pytest.raises(TTLError, match="3 of 4 runs failed: tiny-seed=0, tiny-seed=1, tiny-seed=2"):
        sweeps.sweep_command(tiny.file, str(file))
    lines = capfd.readouterr().out.splitlines()
    assert len(asked(child)) == 4 and f"begun {names[3]}" in lines
    table = lines[-6:]
    assert table[0].startswith(f"{names[0]}  failed in 0:0") and table[0].endswith("not finite: lower the rate")
    assert "killed (signal 9)" in table[1] and "ValueError: no such thing" in table[2]
    assert table[3].startswith(f"{names[3]}  finished in")
    assert table[-1] == f"compare them: ttl compare {names[3]}"


def test_what_is_finished_is_reused_and_what_was_begun_goes_on(child: Path, tiny_prepared, tiny: Tiny) -> None:
    base = tiny_prepared()
    for rate, done in ((0.01, True), (0.02, False)):
        run = Run(
            load_params({"file": tiny.file, "base": "tiny", "run": f"tiny-learning_rate={rate}", **rates(rate)[0]})
        )
        stage = run.stage("03_pretraining")
        stage.folder.mkdir(parents=True)
        text = json.dumps({"identity": stage.identity(), "started": "x", "code": None, "finished": "x"})
        (stage.folder / ("manifest.json" if done else "stage.json")).write_text(text)
    outcomes = sweeps.sweep(tiny.file, rates(0.01, 0.02))
    assert [outcome.state for outcome in outcomes] == ["reused", "finished"]
    assert [arguments[3] for arguments in asked(child)] == ["tiny-learning_rate=0.02"]
    # the same parameters as the base's own stage 03: it is that run's
    stage = base.stage("03_pretraining")
    stage.folder.mkdir()
    text = json.dumps({"identity": stage.identity(), "started": "x", "code": None, "finished": "x"})
    (stage.folder / "manifest.json").write_text(text)
    own = base.params.pretraining.learning_rate
    (outcome,) = sweeps.sweep(tiny.file, rates(own))
    assert (outcome.run, outcome.state) == ("tiny", "reused") and len(asked(child)) == 1


def test_an_interrupt_reaches_the_run_and_ends_the_sweep(child: Path, tiny_prepared, tiny: Tiny) -> None:
    tiny_prepared()
    child.write_text(json.dumps({"tiny-learning_rate=0.01": "wait"}))
    # as a terminal does it: the sweep and its run are one group of processes
    code = f"""
from ttl_utils import sweep
sweep.PRETRAIN = {sweeps.PRETRAIN!r}
try:
    sweep.sweep({tiny.file!r}, {rates(0.01, 0.02)!r})
except KeyboardInterrupt:
    print("the sweep was interrupted")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True, env=os.environ.copy()
    )
    for line in process.stdout:
        if line.startswith("waiting"):
            break
    os.killpg(process.pid, signal.SIGINT)
    rest = process.stdout.read()
    process.wait(20)
    assert child.with_name("saved").exists() and len(asked(child)) == 1
    # what the run says at that very moment may be lost, its checkpoint is not
    assert rest.endswith("the sweep was interrupted\n")


# mistakes


def test_every_mistake_is_found_before_anything_starts(child: Path, tiny_prepared, tiny: Tiny) -> None:
    tiny_prepared()
    wrong = [
        *rates(0.01),
        {"pretraining": {"lerning_rate": 0.1}},
        {"pretraining": {"learning_rate": "1e-3"}},
        *rates(0.01),
        {"run": "mine"},
        "learning_rate",
        {"pretraining": {"tokens_per_step": 7}},
        {"pretraining": {"learning_rate": 0.02, "weight_decay": 0.01}},
        # the file's own value, said again
        {"pretraining": {"weight_decay": 0.01, "learning_rate": 0.02}},
    ]
    with pytest.raises(ParameterError) as caught:
        sweeps.sweep(tiny.file, wrong)
    lines = str(caught.value).splitlines()
    said = {
        2: "did you mean 'learning_rate'",
        3: "write 0.001 without quotes",
        4: "the same parameters as item 1",
        5: "run: not for an item to say",
        6: "expected keys and values",
        7: "not a multiple",
        9: "the same parameters as item 8",
    }
    assert len(lines) == len(said)
    for line, (number, text) in zip(lines, said.items(), strict=True):
        assert line.startswith(f"item {number}: ") and text in line
    with pytest.raises(ParameterError, match="no items"):
        sweeps.sweep(tiny.file, [])
    assert not asked(child)


def test_what_is_missing_is_said_with_the_command_that_makes_it(child: Path, tiny_run, tiny: Tiny) -> None:
    tiny_run()
    with pytest.raises(MissingStage, match=r"run 'tiny', whose stage 02 .*`ttl run \S+tiny.yaml --to 02`"):
        sweeps.sweep(tiny.file, rates(0.01))
    with pytest.raises(MissingStage, match=r"`ttl run \S+tiny.yaml --run other --to 02`"):
        sweeps.sweep(tiny.file, rates(0.01), base="other")
    assert not asked(child)


def test_another_seed_or_corpus_needs_stages_of_its_own(child: Path, tiny_prepared, tiny: Tiny) -> None:
    tiny_prepared()
    with pytest.raises(TTLError) as caught:
        sweeps.sweep(tiny.file, [*rates(0.01), {"seed": 7}, {"data": {"test_share": 0.2}}])
    first, second = str(caught.value).splitlines()
    assert first.startswith("tiny-seed=7: stage 02 of run 'tiny' is of another seed") and "pretraining.seed" in first
    assert f"`ttl run {tiny.file} --run tiny-seed=7 --base tiny --set seed=7 --to 02`" in first
    assert second.startswith("tiny-test_share=0.2: ")
    # a folder of that name that was begun otherwise
    folder = Run(load_params({"file": tiny.file, "run": "tiny-learning_rate=0.01"})).folder / "03_pretraining"
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text(json.dumps({"identity": {"seed": 1}, "started": "x"}))
    with pytest.raises(TTLError, match="tiny-learning_rate=0.01: 03_pretraining of run .* was begun otherwise"):
        sweeps.sweep(tiny.file, rates(0.01))
    assert not asked(child)


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "cannot be read"), ("{a: 1}", "expected a list of overrides.*found dict"), ("- {a: [}", "not readable")],
)
def test_a_file_that_is_no_list_is_told(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "sweep.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ParameterError, match=said):
        sweeps.sweep_command("nano", str(path))


def test_a_real_run_of_a_sweep_uses_the_base_s_corpus_and_tokenizer(tiny_prepared, tiny: Tiny) -> None:
    outputs = tiny_prepared().folder.parent
    items = [{"pretraining": {"max_steps": 2, "eval_tokens": 128, "seed": 1}}]
    (outcome,) = sweeps.sweep(tiny.file, items)
    assert (outcome.run, outcome.state) == ("tiny-max_steps=2-eval_tokens=128-seed=1", "finished"), outcome
    run = outputs / outcome.run
    assert {path.name for path in run.glob("0*")} == {"03_pretraining"} and (run / "energy.jsonl").is_file()
    row = compare([outcome.run], outputs).table.iloc[0]
    assert (row.state, row.steps) == ("finished", 2) and 5 < row.train_loss < 8 and row.duration_s > 0
    (again,) = sweeps.sweep(tiny.file, items)
    assert (again.run, again.state) == (outcome.run, "reused")
