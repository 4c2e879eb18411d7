"""Perplexity against a slow oracle and plain transformers; documents on their own, whatever stands beside them."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from ttl_utils import perplexity as pp
from ttl_utils.blocks import TokenBlocks, TokenWriter
from ttl_utils.checkpoints import save_model_folder
from ttl_utils.cleaning import clean
from ttl_utils.corpus import documents
from ttl_utils.errors import MissingStage, TTLError
from ttl_utils.files import read_json, write_json
from ttl_utils.loss import summed_loss
from ttl_utils.model import new_model
from ttl_utils.tokenizer import load_tokenizer

# two threads that wait for each other cost more than such small matrices
torch.set_num_threads(1)
BLOCK = 8


@pytest.fixture(scope="module")
def tokenizer(tiny_done):
    return load_tokenizer(tiny_done.folder / "02_tokenizer")


@pytest.fixture(scope="module")
def model(tiny_done, tokenizer):
    # weights larger than usual: the losses of tokens differ
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "initializer_range": 0.5}
    return new_model(tiny_done.params.model.model_copy(update=shape), tokenizer, seed=3, attention="sdpa").eval()


@pytest.fixture(scope="module")
def gpt2():
    """Another architecture, in training mode: its dropout must not be heard."""
    torch.manual_seed(5)
    config = GPT2Config(
        vocab_size=512, n_positions=64, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3, resid_pdrop=0.5
    )
    return GPT2LMHeadModel(config).train()


def blocks_of(folder: Path, tokens: int, block: int = BLOCK) -> TokenBlocks:
    """Random tokens in two files."""
    ids = np.random.default_rng(tokens).integers(4, 500, tokens)
    writer = TokenWriter(folder, "test", shard_tokens=max(1, tokens // 2))
    for part in np.array_split(ids, 4):
        writer.add(part)
    return TokenBlocks(writer.close(), block)


def slow_nats(model, ids) -> list[float]:
    """-log p of each token but the first, each from a pass of its own over the tokens before it."""
    nats = []
    for place in range(1, len(ids)):
        logits = model(torch.tensor([ids[:place].tolist()])).logits[0, -1]
        nats.append(-logits.double().log_softmax(-1)[ids[place]].item())
    return nats


# packed blocks


@pytest.mark.parametrize("tokens", [5 * BLOCK + 3, 4 * BLOCK, 4 * BLOCK + 1, BLOCK - 2])
def test_perplexity_is_that_of_token_by_token(model, tmp_path, tokens):
    blocks = blocks_of(tmp_path, tokens)
    ids = blocks.span(0, tokens)
    with torch.no_grad():
        nats = [value for start in range(0, tokens, BLOCK) for value in slow_nats(model, ids[start : start + BLOCK])]
    expected = sum(nats) / len(nats)
    for batch_size in (1, 3, 16, 100):
        found = pp.perplexity(model, blocks, text_bytes=97, batch_size=batch_size)
        # every token but the first of each block, the short one's too
        assert found["scored_tokens"] == len(nats) == tokens - -(-tokens // BLOCK)
        assert found["loss"] == pytest.approx(expected, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
        assert found["bits_per_byte"] == pytest.approx(expected / math.log(2) * tokens / 97, rel=1e-5)


def plain_loss(model, ids: torch.Tensor) -> float:
    """What transformers' logits say, in float64."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double()
    return -logits.log_softmax(-1).gather(2, ids[:, 1:, None]).mean().item()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_perplexity_is_that_of_plain_transformers(model, gpt2, tmp_path, kind, batch_size, monkeypatch):
    scored = {"llama": model, "gpt2": gpt2}[kind]
    blocks = blocks_of(tmp_path, 23 * 16, block=16)
    expected = plain_loss(scored, torch.from_numpy(blocks.batch(range(23))))
    before = scored.training
    found = pp.perplexity(scored, blocks, batch_size=batch_size)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    # as it was before
    assert scored.training == before and all(weights.grad is None for weights in scored.parameters())
    assert not any("Lean" in type(module).__name__ for module in scored.modules())
    # fewer rows at once, where the logits of all would not fit
    monkeypatch.setattr(pp, "LOGITS", 512 * 16 * 2)
    assert pp.perplexity(scored, blocks, batch_size=batch_size)["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("all_of_it", [True, False])
def test_a_quantized_model_is_scored_by_its_own_logits(model, tmp_path, all_of_it):
    part = {name for name, _ in model.named_modules() if name.endswith("_proj")}
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear} if all_of_it else part, torch.qint8)
    blocks = blocks_of(tmp_path, 23 * 16, block=16)
    expected = plain_loss(quantized, torch.from_numpy(blocks.batch(range(23))))
    # its inputs are rounded by what is in the batch: the same batch
    assert pp.perplexity(quantized, blocks, batch_size=23)["loss"] == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(pp.perplexity(model, blocks)["loss"], rel=1e-5)


def test_nothing_is_read_from_the_device_before_the_end(model, tmp_path, monkeypatch):
    """The sum is read once, however many batches there are."""
    reads = []
    original = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: reads.append(1) or original(tensor))
    # transformers itself asks one thing of each batch, by __bool__
    for name in ("__float__", "__int__", "tolist", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("read"))
    pp.perplexity(model, blocks_of(tmp_path, 9 * BLOCK + 3), batch_size=2)
    assert len(reads) == 1


def test_progress_counts_scored_tokens(model, tmp_path):
    seen = []
    progress = SimpleNamespace(update=seen.append)
    found = pp.perplexity(model, blocks_of(tmp_path, 5 * BLOCK + 3), batch_size=2, progress=progress)
    assert seen == [2 * (BLOCK - 1), 4 * (BLOCK - 1), 5 * (BLOCK - 1), 5 * (BLOCK - 1) + 2]
    assert seen[-1] == found["scored_tokens"]


def test_a_cap_scores_the_first_blocks(model, tmp_path):
    blocks = blocks_of(tmp_path, 5 * BLOCK + 3)
    first = pp.perplexity(model, blocks_of_span(tmp_path / "first", blocks, 2 * BLOCK))
    assert pp.perplexity(model, blocks, max_tokens=2 * BLOCK + 5) == first
    assert first["scored_tokens"] == 2 * (BLOCK - 1)
    assert first["bits_per_byte"] is None
    # at least one block; no more than there are
    assert pp.perplexity(model, blocks, max_tokens=3)["scored_tokens"] == BLOCK - 1
    assert pp.perplexity(model, blocks, max_tokens=10**9)["scored_tokens"] == 5 * (BLOCK - 1)


def blocks_of_span(folder, blocks, stop):
    writer = TokenWriter(folder, "test", shard_tokens=10**6)
    writer.add(blocks.span(0, stop))
    return TokenBlocks(writer.close(), BLOCK)


def test_less_than_a_block_is_scored_even_under_a_cap_and_nothing_is_an_error(model, tmp_path):
    short = blocks_of(tmp_path / "short", BLOCK - 2)
    assert pp.perplexity(model, short, max_tokens=100) == pp.perplexity(model, short)
    for tokens in (0, 1):
        with pytest.raises(TTLError, match=f"there are {tokens} held-out tokens"):
            pp.perplexity(model, blocks_of_span(tmp_path / str(tokens), short, tokens))


# documents on their own


class Numbers:
    """A tokenizer of texts that are numbers with spaces between them; 0 is its unknown."""

    bos_token_id, eos_token_id, unk_token_id = 1, 2, 0

    def __call__(self, texts, **_):
        return {"input_ids": [list(map(int, text.split())) for text in texts]}


def alone(model, ids: list[int], context: int) -> tuple[float, int]:
    """Nats and tokens scored of a document, by itself, block by block."""
    nats, scored = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids), context):
            part = torch.tensor([ids[start : start + context]])
            if part.shape[1] > 1:
                nats += model(part, labels=part).loss.item() * (part.shape[1] - 1)
                scored += part.shape[1] - 1
    return nats, scored


document = st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 499), max_size=40))


@settings(deadline=None, max_examples=40)
@given(texts=st.lists(document, min_size=1, max_size=12), context=st.integers(2, 24), batch_size=st.integers(1, 4))
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_stands_beside_a_document_changes_nothing(model, gpt2, kind, texts, context, batch_size):
    scored_by = {"llama": model, "gpt2": gpt2.eval()}[kind]
    given_texts = [(key, " ".join(map(str, ids))) for key, ids in texts]
    window = pp.WINDOW
    try:
        pp.WINDOW = 30
        found = pp.score_texts(scored_by, Numbers(), given_texts, context, batch_size=batch_size)
        backwards = pp.score_texts(scored_by, Numbers(), given_texts[::-1], context, batch_size=batch_size)
    finally:
        pp.WINDOW = window
    assert found.keys() == backwards.keys() == {key for key, ids in texts if ids}
    for key, counts in found.items():
        mine = [ids for name, ids in texts if name == key and ids]
        single = [alone(scored_by, [1, *ids], context) for ids in mine]
        assert counts["scored"] == sum(scored for _, scored in single)
        assert counts["nats"] == pytest.approx(sum(nats for nats, _ in single), rel=1e-5, abs=1e-6)
        assert backwards[key]["nats"] == pytest.approx(counts["nats"], rel=1e-5, abs=1e-6)
        assert counts["tokens"] == sum(map(len, mine)) and counts["documents"] == len(mine)
        assert counts["bytes"] == sum(len(" ".join(map(str, ids))) for ids in mine)
        assert counts["unknown"] == sum(ids.count(0) for ids in mine)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 30), max_size=40), budget=st.integers(1, 100), window=st.integers(1, 60))
def test_rows_are_taken_together_within_bounds(sizes, budget, window):
    rows = [(number % 3, (np.full(size, number), True)) for number, size in enumerate(sizes)]
    before, seen, taken = pp.WINDOW, Counter(), 0

    def counted():
        given = 0
        for key, row in rows:
            assert given - taken <= window
            yield key, row
            given += len(row[0])

    try:
        pp.WINDOW = window
        for key, part in pp._windows(counted()):
            batches = list(pp._similar(part, budget))
            for batch in batches:
                padded, labels = pp._padded([ids for ids, _ in batch])
                assert len(batch) == 1 or padded.size <= budget
                assert (padding := int((labels == pp.IGNORED).sum())) <= pp.SPARE or padding * 16 <= padded.size
                assert (labels != pp.IGNORED).sum() == sum(len(ids) for ids, _ in batch)
            numbers = [int(ids[0]) for batch in batches for ids, _ in batch]
            assert {number % 3 for number in numbers} == {key}
            taken += sum(sizes[number] for number in numbers)
            seen.update(numbers)
    finally:
        pp.WINDOW = before
    assert seen == Counter(range(len(sizes)))


def test_short_documents_share_a_pass(model, monkeypatch):
    calls = []
    monkeypatch.setattr(
        pp, "summed_loss", lambda m, batch: calls.append(batch["labels"].shape) or summed_loss(m, batch)
    )
    pp.score_texts(model, Numbers(), [("a", "5 6 7")] * 30, 10, batch_size=4)
    # 4 tokens each with the beginning: 10 of them in 4 x 10
    assert calls == [(10, 4)] * 3
    # a long one does not make them all long
    calls.clear()
    pp.score_texts(model, Numbers(), [("a", "5 " * 60), *[("a", "5 6 7")] * 30], 64, batch_size=100)
    assert sorted(calls) == [(3, 61), (28, 4)]


def test_sources_are_scored_document_by_document(model, tiny_done, tokenizer):
    corpus = tiny_done.need("01_data")
    found = pp.by_group(model, corpus, tokenizer, context=24)["source"]
    rows = list(documents(corpus, "corpus", "test"))
    assert sum(values["documents"] for values in found.values()) == len(rows)
    name = rows[0]["source"]
    nats, scored, tokens, size = 0.0, 0, 0, 0
    for row in (row for row in rows if row["source"] == name):
        ids = tokenizer(row["text"]).input_ids
        one, count = alone(model, ids, 24)
        nats, scored = nats + one, scored + count
        tokens += len(ids) - 1
        size += len(row["text"].encode())
    assert scored < tokens
    assert found[name]["loss"] == pytest.approx(nats / scored, rel=1e-5)
    assert found[name]["bits_per_byte"] == pytest.approx(nats / scored * tokens / size / math.log(2), rel=1e-5)


def test_groups_add_up_to_the_same(model, tiny_done, tokenizer, tmp_path):
    corpus = tiny_done.need("01_data")
    status = tmp_path / "status.json"
    groups = pp.by_group(model, corpus, tokenizer, 24, batch_size=3, status=status)
    rows = list(documents(corpus, "corpus", "test"))
    assert groups.keys() == {"source", "kind", "domain"}
    assert groups["source"].keys() == {row["source"] for row in rows}
    assert groups["kind"].keys() == {row["kind"] for row in rows}
    for group in ("source", "kind"):
        counted = Counter(row[group] for row in rows)
        assert {name: values["documents"] for name, values in groups[group].items()} == counted
    assert sum(values["documents"] for values in groups["domain"].values()) == len(rows)
    assert read_json(status)["done"] == read_json(status)["total"] == len(rows)


def test_no_documents_are_no_groups(model, tiny_done, tokenizer, monkeypatch):
    monkeypatch.setattr(pp, "documents", lambda *_, **__: iter(()))
    assert pp.by_group(model, tiny_done.need("01_data"), tokenizer, 8) == {"source": {}, "kind": {}, "domain": {}}


def test_a_tokenizer_without_a_beginning_leaves_the_first_token_unscored(model):
    numbers = Numbers()
    numbers.bos_token_id = None
    # the end of one text is then what the next begins with
    one = pp.score_texts(model, numbers, [("a", "5 6 7")], 8)["a"]
    assert (one["scored"], one["tokens"]) == (3, 3)
    assert one["nats"] == pytest.approx(alone(model, [2, 5, 6, 7], 8)[0], rel=1e-5)
    numbers.eos_token_id = None
    one = pp.score_texts(model, numbers, [("a", "5 6 7"), ("b", "9")], 8)
    assert (one["a"]["scored"], one["a"]["tokens"]) == (2, 3)
    assert one["a"]["nats"] == pytest.approx(alone(model, [5, 6, 7], 8)[0], rel=1e-5)
    # mean over what was scored, times all tokens
    assert pp.summary(one["a"])["bits_per_byte"] == pytest.approx(one["a"]["nats"] / 2 * 3 / 5 / math.log(2))
    assert pp.summary(one["b"]) == {"documents": 1, "loss": None, "perplexity": None, "bits_per_byte": None}


# other texts


TEXTS = {
    "spanish": ["El mercado explica que la roca produce más petróleo. " * 3, "  ", "¿Qué  es\u200b eso?", "ñ" * 90],
    "european": ["O autocarro chegou à paragem com um grande atraso.", "Está a chover em Lisboa."],
}


@pytest.fixture
def report(tiny_prepared, no_energy, tmp_path, model, tokenizer, monkeypatch):
    """`report(limit=..., names=...)`: `texts_report` of a run whose model and stage 04 are there; `loads` counts."""
    loads = []
    original = pp.load_model
    monkeypatch.setattr(pp, "load_model", lambda *a: loads.append(1) or original(*a))
    for name, texts in TEXTS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def make(limit=None, names=("spanish", "european", "nowhere"), **settings):
        sets = [{"name": name, "files": [str(tmp_path / f"{name}.jsonl")], "columns": ["text"]} for name in names]
        run = tiny_prepared(evaluation={"texts": sets, "texts_limit": limit, **settings})
        if not (run.folder / "04_evaluation").exists():
            save_model_folder(model, tokenizer, run.folder / "03_pretraining" / "model")
            for stage in ("03_pretraining", "04_evaluation"):
                write_json(run.folder / stage / "manifest.json", {})
                write_json(run.folder / stage / "metrics.json", {"perplexity": 7.0})
        return pp.texts_report(run)

    make.loads, make.root = loads, tmp_path
    make.path = lambda name: tmp_path / "outputs" / "tiny" / "04_evaluation" / name
    return make


def test_other_texts_are_scored_on_their_own(report, model, tokenizer):
    found = report()
    assert [row["name"] for row in found["texts"]] == ["spanish", "european", "nowhere"]
    context = model.config.max_position_embeddings
    for row, texts in zip(found["texts"], TEXTS.values(), strict=False):
        texts = [text for text in map(clean, texts) if text]
        ids = [tokenizer(text)["input_ids"] for text in texts]
        parts = [alone(model, one, context) for one in ids]
        nats, scored = (sum(part[place] for part in parts) for place in (0, 1))
        size, tokens = sum(len(text.encode()) for text in texts), sum(len(one) - 1 for one in ids)
        assert row["loss"] == pytest.approx(nats / scored, rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(nats / scored * tokens / size / math.log(2), rel=1e-5)
        assert (row["documents"], row["bytes"], row["tokens"], row["scored_tokens"]) == (
            len(texts),
            size,
            tokens,
            scored,
        )
        assert row["unknown_share"] == 0
    assert found["texts"][2]["status"] == "not run" and "nowhere.jsonl" in found["texts"][2]["reason"]
    assert report.path("reports/texts.json").is_file() and read_json(report.path("reports/texts.json")) == found
    assert read_json(report.path("metrics.json")) == {
        "perplexity": 7.0,
        "texts": [{name: value for name, value in row.items() if name != "set"} for row in found["texts"]],
    }


def test_what_was_measured_is_not_measured_again(report):
    first = report(names=("spanish", "european"))
    assert report(names=("spanish", "european")) == first and len(report.loads) == 1
    # one more: only that
    (report.root / "spanish.jsonl").write_text("")
    more = report(names=("european", "more", "spanish"))
    assert [row["name"] for row in more["texts"]] == ["european", "more", "spanish"]
    assert more["texts"][::2] == first["texts"][::-1] and "reason" in more["texts"][1]
    # other figures under another limit
    assert report(limit=1, names=("european",))["texts"][0]["documents"] == 1
    # asked for again, and there now
    (report.root / "more.jsonl").write_text(json.dumps({"text": "Uma frase."}))
    assert report(names=("more",))["texts"][0]["documents"] == 1
    assert report(limit=1, names=("spanish",))["texts"][0]["reason"] == "the set holds no text"


def test_a_limit_is_of_documents(report):
    found = report(limit=1, names=("spanish", "european"))["texts"]
    assert [row["documents"] for row in found] == [1, 1]


def test_a_kill_costs_the_set_under_way(report, monkeypatch):
    original = pp.score_texts
    monkeypatch.setattr(pp, "score_texts", lambda m, t, texts, *a, **o: original(m, t, stopped(texts), *a, **o))

    def stopped(texts):
        for key, text in texts:
            if key == "european":
                raise KeyboardInterrupt
            yield key, text

    with pytest.raises(KeyboardInterrupt):
        report(names=("spanish", "european"))
    kept = read_json(report.path("reports/texts.json"))["texts"]
    assert [row["name"] for row in kept] == ["spanish"]
    monkeypatch.setattr(pp, "score_texts", original)
    (report.root / "spanish.jsonl").unlink()
    found = report(names=("spanish", "european"))["texts"]
    assert found[0] == kept[0] and found[1]["documents"] == 2


def test_texts_have_names_of_their_own_and_a_finished_stage(report, tiny_run):
    with pytest.raises(TTLError, match="two sets have the same name"):
        report(names=("spanish", "spanish"))
    with pytest.raises(MissingStage, match="04_evaluation .* is not finished"):
        pp.texts_report(tiny_run(run="other"))
