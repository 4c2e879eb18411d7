"""The smoke set is well-formed, the harness scores choices as the model does, and nothing is scored twice."""

from __future__ import annotations

import json
import socket
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lm_eval
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.test_scoring import byte_tokenizer, tiny_model
from ttl_utils import checkpoints, harness
from ttl_utils.errors import TTLError
from ttl_utils.harness import over_checkpoints, run_harness, write_harness
from ttl_utils.scoring import Scorer
from ttl_utils.task_files import TASKS, Opened, Wanted, open_task

ITEMS = [json.loads(line) for line in (TASKS / "ttl_smoke_pt.jsonl").read_text(encoding="utf-8").splitlines()]
SMOKE = Wanted("ttl_smoke_pt", "ttl_smoke_pt", 0, None)
SHOTS = Wanted("paper/smoke", "ttl_smoke_pt", 2, "paper")
ABOUT = {"model": "tiny", "weights": "a" * 64, "revision": None}
CHANGING = {"duration_s", "scored"}
Score = Callable[..., dict[str, dict]]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """An attempt to connect fails the test; the hub is declared offline, so nothing waits for retries."""
    attempts = []

    def refuse(*args: Any, **_: Any):
        attempts.append(args)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.delenv("TTL_MIRROR", raising=False)
    yield
    assert not attempts


@pytest.fixture
def score(tmp_path: Path) -> Score:
    """`run_harness` on a few items, its cache in this test's folder."""

    def run(model: Any = None, items: Any = (SMOKE,), tokenizer: Any = None, **options: Any) -> dict[str, dict]:
        options = {"batch_size": 4, "device": "cpu", "limit": 4, "seed": 42, "cache": tmp_path / "scores"} | options
        about = options.pop("about", ABOUT)
        return run_harness(model or tiny_model(), tokenizer or byte_tokenizer(), items, about=about, **options)

    return run


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that lm-eval was asked for, as they come; "after N: interrupt" among them stops it there."""
    names, evaluate = [], lm_eval.evaluate

    def counting(lm: Any, tasks: dict, **options: Any) -> Any:
        stop = f"after {len(names) - 1}: interrupt"
        if stop in names:
            names.remove(stop)
            raise KeyboardInterrupt
        [(name, task)] = tasks["tasks"].items()
        names.append(f"{name} {task.config.num_fewshot}")
        return evaluate(lm, tasks, **options)

    monkeypatch.setattr(lm_eval, "evaluate", counting)
    return names


def prompt(item: dict) -> str:
    return f"Pergunta: {item['question']}\nResposta:"


def choice_lengths(item: dict) -> list[int]:
    return [len(text) for text in item["choices"]["text"]]


def accuracy(predict: Callable[[dict], int]) -> float:
    """Share of items where `predict(item)` gives the index of the right choice."""
    return sum("ABCD"[predict(item)] == item["answerKey"] for item in ITEMS) / len(ITEMS)


def log_likelihood(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, continuation: str) -> float:
    """Computed without the harness: one text, no padding, exactly one BOS in front."""
    encode = tokenizer.backend_tokenizer.encode
    before, after = (encode(part, add_special_tokens=False).ids for part in (text, continuation))
    ids = torch.tensor([[tokenizer.bos_token_id, *before, *after]])
    with torch.no_grad():
        log_probs = model(ids).logits[0, :-1].float().log_softmax(-1)
    return float(log_probs.gather(1, ids[0, 1:, None])[-len(after) :].sum())


def steady(rows: dict[str, dict]) -> dict[str, dict]:
    return {key: {name: value for name, value in row.items() if name not in CHANGING} for key, row in rows.items()}


def test_items_are_well_formed_and_unique():
    assert len(ITEMS) == 48
    for item in ITEMS:
        assert set(item) == {"id", "question", "choices", "answerKey", "topic"}
        assert item["choices"]["label"] == list("ABCD")
        assert len({text.strip().lower() for text in item["choices"]["text"]}) == 4
        assert all(text and text == text.strip() for text in [*item["choices"]["text"], item["question"]])
    for key in ("id", "question"):
        assert len({item[key] for item in ITEMS}) == 48


def test_answers_are_balanced_and_length_gives_nothing_away():
    assert Counter(item["answerKey"] for item in ITEMS) == dict.fromkeys("ABCD", 12)
    by_topic = Counter((item["topic"], item["answerKey"]) for item in ITEMS)
    assert set(by_topic.values()) == {2} and len(by_topic) == 24
    lengths = [choice_lengths(item) for item in ITEMS]
    right = [row["ABCD".index(item["answerKey"])] for row, item in zip(lengths, ITEMS, strict=True)]
    assert abs(sum(right) / 48 - (sum(map(sum, lengths)) - sum(right)) / 144) < 0.5
    assert accuracy(lambda item: choice_lengths(item).index(max(choice_lengths(item)))) < 0.35
    assert accuracy(lambda item: choice_lengths(item).index(min(choice_lengths(item)))) < 0.35


def test_a_model_that_knows_scores_one(score: Score):
    # another kind than Llama, whose forward can be told what to answer
    model = GPT2LMHeadModel(GPT2Config(vocab_size=264, n_positions=512, n_embd=8, n_layer=1, n_head=1))
    tokenizer, known = byte_tokenizer(), {}
    for item in ITEMS:
        answer = item["choices"]["text"]["ABCD".index(item["answerKey"])]
        ids = tokenizer(f"{prompt(item)} {answer}")["input_ids"]
        known[tuple(tokenizer(prompt(item))["input_ids"])] = ids

    def forward(input_ids: torch.Tensor) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, 264)
        for row, ids in enumerate(input_ids.tolist()):
            # found only where the prompt begins with one BOS and goes on as the task's file says
            answer = next(full for start, full in known.items() if tuple(ids[: len(start)]) == start)
            for at, token in enumerate(answer[1:]):
                logits[row, at : at + 1, token] = 50.0
        return SimpleNamespace(logits=logits)

    model.forward = forward
    assert score(model, limit=None)["ttl_smoke_pt"]["value"] == 1.0


def test_uniform_model_scores_what_lengths_give(score: Score):
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)

    def most_likely_per_character(item: dict) -> int:
        texts = item["choices"]["text"]
        values = [-len(f" {text}".encode()) / len(text) for text in texts]
        return values.index(max(values))

    row = score(model, limit=None)["ttl_smoke_pt"]
    assert row["value"] == pytest.approx(accuracy(most_likely_per_character))
    assert row["chance"] == row["constant_answer"] == 0.25
    assert (row["metric"], row["samples"], row["truncated"]) == ("acc_norm", 48, 0)


def test_value_equals_direct_scoring(score: Score):
    model, tokenizer = tiny_model(), byte_tokenizer()

    def direct(item: dict) -> int:
        texts = item["choices"]["text"]
        values = [log_likelihood(model, tokenizer, prompt(item), f" {t}") / len(t) for t in texts]
        return values.index(max(values))

    assert score(model, tokenizer=tokenizer, limit=None)["ttl_smoke_pt"]["value"] == pytest.approx(accuracy(direct))


class Energy:
    """As carbon's: kWh so far, asked for by `sample`."""

    energy_kwh = 1.0

    def sample(self) -> float:
        self.energy_kwh += 0.25
        return self.energy_kwh


def test_a_row_says_all_that_is_needed_to_repeat_it(score: Score, capfd: pytest.CaptureFixture):
    model, tokenizer = tiny_model().train(), byte_tokenizer()
    row = score(model, (SHOTS,), tokenizer, energy=Energy(), label="tasks")["paper/smoke"]
    # the caller's objects are left as they were
    assert model.training and tokenizer.pad_token is None
    out, err = capfd.readouterr()
    first, *_, last = err.splitlines()
    # seen while lm-eval's own bars are not
    assert out == "" and first.startswith("tasks: 0 of 1 · paper/smoke ") and last.startswith("tasks: 1 of 1")
    assert all(line.startswith("tasks: ") for line in err.splitlines())
    assert row | ABOUT | {"task": "ttl_smoke_pt", "key": "paper/smoke", "protocol": "paper"} == row
    assert (row["num_fewshot"], row["samples"], row["seed"], row["limit"]) == (2, 4, 42, 4)
    assert (row["batch_size"], row["device"], row["dtype"], row["bos"]) == (4, "cpu", "float32", True)
    assert row["harness_version"] == lm_eval.__version__ and row["status"] == "done"
    assert row["energy_kwh"] == 0.25 and row["duration_s"] > 0 and 0 <= row["value"] <= 1 and row["stderr"] >= 0
    for name in ("dataset", "from_mirror", "version", "metric", "truncated", "chance", "constant_answer"):
        assert name in row
    assert json.loads(json.dumps(row)) == row


def test_without_bos_or_energy_the_row_says_so(score: Score):
    row = score(tiny_model().to(torch.bfloat16), tokenizer=byte_tokenizer("$A"))["ttl_smoke_pt"]
    assert (row["bos"], row["energy_kwh"], row["dtype"]) == (False, None, "bfloat16")


def test_worked_examples_follow_the_seed_whatever_was_scored_before(score: Score, tmp_path: Path):
    rows = [score(items=items, cache=tmp_path / str(n))[SHOTS.key] for n, items in enumerate([[SHOTS], [SMOKE, SHOTS]])]
    assert steady({"": rows[0]}) == steady({"": rows[1]})


@pytest.mark.parametrize("context", [96, 16])
def test_prompts_that_do_not_fit_are_scored_and_counted(score: Score, context: int):
    # 16: too short for any question
    row = score(tiny_model(context), (SHOTS,))[SHOTS.key]
    assert (row["status"], row["samples"], row["truncated"]) == ("done", 4, 4)
    assert score(tiny_model(512), (SMOKE,), about=ABOUT | {"weights": "b"})[SMOKE.key]["truncated"] == 0


def test_a_tokenizer_that_appends_eos_is_refused(score: Score):
    with pytest.raises(TTLError, match="add_eos_token"):
        score(tokenizer=byte_tokenizer("<s> $A </s>"))


def test_names_are_checked_before_the_first_task_runs(score: Score, scored: list[str], monkeypatch: pytest.MonkeyPatch):
    def known(item: Wanted, seed: int) -> Opened:
        if item is SHOTS:
            raise TTLError("no task of that name")
        return open_task(item, seed)

    monkeypatch.setattr(harness, "open_task", known)
    with pytest.raises(TTLError, match="of that name"):
        score(items=[SMOKE, SHOTS])
    with pytest.raises(TTLError, match="twice"):
        score(items=[SMOKE, SMOKE])
    assert not scored


def test_data_out_of_reach_do_not_stop_the_rest(score: Score, tmp_path: Path):
    hub = Wanted("hellaswag_pt", "hellaswag_pt", 0, None)
    rows = score(items=[hub, SMOKE])
    assert list(rows) == ["hellaswag_pt", "ttl_smoke_pt"]
    assert rows["hellaswag_pt"]["status"] == "not run" and "value" not in rows["hellaswag_pt"]
    assert "alexandrainst/m_hellaswag" in rows["hellaswag_pt"]["reason"] and "\n" not in rows["hellaswag_pt"]["reason"]
    assert rows["ttl_smoke_pt"]["status"] == "done"
    assert len(list((tmp_path / "scores").iterdir())) == 1


def test_what_was_not_run_is_tried_again(score: Score, scored: list[str], monkeypatch: pytest.MonkeyPatch):
    def offline(item: Wanted, seed: int) -> Opened:
        return open_task(item, seed) if item is SMOKE else Opened(item, None, "no network", {}, "")

    with monkeypatch.context() as patch:
        patch.setattr(harness, "open_task", offline)
        assert score(items=[SHOTS, SMOKE])[SHOTS.key]["reason"] == "no network"
    assert score(items=[SHOTS, SMOKE])[SHOTS.key]["status"] == "done"
    assert scored == ["ttl_smoke_pt 0", "ttl_smoke_pt 2"]


def test_a_task_the_tokenizer_cannot_carry_does_not_stop_the_rest(score: Score, monkeypatch: pytest.MonkeyPatch):
    usual = Scorer.loglikelihood

    def once(lm: Scorer, requests: list, disable_tqdm: bool = False) -> list:
        monkeypatch.setattr(Scorer, "loglikelihood", usual)
        raise TTLError("no token of its own")

    monkeypatch.setattr(Scorer, "loglikelihood", once)
    rows = score(items=[SMOKE, SHOTS])
    assert (rows[SMOKE.key]["status"], rows[SMOKE.key]["reason"]) == ("not run", "no token of its own")
    assert rows[SHOTS.key]["status"] == "done"
    assert score(items=[SMOKE])[SMOKE.key]["status"] == "done"


def test_a_bug_is_not_taken_for_missing_data(score: Score):
    model = tiny_model()
    model.model.forward = lambda **_: None
    with pytest.raises(AttributeError):
        score(model)


def test_a_second_run_costs_nothing(score: Score, scored: list[str], capfd: pytest.CaptureFixture):
    first = score(items=[SMOKE, SHOTS])
    capfd.readouterr()
    model = tiny_model()
    model.to = None  # not even moved
    again = score(model, items=[SHOTS, SMOKE], batch_size=1, about=ABOUT | {"model": "renamed"})
    assert again == {key: first[key] | {"model": "renamed"} for key in (SHOTS.key, SMOKE.key)}
    assert len(scored) == 2 and capfd.readouterr() == ("", "")


def test_killed_in_the_middle_it_goes_on_with_what_is_left(score: Score, scored: list[str]):
    scored.append("after 1: interrupt")
    with pytest.raises(KeyboardInterrupt):
        score(items=[SMOKE, SHOTS])
    assert scored == ["ttl_smoke_pt 0"]
    rows = score(items=[SMOKE, SHOTS])
    assert scored == ["ttl_smoke_pt 0", "ttl_smoke_pt 2"]
    assert [row["status"] for row in rows.values()] == ["done", "done"]


@pytest.mark.parametrize(
    "change",
    [
        {"about": ABOUT | {"weights": "b" * 64}},
        {"about": ABOUT | {"beside_weights": "c" * 64}},
        {"seed": 43},
        {"limit": 5},
        {"limit": None},
        {"model": tiny_model().to(torch.bfloat16)},
        {"items": [Wanted("ttl_smoke_pt", "ttl_smoke_pt", 1, None)]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_a_score_decides_its_place(score: Score, scored: list[str], tmp_path: Path, change: dict):
    score()
    score(**change)
    assert len(scored) == 2
    score()
    score(**change)
    assert len(scored) == 2
    assert len(list((tmp_path / "scores").iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "changed", "not what is asked", "a list"])
def test_a_damaged_row_is_named_and_measured_anew(
    score: Score, scored: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, damage: str
):
    first = score()
    [path] = (tmp_path / "scores").iterdir()
    text = path.read_text()
    content = json.loads(text)
    if damage == "changed":
        content["row"]["value"] = 0.875
    elif damage == "not what is asked":
        content["identity"]["seed"] = 1
    path.write_text(text[:-40] if damage == "cut" else json.dumps([] if damage == "a list" else content))
    capsys.readouterr()
    assert steady(score()) == steady(first)
    [line] = capsys.readouterr().out.splitlines()
    assert path.name in line and "ttl_smoke_pt" in line
    assert len(scored) == 2
    score()
    assert len(scored) == 2


def test_harness_json_holds_rows_and_where_they_come_from(tmp_path: Path):
    write_harness(tmp_path / "harness.json", [{"key": "a", "value": 0.5}])
    found = json.loads((tmp_path / "harness.json").read_text(encoding="utf-8"))
    assert found["rows"] == [{"key": "a", "value": 0.5}]
    assert found["versions"]["lm-eval"] == lm_eval.__version__ and {"written", "code", "machine"} <= set(found)


# figure 2


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [save(tmp_path, step) for step in (10, 20)]


def save(folder: Path, step: int) -> Path:
    """A checkpoint with weights of its own."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(step)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"tokens": step * 100, "energy_kwh": step / 1000}
    return checkpoints.save_checkpoint(folder / "checkpoints", step, model, byte_tokenizer(), optimizer, state)


@pytest.fixture
def trace(tmp_path: Path) -> Callable:
    """`over_checkpoints` here, with the names of those that were loaded, of which one is held at a time."""
    loaded, alive = [], []

    def load(folder: Path) -> tuple:
        assert all(model() is None for model in alive)
        loaded.append(folder.name)
        model = LlamaForCausalLM.from_pretrained(folder)
        alive.append(weakref.ref(model))
        return model, byte_tokenizer()

    def run(folders: list[Path], items: Any = (SMOKE, SHOTS), **options: Any) -> tuple[list[dict], list[str]]:
        options = {"dtype": "float32", "batch_size": 4, "device": "cpu", "limit": 2, "seed": 1} | options
        loaded.clear()
        about = {"model": "a run", "revision": None}
        return over_checkpoints(folders, load, items, about=about, cache=tmp_path / "scores", **options), list(loaded)

    return run


def test_scores_over_checkpoints_cost_what_is_new(trace: Callable, folders: list[Path], tmp_path: Path):
    rows, loaded = trace(folders, [SMOKE])
    assert loaded == ["step-0000010", "step-0000020"]
    assert [(row["step"], row["tokens"], row["energy_kwh"]) for row in rows] == [(10, 1000, 0.01), (20, 2000, 0.02)]
    score = rows[1]["scores"]["ttl_smoke_pt"]
    assert (score["model"], score["revision"]) == ("a run", "step-0000020") and 0 <= score["value"] <= 1
    assert score["weights"] == checkpoints.sha256(folders[1] / "model.safetensors")
    assert trace(folders, [SMOKE]) == (rows, [])
    # a new checkpoint, then a new task on one whose first is known
    folders.append(save(tmp_path, 30))
    more, loaded = trace(folders, [SMOKE])
    assert loaded == ["step-0000030"] and more[:2] == rows
    both, loaded = trace(folders)
    assert len(loaded) == 3 and [row["scores"]["ttl_smoke_pt"] for row in both] == [
        row["scores"]["ttl_smoke_pt"] for row in more
    ]


def test_killed_among_checkpoints_it_goes_on(trace: Callable, folders: list[Path], scored: list[str]):
    scored.append("after 3: interrupt")
    with pytest.raises(KeyboardInterrupt):
        trace(folders)
    assert scored == ["ttl_smoke_pt 0", "ttl_smoke_pt 2", "ttl_smoke_pt 0"]
    rows, loaded = trace(folders)
    assert loaded == ["step-0000020"] and scored[3:] == ["ttl_smoke_pt 2"]
    assert all(score["status"] == "done" for row in rows for score in row["scores"].values())


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.json", "state.json"])
def test_a_damaged_checkpoint_is_named_and_left_out(
    trace: Callable, folders: list[Path], capsys: pytest.CaptureFixture, name: str
):
    path = folders[0] / name
    path.write_bytes(path.read_bytes()[:-9] + b"damaged!!")
    rows, loaded = trace(folders)
    assert [row["step"] for row in rows] == [20] and loaded == ["step-0000020"]
    [line] = capsys.readouterr().out.splitlines()
    assert "step-0000010" in line and name in line


def test_no_model_is_loaded_where_nothing_can_be_run(
    trace: Callable, folders: list[Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(harness, "open_task", lambda item, seed: Opened(item, None, "no network", {}, ""))
    rows, loaded = trace(folders)
    assert not loaded and {row["scores"]["ttl_smoke_pt"]["status"] for row in rows} == {"not run"}


def test_one_progress_line_for_all_checkpoints(trace: Callable, folders: list[Path], capfd: pytest.CaptureFixture):
    trace(folders, [SMOKE], label="scores")
    out, err = capfd.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("scores: 2 of 2")
    assert all(line.startswith("scores: ") for line in err.splitlines())
