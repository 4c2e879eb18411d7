"""The smoke set is well-formed, and the harness scores choices as the model does."""

from __future__ import annotations

import json
import socket
from collections import Counter
from types import SimpleNamespace

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ttl_utils import harness
from ttl_utils.errors import TTLError
from ttl_utils.harness import TASKS, run_harness

ITEMS = [json.loads(line) for line in (TASKS / "ttl_smoke_pt.jsonl").read_text(encoding="utf-8").splitlines()]
SMOKE = {"name": "ttl_smoke_pt", "num_fewshot": 0}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """An attempt to connect fails the test; the hub is declared offline, so nothing waits for retries."""
    attempts = []

    def refuse(*args, **_):
        attempts.append(args)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("TTL_MIRROR", raising=False)
    yield
    assert not attempts


def byte_tokenizer(template: str = "<s> $A") -> PreTrainedTokenizerFast:
    """A token per byte, so that lengths can be counted by hand."""
    words = ["<unk>", "<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    special = [("<s>", 1), ("</s>", 2)]
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def tiny_model(context: int = 512) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    # a wide initialisation: predictions then depend strongly on every token before, BOS included
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=260, max_position_embeddings=context, initializer_range=0.3, **shape)
    )


def score(model=None, tokenizer=None, tasks=(SMOKE,), **options) -> dict:
    options = {"batch_size": 4, "device": "cpu", "limit": None, "seed": 42} | options
    return run_harness(model or tiny_model(), tokenizer or byte_tokenizer(), list(tasks), **options)


def prompt(item: dict) -> str:
    return f"Pergunta: {item['question']}\nResposta:"


def choice_lengths(item: dict) -> list[int]:
    return [len(text) for text in item["choices"]["text"]]


def accuracy(predict) -> float:
    """Share of items where `predict(item)` gives the index of the right choice."""
    return sum("ABCD"[predict(item)] == item["answerKey"] for item in ITEMS) / len(ITEMS)


def log_likelihood(model, tokenizer, text: str, continuation: str) -> float:
    """Computed without the harness: one text, no padding, exactly one BOS in front."""
    encode = tokenizer.backend_tokenizer.encode
    before, after = (encode(part, add_special_tokens=False).ids for part in (text, continuation))
    ids = torch.tensor([[tokenizer.bos_token_id, *before, *after]])
    with torch.no_grad():
        log_probs = model(ids).logits[0, :-1].float().log_softmax(-1)
    return float(log_probs.gather(1, ids[0, 1:, None])[-len(after) :].sum())


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


def test_a_model_that_knows_scores_one():
    model, tokenizer = tiny_model(), byte_tokenizer()
    known = {}
    for item in ITEMS:
        answer = item["choices"]["text"]["ABCD".index(item["answerKey"])]
        ids = tokenizer(f"{prompt(item)} {answer}")["input_ids"]
        known[tuple(tokenizer(prompt(item))["input_ids"])] = ids

    def forward(input_ids):
        logits = torch.zeros(*input_ids.shape, 260)
        for row, ids in enumerate(input_ids.tolist()):
            # found only where the prompt begins with one BOS and goes on as the task's file says
            answer = next(full for start, full in known.items() if tuple(ids[: len(start)]) == start)
            for at, token in enumerate(answer[1:]):
                logits[row, at : at + 1, token] = 50.0
        return SimpleNamespace(logits=logits)

    model.forward = forward
    assert score(model)["ttl_smoke_pt"]["value"] == 1.0


def test_uniform_model_scores_what_lengths_give():
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)

    def most_likely_per_character(item):
        texts = item["choices"]["text"]
        values = [-len(f" {text}".encode()) / len(text) for text in texts]
        return values.index(max(values))

    row = score(model)["ttl_smoke_pt"]
    assert row["value"] == pytest.approx(accuracy(most_likely_per_character))
    assert row["chance"] == row["constant_answer"] == 0.25
    assert (row["metric"], row["samples"], row["truncated"], row["dtype"]) == ("acc_norm", 48, 0, "float32")
    assert row["bos"] is True


def test_choice_scores_are_the_models_log_likelihoods_with_one_bos():
    model, tokenizer = tiny_model().eval(), byte_tokenizer()
    pairs = [(prompt(item), f" {text}") for item in ITEMS[:2] for text in item["choices"]["text"]]
    expected = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
    for name, template, same in [("bos", "<s> $A", True), ("no bos", "$A", False)]:
        lm = harness._language_model(model, byte_tokenizer(template), batch_size=3)
        found = [value for value, _ in lm.loglikelihood([SimpleNamespace(args=p) for p in pairs], True)]
        assert (found == pytest.approx(expected, abs=1e-3)) is same, name


def test_value_equals_direct_scoring_and_repeats(capfd):
    model, tokenizer = tiny_model().train(), byte_tokenizer()
    first = score(model, tokenizer, batch_size=5)["ttl_smoke_pt"]
    again = score(model, tokenizer, batch_size=5)["ttl_smoke_pt"]
    assert model.training and tokenizer.pad_token is None  # the caller's objects are left as they were
    assert capfd.readouterr() == ("", "")
    assert first | {"duration_s": 0} == again | {"duration_s": 0}
    json.dumps(first)
    model.eval()

    def direct(item):
        texts = item["choices"]["text"]
        values = [log_likelihood(model, tokenizer, prompt(item), f" {t}") / len(t) for t in texts]
        return values.index(max(values))

    assert first["value"] == pytest.approx(accuracy(direct))


def test_few_shot_prompts_follow_the_seed_and_count_what_is_truncated():
    shots = SimpleNamespace(name="ttl_smoke_pt", num_fewshot=3)
    rows = [score(tiny_model(128), tasks=[shots], limit=6, seed=7)["ttl_smoke_pt"] for _ in range(2)]
    assert rows[0] | {"duration_s": 0} == rows[1] | {"duration_s": 0}
    assert (rows[0]["samples"], rows[0]["num_fewshot"], rows[0]["truncated"]) == (6, 3, 6)


def test_tokenizer_that_appends_eos_is_refused():
    with pytest.raises(TTLError, match="add_eos_token"):
        score(tokenizer=byte_tokenizer("<s> $A </s>"))


def test_mirror_stands_in_for_the_hub_and_absent_data_do_not_stop_the_rest(tmp_path, monkeypatch):
    folder = tmp_path / "mirror" / "alexandrainst" / "m_arc"
    folder.mkdir(parents=True)
    options = {f"option_{letter}": text for letter, text in zip("abcd", ("um", "dois", "três", "seis"), strict=True)}
    rows = [{"id": str(i), "instruction": f"Quanto é {i}?", "answer": "C", **options} for i in range(4)]
    rows = [row | {"option_e": "sete" if row["id"] == "0" else None} for row in rows]
    files = []
    for split in ("train", "validation", "test"):
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
        files.append(f"  - split: {split}\n    path: {split}.parquet\n")
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: pt\n  data_files:\n{''.join(files)}---\n", encoding="utf-8"
    )
    monkeypatch.setenv("TTL_MIRROR", str(tmp_path / "mirror"))
    tasks = [{"name": name, "num_fewshot": 1} for name in ("hellaswag_pt", "arc_pt", "ttl_smoke_pt")]
    found = score(tasks=tasks, limit=3)
    assert list(found) == ["hellaswag_pt", "arc_pt", "ttl_smoke_pt"]
    missing = found["hellaswag_pt"]
    assert missing["status"] == "not run" and "value" not in missing
    assert "alexandrainst/m_hellaswag" in missing["reason"] and "\n" not in missing["reason"]
    assert found["arc_pt"]["from_mirror"] and found["arc_pt"]["samples"] == 3
    assert found["arc_pt"]["chance"] == pytest.approx((1 / 5 + 1 / 4 + 1 / 4) / 3)
    assert found["ttl_smoke_pt"]["status"] == "done"


def test_unknown_task_names_its_neighbours():
    with pytest.raises(TTLError, match=r"'arcpt'.*arc_pt"):
        score(tasks=[SMOKE, {"name": "arcpt", "num_fewshot": 0}])
    with pytest.raises(TTLError, match="twice"):
        score(tasks=[SMOKE, SMOKE])


def test_a_bug_is_not_taken_for_missing_data():
    model = tiny_model()
    model.forward = lambda input_ids: None
    with pytest.raises(AttributeError):
        score(model)
