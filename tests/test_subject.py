"""What is evaluated: the run's own model or another's, its tokens, and every way in which it cannot be."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification, PreTrainedTokenizerFast

from ttl_utils import checkpoints as cp
from ttl_utils import hub, subject
from ttl_utils.corpus import documents
from ttl_utils.encoding import plain_ids
from ttl_utils.errors import MissingStage, ParameterError, SourceError, TTLError
from ttl_utils.files import read_json, sha256, write_json
from ttl_utils.model import Hardware, new_model
from ttl_utils.named_models import EVALUATED, fingerprint
from ttl_utils.packing import framed
from ttl_utils.perplexity import perplexity
from ttl_utils.subject import blocks_of, load_model, same_tokens, subject_of
from ttl_utils.tokenizer import load_tokenizer

torch.set_num_threads(1)
CPU = Hardware("cpu", "fp32", "sdpa")


@pytest.fixture(scope="module")
def tokenizer(tiny_done):
    return load_tokenizer(tiny_done.folder / "02_tokenizer")


@pytest.fixture(scope="module")
def made(tiny_done, tokenizer, tmp_path_factory):
    """A checkpoint and a model folder of the same weights, of the tiny run's shape; and another's GPT-2."""
    root = tmp_path_factory.mktemp("made")
    model = new_model(tiny_done.params.model, tokenizer, seed=7, attention="sdpa")
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (4, 8):
        cp.save_checkpoint(root / "checkpoints", step, model, tokenizer, optimizer, {"tokens": step})
    cp.save_model_folder(model, tokenizer, root / "model")
    foreign(root / "foreign", vocab_size=300)
    return SimpleNamespace(root=root, model=model)


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A piece for each byte, and one that both begins and ends a text; the others stand for nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<|endoftext|>", *alphabet]
    pieces += [f"<{number}>" for number in range(vocab_size - len(pieces))]
    form = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    form.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    form.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=form, bos_token=end, eos_token=end, unk_token=end)


def foreign(folder: Path, vocab_size: int, context: int = 32) -> None:
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=vocab_size, n_positions=context, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    byte_tokenizer(vocab_size).save_pretrained(folder)


@pytest.fixture(autouse=True)
def nothing_cached():
    hub.local_model.cache_clear()
    hub.cached_sha256.cache_clear()


@pytest.fixture
def there(made, tmp_path):
    """Copies to change: `checkpoint`, `model`, `foreign`."""
    root = shutil.copytree(made.root, tmp_path / "there")
    return SimpleNamespace(
        root=root, checkpoint=root / "checkpoints" / "step-0000004", model=root / "model", foreign=root / "foreign"
    )


@pytest.fixture
def judge(tiny_prepared):
    """`judge(model)`: a run with stages 01 and 02 that evaluates it."""
    return lambda model=None, **settings: tiny_prepared(evaluation={"model": model and str(model), **settings})


def own(run, there, *names: str) -> None:
    """Put these of the made ones in place as the run's own stage 03."""
    for name in names:
        shutil.copytree(there.root / name, run.folder / "03_pretraining" / name)


def finish(run) -> None:
    write_json(run.folder / "03_pretraining" / "manifest.json", {})


def weights_of(folder: Path) -> str:
    hashes = {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    hashes.pop(cp.OPTIMIZER, None), hashes.pop(cp.RANDOM, None)
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


# which one


def test_without_a_name_it_is_the_runs_own(judge, there):
    run = judge()
    own(run, there, "model")
    with pytest.raises(MissingStage, match="03_pretraining of run 'tiny' is not finished"):
        subject_of(run)
    finish(run)
    found = subject_of(run)
    assert (found.name, found.origin, found.revision, found.context) == ("tiny", "this run", None, 64)
    assert found.folder == run.folder / "03_pretraining" / "model" and found.weights == weights_of(there.model)
    assert found.tokenizer("a")["input_ids"] == load_tokenizer(there.model)("a")["input_ids"]
    assert fingerprint(run.params, EVALUATED) is None


def test_a_run_under_way_is_its_newest_whole_checkpoint(judge, there, capsys):
    run = judge()
    with pytest.raises(MissingStage, match="has no whole checkpoint yet .*every 4 steps"):
        subject_of(run, under_way=True)
    own(run, there, "checkpoints")
    with pytest.raises(MissingStage, match="is not finished"):
        subject_of(run)
    found = subject_of(run, under_way=True)
    assert (found.name, found.folder.name, found.origin) == ("tiny, step 8", "step-0000008", "this run")
    # nothing of the folder of another process is changed
    (found.folder / "config.json").write_text("{}")
    assert subject_of(run, under_way=True).folder.name == "step-0000004"
    assert "checkpoint step-0000008 is passed over" in capsys.readouterr().err
    assert {path.name for path in found.folder.parent.iterdir()} == {"step-0000004", "step-0000008"}
    own(run, there, "model")
    finish(run)
    assert subject_of(run, under_way=True).folder.name == "model"


@pytest.mark.parametrize("kind", ["model", "checkpoint", "foreign"])
def test_a_folder_is_evaluated(judge, there, kind):
    folder = getattr(there, kind)
    run = judge(folder)
    found = subject_of(run)
    assert (found.name, found.origin, found.revision, found.folder) == (str(folder), "folder", None, folder)
    assert found.context == (32 if kind == "foreign" else 64)
    assert found.weights == weights_of(folder)
    known = fingerprint(run.params, EVALUATED)
    assert known == {
        "weights": {cp.WEIGHTS: sha256(folder / cp.WEIGHTS)},
        "beside_weights": found.beside_weights,
    }
    # the same weights with another tokenizer are another model
    other = folder.with_name(f"other {kind}")
    shutil.copytree(folder, other)
    (other / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b" ")
    changed = fingerprint(judge(other).params, EVALUATED)
    assert changed["weights"] == known["weights"] and changed["beside_weights"] != known["beside_weights"]
    model = load_model(found.folder, CPU)
    assert not model.training and model(torch.tensor([[5, 6]])).logits.shape[:2] == (1, 2)


def test_the_same_weights_are_the_same_wherever_they_stand(judge, there):
    assert subject_of(judge(there.model)).weights == subject_of(judge(there.checkpoint)).weights
    assert fingerprint(judge(there.model).params, EVALUATED) == fingerprint(judge(there.checkpoint).params, EVALUATED)


def test_a_changed_byte_is_another_model(judge, there):
    before = subject_of(judge(there.model)).weights, fingerprint(judge(there.model).params, EVALUATED)
    data = bytearray((there.model / cp.WEIGHTS).read_bytes())
    data[-1] ^= 1
    (there.model / cp.WEIGHTS).write_bytes(data)
    os.utime(there.model / cp.WEIGHTS, ns=(1, 1))
    after = subject_of(judge(there.model)).weights, fingerprint(judge(there.model).params, EVALUATED)
    assert before[0] != after[0] and before[1] != after[1]


def test_what_cannot_be_had_any_more_is_what_was_recorded(judge, there):
    params = judge(there.model).params
    recorded = fingerprint(params, EVALUATED)
    shutil.rmtree(there.model)
    hub.local_model.cache_clear()
    assert fingerprint(params, EVALUATED, recorded) == recorded
    with pytest.raises(SourceError, match="evaluation.model: model .* there is no such folder"):
        fingerprint(params, EVALUATED)


def test_a_mirror_stands_in_for_the_hub(judge, there, monkeypatch, tmp_path):
    shutil.copytree(there.model, tmp_path / "mirror" / "alguem" / "modelo")
    monkeypatch.setenv("TTL_MIRROR", str(tmp_path / "mirror"))
    found = subject_of(judge("alguem/modelo"))
    assert (found.name, found.origin, found.revision) == ("alguem/modelo", "hub", None)


def test_a_hub_model_is_known_by_its_commit_and_served_from_the_cache(judge, there, monkeypatch, tmp_path):
    snapshot = shutil.copytree(there.model, tmp_path / "snapshots" / "c0ffee")
    asked = []

    def download(name, revision, allow_patterns, local_files_only=False):
        asked.append((name, revision, local_files_only))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    run = judge("alguem/modelo", model_revision="v1")
    # offline, as all tests are: the cache's copy
    found = subject_of(run)
    assert (found.name, found.origin, found.revision) == ("alguem/modelo", "hub", "c0ffee")
    assert asked == [("alguem/modelo", "v1", True)]
    monkeypatch.setattr(hub, "model_folder", lambda name, revision: name)
    hub.local_model.cache_clear()
    assert subject_of(run).revision == "c0ffee" and asked[1:] == [("alguem/modelo", "v1", False)]


def test_an_unreachable_hub_without_a_copy_says_what_to_do(judge):
    with pytest.raises(SourceError, match="evaluation.model: model 'alguem/outro': .*cannot be reached.*TTL_MIRROR"):
        subject_of(judge("alguem/outro"))


# what cannot be evaluated


def drop(*names: str):
    return lambda folder: [path.unlink() for name in names for path in folder.glob(name)]


def edit(**changes: object):
    return lambda folder: write_json(folder / "config.json", read_json(folder / "config.json") | changes)


def cut(folder: Path) -> None:
    data = (folder / cp.WEIGHTS).read_bytes()
    (folder / cp.WEIGHTS).write_bytes(data[:-100])


def pickled(folder: Path) -> None:
    (folder / cp.WEIGHTS).rename(folder / "pytorch_model.bin")


def more_pieces(folder: Path) -> None:
    tokens = load_tokenizer(folder)
    tokens.add_tokens(["<instruction>", "</instruction>"])
    tokens.save_pretrained(folder)


def indexed(folder: Path) -> None:
    (folder / cp.WEIGHTS).unlink()
    write_json(folder / hub.INDEX, {"weight_map": {"a": "model-00001-of-00002.safetensors"}})


WRONG = {
    "no tokenizer": (drop("token*", "special*"), r"has no tokenizer \(tokenizer.json and tokenizer_config.json, or"),
    "damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "its tokenizer does not open"),
    "more pieces": (more_pieces, "its tokenizer has 514 pieces, up to id 513, and the model rows for 512: put"),
    "no configuration": (drop("config.json"), "has no config.json, which says what kind of model"),
    "damaged configuration": (lambda f: (f / "config.json").write_text("{"), "config.json does not open"),
    "unknown kind": (edit(model_type="nothing known"), "config.json does not open"),
    "other kind": (edit(model_type="t5", architectures=["T5ForConditionalGeneration"]), "is no causal .* T5ForCond"),
    "classifier": (
        edit(architectures=["LlamaForSequenceClassification"]),
        "no causal language model, but a LlamaForSeq",
    ),
    "encoder": (edit(model_type="bert", architectures=["BertForMaskedLM"]), "no causal language model, but a BertFor"),
    "cut": (cut, "model.safetensors is damaged: .*Copy it again, or name another model"),
    "pickled": (pickled, "holds no model.safetensors. Other formats are not read"),
    "a part missing": (indexed, "lacks model-00001-of-00002.safetensors, which its .*index.json names"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_with_a_folder_is_said(judge, there, kind):
    spoil, wanted = WRONG[kind]
    spoil(there.model)
    with pytest.raises(SourceError, match=wanted) as error:
        subject_of(judge(there.model))
    assert "evaluation.model" in str(error.value) and str(there.model) in str(error.value)


def test_a_damaged_checkpoint_is_named(judge, there):
    data = bytearray((there.checkpoint / cp.WEIGHTS).read_bytes())
    data[-9] ^= 1
    (there.checkpoint / cp.WEIGHTS).write_bytes(data)
    with pytest.raises(SourceError, match="evaluation.model .*model.safetensors is damaged. Copy it again"):
        subject_of(judge(there.checkpoint))


def test_a_folder_of_a_run_has_a_hint(judge, there):
    with pytest.raises(SourceError, match="holds no model.safetensors. Name one of its checkpoints, such as .*0000008"):
        subject_of(judge(there.root))


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (
            lambda tensors: tensors.pop("lm_head.weight"),
            "does not hold the weights of a LlamaForCausalLM: lm_head.weight",
        ),
        (lambda tensors: tensors.update({"lm_head.weight": torch.zeros(5, 32)}), "lm_head.weight"),
    ],
    ids=["missing", "shape"],
)
def test_weights_that_are_not_all_there_are_named(there, change, wanted):
    tensors = load_file(there.model / cp.WEIGHTS)
    change(tensors)
    save_file(tensors, there.model / cp.WEIGHTS, {"format": "pt"})
    with pytest.raises(SourceError, match=wanted):
        load_model(there.model, CPU)


def test_a_classifier_is_no_language_model_even_where_it_says_so(tiny_done, there):
    """Its body would be taken, under an output layer that is random."""
    LlamaForSequenceClassification.from_pretrained(there.model).save_pretrained(there.model)
    edit(architectures=["LlamaForCausalLM"])(there.model)
    with pytest.raises(SourceError, match="does not hold the weights of a LlamaForCausalLM: lm_head.weight"):
        load_model(there.model, CPU)


def test_a_model_is_loaded_for_scoring_in_the_runs_precision(there):
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("tf32", torch.float32)):
        loaded = load_model(there.model, Hardware("cpu", precision, "sdpa"))
        assert loaded.dtype == dtype
        assert not loaded.training
    assert load_model(there.model, Hardware("cpu", "bf16", "sdpa"), torch.float32).dtype == torch.float32
    assert load_model(there.model, Hardware("cpu", "fp32", "eager")).config._attn_implementation == "eager"


def test_a_longer_context_than_it_has_is_refused(judge, there):
    run = judge(there.model)
    found = subject_of(run)
    subject.check_context(found, 64, "evaluation.inference")
    with pytest.raises(
        ParameterError, match=r"evaluation.inference: 65 tokens at once, and .*model reads 64: ask less"
    ):
        subject.check_context(found, 65, "evaluation.inference")
    with pytest.raises(ParameterError, match="the blocks to be scored: 128 tokens"):
        blocks_of(run, found, 128)


def test_a_model_that_does_not_say_its_context(judge, there):
    config = read_json(there.foreign / "config.json")
    write_json(
        there.foreign / "config.json", {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "n_layer": 1}
    )
    with pytest.raises(SourceError, match="does not say how many tokens it reads at once: .*model_max_length"):
        subject_of(judge(there.foreign))
    settings = read_json(there.foreign / "tokenizer_config.json")
    write_json(there.foreign / "tokenizer_config.json", settings | {"model_max_length": 48})
    assert subject_of(judge(there.foreign)).context == 48
    assert config["n_positions"] == 32


# its tokens


def test_the_runs_own_tokens_where_they_are_in_the_vocabulary(judge, there, tiny_done):
    run = judge(there.model)
    found = subject_of(run)
    assert same_tokens(run, found)
    stage = run.need("02_tokenizer")
    for context in (None, 16):
        blocks, text_bytes = blocks_of(run, found, context)
        assert blocks.block_size == (context or 64) and text_bytes == stage.metrics()["test_bytes"]
        assert blocks.tokens == stage.metrics()["test_tokens"]
    assert not (run.folder / "04_evaluation").exists()
    # a chat model's two more change nothing
    more_pieces(there.model)
    model = load_model(there.model, CPU)
    model.resize_token_embeddings(514)
    model.save_pretrained(there.model)
    hub.cached_sha256.cache_clear()
    assert same_tokens(run, subject_of(run))


def test_two_pieces_the_other_way_round_are_another_vocabulary(judge, there):
    whole = json.loads((there.model / "tokenizer.json").read_text())
    pieces = whole["model"]["vocab"]
    one, two = list(pieces)[300:302]
    pieces[one], pieces[two] = pieces[two], pieces[one]
    (there.model / "tokenizer.json").write_text(json.dumps(whole))
    run = judge(there.model)
    assert not same_tokens(run, subject_of(run))


def expected_tokens(run, tokenizer) -> tuple[list[int], int]:
    """Every held-out document after the piece that begins it, and the bytes of all."""
    texts = [row["text"] for row in documents(run.need("01_data"), "corpus", "test")]
    ids = [number for text in texts for number in [0, *plain_ids(tokenizer, [text])[0]]]
    return ids, sum(len(text.encode()) for text in texts)


def test_another_vocabulary_is_scored_on_the_same_text(judge, there):
    run = judge(there.foreign)
    found = subject_of(run)
    assert not same_tokens(run, found)
    blocks, text_bytes = blocks_of(run, found)
    ids, size = expected_tokens(run, found.tokenizer)
    assert blocks.block_size == 32 and blocks.span(0, blocks.tokens).tolist() == ids
    # the text of the run's own tokens, byte for byte; here a token each
    assert text_bytes == size == run.need("02_tokenizer").metrics()["test_bytes"]
    assert blocks.tokens == size + run.need("02_tokenizer").metrics()["test_documents"]
    scored = perplexity(load_model(found.folder, CPU), blocks, text_bytes=text_bytes)
    assert scored["scored_tokens"] == len(ids) - -(-len(ids) // 32)
    # near that of any byte
    assert scored["bits_per_byte"] == pytest.approx(math.log2(300) * len(ids) / size, rel=0.02)


def test_packing_is_that_of_stage_02(judge, there, tokenizer, monkeypatch):
    """Its own tokenizer, taken for a foreign one, gives the run's own tokens."""
    run = judge(there.model)
    found = subject_of(run)
    wanted, wanted_bytes = blocks_of(run, found)
    monkeypatch.setattr(subject, "same_tokens", lambda *_: False)
    blocks, text_bytes = blocks_of(run, found)
    assert blocks.paths != wanted.paths
    assert np.array_equal(blocks.span(0, blocks.tokens), wanted.span(0, wanted.tokens)) and text_bytes == wanted_bytes
    model = load_model(found.folder, CPU)
    assert perplexity(model, blocks, text_bytes=text_bytes) == perplexity(model, wanted, text_bytes=wanted_bytes)


def test_more_pieces_than_16_bits_hold(judge, there):
    foreign(there.root / "wide", vocab_size=70_000)
    found = subject_of(judge(there.root / "wide"))
    # the highest id is one of the text's
    whole = json.loads((found.folder / "tokenizer.json").read_text())
    pieces = whole["model"]["vocab"]
    pieces["a"], pieces["<69742>"] = pieces["<69742>"], pieces["a"]
    (found.folder / "tokenizer.json").write_text(json.dumps(whole))
    run = judge(found.folder)
    found = subject_of(run)
    blocks, text_bytes = blocks_of(run, found)
    ids, size = expected_tokens(run, found.tokenizer)
    assert max(ids) == 69_999 and blocks.span(0, blocks.tokens).tolist() == ids and text_bytes == size
    assert np.array_equal(blocks.batch([1])[0], ids[32:64]) and len(blocks.remainder()) == len(ids) % 32


def test_foreign_tokens_are_kept_whole_or_not_at_all(judge, there, monkeypatch):
    run = judge(there.foreign)
    found = subject_of(run)
    calls, original = [], subject.plain_ids

    def encode(tokenizer, texts):
        calls.append(len(texts))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return original(tokenizer, texts)

    monkeypatch.setattr(subject, "plain_ids", encode)
    monkeypatch.setattr(subject, "PLAIN_CHARACTERS", 4000)
    tokens, stop = run.folder / "04_evaluation" / "tokens", 3
    with pytest.raises(KeyboardInterrupt):
        blocks_of(run, found)
    assert not list(tokens.glob("[!.]*"))
    stop = None
    first, text_bytes = blocks_of(run, found)
    assert first.span(0, first.tokens).tolist() == expected_tokens(run, found.tokenizer)[0]
    assert [path.name for path in tokens.iterdir()] == [first.paths[0].parent.name]
    # reused; made anew where it was cut
    calls.clear()
    assert blocks_of(run, found, 8)[1] == text_bytes and not calls
    os.truncate(first.paths[0], 400)
    again, _ = blocks_of(run, found)
    assert calls and again.tokens == first.tokens
    # and where the tokenizer is another
    calls.clear()
    whole = json.loads((there.foreign / "tokenizer.json").read_text())
    pieces = whole["model"]["vocab"]
    pieces["a"], pieces["b"] = pieces["b"], pieces["a"]
    (there.foreign / "tokenizer.json").write_text(json.dumps(whole))
    other, _ = blocks_of(run, subject_of(run))
    assert calls and not np.array_equal(other.span(0, 500), again.span(0, 500))


def test_a_run_without_tokens_of_its_own_encodes_the_text(judge, there):
    run = judge(there.model)
    shutil.rmtree(run.folder / "02_tokenizer")
    found = subject_of(run)
    assert not same_tokens(run, found)
    blocks, _ = blocks_of(run, found)
    ids = load_tokenizer(there.model)
    texts = [row["text"] for row in documents(run.need("01_data"), "corpus", "test")]
    plain = plain_ids(ids, texts)
    wanted, _ = framed(np.concatenate(plain), np.array(list(map(len, plain))), ids.bos_token_id, ids.eos_token_id)
    assert np.array_equal(blocks.span(0, blocks.tokens), wanted)


def test_no_text_to_encode_is_said(judge, there, monkeypatch):
    run = judge(there.foreign)
    monkeypatch.setattr(subject, "documents", lambda *_, **__: iter(()))
    with pytest.raises(TTLError, match="has a tokenizer of its own, and 01_data holds no held-out text"):
        blocks_of(run, subject_of(run))
