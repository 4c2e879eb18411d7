"""Folders for the hub: the card's fields and figures, licences, and sending by a stand-in of the hub's client."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from tests.finished import OVERRIDES, finished
from ttl_utils import gguf_files, memorisation
from ttl_utils import model_card as mc
from ttl_utils import publish as pb
from ttl_utils.commands import main
from ttl_utils.errors import DamagedFile, TTLError
from ttl_utils.files import read_json, write_json

MEMORISED = {"reason": "it was not asked for"}
SPENT = {"cpu_kwh": 0.001, "gpu_kwh": 0.002, "ram_kwh": 0.0, "energy_kwh": 0.003, "emissions_kg": 0.0012}
LEDGER = {
    "rank": 0, "intensity_g_per_kwh": 400.0, "pue": 1.0, "duration_s": 60.0,
    "country_iso_code": "BRA", "cpu_method": "modelled (rated power)",
    "gpu_method": "measured (NVML)", "ram_method": "none", "codecarbon_version": "3", "final": True,
}  # fmt: skip
SCORE = {
    "status": "done", "metric": "acc", "value": 0.256, "stderr": 0.0625, "chance": 0.25, "constant_answer": 0.3125,
    "dataset": "owner/set", "config": None, "split": "test", "task": "arc_pt",
}  # fmt: skip


@pytest.fixture
def run(tiny, tiny_run, tiny_done, tmp_path_factory):
    """A copy of the finished run, to change; with energy, and with scores of stage 04 written by hand."""
    done = finished(tiny.file, tiny_done.folder, tmp_path_factory.getbasetemp() / "finished")
    copy = tiny_run(**OVERRIDES)
    shutil.copytree(done.folder, copy.folder, ignore=shutil.ignore_patterns("export", ".locks"))
    lines = []
    for name in ("03_pretraining", "05_chat"):
        manifest = copy.stage(name).manifest()
        # the folder's own work, and a report that was asked of the finished stage
        for number, time in enumerate((manifest["started"], "2099-01-01T00:00:00+00:00")):
            row = LEDGER | {"session": f"{name}-{number}", "stage": name, "time": time}
            lines.append(json.dumps(row | {key: value * 10**number for key, value in SPENT.items()}))
    (copy.folder / "energy.jsonl").write_text("\n".join(lines) + "\n")
    scored = {"origin": "this run", "perplexity": 31.5, "bits_per_byte": 1.25, "downstream": {}}
    scored["harness"] = {"arc_pt": SCORE, "other": {"status": "not run", "reason": "no network"}}
    write_json(copy.folder / "04_evaluation" / "metrics.json", scored)
    write_json(copy.folder / "04_evaluation" / "manifest.json", {"finished": "now"})
    return copy


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(pb, "memorisation", lambda *_: MEMORISED)
    monkeypatch.setattr(pb, "export_gguf", lambda *_: [])


def card(run, name, repository=None, files=()):
    stage = run.stage({"base": "03_pretraining", "chat": "05_chat"}[name])
    path = run.folder / "README.md"
    path.write_text(mc.model_card(run, name, stage, repository, MEMORISED, list(files)), encoding="utf-8")
    return metadata_load(path), path.read_text(encoding="utf-8")


# the dry run


def test_a_dry_run_needs_no_name_no_token_and_no_network(run, tiny, monkeypatch, capsys):
    monkeypatch.setattr(memorisation, "PASSAGES", 20)
    monkeypatch.setattr(gguf_files, "FORMS", {"q8_0": gguf_files.FORMS["q8_0"], "f16": gguf_files.FORMS["f16"]})
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    assert main(["export", tiny.file, "--to", "hub", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for name in ("base", "chat"):
        folder = run.folder / "export" / f"hub-{name}"
        found = {path.name for path in folder.iterdir()}
        wanted = {"README.md", "LICENSE.md", "data_sheet.md", "model.safetensors", "config.json", "tokenizer.json"}
        assert wanted | {f"tiny-{name}-{form}.gguf" for form in ("f16", "q8_0")} <= found
        assert ("chat_template.jinja" in found) == (name == "chat")
        assert all(file in said for file in found)
        # the model's bytes stand on the disk once
        stage = {"base": "03_pretraining", "chat": "05_chat"}[name]
        assert os.path.samefile(folder / "model.safetensors", run.folder / stage / "model" / "model.safetensors")
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert {"base": "16 tokens of a passage", "chat": "a conversation up to an answer"}[name] in text
        program = {
            "base": "llama-completion -m tiny-base-f16.gguf -no-cnv",
            "chat": "llama-cli -m tiny-chat-f16.gguf --jinja",
        }
        assert program[name] in text and "gguf" in metadata_load(folder / "README.md")["tags"]
        ModelCard(text)
        private = (str(run.folder.parent), socket.gethostname(), os.path.expanduser("~"))
        assert not [secret for secret in private if secret in text]
    assert "nothing was sent" in said


def test_a_folder_is_made_anew_whole_and_a_fault_leaves_the_earlier_one(run, quick, monkeypatch):
    pb.publish(run, None, dry_run=True)
    folder = run.folder / "export" / "hub-base"
    (folder / "stale.txt").write_text("left over")
    monkeypatch.setattr(pb, "licence_text", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pb.publish(run, None, dry_run=True)
    assert (folder / "stale.txt").is_file() and not list(folder.parent.glob(".*"))
    monkeypatch.undo()
    monkeypatch.setattr(pb, "memorisation", lambda *_: MEMORISED)
    monkeypatch.setattr(pb, "export_gguf", lambda *_: [])
    pb.publish(run, None, dry_run=True)
    assert not (folder / "stale.txt").exists()
    weights = run.folder / "03_pretraining" / "model" / "model.safetensors"
    weights.unlink()
    with pytest.raises(DamagedFile, match="missing"):
        pb.publish(run, None, dry_run=True)


def test_a_model_that_gguf_cannot_hold_is_published_without(run, quick, monkeypatch, capsys):
    def refuse_chat(run, models):
        if "chat" in models:
            raise gguf_files.NotForGGUF("not BPE")
        path = run.folder / "export" / "tiny-base-f16.gguf"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"GGUF")
        return [path]

    monkeypatch.setattr(pb, "export_gguf", refuse_chat)
    pb.publish(run, None, dry_run=True)
    assert "no GGUF files: not BPE" in capsys.readouterr().out
    base, chat = (run.folder / "export" / f"hub-{name}" / "README.md" for name in ("base", "chat"))
    assert "gguf" in metadata_load(base)["tags"] and "llama-completion" in base.read_text(encoding="utf-8")
    assert "gguf" not in metadata_load(chat)["tags"]
    text = chat.read_text(encoding="utf-8")
    assert "No GGUF file was made" in text and "llama-" not in text and "q4_0" not in text


def test_a_full_disk_is_not_taken_for_a_model_that_gguf_cannot_hold(run, quick, monkeypatch):
    def full(*_):
        raise TTLError("no space left")

    monkeypatch.setattr(pb, "export_gguf", full)
    with pytest.raises(TTLError, match="no space left"):
        pb.publish(run, None, dry_run=True)


@pytest.mark.parametrize("flag", [["--dry-run"], ["--repository", "someone/tiny"]])
def test_what_is_meant_for_the_hub_is_not_ignored(run, tiny, flag, capsys):
    assert main(["export", tiny.file, *flag]) == 1
    assert "--to hub" in capsys.readouterr().err


def test_a_disk_without_hard_links_gets_copies(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("weights")
    pb._link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "weights"


# the card


def test_the_cards_fields_are_what_the_run_measured(run):
    fields, text = card(run, "base", "someone/tiny", ["tiny-base-f16.gguf"])
    assert (fields["language"], fields["library_name"], fields["pipeline_tag"]) == (
        "pt",
        "transformers",
        "text-generation",
    )
    assert fields["license"] == "other" and fields["license_link"] == "LICENSE.md" and "base_model" not in fields
    # the hub counts grams; of pretraining alone
    co2 = fields["co2_eq_emissions"]
    assert co2["emissions"] == pytest.approx(1.2) and "| energy kwh | 0.003 |" in text
    assert (co2["training_type"], "BRA" in co2["geographical_location"]) == ("pre-training", True)
    assert "gpu: measured (NVML)" in co2["source"] and "cpu: modelled" in co2["source"]
    results = fields["model-index"][0]["results"]
    found = {one["type"]: (row["dataset"]["type"], one["value"]) for row in results for one in row["metrics"]}
    own = "tiny-held-out-text"
    assert found == {"perplexity": (own, 31.5), "bits_per_byte": (own, 1.25), "acc": ("owner/set", 0.256)}
    for said in ("not comparable with the paper", "| arc_pt | 25.60 | 6.25 | 31.25 |", "petrogold"):
        assert said in text
    metrics = run.stage("03_pretraining").metrics()
    assert f"{metrics['parameters']:,} parameters" in text
    asked = run.params.evaluation.generation
    assert (
        f"max_new_tokens={asked.max_new_tokens}" in text and f"repetition_penalty={asked.repetition_penalty})" in text
    )
    assert f"top_p={asked.top_p}" in text and "rope theta" not in text and "| decay norms | False |" in text
    assert run.stage("03_pretraining").manifest()["outputs"]["model"]["fingerprint"] in text
    assert "$" not in text


def test_the_chat_card_has_its_own_energy_results_and_base(run):
    fields, text = card(run, "chat", "someone/tiny-Chat")
    assert fields["base_model"] == "someone/tiny" and "conversational" in fields["tags"]
    assert fields["co2_eq_emissions"]["training_type"] == "fine-tuning"
    loss = run.stage("05_chat").metrics()["validation_loss_after"]
    (row,) = fields["model-index"][0]["results"]
    assert row["metrics"][0]["value"] == pytest.approx(math.exp(loss), rel=1e-6)
    metrics, answered = run.stage("05_chat").metrics(), fields["co2_eq_emissions"]
    assert answered["emissions"] == pytest.approx(1.2) and answered["hardware_used"].startswith("cpu;")
    followed = metrics["answers_after"]["follows_template"]["value"]
    assert "follows the template" in text and f"{len(run.params.chat.prompts)} prompts, 4 answers" in text
    assert any("follows the template" in line and f"{followed:.3g}" in line for line in text.splitlines())
    assert f"repetition_penalty={run.params.chat.repetition_penalty})" in text
    assert "apply_chat_template" in text and "chatterbot-chat" in text and "arc_pt" not in text


def test_what_was_not_measured_says_so(run):
    shutil.rmtree(run.folder / "04_evaluation")
    (run.folder / "energy.jsonl").unlink()
    fields, text = card(run, "base")
    assert "model-index" not in fields and "co2_eq_emissions" not in fields
    assert text.count("not measured") >= 3 and "Not measured." in text


def test_scores_of_another_model_are_not_this_models(run):
    path = run.folder / "04_evaluation" / "metrics.json"
    write_json(path, read_json(path) | {"origin": "hub"})
    fields, text = card(run, "base")
    assert "model-index" not in fields and "31.5" not in text


# licences


def set_licences(run, *names):
    path = run.folder / "02_tokenizer" / "metrics.json"
    rows = [{"licence": name, "tokens": 5, "share": 0.5, "model_use": "?"} for name in names]
    write_json(path, read_json(path) | {"tokens_by_licence": rows})


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["CC BY-SA 4.0"], "cc-by-sa-4.0"),
        (["Apache 2.0"], "apache-2.0"),
        (["CC BY 4.0", "CC BY-SA 4.0"], "other"),
        (["Llama 2 Community License"], "other"),
        (["My own terms"], "other"),
        ([], "other"),
    ],
)
def test_the_licence_is_that_of_the_texts_alone(run, names, wanted):
    set_licences(run, *names)
    assert mc.licence_of(run, "base")["license"] == wanted
    text = mc.licence_text(run, "base")
    assert all(name in text for name in names)
    if not names or names == ["My own terms"]:
        assert "unclear" in text


def given(run, monkeypatch, section, **values):
    changed = getattr(run.params, section).model_copy(update=values)
    monkeypatch.setattr(run, "params", With(run.params, section, changed))


class With:
    """Parameters with another section."""

    def __init__(self, params, section, changed):
        self.params, self.section, self.changed = params, section, changed

    def __getattr__(self, name):
        return self.changed if name == self.section else getattr(self.params, name)


def test_text_that_was_not_kept_has_no_say(run):
    path = run.folder / "02_tokenizer" / "metrics.json"
    set_licences(run, "CC BY 4.0")
    rows = read_json(path)["tokens_by_licence"] + [{"licence": "CC BY-NC 4.0", "tokens": 0}]
    write_json(path, read_json(path) | {"tokens_by_licence": rows})
    assert mc.licence_of(run, "base")["license"] == "cc-by-4.0"
    # the conversations' licence comes to that
    assert mc.licence_of(run, "chat")["licences"] == ["BSD-3-Clause", "CC BY 4.0"]


def test_what_others_made_has_terms_of_its_own(run, monkeypatch):
    set_licences(run, "CC BY 4.0")
    given(run, monkeypatch, "pretraining", init_from="/home/me/secret/begin")
    found = mc.licence_of(run, "base")
    assert found["license"] == "other" and found["licences"] == ["CC BY 4.0", "terms of the initial model begin"]
    given(run, monkeypatch, "pretraining", init_from="/home/me/runs/160m/03_pretraining/model")
    assert mc.licence_of(run, "base")["licences"][1] == "terms of the initial model 160m/03_pretraining"
    given(run, monkeypatch, "chat", base_model="owner/theirs")
    assert mc.licence_of(run, "chat")["licences"] == ["BSD-3-Clause", "terms of the base model owner/theirs"]
    fields, text = card(run, "chat", "someone/tiny-Chat")
    assert fields["base_model"] == "owner/theirs" and "owner/theirs, learned from other texts" in text
    assert "petrogold" not in text and "chatterbot-chat" in text
    given(run, monkeypatch, "chat", base_model=str(run.folder / "03_pretraining"))
    fields, text = card(run, "chat", "someone/tiny-Chat")
    assert "base_model" not in fields and str(run.folder) not in text


def test_tokens_of_others_take_the_place_of_the_corpus(run, monkeypatch):
    set_licences(run)
    given(run, monkeypatch, "tokenizer", tokens=SimpleNamespace(dataset="owner/tokens"))
    fields, text = card(run, "base")
    assert fields["datasets"] == ["owner/tokens"] and "Pretrained on the tokens of owner/tokens" in text
    assert "petrogold" not in text and "terms of the tokens owner/tokens" in text


def test_a_mirrors_stand_in_is_not_passed_off_as_the_published_set(run, monkeypatch, tmp_path):
    sources = [source.model_copy(update={"dataset": f"owner/{source.name}"}) for source in run.params.data.sources]
    given(run, monkeypatch, "data", sources=sources)
    path = run.folder / "01_data" / "metrics.json"
    metrics = read_json(path)
    local = next(report for report in metrics["sources"] if report["use"] == "corpus")
    local["from_mirror"] = True
    write_json(path, metrics)
    fields, text = card(run, "base")
    assert f"owner/{local['source']}" not in fields["datasets"] and fields["datasets"]
    assert f"local mirror, which may not hold the published set: {local['source']}" in text
    (tmp_path / "owner" / "tokens").mkdir(parents=True)
    given(run, monkeypatch, "tokenizer", tokens=SimpleNamespace(dataset="owner/tokens"))
    monkeypatch.setenv("TTL_MIRROR", str(tmp_path))
    fields, text = card(run, "base")
    assert "datasets" not in fields and "local mirror, which may not hold the published set: owner/tokens" in text


# sending


class Hub:
    """In the place of HfApi: keeps what it was asked."""

    def __init__(self, error=None):
        self.error, self.asked = error, []

    def __call__(self, token=None):
        self.asked.append(("token", token))
        return self

    def create_repo(self, name, **options):
        if self.error:
            raise self.error
        self.asked.append(("create", name, options))

    def upload_folder(self, **options):
        self.asked.append(
            ("upload", options["repo_id"], sorted(path.name for path in options["folder_path"].iterdir()))
        )
        return SimpleNamespace(commit_url="the commit")


def test_both_models_are_sent_to_private_repositories(run, quick, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pb.publish(run, "someone/tiny")
    created = [row[1:] for row in hub.asked if row[0] == "create"]
    assert created == [(name, {"private": True, "exist_ok": True}) for name in ("someone/tiny", "someone/tiny-Chat")]
    sent = {row[1]: row[2] for row in hub.asked if row[0] == "upload"}
    assert sent.keys() == {"someone/tiny", "someone/tiny-Chat"} and all("README.md" in files for files in sent.values())
    assert {row[1] for row in hub.asked if row[0] == "token"} == {"hf_secret"}
    assert "hf_secret" not in capsys.readouterr().out
    files = [path for folder in ("hub-base", "hub-chat") for path in (run.folder / "export" / folder).glob("*.md")]
    assert not any("hf_secret" in path.read_text(encoding="utf-8") for path in files)


def test_without_name_or_token_nothing_is_begun(run, monkeypatch):
    monkeypatch.setattr(pb, "export_gguf", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(TTLError, match="--repository OWNER/NAME"):
        pb.publish(run, None)
    with pytest.raises(TTLError, match="HF_TOKEN"):
        pb.publish(run, "someone/tiny")
    for name in ("tiny", "a/b/c", "some one/tiny", "../tiny", "someone/"):
        with pytest.raises(TTLError, match="as OWNER/NAME"):
            pb.publish(run, name, dry_run=True)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("no route to host"), "cannot be reached"),
        (HTTPError("no route to host"), "cannot be reached"),
        (HfHubHTTPError("403 Forbidden", response=SimpleNamespace(headers={}, request=None)), "refused"),
    ],
)
def test_a_hub_that_cannot_be_reached_or_refuses_is_one_clear_line(run, quick, monkeypatch, error, said):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(error))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(TTLError, match=said) as raised:
        pb.publish(run, "someone/tiny")
    assert "hf_secret" not in str(raised.value)
