"""Runs beside each other: settings and seeds, unfinished and damaged runs, what compares and what does not."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from tests.test_ledger import rows_of
from ttl_utils.comparison import compare, compare_command, report
from ttl_utils.errors import DamagedFile, TTLError
from ttl_utils.params import load_params
from ttl_utils.redraw import redraw

NANO = load_params({})
STEPS, LOGGED, TOKENS = 200, 10, 2048


def curve(end: float, steps: int = STEPS, bits: float | None = 1.5) -> list[dict]:
    """A loss that falls from 8 to `end`, evaluated at the start and at every hundredth step."""
    records = [{"step": 0, "tokens": 0, "validation_loss": 8.0, "perplexity": math.exp(8), "bits_per_byte": 4.0}]
    for step in range(LOGGED, steps + 1, LOGGED):
        loss = end + (8 - end) * math.exp(-step / 10)
        row = {"step": step, "tokens": step * TOKENS, "energy_kwh": step * 1e-6}
        records.append({**row, "loss": loss, "tokens_per_second": 5000.0, "learning_rate": 1e-3})
        if step % 100 == 0:
            records.append({**row, "validation_loss": loss + 0.1, "perplexity": math.exp(loss), "bits_per_byte": bits})
    return records


class Folder:
    """Runs as files alone, in a folder of outputs."""

    def __init__(self, path: Path):
        self.path = path

    def stage(self, run: str, stage: str, identity: dict, outputs: dict | None, metrics: dict) -> Path:
        place = self.path / run / stage
        place.mkdir(parents=True)
        text = {"identity": identity, "started": "2026-11-23T00:00:00+00:00"}
        (place / "stage.json").write_text(json.dumps(text))
        if outputs is not None:
            prints = {name: {"fingerprint": value} for name, value in outputs.items()}
            (place / "manifest.json").write_text(json.dumps({**text, "outputs": prints}))
            (place / "metrics.json").write_text(json.dumps(metrics))
        return place

    def tokens(self, run: str, mark: str = "t", corpus: str = "c", seed: int = 42, **tokenizer: object) -> None:
        """Stages 01 and 02."""
        self.stage(run, "01_data", {"seed": seed, "data": {"language": "pt"}}, {"corpus": corpus}, {})
        identity = {"seed": seed, "tokenizer": {"vocab_size": 4096, **tokenizer}, "input 01_data/corpus": corpus}
        outputs = {"tokenizer": f"tokenizer {mark}", "tokens": f"tokens {mark}"}
        self.stage(run, "02_tokenizer", identity, outputs, {"vocab_size": 4096})

    def run(
        self, name: str, records: list[dict], *, done: bool = True, mark: str = "t", seed: int = 42, **given
    ) -> Path:
        """Stage 03; `pretraining_seed` is `seed` of the section."""
        changes = {"seed" if key == "pretraining_seed" else key: value for key, value in given.items()}
        asked = NANO.pretraining.model_copy(update={"max_steps": STEPS, **changes})
        identity = {"seed": seed, "model": NANO.model.identity(), "pretraining": asked.identity()}
        identity |= {f"input 02_tokenizer/{part}": f"{part} {mark}" for part in ("tokenizer", "tokens")}
        metrics = {"tokens_per_second": 5100.0, "energy_kwh": 0.001, "duration_s": 90.0}
        place = self.stage(name, "03_pretraining", identity, {} if done else None, metrics)
        (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
        if done:
            about = {"parameters": {"pretraining": asked.model_dump()}, "stages": {}}
            (self.path / name / "run.json").write_text(json.dumps(about))
        return place


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all else: only where the files are looked at."""
    if request.function is not test_the_pictures_are_saved:
        monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path)
    made.tokens("base")
    return made


def sweep_of(folder: Folder) -> list[str]:
    """3 rates, 2 seeds of each, 0.2 apart."""
    names = []
    for rate, end in ((1e-3, 3.5), (3e-3, 3.0), (1e-2, 4.0)):
        for seed in (1, 2):
            names.append(f"nano-learning_rate={rate}-seed={seed}")
            folder.run(names[-1], curve(end + 0.2 * seed), learning_rate=rate, pretraining_seed=seed)
    return names


def test_two_runs_by_hand(folder: Folder) -> None:
    folder.run("one", curve(3.0))
    folder.run("two", curve(4.0), learning_rate=0.01, logging_steps=20)
    found = compare(["one", "two"], folder.path)
    differing = {
        "run": ["one", "two"],
        # how often it was logged decides nothing
        "pretraining.learning_rate": [0.003, 0.01],
    }
    assert found.parameters.to_dict("list") == differing
    assert found.notes == ()
    assert list(found.table.setting) == ["one", "two"] and list(found.table.state) == ["finished"] * 2
    row = found.table.iloc[1]
    assert (row.n, row.steps, row.tokens) == (1, STEPS, STEPS * TOKENS)
    assert row.train_loss == pytest.approx(4.0, abs=1e-6) and row.validation_loss == pytest.approx(4.1, abs=1e-6)
    assert row.perplexity == pytest.approx(math.exp(4.0), rel=1e-6) and row.bits_per_byte == 1.5
    # of a finished stage: its own figures
    assert (row.tokens_per_second, row.energy_kwh, row.duration_s) == (5100, 0.001, 90)
    assert not [name for name in found.table if "deviation" in name]


def test_seeds_of_one_setting_are_its_mean_and_deviation(folder: Folder) -> None:
    names = sweep_of(folder)
    found = compare(names, folder.path)
    labels = [f"learning_rate={rate} (2 seeds)" for rate in (0.001, 0.003, 0.01)]
    assert list(found.table.setting) == labels and list(found.table.n) == [2, 2, 2]
    assert found.table.validation_loss.tolist() == pytest.approx([3.9, 3.4, 4.4], abs=1e-6)
    # 0.2 apart: the sample deviation is 0.2 / sqrt(2)
    assert found.table.validation_loss_deviation.tolist() == pytest.approx([0.2 / math.sqrt(2)] * 3, abs=1e-6)
    assert "3.4000 ± 0.1414" in report(found)
    # each run is in the file, below its setting
    saved = pd.read_csv(found.folder / "comparison.csv")
    assert saved.run.tolist()[:3] == ["mean of the setting", *names[:2]] and len(saved) == 9
    assert saved["pretraining.seed"].dropna().tolist() == [1, 2] * 3
    assert (saved.n == 1).sum() == 6


def test_the_figure_has_a_band_for_seeds_and_none_for_one(folder: Folder) -> None:
    names = sweep_of(folder)
    training, validation = compare(names[:3], folder.path).figure.axes
    assert len(training.lines) == len(validation.lines) == 2
    assert len(training.collections) == len(validation.collections) == 1
    # without the evaluation before the first step
    assert validation.lines[0].get_ydata() == pytest.approx([3.9, 3.9], abs=1e-3)
    edge = validation.collections[0].get_paths()[0].vertices
    ends = edge[edge[:, 0] == STEPS * TOKENS][:, 1]
    assert (ends.min(), ends.max()) == pytest.approx((3.9 - 0.02**0.5, 3.9 + 0.02**0.5), abs=1e-3)
    legend = {text.get_text() for text in training.figure.legends[0].get_texts()}
    assert legend == {"learning_rate=0.001 (2 seeds)", names[2]}


def test_the_window_is_that_share_of_the_run_that_figure_1_takes(folder: Folder) -> None:
    folder.run("short", curve(3.0))
    folder.run("long", curve(3.0, 2 * STEPS), max_steps=2 * STEPS)
    title = compare(["short"], folder.path).figure.axes[0].get_title(loc="left")
    assert "centred mean over 22 steps" in title
    assert "over 11% of the steps" in compare(["short", "long"], folder.path).figure.axes[0].get_title(loc="left")
    long = compare(["long"], folder.path)
    assert "over 44 steps" in long.figure.axes[0].get_title(loc="left")
    saved = pd.read_csv(long.folder / "figures" / "curves.csv")
    assert saved.smoothed.notna().sum() == saved.loss.notna().sum() == 2 * STEPS / LOGGED


def test_a_run_under_way_compares_as_far_as_it_is(folder: Folder) -> None:
    folder.run("done", curve(3.0))
    place = folder.run("going", curve(3.0, 120), done=False)
    ledger = [rows_of("s", 0, 42)[-1] | {"time": "2026-11-23T01:00:00+00:00", "energy_kwh": 0.5, "emissions_kg": 0.1}]
    # of another stage, and of work that was set aside
    ledger += [ledger[0] | {"session": "t", "stage": "02_tokenizer"}]
    ledger += [ledger[0] | {"session": "u", "time": "2026-11-22T01:00:00+00:00"}]
    (place.parent / "energy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ledger))
    # a line that is being written
    with (place / "metrics.jsonl").open("a") as file:
        file.write('{"step": 130, "tok')
    found = compare(["done", "going"], folder.path)
    row = found.table.iloc[1]
    assert row.state == "step 120 of 200" and (row.steps, row.tokens) == (120, 120 * TOKENS)
    assert row.train_loss == pytest.approx(3.0, abs=1e-3) and row.validation_loss == pytest.approx(3.1, abs=1e-3)
    assert (row.tokens_per_second, row.duration_s) == (5000, 42) and row.energy_kwh == pytest.approx(120e-6)
    assert found.notes == ("going is not finished: step 120 of 200",)
    assert "step 120 of 200" in found.figure.legends[0].get_texts()[1].get_text()
    # what its folder does not tell yet is no difference
    assert list(found.parameters) == ["run"]
    assert "the parameters are the same" in report(found)


def test_seeds_under_way_are_compared_at_the_step_all_have_reached(folder: Folder) -> None:
    folder.run("one", curve(3.0, 120), done=False, pretraining_seed=1)
    folder.run("two", curve(3.2, 150), done=False, pretraining_seed=2)
    found = compare(["one", "two"], folder.path)
    row = found.table.iloc[0]
    assert (row.n, row.steps, row.state) == (2, 120, "all at step 120 of 200")
    assert row.train_loss == pytest.approx(3.1, abs=1e-3)
    # once one is finished, the other waits for its end
    folder.run("three", curve(3.6), pretraining_seed=3)
    found = compare(["one", "two", "three"], folder.path)
    row = found.table.iloc[0]
    assert (row.n, row.steps, row.state) == (1, STEPS, "1 of 3 finished")
    assert row.train_loss == pytest.approx(3.6, abs=1e-3)
    assert found.figure.axes[0].lines[0].get_ydata()[-1] == pytest.approx(3.6, abs=1e-3)


def test_a_diverged_run_is_told_and_does_not_flatten_the_others(folder: Folder) -> None:
    folder.run("good", curve(3.0))
    bad = [row | ({"loss": 8 * 1.05 ** row["step"]} if "loss" in row else {}) for row in curve(3.0, 90)]
    bad.append({"step": 95, "tokens": 95 * TOKENS, "not_finite": "loss", "energy_kwh": 0.1})
    folder.run("bad", bad, done=False, learning_rate=0.3)
    found = compare(["good", "bad"], folder.path)
    assert found.table.state[1] == "stopped at step 95: not finite"
    assert [one.kind for one in found.findings["bad"]][-1] == "not_finite" and not found.findings["good"]
    assert found.figure.axes[0].get_yscale() == "log" and found.figure.axes[1].get_yscale() == "linear"
    text = report(found)
    assert "bad: step 95: not finite: loss" in text and "bad is not finished: stopped at step 95" in text


def test_other_tokenizers_compare_by_bits_per_byte(folder: Folder) -> None:
    folder.tokens("other", mark="u", vocab_size=8192)
    folder.run("one", curve(3.0))
    folder.run("two", curve(3.5), mark="u")
    found = compare(["one", "two"], folder.path)
    # the same corpus: the held-out text is one
    (note,) = found.notes
    assert "tokenizers differ (one | two)" in note and "bits per byte do" in note
    assert found.parameters["tokenizer.vocab_size"].tolist() == [4096, 8192]
    assert found.figure.axes[1].get_ylabel() == "bits per byte"
    # where a run has none, losses are all there is
    folder.run("without", [{**row, "bits_per_byte": None} for row in curve(3.5)], mark="u")
    assert compare(["one", "without"], folder.path).figure.axes[1].get_ylabel() == "nats per token"


def test_other_corpora_are_told(folder: Folder) -> None:
    folder.tokens("other", mark="u", corpus="d", seed=7)
    folder.run("one", curve(3.0))
    folder.run("again", curve(3.0), pretraining_seed=9)
    folder.run("two", curve(3.2), mark="u", seed=7)
    found = compare(["one", "again", "two"], folder.path)
    # the seed of the run makes another corpus and tokenizer, and the setting is still one
    assert len(found.table) == 1 and found.table.n[0] == 3
    assert "tokenizers differ (one, again | two)" in found.notes[0]
    assert "corpora differ (one, again | two)" in found.notes[1]


def test_the_same_seed_on_another_corpus_is_another_setting(folder: Folder) -> None:
    folder.tokens("other", mark="u", corpus="d")
    folder.run("one", curve(3.0))
    folder.run("two", curve(3.0), mark="u", pretraining_seed=3)
    assert len(compare(["one", "two"], folder.path).table) == 2


def test_a_corpus_that_is_gone_is_no_obstacle(folder: Folder) -> None:
    folder.run("one", curve(3.0))
    folder.run("two", curve(3.0), pretraining_seed=3)
    shutil.rmtree(folder.path / "base")
    found = compare(["one", "two"], folder.path)
    assert len(found.table) == 1 and not [note for note in found.notes if "differ" in note]


def test_a_run_that_uses_its_base_s_stage_is_found(folder: Folder) -> None:
    folder.run("base", curve(3.0))
    about = {"parameters": {"pretraining": {}}, "stages": {"03_pretraining": {"folder": "../base/03_pretraining"}}}
    (folder.path / "based").mkdir()
    (folder.path / "based" / "run.json").write_text(json.dumps(about))
    assert compare(["based"], folder.path).table.validation_loss[0] == pytest.approx(3.1, abs=1e-6)


def test_what_is_saved(folder: Folder, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    names = sweep_of(folder)
    monkeypatch.setenv("TTL_OUTPUTS", str(folder.path))
    compare_command(names[:2])
    place = folder.path / "comparisons" / "+".join(names[:2])
    assert str(place) in capsys.readouterr().out
    assert {path.name for path in place.iterdir()} == {"figures", "comparison.csv"}
    # a name of bounded length, of its own for other runs, the same for the same
    folders = [
        compare(chosen, folder.path).folder.name for chosen in (names, names, [names[0], *names[:0:-1]], names[:-1])
    ]
    assert folders[0] == folders[1] and len(set(folders)) == 3 and max(map(len, folders)) <= 100
    # a run that is named twice is one
    assert len(compare([names[0]] * 2, folder.path).table) == 1


def test_the_pictures_are_saved(folder: Folder) -> None:
    folder.run("one", curve(3.0))
    place = compare(["one"], folder.path).folder
    pictures = {path.name: path.stat().st_size for path in (place / "figures").iterdir()}
    assert pictures.keys() == {f"curves.{kind}" for kind in ("png", "svg", "pdf", "csv")}
    assert min(pictures.values()) > 1000
    # and can be drawn anew, as a run's
    assert len(redraw(place / "figures", "pt", "column")) == 3


def test_what_is_not_the_seed_alone_is_another_setting(folder: Folder) -> None:
    folder.run("fp32", curve(3.0), precision="fp32")
    folder.run("bf16", curve(3.0), precision="bf16")
    folder.run("again", curve(3.0), precision="fp32")
    folder.run("seed", curve(3.0), precision="bf16", pretraining_seed=2)
    found = compare(["fp32", "bf16", "again", "seed"], folder.path)
    # the same seed twice is no second seed
    assert found.table.setting.tolist() == ["fp32", "precision=bf16 (2 seeds)", "again"]
    assert found.parameters["pretraining.precision"].tolist() == ["fp32", "bf16", "fp32", "bf16"]


def test_mistakes_are_named(folder: Folder) -> None:
    folder.run("nano-a", curve(3.0))
    for names, said in (
        (["nano-b"], "no run 'nano-b' in .*there are: nano-a"),
        (["x"], "there are: nano-a"),
        (["../nano-a"], "no run '../nano-a'"),
        ([""], "no run ''"),
        (["base"], "'base' has no stage 03 yet: .*ttl pretrain SIZE --run base"),
        ([], "name the runs to compare; .*nano-a"),
    ):
        with pytest.raises(TTLError, match=said):
            compare(names, folder.path)
    assert not (folder.path / "comparisons").exists()


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("metrics.jsonl", "", "'bad' has no record yet"),
        ("metrics.jsonl", '{"step": 1, "tokens": 2}\n{"step":\n', "metrics.jsonl, line 2: not a record"),
        ("metrics.jsonl", '{"step": 1}\n', "metrics.jsonl is damaged"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl is damaged"),
        ("metrics.json", "{", "metrics.json is damaged"),
        ("metrics.json", None, "metrics.json is missing"),
        ("manifest.json", "{", "manifest.json is damaged"),
    ],
)
def test_damaged_files_are_named(folder: Folder, file: str, text: str | None, said: str) -> None:
    folder.run("good", curve(3.0))
    path = folder.run("bad", curve(3.0)) / file
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(TTLError, match=said) as caught:
        compare(["good", "bad"], folder.path)
    assert isinstance(caught.value, DamagedFile) or "no record" in said


def test_a_first_evaluation_alone_is_enough(folder: Folder) -> None:
    folder.run("new", curve(3.0)[:1], done=False)
    found = compare(["new"], folder.path)
    assert found.table.validation_loss[0] == 8.0 and "train_loss" not in found.table
    assert "8.0000" in report(found)


def test_null_and_unknown_are_told_apart(folder: Folder) -> None:
    folder.run("null", curve(3.0))
    folder.run("clipped", curve(3.0), max_grad_norm=1.0)
    assert compare(["null", "clipped"], folder.path).parameters["pretraining.max_grad_norm"].tolist() == ["null", 1.0]
