"""What a run begins from: weights of any Llama of its shape and tokenizer, or a checkpoint that it goes on from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ttl_utils import checkpoints as cp
from ttl_utils import hub
from ttl_utils.errors import ParameterError, SourceError, TTLError
from ttl_utils.files import read_json, sha256, write_json
from ttl_utils.initial import lineage, starting_point
from ttl_utils.model import new_model
from ttl_utils.named_models import INITIAL, fingerprint
from ttl_utils.pretraining import pretrain
from ttl_utils.step import make_optimizer
from ttl_utils.tokenizer import load_tokenizer

torch.set_num_threads(1)
SCHEDULES = ("new", "same", "longer")


@pytest.fixture(scope="module")
def tokenizer(tiny_done):
    return load_tokenizer(tiny_done.folder / "02_tokenizer")


@pytest.fixture(scope="module")
def made(tiny_done, tokenizer, tmp_path_factory):
    """A checkpoint of step 4 of the tiny run's own shape and schedule, and a model folder of the same weights."""
    stage = tmp_path_factory.mktemp("other") / "03_pretraining"
    model = new_model(tiny_done.params.model, tokenizer, seed=7, attention="sdpa")
    optimizer = make_optimizer(model, tiny_done.params.pretraining)
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    cp.save_checkpoint(stage / "checkpoints", 4, model, tokenizer, optimizer, {"tokens": 1, **lineage(tiny_done)})
    cp.save_model_folder(model, tokenizer, stage / "model")
    return SimpleNamespace(stage=stage, model=model, optimizer=optimizer)


@pytest.fixture(autouse=True)
def nothing_cached():
    hub.local_model.cache_clear()
    hub.cached_sha256.cache_clear()


@pytest.fixture
def begin(made, tmp_path, tiny_prepared, tokenizer):
    """`begin(**overrides)`: a run that begins from a copy of the checkpoint (`checkpoint`) or the model folder."""
    stage = shutil.copytree(made.stage, tmp_path / "other" / "03_pretraining")
    checkpoint, model = stage / "checkpoints" / "step-0000004", stage / "model"

    def make(source: Path = checkpoint, schedule: str = "new", sections: dict | None = None, **pretraining: object):
        settings = {"init_from": str(source), "init_schedule": schedule, **pretraining}
        return tiny_prepared(pretraining=settings, **(sections or {}))

    make.checkpoint, make.model = checkpoint, model
    make.start = lambda *a, **options: starting_point(make(*a, **options), tokenizer, "sdpa")
    return make


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def edit(path: Path, **changes: object) -> None:
    write_json(path, {**read_json(path), **changes})


# weights


def test_without_init_from_the_weights_are_random(tiny_prepared, tokenizer):
    run = tiny_prepared()
    start = starting_point(run, tokenizer, "sdpa")
    assert (start.checkpoint, start.origin, fingerprint(run.params, INITIAL)) == (None, None, None)
    assert same(start.model, new_model(run.params.model, tokenizer, run.params.seed, "sdpa"))
    other = starting_point(tiny_prepared(pretraining={"seed": 8}), tokenizer, "sdpa")
    assert same(other.model, new_model(run.params.model, tokenizer, 8, "sdpa"))


def test_new_takes_the_weights_alone(begin, made, tokenizer, tmp_path, capsys):
    for source in (begin.checkpoint, begin.model):
        start = begin.start(source)
        assert start.checkpoint is None and same(start.model, made.model)
        assert start.origin == {"init_from": str(source), "init_schedule": "new", "commit": None, "step": 0}
        assert f"pretraining.init_from '{source}': its weights, from step 0" in capsys.readouterr().out
    for path in cp.save_model_folder(start.model, tokenizer, tmp_path / "saved"):
        assert path.read_bytes() == (begin.model / path.name).read_bytes()
    assert start.model.config._attn_implementation == "sdpa"
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(begin.model) not in maps.read_text()


def test_other_forms_of_the_same_weights(begin, made, tmp_path):
    """In bfloat16, in several files, and with an old configuration and settings of its own."""
    folder = tmp_path / "published"
    made.model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert same(begin.start(folder).model, made.model)
    shutil.rmtree(folder)
    shutil.copytree(begin.model, folder)
    save_file(
        {k: v.bfloat16() for k, v in load_file(folder / cp.WEIGHTS).items()}, folder / cp.WEIGHTS, {"format": "pt"}
    )
    config = read_json(folder / "config.json")
    config |= {
        "rope_theta": config.pop("rope_parameters")["rope_theta"],
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
    }
    write_json(folder / "config.json", config | {"bos_token_id": 9, "use_cache": False})
    write_json(folder / "generation_config.json", {"do_sample": True, "temperature": 0.3})
    hub.local_model.cache_clear()
    model = begin.start(folder).model
    for weights, expected in zip(model.parameters(), made.model.parameters(), strict=True):
        assert weights.dtype == torch.float32 and torch.equal(weights, expected.bfloat16().float())
    assert model.config.bos_token_id == made.model.config.bos_token_id and not model.generation_config.do_sample


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_parameters .*5.0.*here"),
        ({"num_attention_heads": 4, "head_dim": 8}, r"num_attention_heads 4 \(here 2\), head_dim 8 \(here 16\)"),
        ({"rms_norm_eps": 0.5}, "rms_norm_eps 0.5"),
        ({"hidden_act": "relu"}, "hidden_act relu"),
        ({"model_type": "mistral"}, "is not a Llama .*mistral"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_shape_is_named(begin, change, wanted):
    edit(begin.model / "config.json", **change)
    with pytest.raises(TTLError, match=wanted):
        begin.start(begin.model)


def test_this_runs_own_shape_is_what_counts(begin):
    with pytest.raises(ParameterError, match=r"hidden_size 32 \(here 16\).* head_dim"):
        begin.start(sections={"model": {"hidden_size": 16}})


def test_another_tokenizer_is_named(begin):
    tokens = AutoTokenizer.from_pretrained(begin.model)
    tokens.add_tokens(["<instruction>"])
    tokens.save_pretrained(begin.model)
    # it has one more, and all of ours
    begin.start(begin.model)
    text = (begin.model / "tokenizer.json").read_text()
    vocabulary = json.loads(text)["model"]["vocab"]
    one, two = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    whole = json.loads(text)
    whole["model"]["vocab"] = vocabulary
    (begin.model / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(
        ParameterError, match="has another tokenizer: piece .* is 301 there and 300 here: .*tokenizer.source"
    ):
        begin.start(begin.model)
    for path in begin.model.glob("token*"):
        path.unlink()
    begin.start(begin.model)
    edit(begin.model / "config.json", vocab_size=77)
    with pytest.raises(ParameterError, match="has rows for 77 pieces, the tokenizer"):
        begin.start(begin.model)


@pytest.mark.parametrize("change", ["missing", "more", "shape", "damaged"])
def test_weights_that_are_not_just_a_llamas_are_named(begin, change):
    path = begin.model / cp.WEIGHTS
    tensors = load_file(path)
    if change == "missing":
        del tensors["model.norm.weight"]
    elif change == "more":
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    elif change == "shape":
        tensors["model.norm.weight"] = torch.zeros(5)
    save_file(tensors, path, {"format": "pt"})
    if change == "damaged":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SourceError, match="does not (hold just the weights|open as) .*a Llama"):
        begin.start(begin.model)


def test_a_damaged_checkpoint_is_named(begin):
    data = bytearray((begin.checkpoint / cp.WEIGHTS).read_bytes())
    data[-9] ^= 1
    (begin.checkpoint / cp.WEIGHTS).write_bytes(data)
    for schedule in ("new", "same"):
        with pytest.raises(SourceError, match="model.safetensors is damaged. Name another checkpoint"):
            begin.start(schedule=schedule)


@pytest.mark.parametrize("place", ["stage", "stage/checkpoints", "elsewhere"])
def test_a_folder_that_is_no_model_has_a_hint(begin, tmp_path, place):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    if place != "elsewhere":
        folder = begin.model.parent if place == "stage" else begin.model.parent / "checkpoints"
    wanted = "Other formats are not read" if place == "elsewhere" else "such as .*step-0000004"
    with pytest.raises(SourceError, match=f"holds no model.safetensors. .*{wanted}"):
        begin.start(folder)
    with pytest.raises(SourceError, match="no such folder"):
        begin.start(tmp_path / "nowhere")


# the schedule


def test_same_and_longer_go_on(begin, made, capsys):
    for schedule, steps in (("same", 12), ("longer", 13)):
        start = begin.start(schedule=schedule, max_steps=steps)
        assert start.checkpoint == begin.checkpoint and start.origin["step"] == 4 and same(start.model, made.model)
        assert f"step 4 with its optimizer, schedule {schedule}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("schedule", "changes", "wanted"),
    [
        ("same", {"max_steps": 13}, r"max_steps 12 \(here 13; for more steps set init_schedule to longer\)"),
        ("same", {"learning_rate": 0.5, "warmup_steps": 3}, r"learning_rate .*\(here 0.5\), warmup_steps 2 \(here 3\)"),
        ("same", {"seed": 9}, r"seed \d+ \(here 9\)"),
        ("same", {"block_size": 32}, r"block_size 64 \(here 32\)"),
        ("longer", {"max_steps": 13, "weight_decay": 0.5}, r"weight_decay 0.01 \(here 0.5\)"),
        ("longer", {"max_steps": 12}, "needs max_steps above its own 12, and it is 12"),
        ("longer", {"max_steps": 8}, "needs max_steps above its own 12, and it is 8"),
    ],
)
def test_what_was_otherwise_is_named(begin, schedule, changes, wanted):
    with pytest.raises(ParameterError, match=wanted):
        begin.start(schedule=schedule, **changes)
    # its weights alone may be used by any schedule
    assert begin.start(**changes).checkpoint is None


def test_what_changes_no_result_may_change(begin):
    start = begin.start(
        schedule="same", seed=begin().params.seed, block_size=64, logging_steps=7, per_device_train_batch_size=1
    )
    assert start.checkpoint


def test_other_tokens_are_refused(begin):
    edit(begin.checkpoint / "state.json", data="another fingerprint")
    with pytest.raises(ParameterError, match="other tokens .* init_schedule 'same' .*set it to new"):
        begin.start(schedule="same")


def test_what_cannot_go_on_says_why(begin):
    with pytest.raises(
        SourceError, match="has no optimizer.safetensors.* name one of .*checkpoints, such as step-0000004"
    ):
        begin.start(begin.model, schedule="same")
    state = read_json(begin.checkpoint / "state.json")
    edit(begin.checkpoint / "state.json", step=12)
    with pytest.raises(ParameterError, match="is at its last step, 12: set init_schedule to longer"):
        begin.start(schedule="same")
    write_json(begin.checkpoint / "state.json", {key: state[key] for key in ("step", "tokens")})
    with pytest.raises(SourceError, match="does not say what it was trained with: set init_schedule to new"):
        begin.start(schedule="longer", max_steps=20)
    cp.thin_out(begin.checkpoint.parent, 1)
    (begin.checkpoint / cp.OPTIMIZER).unlink()
    with pytest.raises(SourceError, match="has no optimizer.safetensors.* name one that has"):
        begin.start(schedule="same")


def test_a_run_under_way_goes_on_from_its_own(begin, tokenizer, tiny_prepared):
    run = begin()
    shutil.copytree(begin.checkpoint, run.folder / "03_pretraining" / "checkpoints" / "step-0000008")
    shutil.rmtree(begin.checkpoint)
    assert starting_point(run, tokenizer, "sdpa").origin is None
    # from its start anew: that is where it began
    with pytest.raises(SourceError):
        begin.start(resume_from_checkpoint=0)


# identity


def test_the_identity_is_the_weights_and_the_schedule(begin, made, tmp_path):
    found = fingerprint(begin().params, INITIAL)
    assert found == {"schedule": "new", "weights": {cp.WEIGHTS: sha256(begin.checkpoint / cp.WEIGHTS)}}
    assert fingerprint(begin(begin.model).params, INITIAL) == found
    assert fingerprint(begin(schedule="same").params, INITIAL) == found | {"schedule": "same"}
    data = bytearray((begin.model / cp.WEIGHTS).read_bytes())
    data[-1] ^= 1
    (begin.model / cp.WEIGHTS).write_bytes(data)
    os.utime(begin.model / cp.WEIGHTS, ns=(1, 1))
    assert fingerprint(begin(begin.model).params, INITIAL) != found


def test_weights_are_hashed_once(begin, monkeypatch):
    params = begin().params
    wanted = fingerprint(params, INITIAL)
    monkeypatch.setattr(hub, "sha256", lambda path: pytest.fail("hashed again"))
    assert fingerprint(params, INITIAL) == wanted


def test_what_cannot_be_had_any_more_is_what_was_recorded(begin):
    recorded = fingerprint(begin().params, INITIAL)
    shutil.rmtree(begin.checkpoint)
    assert fingerprint(begin().params, INITIAL, recorded) == recorded
    hub.local_model.cache_clear()
    assert fingerprint(begin().params, INITIAL, recorded) == recorded
    for schedule, known in (("same", recorded), ("new", None)):
        with pytest.raises(SourceError, match="there is no such folder"):
            fingerprint(begin(schedule=schedule).params, INITIAL, known)


# the hub


@pytest.fixture
def published(begin, monkeypatch, tmp_path):
    """The hub holds the model folder as alguem/modelo at one commit; `asked` says of what it was asked."""
    snapshot = tmp_path / "cache" / "snapshots" / "c0ffee"
    found = SimpleNamespace(asked=[], there=True, cached=False)

    def download(name, revision, allow_patterns, local_files_only=False):
        found.asked.append((name, revision, local_files_only))
        if not (found.cached if local_files_only else found.there):
            from huggingface_hub.errors import LocalEntryNotFoundError

            raise LocalEntryNotFoundError("nothing here")
        if not snapshot.exists():
            shutil.copytree(begin.model, snapshot)
        return str(snapshot)

    def model_folder(name, revision):
        if not found.there:
            raise SourceError(f"model {name!r}: the Hugging Face hub cannot be reached")
        return name

    monkeypatch.setattr(hub, "model_folder", model_folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return found


def test_a_hub_model_at_a_revision(begin, made, published, tokenizer):
    run = begin("alguem/modelo", init_revision="v1")
    start = starting_point(run, tokenizer, "sdpa")
    assert same(start.model, made.model) and start.origin["commit"] == "c0ffee"
    assert fingerprint(run.params, INITIAL)["weights"] == {cp.WEIGHTS: sha256(begin.model / cp.WEIGHTS)}
    # asked once
    assert published.asked == [("alguem/modelo", "v1", False)]


def test_an_unreachable_hub_is_the_cache_where_there_is_one(begin, made, published):
    published.there, published.cached = False, True
    assert same(begin.start("alguem/modelo").model, made.model)
    hub.local_model.cache_clear()
    published.cached = False
    with pytest.raises(SourceError, match="hub cannot be reached"):
        begin.start("alguem/modelo")


# in the loop


def test_going_on_ends_where_the_run_itself_ends(tiny_prepared, no_energy, tmp_path):
    whole = tiny_prepared(run="whole")
    pretrain(whole)
    source = whole.folder / "03_pretraining" / "checkpoints" / "step-0000008"
    assert {"schedule", "data"} <= read_json(source / "state.json").keys()
    made = tiny_prepared(run="same", pretraining={"init_from": str(source), "init_schedule": "same"})
    pretrain(made)
    wanted = load_file(whole.folder / "03_pretraining" / "model" / cp.WEIGHTS)
    found = load_file(made.folder / "03_pretraining" / "model" / cp.WEIGHTS)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
