"""Table 5 as the stage runs it: seeds, baselines, going on after a stop, and a classifier that is ready to share."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.tiny_encoder import CONTEXT, write_encoder
from ttl_utils import downstream as ds
from ttl_utils import examples as ex
from ttl_utils.checkpoints import save_pretrained
from ttl_utils.errors import SourceError, TTLError
from ttl_utils.files import read_json, sha256
from ttl_utils.model import Hardware, new_model
from ttl_utils.tokenizer import load_tokenizer

# two threads that wait for each other cost more than such small matrices
torch.set_num_threads(1)
CPU = Hardware("cpu", "fp32", "sdpa")
SET = {"name": "set", "source": "dantestocks-trust", "text": "{text}", "label": "label", "max_length": 32}
PAIR = {"name": "pair", "source": "dantestocks-trust", "text": "<s>{text}<s>{origin}</s>"}
HUB = {"name": "hub", "dataset": "someone/set", "train_split": "train", "test_split": "test", "text": "{text}"}


def words(label, count, seed):
    """The first word alone decides."""
    random = np.random.default_rng(seed)
    nouns = ["mercado", "empresa", "bacia", "rocha"]
    for _ in range(count):
        text = f"{'confio' if label else 'duvido'} {' '.join(random.choice(nouns, random.integers(1, 5)))}"
        yield {"text": text, "origin": "<s> não", "label": label, "source": "dantestocks-trust"}


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """A set that can be learned, in place of stage 01's."""
    sides = {
        "train": [*words(1, 60, 1), *words(0, 36, 2)],
        "test": [*words(1, 8, 3), *words(0, 24, 4)],
    }
    monkeypatch.setattr(ex, "documents", lambda corpus, use, side: iter(sides[side]))
    return sides


@pytest.fixture(scope="module")
def base(tiny_done, tmp_path_factory) -> Path:
    tokenizer = load_tokenizer(tiny_done.folder / "02_tokenizer")
    folder = tmp_path_factory.mktemp("base") / "model"
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "initializer_range": 0.1}
    save_pretrained(
        new_model(tiny_done.params.model.model_copy(update=shape), tokenizer, seed=0, attention="sdpa"),
        tokenizer,
        folder,
    )
    return folder


@pytest.fixture
def go(tiny_run, base, tmp_path):
    """`go(**evaluation)`: the part of the stage, in the same folder each time."""

    def run(about=None, base=base, folder=tmp_path / "04_evaluation" / "downstream", energy=None, **changes):
        asked = {"downstream": [SET], "downstream_epochs": 2, "downstream_batch_size": 8} | changes
        made = tiny_run(evaluation={"downstream_learning_rate": 0.02, **asked})
        tokenizer = load_tokenizer(base)
        return ds.run_downstream(made, None, base, tokenizer, folder, CPU, {"model": "tiny", **(about or {})}, energy)

    return run


@pytest.fixture
def tuned(monkeypatch):
    """What was fine-tuned, in order: (model, seed)."""
    done, real = [], ds.fine_tune

    def counted(origin, names, rows, seed, *more, **options):
        done.append((origin.name, seed))
        return real(origin, names, rows, seed, *more, **options)

    monkeypatch.setattr(ds, "fine_tune", counted)
    return done


def same(found):
    """All but the time it took."""
    text = json.dumps(found)
    return re.sub(r'"duration_s": [\d.]+', "", text)


def test_every_fine_tuning_has_its_energy(go):
    assert go()["set"]["energy_kwh"] is None, "not metered"
    meter = SimpleNamespace(sample=iter((1.0, 1.5, 4.0, 4.25)).__next__)
    found = go(energy=meter, downstream_seeds=2, downstream_learning_rate=0.01)["set"]
    assert found["energy_kwh"] == 0.75


def test_one_seed(go, tmp_path):
    found = go()["set"]
    assert {"accuracy", "macro_f1", "best_epoch", "last_epoch", "epochs", "constant_answer", "labels"} <= found.keys()
    assert {"train_examples", "test_examples", "stderr", "seed", "from_mirror", "duration_s"} <= found.keys()
    assert found["accuracy"] > 0.9 > 0.25 == found["constant_answer"]["accuracy"]
    assert (found["train_examples"], found["test_examples"], found["labels"]) == (96, 32, ["0", "1"])
    assert [epoch["epoch"] for epoch in found["epochs"]] == [1, 2]
    assert found["accuracy"] == max(epoch["accuracy"] for epoch in found["epochs"])
    assert found["stderr"] == pytest.approx((found["accuracy"] * (1 - found["accuracy"]) / 32) ** 0.5)
    assert (found["seeds"], found["accuracy_std"], found["baselines"]) == ([found["seed"]], None, {})
    assert (found["fed"], found["max_length"], found["model"]) == ("<s>{text}", 32, "tiny")
    record = read_json(tmp_path / "04_evaluation" / "downstream" / "set" / f"seed-{found['seed']}" / "result.json")
    assert record["best_epoch"]["accuracy"] == found["accuracy"]


def test_the_same_figures_and_weights_bit_for_bit(go, tmp_path):
    assert same(go(folder=tmp_path / "one")) == same(go(folder=tmp_path / "two"))
    assert sha256(tmp_path / "one/set/model/model.safetensors") == sha256(tmp_path / "two/set/model/model.safetensors")


def test_several_seeds(go, tuned):
    # too little training for all seeds to be right
    found = go(downstream_seeds=3, downstream_learning_rate=0.004)["set"]
    seed = found["seed"]
    assert tuned == [("tiny", seed), ("tiny", seed + 1), ("tiny", seed + 2)]
    best = [run["best_epoch"]["accuracy"] for run in found["runs"]]
    last = [run["last_epoch"]["accuracy"] for run in found["runs"]]
    assert len(set(best)) > 1
    assert found["seeds"] == [run["seed"] for run in found["runs"]] == [seed, seed + 1, seed + 2]
    assert found["accuracy"] == pytest.approx(np.mean(best))
    assert found["accuracy_std"] == pytest.approx(statistics.stdev(best))
    assert found["last_epoch"]["accuracy"] == found["epochs"][-1]["accuracy"] == pytest.approx(np.mean(last))
    assert found["last_epoch"]["accuracy_std"] == pytest.approx(statistics.stdev(last))
    # a seed's figures are those that it has alone
    assert go(downstream_learning_rate=0.004)["set"]["accuracy"] == best[0]


# going on


def test_what_is_done_is_not_done_again(go, tuned, capsys):
    first = go(downstream_seeds=2)
    seed = first["set"]["seed"]
    again = go(downstream_seeds=3)
    assert tuned == [("tiny", seed), ("tiny", seed + 1), ("tiny", seed + 2)]
    assert again["set"]["runs"][:2] == first["set"]["runs"]
    assert f"set · tiny · seed {seed}: done before" in capsys.readouterr().out


@pytest.mark.parametrize("stopped_at", range(4))
def test_a_killed_stage_goes_on(go, tuned, tmp_path, stopped_at):
    """Killed at the end of one of four fine-tunings, and once more as that one's result is written."""
    asked = {"downstream": [SET, {**SET, **PAIR}], "downstream_seeds": 2, "downstream_epochs": 1}
    whole = go(folder=tmp_path / "whole", **asked)
    tuned.clear()
    fine_tune, folder = ds.fine_tune, tmp_path / "04_evaluation" / "downstream"

    def killed(*args, **options):
        result = fine_tune(*args, **options)
        if len(tuned) == stopped_at + 1:
            raise KeyboardInterrupt
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ds, "fine_tune", killed)
        go(**asked)
    # no classifier of a fine-tuning that did not end
    assert len(list(folder.glob("*/model"))) == (stopped_at + 1) // 2
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ds, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        go(**asked)
    assert same(go(**asked)) == same(whole)
    # two were done twice or more, none of the finished ones again
    assert len(tuned) == 4 + 2
    assert not [path for path in folder.rglob("*partial*") if path.is_file()]


@pytest.mark.parametrize(
    "change",
    [
        {"downstream_epochs": 1},
        {"downstream_batch_size": 4},
        {"downstream_learning_rate": 0.01},
        {"downstream_weight_decay": 0.5},
        {"downstream": [{**SET, "max_length": 16}]},
        {"downstream": [{**SET, "text": "<s>{text}!"}]},
    ],
)
def test_another_setting_is_not_mistaken_for_a_finished_one(go, tuned, tmp_path, change, capsys):
    asked = {"downstream_epochs": 2}
    before = go(**asked)["set"]
    go(**asked | change)
    assert len(tuned) == 2
    kept = tmp_path / "04_evaluation/downstream/set"
    # nothing is thrown away
    assert (
        read_json(kept / f"seed-{before['seed']}" / "result.json.other")["best_epoch"]["accuracy"] == before["accuracy"]
    )
    assert (kept / "model.other" / "model.safetensors").is_file()
    assert "result.json is kept as result.json.other" in capsys.readouterr().out
    # and back again: the newest stands
    go(**asked | change)
    assert len(tuned) == 2


def test_other_weights_tokenizer_or_data_are_not_mistaken(go, tuned, base, rows, tmp_path):
    from safetensors.torch import load_file, save_file

    go()
    other = shutil.copytree(base, tmp_path / "other")
    # elsewhere they are the same
    go(base=other)
    assert len(tuned) == 1
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    go(base=other)
    assert len(tuned) == 2
    rows["test"][0]["text"] += "!"
    go(base=other)
    assert len(tuned) == 3
    spelling = json.loads((other / "tokenizer.json").read_text())
    spelling["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(spelling))
    go(base=other)
    assert len(tuned) == 4


def test_a_classifier_that_is_gone_is_made_again(go, tuned, tmp_path):
    first = go()
    shutil.rmtree(tmp_path / "04_evaluation/downstream/set/model")
    assert same(go()) == same(first)
    assert len(tuned) == 2


# what is shared


@pytest.mark.parametrize("format", ["{text}", "<s>{text}<s>{origin}\n{text}</s>"])
def test_the_classifier_is_ready_to_share(go, rows, tmp_path, format):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    found = go(downstream=[{**SET, "text": format}])["set"]
    folder = tmp_path / "04_evaluation/downstream/set/model"
    model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True)
    assert (model.config.id2label, model.config.label2id) == ({0: "0", 1: "1"}, {"0": 0, "1": 1})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (32, "right")
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert (folder / "tokenizer.model").is_file()
    # the card's code gives the answers that were measured
    card = (folder / "README.md").read_text()
    code = re.search("```python\n(.*?)```", card, re.DOTALL)[1]
    assert "classify(**{" in code
    space = {}
    exec(code.replace('folder = "."', f"folder = {str(folder)!r}"), space)
    columns = re.findall(r"{(\w+)}", format)
    answers = [space["classify"](**{name: row[name] for name in columns}) for row in rows["test"]]
    right = [answer == str(row["label"]) for answer, row in zip(answers, rows["test"], strict=True)]
    assert np.mean(right) == found["accuracy"]


def test_the_card_says_what_was_measured_and_no_path_of_this_machine(go, tmp_path, mirror):
    found = go(about={"model": str(tmp_path / "mine")}, downstream=[{**SET, **HUB, "source": None}])["hub"]
    card = (tmp_path / "04_evaluation/downstream/hub/model/README.md").read_text()
    assert f"| {found['accuracy']:.2%} | {found['macro_f1']:.2%} |" in card
    assert f"| always the commonest class | {found['constant_answer']['accuracy']:.2%} |" in card
    assert f"seed {found['seed']}" in card
    assert "datasets:\n- someone/set\n" in card
    assert "read from a local mirror" in card
    assert "`mine`" in card
    assert str(tmp_path) not in card
    assert "base_model" not in card
    assert "license" not in card.split("---")[1]
    assert "see the data set's and the base model's" in card
    assert "Classes: `BAD`, `GOOD`" in card


def test_the_card_names_a_base_of_the_hub(go, tmp_path):
    go(about={"model": "someone/model"})
    assert "base_model: someone/model\n" in (tmp_path / "04_evaluation/downstream/set/model/README.md").read_text()


# baselines


@pytest.fixture
def mirror(tmp_path, monkeypatch, rows):
    """A set of the hub whose classes have names, and an encoder."""
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["BAD", "GOOD"])}
    )
    folder = tmp_path / "mirror" / "someone" / "set"
    folder.mkdir(parents=True)
    for side, found in rows.items():
        kept = [{name: row[name] for name in features} for row in found]
        datasets.Dataset.from_list(kept, features=features).to_parquet(folder / f"{side}.parquet")
    write_encoder(tmp_path / "mirror" / "someone" / "bert")
    monkeypatch.setenv("TTL_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "mirror"


def test_an_encoder_beside_ours(go, tuned, mirror, tmp_path):
    asked = {"downstream": [{**SET, **PAIR, "max_length": 60}], "downstream_baselines": ["someone/bert"]}
    asked["downstream_epochs"] = 4
    found = go(**asked)["pair"]
    other = found["baselines"]["someone/bert"]
    seed = found["seed"]
    assert tuned == [("tiny", seed), ("someone/bert", seed)]
    assert other["accuracy"] > 0.9
    assert (other["fed"], other["max_length"]) == ("a pair: {text} and {origin}", CONTEXT)
    assert found["max_length"] == 60
    place = tmp_path / "04_evaluation/downstream/pair"
    assert (place / "baselines/someone--bert" / f"seed-{seed}" / "result.json").is_file()
    # its classifier is not kept
    assert [path.parent for path in place.rglob("model.safetensors")] == [place / "model"]
    assert same(go(**asked)["pair"]) == same(found)
    assert len(tuned) == 2


def test_a_decoder_as_baseline_is_fed_as_ours(go, base, tuned):
    found = go(downstream_baselines=[str(base)])["set"]
    other = found["baselines"][str(base)]
    assert (other["fed"], other["accuracy"]) == (found["fed"], found["accuracy"])
    assert len(tuned) == 2


def test_baselines_that_cannot_be_had_are_rows(go, base, mirror, tmp_path):
    binary = tmp_path / "binary"
    write_encoder(binary)
    (binary / "model.safetensors").rename(binary / "pytorch_model.bin")
    broken = tmp_path / "broken"
    write_encoder(broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    names = ["someone/absent", str(binary), str(broken), str(tmp_path / "nowhere"), "someone/bert"]
    found = go(downstream_baselines=names, downstream_epochs=1)["set"]
    rows = [found["baselines"][name] for name in names]
    assert [row.get("status") for row in rows] == ["not run"] * 4 + [None]
    reasons = ("cannot be reached", "no safetensors weights", "does not open", "there is no such folder")
    assert all(reason in row["reason"] for reason, row in zip(reasons, rows, strict=False))
    assert "accuracy" in found
    assert "accuracy" in rows[4]


# what is wrong


def test_a_set_that_cannot_be_had_is_a_row_and_the_others_run(go):
    found = go(downstream=[{**SET, **HUB, "source": None}, SET])
    assert list(found) == ["hub", "set"]
    assert found["hub"]["status"] == "not run"
    assert "cannot be reached" in found["hub"]["reason"]
    assert "accuracy" in found["set"]


def test_no_set_no_work(go, tuned, tmp_path):
    assert go(downstream=[], downstream_baselines=["someone/absent"]) == {}
    assert not tuned


def test_a_wrong_set_stops_before_any_work(go, tuned):
    with pytest.raises(TTLError, match="'wrong': there is no column 'comment'"):
        go(downstream=[SET, {**SET, "name": "wrong", "text": "{comment}"}])
    assert not tuned


def test_two_sets_of_one_name(go):
    with pytest.raises(TTLError, match="'set': there are two sets of that name"):
        go(downstream=[SET, SET])


def test_a_text_is_cut_to_the_models_context(go, base, tmp_path):
    other = shutil.copytree(base, tmp_path / "short")
    config = read_json(other / "config.json")
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    assert go(base=other)["set"]["max_length"] == 20


def test_a_model_that_cannot_be_fine_tuned_is_a_row(go, base, monkeypatch):
    def refuse(*_, **__):
        raise SourceError("its tokenizer is of the slow kind")

    monkeypatch.setattr(ds, "find_origin", refuse)
    assert go()["set"] == {"status": "not run", "reason": "its tokenizer is of the slow kind"}


def test_a_model_of_another_vocabulary(go, base, tmp_path):
    other = shutil.copytree(base, tmp_path / "smaller")
    config = read_json(other / "config.json")
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(SourceError, match="the tokenizer gives id .*, and the model has 100 rows"):
        go(base=other)


def test_names_become_plain_folders():
    assert ds._plain("someone/bert") == "someone--bert"
    assert ds._plain("/a b/ç") == "a--b--ç"
    assert ds._plain("..") == "unnamed"
