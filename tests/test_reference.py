"""The committed reference run: how it is collected, that it is fresh, and that quoted figures are its own."""

from __future__ import annotations

import html
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tiny import Tiny
from ttl_utils import reference, wheels
from ttl_utils.errors import MissingStage, TTLError
from ttl_utils.files import read_json, write_json
from ttl_utils.params import load_params
from ttl_utils.run import STAGES, Run

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "outputs" / "reference" / "nano"
STALE = "make it anew: `make reference`"


# collecting


@pytest.fixture(scope="module")
def tweets(tiny: Tiny) -> set[tuple[str, ...]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTL_CACHE", str(tiny.cache))
        return reference.tweet_runs(Run(load_params({"file": tiny.file})))


@pytest.fixture(scope="module")
def texts(tiny: Tiny) -> list[str]:
    params = load_params({"file": tiny.file})
    (source,) = [source for source in params.data.active if source.reader == "dantestocks"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTL_CACHE", str(tiny.cache))
        rows = [row["text"] for row in wheels.read(source, params.data, Counter())]
    return [text for text in rows if len(re.findall(r"\w+", text)) >= reference.SHINGLE]


def notebook(*outputs: dict) -> nbformat.NotebookNode:
    cell = nbformat.v4.new_code_cell("print(1)", outputs=list(outputs), metadata={"papermill": {"duration": 1}})
    injected = nbformat.v4.new_code_cell('size = "tiny"', metadata={"tags": ["injected-parameters"]})
    about = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": about, "language_info": {"name": "python"}, "papermill": {"duration": 2.5}, "ttl": {}}
    return nbformat.v4.new_notebook(cells=[injected, cell], metadata=metadata)


def stream(text: str) -> dict:
    return nbformat.v4.new_output("stream", name="stdout", text=text)


def table(text: str) -> dict:
    data = {"text/html": f"<table><tr><td>{html.escape(text)}</td><td>7</td></tr></table>", "text/plain": "<Styler>"}
    return nbformat.v4.new_output("display_data", data=data)


@pytest.fixture
def finished(tiny_run, texts: list[str]) -> Run:
    """A run's folder as six finished stages leave it, without the work."""
    run = tiny_run()
    for name in STAGES:
        write_json(run.folder / name / "manifest.json", {})
        (run.folder / name / "model.safetensors").write_bytes(b"weights")
    home = f"{Path.home()}/data"
    for name in STAGES:
        path = run.folder / "notebooks" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        said = f"[dantestocks]\n{texts[0]}\n\nperplexity 3.14 in {run.folder}/x, {home}\n"
        nbformat.write(notebook(stream(said), table(texts[1])), path)
    code = {"commit": "0" * 40, "clean": True}
    write_json(run.folder / "run.json", {"code": code, "machine": {"cores": 2}, "versions": {}})
    write_json(run.folder / "metrics.json", {"03_pretraining": {"train_loss": 3.14159, "rows": [{"n": 12345}]}})
    (run.folder / "06_carbon_report" / "report.md").write_text("# Energy\n![Loss](../figures/03_loss.png)\n")
    for kind in ("png", "svg", "csv", "pdf"):
        path = run.folder / "figures" / f"03_loss.{kind}"
        path.parent.mkdir(exist_ok=True)
        path.write_text("step,loss\n")
    return run


def test_what_may_be_seen_is_collected(finished: Run, tmp_path: Path, texts: list[str], tweets) -> None:
    target = tmp_path / "reference" / "tiny"
    stamp = reference.collect(finished, target)
    names = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    kept = {f"notebooks/{name}.ipynb" for name in STAGES} | {
        f"figures/03_loss.{kind}" for kind in ("png", "svg", "csv")
    }
    assert names == kept | {"metrics.json", "run.json", "reference.json", "06_carbon_report/report.md"}
    report = target / "06_carbon_report" / "report.md"
    assert all((report.parent / link).is_file() for link in re.findall(r"\]\((.+?)\)", report.read_text()))
    assert list(target.parent.iterdir()) == [target], "nothing half-made stays"
    made = nbformat.read(target / "notebooks" / "01_data.ipynb", as_version=4)
    nbformat.validate(made)
    said, row = made.cells[1].outputs[0].text, made.cells[1].outputs[1].data["text/html"]
    assert reference.HIDDEN in said and "perplexity 3.14 in outputs/tiny/x, ~/data" in said
    assert reference.HIDDEN in row and row.endswith("</td><td>7</td></tr></table>")
    assert not reference.spans(said, tweets) and not reference.spans(row, tweets)
    assert "papermill" not in made.metadata and not made.cells[1].metadata
    # the stamp knows the code, the machine, and the cells that ran, injected ones aside
    assert stamp["code"]["commit"] == "0" * 40 and stamp["duration_s"]["01_data"] == 2.5
    assert stamp["notebooks"]["01_data"] == reference.cells_hash(target / "notebooks" / "01_data.ipynb")
    made.cells[0].source = "size = 'other'"
    nbformat.write(made, tmp_path / "other.ipynb")
    assert reference.cells_hash(tmp_path / "other.ipynb") == stamp["notebooks"]["01_data"]
    made.cells[1].source = "print(2)"
    nbformat.write(made, tmp_path / "other.ipynb")
    assert reference.cells_hash(tmp_path / "other.ipynb") != stamp["notebooks"]["01_data"]


@pytest.mark.parametrize("what", ["tweet", "folder", "host"])
@pytest.mark.parametrize("place", ["figures/03_loss.csv", "figures/03_loss.svg", "06_carbon_report/report.md"])
def test_nothing_is_collected_where_something_would_show(
    finished: Run, tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, what: str, place: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "my-own-laptop")
    shown = {"tweet": texts[3], "folder": "/home/someone/ttl", "host": "trained on my-own-laptop"}[what]
    (finished.folder / place).write_text(shown)
    target = tmp_path / "reference" / "tiny"
    target.mkdir(parents=True)
    (target / "earlier.txt").touch()
    with pytest.raises(TTLError, match=f"{Path(place).name} (shows a|names a|names this)"):
        reference.collect(finished, target)
    assert [path.name for path in target.parent.rglob("*")] == ["tiny", "earlier.txt"]


def test_an_unfinished_run_is_refused(finished: Run, tmp_path: Path) -> None:
    (finished.folder / "05_chat" / "manifest.json").unlink()
    with pytest.raises(MissingStage, match="05_chat"):
        reference.collect(finished, tmp_path / "reference" / "tiny")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), before=st.text(max_size=20), cut=st.integers(0, 60))
def test_a_tweet_is_found_however_it_is_shown(texts: list[str], tweets, data, before: str, cut: int) -> None:
    text = data.draw(st.sampled_from(texts))
    shown = data.draw(st.sampled_from([text, text.upper(), html.escape(text), repr(text), f"<td>{text}</td>"]))
    assert reference.spans(f"{before} {shown}", tweets)
    hidden = reference.hide(f"{before} {shown} e mais", tweets)
    assert not reference.spans(hidden, tweets) and hidden.endswith(" e mais")
    # all of its words are gone, those at the ends too
    alone = re.findall(r"\w+", reference.hide(text.lower(), tweets).replace(reference.HIDDEN, ""))
    assert not alone


@pytest.mark.parametrize("text", ["", "perplexity 31.04, 2.1 bits per byte over 12,345 tokens", "O mercado da bolsa"])
def test_other_text_stays(tweets, text: str) -> None:
    assert reference.hide(text, tweets) == text


# what the READMEs quote


@pytest.fixture
def small(tmp_path: Path) -> Path:
    write_json(tmp_path / "metrics.json", {"03": {"loss": 3.14159, "share": 0.251, "rows": [{"n": 12345}]}})
    write_json(tmp_path / "reference.json", {"code": {"commit": "abc"}})
    return tmp_path


@pytest.mark.parametrize(
    ("mark", "shown", "comma"),
    [
        ("03.loss:.2f", "3.14", "3,14"),
        ("03.share:.1%", "25.1%", "25,1%"),
        ("03.rows.0.n:,", "12,345", "12.345"),
        ("reference.code.commit:", "abc", "abc"),
    ],
)
def test_marks_are_filled(small: Path, mark: str, shown: str, comma: str) -> None:
    text = f"| <!-- ref:{mark} -->?<!-- /ref --> | <!-- ref:{mark} --><!-- /ref --> of 2.71 |"
    made = reference.filled(text, small)
    assert made == text.replace("?", "").replace(" --><!-- /", f" -->{shown}<!-- /")
    assert reference.filled(made, small) == made
    assert reference.filled(made, small, decimal_comma=True) == made.replace(f">{shown}<", f">{comma}<")


@pytest.mark.parametrize(
    "mark", ["03.lost:.2f", "04.loss:.2f", "03.rows.7.n:,", "03.rows.n:,", "03.loss:d", "03.rows:.1f"]
)
def test_a_figure_that_is_not_there_is_named(small: Path, mark: str) -> None:
    with pytest.raises(TTLError, match=re.escape(mark)):
        reference.filled(f"<!-- ref:{mark} --><!-- /ref -->", small)


# the command


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Run) -> Path:
    """A project of two READMEs, whose `ttl run` brings the finished run."""
    root = tmp_path / "project"
    for name in ("ttl_utils", "params"):
        (root / name).mkdir(parents=True)
    (root / "ttl_utils" / "code.py").write_text("one = 1\n")
    for name in reference.READMES:
        (root / name).write_text("loss <!-- ref:03_pretraining.train_loss:.2f -->?<!-- /ref -->\n")
    calls: list[list[str]] = []

    def run(command: list[str]) -> subprocess.CompletedProcess:
        calls.append(command)
        outputs = Path(os.environ["TTL_OUTPUTS"])
        (outputs / "attempt").touch()
        finished.folder.rename(outputs / "tiny")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(reference, "project_root", lambda: root)
    monkeypatch.setattr(reference, "load_params", lambda _: finished.params)
    monkeypatch.setattr(reference.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["reference"])
    return root


def test_one_command_makes_it_and_fills_the_readmes(checkout: Path) -> None:
    # of another state of the sources: not gone on with
    left = checkout / "outputs" / "reference-run"
    (left / "nano").mkdir(parents=True)
    (left / "package.txt").write_text("another")
    assert reference.main() == 0
    assert (checkout / "outputs" / "reference" / "nano" / "reference.json").is_file()
    assert ">3.14<" in (checkout / "README.md").read_text() and ">3,14<" in (checkout / "README.pt-BR.md").read_text()
    assert not left.exists()


def test_a_failure_leaves_the_readmes_and_the_run(checkout: Path, capsys: pytest.CaptureFixture) -> None:
    (checkout / "README.pt-BR.md").write_text("<!-- ref:03_pretraining.lost:.2f -->?<!-- /ref -->")
    before = (checkout / "README.md").read_text()
    assert reference.main() == 1
    assert "lost" in capsys.readouterr().err and (checkout / "README.md").read_text() == before
    assert (checkout / "outputs" / "reference-run" / "tiny").is_dir(), "kept, to go on with"


# what is committed


def stamp() -> dict:
    assert (COMMITTED / "reference.json").is_file(), f"there is no reference run; {STALE}"
    return read_json(COMMITTED / "reference.json")


def test_the_reference_is_of_these_notebooks() -> None:
    now = {name: reference.cells_hash(ROOT / "notebooks" / f"{name}.ipynb") for name in STAGES}
    changed = [name for name in STAGES if stamp()["notebooks"][name] != now[name]]
    assert not changed, f"code cells of {', '.join(changed)} changed since the reference was made; {STALE}"


def test_its_notebooks_are_those_of_its_stamp() -> None:
    found = {name: reference.cells_hash(COMMITTED / "notebooks" / f"{name}.ipynb") for name in STAGES}
    assert found == stamp()["notebooks"]
    assert stamp()["code"] == read_json(COMMITTED / "run.json")["code"] and stamp()["code"]["commit"]


@pytest.mark.parametrize("name", reference.READMES)
def test_the_readmes_quote_it_to_the_digit(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert len(reference._REF.findall(text)) >= 10
    assert reference.filled(text, COMMITTED, "pt-BR" in name) == text, STALE


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("01_data", "held-out texts of all uses: {01_data.held_out_texts:,}"),
        ("02_tokenizer", "vocabulary: {02_tokenizer.vocab_size:,} pieces"),
        ("02_tokenizer", "training: {02_tokenizer.train_tokens:,} tokens"),
        ("03_pretraining", "{03_pretraining.parameters:,}"),
        ("04_evaluation", "perplexity {04_evaluation.perplexity:.2f}, {04_evaluation.bits_per_byte:.3f} bits per byte"),
        ("04_evaluation", "{04_evaluation.scored_tokens:,} tokens scored"),
        ("05_chat", "{05_chat.padding_share:.1%} of the slots are padding"),
    ],
)
def test_its_notebooks_show_its_metrics(name: str, line: str) -> None:
    marked = re.sub(r"{(.+?):(.*?)}", r"<!-- ref:\1:\2 --><!-- /ref -->", line)
    shown = re.sub("<.*?>", "", reference.filled(marked, COMMITTED)).replace("held-out texts of all uses: ", "")
    assert shown in reference.shown_text(COMMITTED / "notebooks" / f"{name}.ipynb")


def energies_not_shown(metrics: dict, text: str) -> list[str]:
    """Stages whose energy no row of the bill's table shows, in kWh, Wh or mWh, to three digits."""
    missing = []
    for row in metrics["06_carbon_report"]["stages"]:
        numbers = re.findall(rf"\| {row['stage']} \|.*", text)
        shown = [float(number.replace(",", "")) for line in numbers for number in re.findall(r"[\d,]+\.\d+", line)]
        scaled = [number * scale for number in shown for scale in (1, 1e-3, 1e-6)]
        if not any(math.isclose(row["energy_kwh"], number, rel_tol=5e-3) for number in scaled):
            missing.append(row["stage"])
    return missing


def test_its_last_notebook_shows_the_energy_of_every_stage() -> None:
    metrics = read_json(COMMITTED / "metrics.json")
    text = reference.shown_text(COMMITTED / "notebooks" / "06_carbon_report.ipynb")
    assert not energies_not_shown(metrics, text)
    stages = metrics["06_carbon_report"]["stages"]
    changed = {"06_carbon_report": {"stages": [row | {"energy_kwh": 1.07 * row["energy_kwh"]} for row in stages]}}
    assert len(energies_not_shown(changed, text)) > len(stages) / 2, "of another run, most are not there"


def test_it_is_small_and_shows_nothing_of_a_machine() -> None:
    files = [path for path in COMMITTED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert {path.suffix for path in files} <= {".json", ".ipynb", ".md", ".html", ".png", ".svg", ".csv", ".tex"}
    assert reference.problems(COMMITTED, set()) == []
    assert not any(tempfile.gettempdir() + "/" in path.read_text() for path in files if path.suffix in (".json", ".md"))
